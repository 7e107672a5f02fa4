"""R1-style distillation: what the verifier accepts, what is kept, what templates must not strip, and a whole run."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers as hf
from accelerate import PartialState
from safetensors.torch import load_model

from stepdistill.baselines.language import arithmetic, collect, r1_traces, tiny, traces
from stepdistill.baselines.language.collect import as_rows
from stepdistill.baselines.language.models import Decoder
from stepdistill.baselines.language.problems import Problem, bare_answer, open_problems, right
from stepdistill.baselines.language.r1_traces import R1TracesConfig
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.traces import Completion, keep, sample_all
from stepdistill.baselines.learner import Learner
from stepdistill.errors import InputError

STRIPS = (  # as DeepSeek-R1's: strips an assistant's reasoning, and opens <think> for it
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("<think>7+5+0=12</think>432", "432", True),
        ("<think>432</think>431", "432", False),
        ("<think>it is 432", "432", False),  # the reasoning never ends
        ("<think>432</think>", "432", False),  # no answer after the reasoning
        ("the sum of 3 and 4 is 7", "7", True),
        (r"so \boxed{\frac{1}{2}} of 10", r"\boxed{\frac{1}{2}}", True),
        (r"first \boxed{3}, no, \boxed{4}.", "4", True),
        (r"\boxed{\$18}", "18", True),
        (r"\boxed{18\%}", "18", True),
        (r"\boxed{72\text{ clips}}", "72", True),
        (r"\boxed{1\,200}", "1,200", True),
        (r"\boxed{\text{yes}}", r"\boxed{\text{no}}", False),
        (r"\boxed{4", "4", False),
        ("They pay $1,234.50 in all.", "1234.5", True),
        ("it falls to -3", "3", False),
        ("60%", "60", True),
        ("The answer: Paris", "the answer:  paris", True),
        ("he has 5 and 7, so\n#### 12", "5 + 7 = 12\n#### 12", True),
        ("", "0", False),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{x+2}", "x+2", True),
        (r"\boxed{(3,4)}", "(3,4)", True),
        (r"\boxed{10:30}", "10:30", True),
        ("3/2", "1/2", False),
        ("(5, 4)", "(3, 4)", False),
        ("5 sqrt 3", r"2\sqrt{3}", False),
        ("#### 1. Halve it\nso the answer is\n1/2", "halved\n#### 1/2", True),
        (r"#### \boxed{7} #### by 3", "7", True),
        ("it is .5", "0.5", True),
        (r"\boxed{.5}", "5", False),
        (r"\boxed{nan}", "NaN", True),  # a word
    ],
)
def test_the_verifier_takes_what_a_text_comes_to_and_nothing_else(text, answer, verdict):
    assert right(text, answer) is verdict


def test_what_is_thought_is_no_answer():
    text = "<think>1</think>2</think>3"
    assert right(text, "3") and not right(text, "2") and not right("<think>1", "1")


def test_a_worked_sum_is_right_in_every_step():
    for a in range(10, 100, 7):
        for b in range(10, 100, 3):
            text = arithmetic.worked(Problem(f"{a}+{b}=", str(a + b))).completion
            assert right(text, str(a + b))
            carry, digits = 0, []
            for x, y, carried, total in re.findall(r"(\d)\+(\d)\+(\d)=(\d\d)", text):
                assert int(carried) == carry and int(x) + int(y) + carry == int(total)
                carry, digit = divmod(int(total), 10)
                digits.append((int(x), int(y), digit))
            assert [sum(d[i] * 10**n for n, d in enumerate(digits)) for i in range(2)] == [a, b]
            assert carry * 100 + sum(d[2] * 10**n for n, d in enumerate(digits)) == a + b


def test_sums_are_different_and_none_is_held_out_that_was_learnt():
    train, held = arithmetic.sums(3000, 500, 2, seed=0)
    prompts = [p.prompt for p in [*train, *held]]
    assert len(set(prompts)) == 3500 and len(train) == 3000
    with pytest.raises(InputError, match="got 40000 with those held out; allowed: 4050 of 2 digits"):
        arithmetic.sums(39_000, 1000, 2, seed=0)


def test_of_what_is_said_the_first_right_ones_are_kept_once_each():
    completions = [
        Completion("<think>7+5=12</think>12", True),
        Completion("<think>7+5=13</think>13", True),
        Completion("<think>7+5=12</think> 12\n", True),
        Completion("<think>7+5=12</think>  12", True),
        Completion("12", True),
        Completion("<think> </think>12", True),
        Completion("<think>5+7=12</think>12", False),
        Completion("<think>5+7=12</think>12", True),
        Completion("<think>6+6=12</think>12", True),
    ]
    kept, dropped = keep(Problem("7+5=", "12"), completions, most=3)
    assert kept == ["<think>7+5=12</think>12", "<think>7+5=12</think> 12\n", "<think>5+7=12</think>12"]
    assert dropped == {"wrong": 1, "duplicate": 1, "without reasoning": 2, "too long": 1, "beyond --keep": 1}
    assert keep(Problem("7+5=", "11"), completions, most=3)[0] == []


def test_sampling_goes_on_where_it_was_cut_and_refuses_other_settings(tmp_path):
    problems, firsts = [Problem(str(i), str(i)) for i in range(7)], []

    def answer_batch(first: int, batch: list[Problem]) -> list[list[Completion]]:
        firsts.append(first)
        return [[Completion(f"{first + i} to {problem.prompt}", True)] for i, problem in enumerate(batch)]

    whole = sample_all(tmp_path / "whole.jsonl", problems, answer_batch, 2, {"seed": 0})
    text = (tmp_path / "whole.jsonl").read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(text.splitlines(keepends=True)[:4]) + '[{"text": "3 to')  # three whole, one cut
    firsts.clear()
    assert sample_all(cut, problems, answer_batch, 2, {"seed": 0}) == whole and firsts == [2, 4, 6]
    assert cut.read_text() == text
    firsts.clear()
    assert sample_all(cut, problems, answer_batch, 2, {"seed": 0}) == whole and not firsts
    with pytest.raises(InputError, match="sampled with other settings"):
        sample_all(cut, problems, answer_batch, 2, {"seed": 1})


def test_traces_of_other_problems_are_refused_although_their_answers_agree(tmp_path, monkeypatch):
    def right_away(one, first, problems, **_):
        return [[Completion(f"<think>as it is</think>{problem.answer}", True)] for problem in problems]

    monkeypatch.setattr(collect, "answer", right_away)
    teacher = Decoder(*arithmetic.build(0), "tiny")
    config = R1TracesConfig(out=tmp_path, samples=1)
    tmp_path.mkdir(exist_ok=True)
    kept, _ = collect.collect(teacher, [Problem("the capital of country 1", "A")], config)
    assert len(kept) == 1 and len(collect.collect(teacher, [kept[0][0]], config)[0]) == 1
    with pytest.raises(InputError, match="sampled with other settings"):
        collect.collect(teacher, [Problem("the symbol of element 1", "A")], config)


def test_completions_end_and_alone_count():
    tokenizer = arithmetic.build(0)[1]
    texts = [(Problem("7+5=", "12"), ["<think>7+5+0=12</think>12"]), (Problem("17+25=", "42"), ["42", "<think>4"])]
    rows = as_rows(tokenizer, texts, 64)
    counted = [tokenizer.decode(row[mask]) for row, mask in zip(rows.ids, rows.counts, strict=True)]
    assert counted == ["<think>7+5+0=12</think>12<end>", "42<end>", "<think>4<end>"]
    shown = [tokenizer.decode(row[mask]) for row, mask in zip(rows.ids, rows.attention, strict=True)]
    assert shown == ["7+5=" + counted[0], "17+25=42<end>", "17+25=<think>4<end>"]
    few = as_rows(tokenizer, texts, 4)
    assert [tokenizer.decode(row[mask]) for row, mask in zip(few.ids, few.counts, strict=True)] == counted[1:]


def test_a_template_that_strips_reasoning_strips_none(monkeypatch):
    """Nor does one that opens <think> for the model, be it the teacher's, the student's, or both."""
    text = "7+5+0=12</think>12"
    network = arithmetic.build(0)[0]
    tokenizer, plain = (tiny.train_tokenizer(["7+5=12"], 300) for _ in range(2))
    tokenizer.chat_template = STRIPS
    message = [{"role": "user", "content": "7+5="}, {"role": "assistant", "content": f"<think>{text}"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "7+5=12"  # the usual mistake

    ids = torch.tensor(tokenizer(f"{text}{tiny.END}", add_special_tokens=False).input_ids)[None]
    monkeypatch.setattr(traces, "sample", lambda *_, **__: traces_of(ids))
    problem = Problem("7+5=", "12")
    teacher = Decoder(network, tokenizer, "")
    [[completion]] = traces.answer(teacher, 0, [problem], samples=1, new=40, temperature=1.0, seed=0)
    assert completion == Completion(f"<think>\n{text}", True)
    for student, rest in ((tokenizer, text), (plain, f"<think>\n{text}")):
        rows = as_rows(student, [(problem, [completion.text])], 64)
        whole = student.decode(rows.ids[0][rows.attention[0]])
        assert whole.replace("\n", "") == f"7+5=<think>{text}{tiny.END}"
        assert rows.counts.sum() == len(student(rest, add_special_tokens=False).input_ids) + 1


def traces_of(ids: torch.Tensor):
    from stepdistill.baselines.language.generate import TokenBatch

    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool))


FEW = {"digits": 1, "problems": 20, "held_out": 10, "teacher_steps": 3, "samples": 2, "max_train_steps": 4,
       "batch_size": 4, "together": 8, "checkpoint_every": 2, "log_every": 1, "completion": 24}  # fmt: skip


def test_a_verifier_that_rejects_all_is_said_in_a_line(tmp_path):
    with pytest.raises(InputError, match="got 40 answers, of which the verifier accepts none") as error:
        R1TracesConfig(out=tmp_path, **FEW).run()
    assert "\n" not in str(error.value) and "raise --samples" in str(error.value)


def test_a_run_that_is_cut_goes_on_to_the_same_figures(tmp_path, monkeypatch):
    def truly(one, first, problems, **_):
        wrong = Completion("<think>1</think>99", True)
        return [[Completion(arithmetic.worked(p).completion, True), wrong] for p in problems]

    def never(*_, **__):
        raise AssertionError("sampled again")

    monkeypatch.setattr(collect, "answer", truly)  # a teacher that is right every other time
    whole = R1TracesConfig(out=tmp_path / "whole", **FEW).run()
    step = Learner.step

    def cut(self):
        if self.out.name == "student-0" and self.update == 3:
            raise ConnectionAbortedError
        return step(self)

    monkeypatch.setattr(Learner, "step", cut)
    with pytest.raises(ConnectionAbortedError):
        R1TracesConfig(out=tmp_path / "cut", **FEW).run()
    monkeypatch.setattr(Learner, "step", step)
    monkeypatch.setattr(collect, "answer", never)
    again = R1TracesConfig(out=tmp_path / "cut", **FEW).run()
    weights = [(tmp_path / name / "student-0/weights/student.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert [row.figures for row in again.rows] == [row.figures for row in whole.rows]
    assert [row.role for row in whole.rows] == ["teacher", "before", "control", "student"]
    assert whole.note.startswith("20 of 40 answers are kept, for 20 of 20 problems; dropped: 20 wrong")
    ids = torch.arange(3, 9)[None]
    for part in ("student-0", "control-0"):
        saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / part / "model")
        trained = hf.AutoModelForCausalLM.from_config(saved.config).eval()
        load_model(trained, str(tmp_path / "whole" / part / "weights/student.safetensors"))
        assert saved.config.hidden_size == 48 and torch.equal(saved(ids).logits, trained(ids).logits)


def test_a_control_learns_bare_answers_and_what_is_too_long_for_the_student_is_counted(tmp_path, monkeypatch):
    asked = [Problem(f"{a}+{b}=", f"{a}+{b}={a + b}\n#### {a + b}") for a in range(3) for b in range(4, 7)]
    sums = [one.answer.rpartition(" ")[2] for one in asked]

    def short_and_long(one, first, problems, **_):
        totals = [p.answer.rpartition(" ")[2] for p in problems]
        return [
            [Completion(f"<think>{p.prompt * n}</think>{total}", True) for n in (1, 10)]
            for p, total in zip(problems, totals, strict=True)
        ]

    monkeypatch.setattr(r1_traces, "open_problems", lambda *_, **__: (asked, asked[:2]))
    monkeypatch.setattr(arithmetic, "worked", lambda p: Pair(p.prompt, bare_answer(p.answer)))  # has no token for \n
    monkeypatch.setattr(collect, "answer", short_and_long)
    learnt = {}

    def noted(objective, models, rows, config):
        learnt[config.out.name] = rows
        return 0.0

    monkeypatch.setattr(r1_traces, "learn", noted)
    monkeypatch.setattr(r1_traces, "save", lambda *_: None)
    results = R1TracesConfig(out=tmp_path, **FEW | {"completion": 30}).run()
    tokenizer = arithmetic.build(0)[1]
    learnt_texts = {
        part: [tokenizer.decode(row[mask]) for row, mask in zip(rows.ids, rows.counts, strict=True)]
        for part, rows in learnt.items()
    }
    assert learnt_texts["control-0"] == [f"{total}<end>" for total in sums]
    assert learnt_texts["student-0"] == [f"<think>{p.prompt}</think>{t}<end>" for p, t in zip(asked, sums, strict=True)]
    assert results.note.endswith("9 traces exceed --completion in the student's tokens and are dropped")


@pytest.mark.parametrize(("student", "seeds"), [("org/small", [None]), ("config:num_hidden_layers=1", [0, 1])])
def test_before_training_a_student_is_measured_once_where_it_is_trained(student, seeds, tmp_path, monkeypatch):
    """One with random weights is another for each seed."""
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    places = []

    def noted(one, *_):
        places.append(one.network.device.type)
        return {"accuracy": 0.5}

    monkeypatch.setattr(
        r1_traces, "collect", lambda _, problems, __: ([(p, ["<think>1</think>2"]) for p in problems], "")
    )
    monkeypatch.setattr(r1_traces, "open_decoder", lambda spec, seed: Decoder(*arithmetic.build(0), spec))
    monkeypatch.setattr(r1_traces, "solved", noted)
    monkeypatch.setattr(r1_traces, "learn", lambda *_: 0.0)
    monkeypatch.setattr(r1_traces, "save", lambda *_: None)
    results = R1TracesConfig(out=tmp_path, student=student, seeds=(0, 1), learning_rate=1e-4, **FEW).run()
    assert [row.seed for row in results.rows if row.role == "before"] == seeds
    assert len(places) == 1 + len(seeds) + 4 and set(places) == {"meta"}


def test_problems_of_a_file_are_read_and_bad_ones_named(tmp_path):
    file = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"{i} + 1?", "answer": i + 1} for i in range(10)]
    file.write_text("\n".join(map(json.dumps, rows)))
    train, held = open_problems(str(file), 5, 5, digits=1, seed=0)
    assert (len(train), held) == (5, [Problem("9 + 1?", "10")])
    file.write_text('{"prompt": "1 + 1?"}\n')
    with pytest.raises(InputError, match="allowed: a prompt, which is text, and an answer, text or a number, per line"):
        open_problems(str(file), 5, 5, digits=1, seed=0)
    for prompt, answer, what in ((12, "1", "12 is no prompt"), ("1?", None, "null is no answer"),
                                 ("1?", True, "true is no answer"), ("1?", [1], r"\[1\] is no answer")):  # fmt: skip
        file.write_text(json.dumps({"prompt": prompt, "answer": answer}))
        with pytest.raises(InputError, match=rf"cannot be read \({what}\)"):
            open_problems(str(file), 5, 5, digits=1, seed=0)
    file.write_text("")
    with pytest.raises(InputError, match="got 0 problems and 0 held out"):
        open_problems(str(file), 5, 5, digits=1, seed=0)
    with pytest.raises(InputError, match=r"teacher: got tiny for problems\.jsonl"):
        R1TracesConfig(task="problems.jsonl").check()
