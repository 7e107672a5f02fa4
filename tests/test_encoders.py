"""Encoders: masking, DistilBERT's and TinyBERT's losses by hand, which networks they train, and whole runs."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, load_model
from torch import nn

from stepdistill.baselines.base import Batch, TeacherStudent
from stepdistill.baselines.language import encoder_run, encoders, layers, masked, tinybert
from stepdistill.baselines.language.distilbert import DistilBertConfig
from stepdistill.baselines.language.labelled import Classifier, Labelled, classification_metrics
from stepdistill.baselines.language.layers import Answers, Layers, Projections
from stepdistill.baselines.language.masked import Lines, MaskedLM, Masking
from stepdistill.baselines.language.models import check_length
from stepdistill.baselines.language.saved import load_classifier
from stepdistill.baselines.language.students import copy_layers, evenly
from stepdistill.baselines.language.tasks import open_task
from stepdistill.baselines.language.tinybert import TinyBertConfig
from stepdistill.baselines.language.triple import DistilBert, cosine_distance
from stepdistill.baselines.learner import Learner
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock

CLOCK = Clock(0, 1)
MASKING = Masking(0.5, 12, mask=4, special=(0, 1, 2, 3, 4), vocabulary=23)


def bert(depth: int = 2, width: int = 8, *, seed: int = 0, kind: str = "bert", **more):
    """A random encoder in float64 without dropout: two heads, a vocabulary of 23."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=23, hidden_size=width, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=12,
                 max_position_embeddings=16, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                 initializer_range=0.3, **more)  # fmt: skip
    if kind == "roberta":
        return hf.RobertaForMaskedLM(hf.RobertaConfig(**shape)).double().eval()
    return hf.BertForMaskedLM(hf.BertConfig(**shape)).double().eval()


def lines(*lengths: int, width: int = 12) -> Lines:
    """Random pieces between cls (2) and sep (3), padded with 0."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, n in enumerate(lengths):
        ids[row, :n] = torch.randint(5, 23, (n,), generator=generator)
        ids[row, 0], ids[row, n - 1] = 2, 3
    return Lines(ids, torch.arange(width) < torch.tensor(lengths)[:, None])


def batch(data, count: int) -> Batch:
    return Batch(data.batch(list(range(count))), Draws.at(0, 0, count))


# -------------------------------------------------------------------------------------------------------------- masking


def test_of_what_is_hidden_eight_tenths_are_masks_and_half_of_the_rest_any_token():
    data = lines(*[12] * 4000)
    masking = Masking(0.15, 12, 4, (0, 1, 2, 3, 4), 23)
    masked_ids, is_masked = masking(data.ids, data.attention, Draws.at(0, 0, 4000))
    maskable = data.ids > 4
    assert not is_masked[~maskable].any() and torch.equal(masked_ids[~is_masked], data.ids[~is_masked])
    n = is_masked.sum().item()
    deviation = 4 * math.sqrt(0.25 / n)
    assert n / maskable.sum().item() == pytest.approx(0.15, abs=deviation)
    assert (masked_ids[is_masked] == 4).double().mean().item() == pytest.approx(0.8 + 0.1 / 23, abs=deviation)
    unchanged = (masked_ids[is_masked] == data.ids[is_masked]).double().mean().item()
    assert unchanged == pytest.approx(0.1 + 0.1 / 23, abs=deviation)


def test_what_is_hidden_belongs_to_a_piece_and_not_to_those_beside_it():
    data = lines(6, 12)
    alone = data.batch([0])
    assert alone["ids"].shape == (1, 6)
    masked_ids, is_masked = MASKING(alone["ids"], alone["attention"], Draws.at(0, 0, 1))
    both_ids, both_masked = MASKING(*data.batch([0, 1]).values(), Draws.at(0, 0, 2))
    assert torch.equal(both_ids[:1, :6], masked_ids) and torch.equal(both_masked[:1, :6], is_masked)
    assert not both_masked[0, 6:].any()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@torch.no_grad()
def test_a_head_asked_about_some_places_says_there_what_it_says_everywhere(kind):
    network, data = bert(kind=kind), lines(5, 9)
    selected = data.ids > 9
    hidden, logits = MaskedLM(network)(data.ids, data.attention, selected)
    whole = network(data.ids, attention_mask=data.attention.long(), output_hidden_states=True)
    assert (logits - whole.logits[selected]).abs().max() < 1e-12 and torch.equal(hidden, whole.hidden_states[-1])


def test_lines_are_cut_into_pieces_with_the_special_tokens_around_each():
    encoder = encoders.open_encoder("tiny", ["one two three four five\n\n six seven"])
    data = masked.cut_lines(["one two three four five\n\n six seven"], encoder.tokenizer, 5)
    words = [encoder.tokenizer.convert_ids_to_tokens(row) for row in data.ids.tolist()]
    assert words == [
        ["[CLS]", "one", "two", "three", "[SEP]"],
        ["[CLS]", "four", "five", "[SEP]", "[PAD]"],
        ["[CLS]", "six", "seven", "[SEP]", "[PAD]"],
    ]
    assert torch.equal(data.attention, data.ids != encoder.tokenizer.pad_token_id)
    with pytest.raises(InputError, match="corpus: got no words"):
        masked.cut_lines([" \n"], encoder.tokenizer, 5)


# ----------------------------------------------------------------------------------------------------------- DistilBERT


def triple(student, teacher, data: Lines, kl_on: str) -> dict[str, float]:
    """The three terms, computed token by token."""
    masked_ids, is_masked = MASKING(data.ids, data.attention, Draws.at(0, 0, len(data)))
    s, t = (
        net(masked_ids, attention_mask=data.attention.long(), output_hidden_states=True) for net in (student, teacher)
    )
    kls, nlls, cosines = [], [], []
    for row, length in enumerate(data.attention.sum(1).tolist()):
        for at in range(length):
            p, q = ((x.logits[row, at] / 2).softmax(-1) for x in (t, s))
            if kl_on == "all" or is_masked[row, at]:
                kls.append(4 * sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            if is_masked[row, at]:
                nlls.append(-math.log(s.logits[row, at].softmax(-1)[data.ids[row, at]].item()))
            h, g = s.hidden_states[-1][row, at], t.hidden_states[-1][row, at]
            cosines.append(1 - (h @ g / (h.norm() * g.norm())).item())
    return {name: sum(x) / len(x) for name, x in (("kl", kls), ("masked", nlls), ("cosine", cosines))}


@pytest.mark.parametrize("kl_on", ["all", "masked"])
def test_distilberts_loss_is_its_three_terms_over_what_is_not_padding(kl_on):
    teacher, student, data = bert(4), bert(2, seed=1), lines(5, 12, 8)
    objective = DistilBert(MASKING, 2.0, 5.0, 2.0, 1.0, kl_on)
    loss = objective.loss("student", batch(data, 3), TeacherStudent(MaskedLM(student), MaskedLM(teacher)), CLOCK)
    truth = triple(student, teacher, data, kl_on)
    assert {name: value.item() for name, value in loss.terms.items()} == pytest.approx(truth, abs=1e-10)
    assert loss.total.item() == pytest.approx(5 * truth["kl"] + 2 * truth["masked"] + truth["cosine"], abs=1e-10)
    loss.total.backward()
    assert (
        all(p.grad is None for p in teacher.parameters())
        and student.base_model.encoder.layer[0].output.dense.weight.grad.any()
    )


def test_a_batch_in_which_nothing_is_hidden_has_a_loss_of_zero():
    data, nothing = lines(5, 5), Masking(0.0, 12, 4, (0, 1, 2, 3, 4), 23)
    value = (
        masked.MaskedModelling(nothing).loss("student", batch(data, 2), TeacherStudent(MaskedLM(bert())), CLOCK).total
    )
    assert value.item() == 0


def test_the_angle_is_of_each_token_and_not_of_all():
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    attention = torch.tensor([[True, True, False], [True, False, False]])
    truth = [1 - torch.dot(x[b, s], y[b, s]) / x[b, s].norm() / y[b, s].norm() for b, s in ((0, 0), (0, 1), (1, 0))]
    assert cosine_distance(x, y, attention).item() == pytest.approx(sum(truth).item() / 3, abs=1e-10)


def test_a_student_begins_with_every_other_layer_first_and_last_among_them():
    assert evenly(6, 12) == [0, 2, 4, 7, 9, 11]
    teacher = bert(12)
    student = copy_layers(teacher, evenly(6, 12))
    for new, old in enumerate([0, 2, 4, 7, 9, 11]):
        pairs = zip(
            student.bert.encoder.layer[new].parameters(), teacher.bert.encoder.layer[old].parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)
    assert torch.equal(student.cls.predictions.transform.dense.weight, teacher.cls.predictions.transform.dense.weight)
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight


# ------------------------------------------------------------------------------------------------------------- TinyBERT


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@torch.no_grad()
def test_attention_scores_are_those_that_eager_attention_takes_the_softmax_of(kind):
    body, data = bert(3, kind=kind, attn_implementation="eager").base_model, lines(5, 12)
    seen = layers.look(body, body, data.ids, data.attention)
    truth = body(data.ids, attention_mask=data.attention.long(), output_attentions=True, output_hidden_states=True)
    for scores, probabilities in zip(seen.scores, truth.attentions, strict=True):
        masked_scores = scores.masked_fill(~data.attention[:, None, None], -torch.inf)
        assert (masked_scores.softmax(-1) - probabilities).abs().max() < 1e-10
        assert (scores.sum(-1) - 1).abs().min() > 1e-6  # they are not probabilities
    assert all(torch.equal(a, b) for a, b in zip(seen.hidden, truth.hidden_states, strict=True))


def test_tinyberts_losses_are_mean_squares_over_what_is_not_padding():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = (torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    attention = torch.tensor([[True] * 4, [True, True, False, False]])
    hidden = [(s[i, j] - t[i, j]).square().mean() for i, n in ((0, 4), (1, 2)) for j in range(n)]
    assert layers.hidden_loss(s, t, attention).item() == pytest.approx(sum(hidden).item() / 6, abs=1e-10)
    scores = [(a[0] - b[0]).square().mean() * 16, (a[1, :, :2, :2] - b[1, :, :2, :2]).square().mean() * 4]
    assert layers.attention_loss(a, b, attention).item() == pytest.approx(sum(scores).item() / 20, abs=1e-10)
    p, q = torch.randn(3, 5, generator=generator, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    truth = -sum(
        x * math.log(y) for x, y in zip((p / 2).softmax(-1).flatten().tolist(), (q / 2).softmax(-1).flatten().tolist(),
                                        strict=True)
    ) / 3  # fmt: skip
    assert layers.prediction_loss(q, p, 2.0).item() == pytest.approx(truth, abs=1e-10)


def test_a_student_of_four_layers_follows_every_third_of_twelve():
    assert layers.layer_map(4, 12) == [0, 3, 6, 9, 12]
    with pytest.raises(ValueError, match="allowed: divisors of those"):
        layers.layer_map(5, 12)


def test_the_layers_loss_adds_embeddings_hidden_states_and_attention_of_the_mapped_layers():
    teacher, student, data = bert(4, 12).base_model, bert(2, 8, seed=1).base_model, lines(6, 11)
    widen = Projections(8, 12).double()
    models = TeacherStudent(student, teacher, projections=widen)
    loss = Layers().loss("student", batch(data, 2), models, CLOCK)
    items = data.batch([0, 1])
    s, t = (layers.look(body, body, items["ids"], items["attention"]) for body in (student, teacher))
    keep = items["attention"]
    truth = {
        "embeddings": layers.hidden_loss(s.hidden[0] @ widen.embeddings.weight.T, t.hidden[0], keep),
        "hidden": sum(layers.hidden_loss(s.hidden[m] @ widen.hidden.weight.T, t.hidden[2 * m], keep) for m in (1, 2)),
        "attention": sum(layers.attention_loss(s.scores[m], t.scores[2 * m + 1], keep) for m in (0, 1)),
    }
    for name, value in truth.items():
        assert loss.terms[name].item() == pytest.approx(value.item(), abs=1e-10)
    assert loss.total.item() == pytest.approx(sum(truth.values()).item(), abs=1e-10)


def test_both_phases_take_the_gradient_of_one_loss_from_one_forward():
    teacher, student, data = bert(4, 12).base_model, bert(2, 8, seed=1).base_model, lines(6, 11)
    widen = Projections(8, 12).double()
    models, calls = TeacherStudent(student, teacher, projections=widen), []
    for network in (student, teacher):
        network.register_forward_hook(lambda *_: calls.append(1))
    joint = Layers().loss("student", batch(data, 2), models, CLOCK).total
    everything = [*student.parameters(), *widen.parameters()]
    truth = torch.autograd.grad(joint, everything, allow_unused=True)
    calls.clear()
    one = batch(data, 2)
    for phase in Layers().phases(CLOCK):
        with models.only(phase):
            Layers().loss(phase, one, models, CLOCK).total.backward()
    assert len(calls) == 2
    for p, gradient in zip(everything, truth, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or (p.grad - gradient).abs().max() < 1e-12
    assert all(p.grad is None for p in teacher.parameters())


def test_a_tasks_answers_are_learnt_from_the_mean_over_what_is_not_padding():
    torch.manual_seed(0)
    teacher, student = Classifier(bert(4).base_model, 3).double(), Classifier(bert(2, seed=1).base_model, 3).double()
    data = Labelled(lines(5, 12), torch.tensor([0, 2]), ["a", "b", "c"])
    logits = []
    for one in (student, teacher):
        hidden = one.body(data.lines.ids, attention_mask=data.lines.attention.long()).last_hidden_state
        logits.append(torch.stack([one.head(hidden[0, :5].mean(0)), one.head(hidden[1].mean(0))]))
    truth = nn.functional.cross_entropy(logits[0], logits[1].softmax(-1))
    value = Answers(1.0).loss("student", batch(data, 2), TeacherStudent(student, teacher), CLOCK).total
    assert value.item() == pytest.approx(truth.item(), abs=1e-10)


# ----------------------------------------------------------------------------------------------------------- whole runs

FEW = {"limit": 40, "held_out": 20, "teacher_steps": 2, "max_train_steps": 4, "checkpoint_every": 2, "batch_size": 4}
SMALL = {
    "distilbert": (DistilBertConfig, FEW | {"log_every": 1}),
    "tinybert": (
        TinyBertConfig, FEW | {"log_every": 1, "task_limit": 40, "task_steps": 2, "general_steps": 4,
                               "intermediate_steps": 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_run_that_is_cut_goes_on_to_the_same_figures(name, tmp_path, monkeypatch):
    kind, small = SMALL[name]
    whole = kind(out=tmp_path / "whole", **small).run()
    step = Learner.step

    def cut(self):
        if self.out.parts[-1] in ("student-0", "layers") and self.update == 3:
            raise ConnectionAbortedError
        return step(self)

    monkeypatch.setattr(Learner, "step", cut)
    with pytest.raises(ConnectionAbortedError):
        kind(out=tmp_path / "cut", **small).run()
    monkeypatch.setattr(Learner, "step", step)
    again = kind(out=tmp_path / "cut", seeds=(0, 1), **small).run()  # a seed may be added
    assert [row.figures for row in again.rows if row.seed in (None, 0)] == [row.figures for row in whole.rows]
    assert [row.seed for row in again.rows if row.role == "student"] == [0, 1]
    roles = {row.role: row for row in whole.rows}
    assert {"teacher", "control", "student"} <= set(roles)
    assert roles["control"].parameters == roles["student"].parameters < roles["teacher"].parameters
    assert roles["control"].figures != roles["student"].figures


def test_distilberts_student_and_control_are_what_transformers_loads(tmp_path):
    DistilBertConfig(out=tmp_path, **SMALL["distilbert"][1]).run()
    logits = []
    for part in ("student-0", "control-0"):
        saved = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / part / "model").eval()
        ids = hf.AutoTokenizer.from_pretrained(tmp_path / part / "model")("a person with red hair", return_tensors="pt")
        logits.append(saved(ids.input_ids).logits)
        trained = copy.deepcopy(saved)
        torch.nn.init.normal_(trained.base_model.encoder.layer[0].output.dense.weight)
        load_model(MaskedLM(trained), str(tmp_path / part / "weights" / "student.safetensors"))
        assert torch.equal(trained(ids.input_ids).logits, logits[-1])
    assert not torch.equal(*logits)


def test_tinyberts_student_and_control_are_an_encoder_that_transformers_loads_and_a_head(tmp_path):
    results = TinyBertConfig(out=tmp_path, **SMALL["tinybert"][1]).run()
    figures = {row.role: row.figures for row in results.rows}
    for role, last in (("student", "answers"), ("control", "task")):
        folder = tmp_path / f"{role}-0" / "model"
        saved, tokenizer = load_classifier(folder), hf.AutoTokenizer.from_pretrained(folder)
        _, held = open_task("avatars", tokenizer, 64, label="right clothes", limit=40, held_out=20)
        assert classification_metrics(saved, held) == figures[role]
        assert [saved.body.config.id2label[i] for i in range(len(held.classes))] == list(held.classes)
        weights = load_file(tmp_path / f"{role}-0" / last / "weights" / "student.safetensors")
        body = hf.AutoModel.from_pretrained(folder).eval()
        hidden = body(held.lines.ids, attention_mask=held.lines.attention.long()).last_hidden_state
        mean = torch.stack([row[keep].mean(0) for row, keep in zip(hidden, held.lines.attention, strict=True)])
        truth = mean @ weights["head.weight"].T + weights["head.bias"]
        assert torch.allclose(saved(held.lines.ids, held.lines.attention), truth, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (DistilBertConfig(teacher_steps=0), "has not been trained to predict masked tokens; give --teacher-steps"),
        (DistilBertConfig(layers=(0, 7)), r"got \[0, 7\]; allowed: rising numbers from 0 to 3"),
        (DistilBertConfig(kl_weight=0, mlm_weight=0, cosine_weight=0), "one above 0; raise it"),
        (DistilBertConfig(mask_rate=1), "mask_rate: got 1"),
        (DistilBertConfig(teacher="/nowhere/bert"), "got /nowhere/bert, which is no folder; allowed: tiny, minilm"),
        (TinyBertConfig(layers=3), "layers: got 3; allowed: divisors of 4"),
        (TinyBertConfig(width=30), "width: got 30; allowed: multiples of 4"),
        (TinyBertConfig(label="age"), "--label: got 'age'; allowed: pattern"),
        (TinyBertConfig(general_steps=0), "general_steps: got 0"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line_before_anything_is_trained(config, match, tmp_path):
    with pytest.raises(InputError, match=match) as error:
        dataclasses.replace(config, out=tmp_path / "run").run()
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_kind_of_model_and_a_sentence_encoder_without_a_head_are_told_apart(tmp_path):
    tokenizer = encoders.open_encoder("tiny", ["one two"]).tokenizer
    bert().float().base_model.save_pretrained(tmp_path / "body")
    bert().float().save_pretrained(tmp_path / "whole")
    other = hf.DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    hf.DistilBertForMaskedLM(other).save_pretrained(tmp_path / "other")
    for name in ("body", "whole", "other"):
        tokenizer.save_pretrained(tmp_path / name)
    assert encoders.open_encoder(str(tmp_path / "body"), []).untrained == "head"
    assert encoders.open_encoder(str(tmp_path / "whole"), []).untrained == ""
    with pytest.raises(InputError, match="a distilbert; allowed: bert, roberta"):
        encoders.open_encoder(str(tmp_path / "other"), [])


def test_the_texts_whose_class_is_told_are_spread_over_all_and_the_student_learns_from_the_rest_too(
    tmp_path, monkeypatch
):
    data = Labelled(lines(*[5] * 10), torch.arange(10) // 3, list("abcd"))
    some = data.spread(4)
    assert some.labels.tolist() == [0, 0, 1, 2] and torch.equal(some.lines.ids, data.lines.ids[[0, 2, 5, 7]])
    assert data.spread(None) is data
    seen = {}

    def learnt(objective, models, data, config):
        seen["/".join(config.out.relative_to(tmp_path).parts)] = len(data)
        return 0.0

    for module in (encoder_run, tinybert):
        monkeypatch.setattr(module, "learn", learnt)
    TinyBertConfig(out=tmp_path, **SMALL["tinybert"][1], labelled=10, dry_run=True).run()
    assert seen == {"teacher": 40, "task": 10, "control-0/text": 40, "control-0/task": 10, "student-0/text": 40,
                    "student-0/layers": 40, "student-0/answers": 40}  # fmt: skip
    for count, message in ((11, "--labelled: got 11; allowed: up to 10"), (1, "got 1, all of one class")):
        with pytest.raises(InputError, match=message):
            data.spread(count)


def test_a_task_of_one_class_or_of_strange_ones_is_refused(tmp_path):
    tokenizer = encoders.open_encoder("tiny", ["one two"]).tokenizer
    sizes = {"label": "", "limit": None, "held_out": 9}
    file, other = tmp_path / "task.tsv", tmp_path / "test.tsv"
    file.write_text("a\tone\na\ttwo\n")
    with pytest.raises(InputError, match="got 2 texts of 1 class"):
        open_task(str(file), tokenizer, 8, test=str(file), **sizes)
    file.write_text("a\tone\nb\ttwo\n")
    other.write_text("c\tone\n")
    with pytest.raises(InputError, match="got 'c' in held-out texts"):
        open_task(str(file), tokenizer, 8, test=str(other), **sizes)
    file.write_text("one two\n")
    with pytest.raises(InputError, match="allowed: lines of a class, a tab and a text"):
        open_task(str(file), tokenizer, 8, **sizes)


@torch.no_grad()
def test_the_longest_text_that_is_taken_is_the_longest_that_works(tmp_path):
    """RoBERTa's positions start after that of its padding token."""
    for kind, most in (("bert", 16), ("roberta", 15)):
        network, ids = bert(kind=kind), torch.full((1, 17), 7)
        check_length(network, most, "length")
        network(ids[:, :most])
        with pytest.raises(InputError, match=f"length: got {most + 1} tokens; allowed: {most}, the model's positions"):
            check_length(network, most + 1, "length")
        with pytest.raises((IndexError, RuntimeError)):
            network(ids[:, : most + 1])


@pytest.mark.parametrize("kind", [DistilBertConfig, TinyBertConfig])
def test_encoders_read_prompts_with_their_completions_as_one_text(kind, tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(f'{{"prompt": "a{i} b", "completion": " c d{i}"}}\n' for i in range(20)))
    seen = []

    def cut(texts, *rest):
        seen.append(list(texts))
        raise InputError("read")

    monkeypatch.setattr(masked, "cut_lines", cut)
    with pytest.raises(InputError, match=r"^read$"):
        kind(out=tmp_path / "run", data=str(file)).run()
    assert seen == [[f"a{i} b c d{i}" for i in range(18)]]


def test_a_task_in_order_of_class_is_drawn_from_all_of_it(tmp_path):
    file = tmp_path / "task.tsv"
    rows = [(name, f"{name} {n}") for name in "abcd" for n in range(50)]
    file.write_text("".join(f"{name}\t{text}\n" for name, text in rows))
    tokenizer = encoders.open_encoder("tiny", [text for _, text in rows]).tokenizer

    def drawn(**more) -> list[list[tuple[int, str]]]:
        parts = open_task(str(file), tokenizer, 8, label="", **more)
        texts = [tokenizer.batch_decode(part.lines.ids, skip_special_tokens=True) for part in parts]
        return [list(zip(part.labels.tolist(), words, strict=True)) for part, words in zip(parts, texts, strict=True)]

    train, held = drawn(limit=40, held_out=15)
    assert (len(train), len(held)) == (40, 15) and not {text for _, text in train} & {text for _, text in held}
    for part in (train, held):
        assert {label for label, _ in part} == {0, 1, 2, 3}
        assert all("abcd"[label] == text[0] for label, text in part)
    assert drawn(limit=40, held_out=15) == [train, held] != drawn(limit=40, held_out=15, seed=1)
    with pytest.raises(InputError, match="got 1 texts of 1 class"):
        drawn(limit=1, held_out=15)
