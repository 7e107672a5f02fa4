"""What a tokenizer prepends to a text, chat templates, long texts in pieces, and prompts without completions."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_decoders import sentences, tiny_decoder, tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stepdistill.baselines.language import answers, tokens
from stepdistill.baselines.language.forward_kl import ForwardKLConfig
from stepdistill.baselines.language.gkd import GKDConfig
from stepdistill.baselines.language.measure import perplexity
from stepdistill.baselines.language.models import Decoder, logits, open_decoder
from stepdistill.baselines.language.problems import Problem
from stepdistill.baselines.language.prompts import begin, chat_prompt, prompt_ids
from stepdistill.baselines.language.texts import Pair, open_texts
from stepdistill.baselines.language.tokens import pack, pair_up, stream
from stepdistill.baselines.language.traces import Completion, answer
from stepdistill.baselines.sweep import take_over
from stepdistill.cli.baselines import main
from stepdistill.errors import InputError

LLAMA3 = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    )
)  # fmt: skip
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"


def llama3(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that starts every text with its bos token, and splits words as Llama 3's and Qwen2's do."""
    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        [ODD, *sentences(50)],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens([AddedToken(word, special=True) for word in special])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", chat_template=template
    )  # fmt: skip


ODD = " \n = The  cat = \n \n\n\tIt's 12345 red\u00a0hats ,\r\n  don't!?\n\n  x \n\n\n y..\n\nz   \n" * 3


@pytest.mark.parametrize("make", [tokenizer, llama3])
@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(make, size, monkeypatch):
    texts = [ODD, "", "  ", ODD + " ".join(sentences(9)), "nospace" * 9]
    whole = [i for t in texts for i in [*make()(t, add_special_tokens=False).input_ids, make().eos_token_id]]
    monkeypatch.setattr(tokens, "PIECE", size)
    assert len(list(tokens._pieces(ODD))) > 1 and "".join(tokens._pieces(ODD)) == ODD
    assert stream(texts, make()).tolist() == whole
    assert stream(texts, make(), 50).tolist() == whole[:50]


def test_of_a_long_text_no_more_is_tokenised_than_the_limit_asks_for(monkeypatch):
    """WikiText-103 is one text of 540 million characters, and a tokenizer keeps 200 bytes for each."""
    monkeypatch.setattr(tokens, "PIECE", 100)
    seen = []

    class Counting:
        eos_token_id, bos_token_id = tokenizer().eos_token_id, None

        def __call__(self, text: str, **settings):
            seen.append(len(text))
            return tokenizer()(text, **settings)

    rows = pack([" ".join(sentences(1000))], Counting(), 8, prompt=3, limit=10)
    assert len(rows) == 10 and max(seen) < 120 and sum(seen) < 1000


def test_a_text_begins_as_its_tokenizer_begins_it():
    assert begin(llama3()) == [0] and begin(tokenizer()) == []
    assert prompt_ids(llama3(), "the cat") == llama3()("the cat").input_ids
    assert prompt_ids(llama3(), "<bos>the cat") == llama3()("the cat").input_ids  # written by a template
    assert prompt_ids(tokenizer(), "the cat") == tokenizer()("the cat").input_ids


def test_each_packed_row_and_each_prompt_begins_with_it():
    made, texts = llama3(), sentences(9)
    rows = pack(texts, made, 8, prompt=3)
    token_stream = stream(texts, made)
    assert rows.ids[:, 0].tolist() == [0] * len(rows)
    assert rows.ids[:, 1:].flatten().tolist() == token_stream[: len(token_stream) // 7 * 7].tolist()
    assert rows.counts[:, 1:].all() and not rows.counts[:, 0].any()
    pairs = [Pair("the cat", " sees"), Pair("a dog likes the old owl", " sees")]
    for prompt in (1, 4, 40):
        paired = pair_up(pairs, made, prompt=prompt, completion=3)
        for pair, ids, attention in zip(pairs, paired.ids, paired.attention, strict=True):
            words = made(pair.prompt, add_special_tokens=False).input_ids
            kept = words[max(len(words) - prompt + 1, 0) :]
            assert ids[:prompt][attention[:prompt]].tolist() == [0, *kept]


@torch.no_grad()
def test_each_measured_window_begins_with_it():
    network = tiny_decoder(vocab_size=len(llama3())).network
    ids = stream(sentences(20), llama3(), 40)
    found = perplexity(network, ids, window=16, stride=8, first=begin(llama3()))["nll"]
    values = []
    for place in range(1, 40):
        start = max(place - 16, 0) // 8 * 8 + (8 if place >= 16 else 0)
        row = torch.cat([torch.tensor([0]), ids[start : place + 1]])[None]
        values.append(-logits(network, row, torch.ones_like(row))[0, -2].log_softmax(-1)[ids[place]].item())
    assert found == pytest.approx(sum(values) / 39, abs=1e-5)
    assert abs(perplexity(network, ids, window=16, stride=8)["nll"] - found) > 1e-3


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_problem_is_asked_with_it_once(template, monkeypatch):
    from stepdistill.baselines.language import traces

    prompts_seen = []

    def sample(mixture, ids, attention, draws, **settings):
        prompts_seen.append(ids[attention].tolist())
        return real(mixture, ids, attention, draws, **settings)

    real = traces.sample
    monkeypatch.setattr(traces, "sample", sample)
    made = llama3(template)
    model = Decoder(tiny_decoder(vocab_size=len(made)).network, made, "one")
    answer(model, 0, [Problem("the cat", "")], samples=1, new=2, temperature=1.0, seed=0)
    asked = "the cat" if template is None else "<user>the cat</><assistant>"
    assert prompts_seen == [made(asked).input_ids]


def folder(place: Path, template: str | None) -> str:
    """Saves a model whose tokenizer has a chat template; returns its path."""
    made = copy.deepcopy(tokenizer())
    made.chat_template = template
    tiny_decoder(seed=5, max_position_embeddings=128).network.save_pretrained(place)
    made.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("template", [None, TEMPLATE.replace("{{ bos_token }}", "")])
def test_prompts_go_through_the_chat_template_and_completions_do_not(template, tmp_path):
    teacher = open_decoder(folder(tmp_path, template))
    config = ForwardKLConfig(block=40, prompt=30, validation=1)
    corpus = config.open_corpus([Pair("the cat", " sees")] * 2, [Pair("the cat", " sees")], teacher)
    asked = "the cat" if template is None else "<user>the cat</><assistant>"
    text = teacher.tokenizer.decode(corpus.train.ids[0][corpus.train.attention[0]])
    assert text == f"{asked} sees<|endoftext|>"
    assert teacher.tokenizer.decode(corpus.test.ids[0][corpus.test.counts[0]]) == " sees<|endoftext|>"


def prompts(place: Path, *more: dict) -> str:
    file = place / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*({"prompt": text} for text in sentences(40)), *more]))
    return str(file)


def test_to_prompts_alone_the_teacher_says_the_completions_and_says_them_once(tmp_path, monkeypatch):
    given, out = prompts(tmp_path), tmp_path / "run"
    command = ["run", "gkd", "--lmbda", "1", "--teacher", folder(tmp_path / "teacher", None), "--student", "layers:1",
               "--data", given, "--block", "24", "--prompt", "16", "--validation", "4", "--shown", "2",
               "--batch-size", "4", "--max-train-steps", "2", "--learning-rate", "1e-3", "--out", str(out)]  # fmt: skip
    main(command)
    completions = [json.loads(line)[0]["text"] for line in (out / "answers-train.jsonl").read_text().splitlines()[1:]]
    assert len(completions) == 36 and len(set(completions)) > 20
    asked = [Problem(pair.prompt, "") for pair in open_texts(given, "train")[:16]]
    own = answer(open_decoder(str(tmp_path / "teacher")), 0, asked, samples=1, new=8, temperature=1.0, seed=0)
    assert completions[:16] == [texts[0].text for texts in own]
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["teacher", "before", "control", "student"]
    again = []
    monkeypatch.setattr(answers, "answer", lambda *asked, **_: again.append(asked))
    main(command)
    assert not again
    assert json.loads((out / "results.json").read_text())["rows"] == rows


def test_an_answer_that_was_cut_has_no_end_even_if_its_text_has_fewer_tokens(tmp_path, monkeypatch):
    """A text that was sampled in many tokens may come back from the tokenizer in few."""
    completions = {"the cat": Completion(" sees red hats.", False), "a dog": Completion(" sees red hats.", True)}
    monkeypatch.setattr(answers, "answer", lambda _, first, some, **__: [[completions[one.prompt]] for one in some])
    config = ForwardKLConfig(block=40, prompt=20, validation=1)
    asked, teacher = [Pair(prompt, None) for prompt in completions], tiny_decoder()
    corpus = config.open_corpus(*config.answered([asked, asked], teacher, tmp_path), teacher)
    texts = [
        teacher.tokenizer.decode(row[counts]) for row, counts in zip(corpus.test.ids, corpus.test.counts, strict=True)
    ]
    assert texts == [" sees red hats.", " sees red hats.<|endoftext|>"]


def test_an_empty_prompt_is_the_end_of_text():
    decoder = tiny_decoder()
    assert prompt_ids(decoder.tokenizer, "") == [decoder.eos]
    alone, (together, _) = (
        answer(decoder, 0, [Problem(prompt, "1") for prompt in prompts], samples=1, new=4, temperature=1e-3, seed=0)
        for prompts in ([""], ["", "the cat"])
    )
    assert alone == [together]


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_prompts_are_answered_in_the_precision_of_the_run(precision, tmp_path, monkeypatch):
    teacher, seen = tiny_decoder(), []

    def noted(one, first, some, **_):
        layer = one.network.model.layers[0].mlp.up_proj
        seen.append((torch.is_autocast_enabled("cpu"), layer.weight.dtype == torch.bfloat16))
        return [[Completion("so", True)]] * len(some)

    monkeypatch.setattr(answers, "answer", noted)
    sampling = {"new": 4, "seed": 0}
    answers.answered([Pair("a", None)], teacher, tmp_path / "a.jsonl", **sampling, precision=precision)
    assert seen == [(precision == "bf16",) * 2]
    assert teacher.network.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    with pytest.raises(InputError, match="sampled with other settings"):
        answers.answered([Pair("a", None)], teacher, tmp_path / "a.jsonl", **sampling, precision="fp16")


@pytest.mark.parametrize(
    ("flag", "value", "same"),
    [
        ("lmbda", 0.25, True),
        ("learning_rate", 1e-5, True),
        ("student", "layers:1", True),
        ("block", 32, False),
        ("seed", 1, False),
        ("mixed_precision", "bf16", False),
        ("teacher", "smollm2", False),
    ],
)
def test_the_runs_of_a_sweep_share_the_teachers_answers(flag, value, same, tmp_path):
    one = GKDConfig(out=tmp_path / "one")
    two = dataclasses.replace(one, out=tmp_path / "two", **{flag: value})
    one.out.mkdir()
    for split in ("train", "test"):
        (one.out / f"answers-{split}.jsonl").write_text("answers")
    take_over(one, two)
    assert [(two.out / f"answers-{split}.jsonl").exists() for split in ("train", "test")] == [same, same]


LLAMA3_DATE = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA3_DATE + "{{ date_string }}", "26 Jul 2024"),
        ("{{ strftime_now('%A, %d %B %Y (%Y-%m-%d %H:%M)') }}", "Friday, 26 July 2024 (2024-07-26 00:00)"),
    ],
)
def test_a_run_that_is_resumed_on_another_day_has_the_same_prompts(template, expected):
    assert chat_prompt(llama3(template), "the cat") == expected


@pytest.mark.parametrize("template", [TEMPLATE, "\n{% if true %}\n  {{ messages[0].content }}{% endif %}\n\n"])
def test_but_for_the_date_a_template_is_the_tokenizers_own(template):
    made, message = llama3(template), [{"role": "user", "content": "the cat"}]
    theirs = made.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert chat_prompt(made, "the cat") == theirs


def test_prompts_that_nobody_can_answer_are_refused(tmp_path):
    sampling = {"new": 4, "seed": 0, "precision": "no"}
    with pytest.raises(InputError, match=r"got prompts without completions for tiny, which learns from these"):
        answers.answered([Pair("a", None)], Decoder(None, None, "tiny"), tmp_path / "a.jsonl", **sampling)
    mixed = open_texts(prompts(tmp_path, *[{"prompt": "a", "completion": "b"}] * 10), "train")
    with pytest.raises(InputError, match=r"data: got 40 prompts without a completion, of 45; allowed: none, or all"):
        answers.answered(mixed, tiny_decoder(), tmp_path / "a.jsonl", **sampling)
    assert answers.answered(mixed[-2:], tiny_decoder(), tmp_path / "a.jsonl", **sampling) == mixed[-2:]
    assert not (tmp_path / "a.jsonl").exists()
