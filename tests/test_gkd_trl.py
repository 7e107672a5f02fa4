"""GKD with trl's trainer: the same loss on the same samples, λ with the same meaning, and runs that log and resume."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_decoders import sentences, tiny_decoder, tokenizer

from stepdistill.baselines.base import Batch, TeacherStudent
from stepdistill.baselines.language.gkd import GKD, GKDConfig
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.tokens import Tokens, pack, pair_up
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock

pytest.importorskip("trl")

from stepdistill.baselines.language.gkd_trl import make_trainer, teach
from stepdistill.baselines.language.trl_trainer import Trainer, as_trl

PROMPT, BLOCK = 4, 12
EVERY = torch.ones(1, 8, dtype=torch.bool)


def packed() -> Tokens:
    return pack(sentences(30), tokenizer(), BLOCK, prompt=PROMPT)


def padded() -> Tokens:
    pairs = [Pair("the cat", " sees red hats."), Pair("a dog likes the old", " owl."), Pair("the", " cat.")]
    return pair_up(pairs, tokenizer(), prompt=PROMPT, completion=BLOCK - PROMPT)


def config(out: Path, **changes) -> GKDConfig:
    settings = {"trainer": "trl", "lmbda": 0.4, "beta": 0.3, "temperature": 0.8, "block": BLOCK, "prompt": PROMPT,
                "batch_size": 2, "max_train_steps": 5, "checkpoint_every": 2, "log_every": 2,
                "lr_warmup": 0}  # fmt: skip
    return GKDConfig(out=out, **settings | changes)


@pytest.mark.parametrize(("data", "kind"), [(packed, "llama"), (padded, "llama"), (padded, "gpt2")])
def test_trls_trainer_takes_the_same_samples_to_the_same_loss(data, kind, tmp_path):
    """With padded prompts too: GPT-2 has learned positions."""
    student, teacher, rows = tiny_decoder(kind, seed=1), tiny_decoder(kind, seed=2), data()
    trainer = make_trainer(config(tmp_path), teacher, student.network, rows)
    assert (trainer.lmbda, trainer.beta, trainer.temperature) == (0.4, 0.3, 0.8)
    assert trainer.generation_config.max_new_tokens == BLOCK - PROMPT
    theirs = trainer.compute_loss(student.network, as_trl(rows, [0, 1, 2])).item()
    objective = GKD(lmbda=0.0, beta=0.3, temperature=0.8, prompt=PROMPT, eos=2, pad=0, seed=0)
    given = Batch(rows.batch([0, 1, 2]), Draws.at(7, 0, 3))
    ours = objective.loss("student", given, TeacherStudent(student.network, teacher.network), Clock(3, 10)).total.item()
    assert math.isclose(theirs, ours, abs_tol=1e-6)


@pytest.mark.parametrize(("lmbda", "name"), [(0.0, "jsd_text"), (1.0, "jsd_own")])
def test_lambda_is_the_share_of_steps_in_which_the_student_speaks(lmbda, name, tmp_path, monkeypatch):
    generated = []
    generate = Trainer.generate_on_policy_outputs

    def spy(*args):
        generated.append(generate(*args))
        return generated[-1]

    monkeypatch.setattr(Trainer, "generate_on_policy_outputs", staticmethod(spy))
    student = tiny_decoder(seed=1).network
    trainer = make_trainer(config(tmp_path, lmbda=lmbda), tiny_decoder(seed=2), student, packed())
    trainer.current_gradient_accumulation_steps = 1  # as its own loop sets it
    for _ in range(3):
        trainer.training_step(student, as_trl(packed(), [0, 1]))
    assert len(generated) == 3 * lmbda and list(trainer.losses) == [name] and len(trainer.losses[name]) == 3


def run(given: GKDConfig) -> tuple[torch.nn.Module, float]:
    student = tiny_decoder(seed=1).network
    return student, teach(given, tiny_decoder(seed=2), student, packed())


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_was_cut_goes_on_to_the_same_bits_and_counts_its_first_leg(tmp_path, monkeypatch):
    whole, _ = run(config(tmp_path / "whole"))
    step, calls = Trainer.training_step, []

    def cut(self, *args):
        calls.append(self)
        if len(calls) == 4:
            raise ConnectionAbortedError
        return step(self, *args)

    monkeypatch.setattr(Trainer, "training_step", cut)
    with pytest.raises(ConnectionAbortedError):
        run(config(tmp_path / "cut"))
    (tmp_path / "cut" / "checkpoints" / "checkpoint-2" / "seconds.json").write_text("1000.0")
    student, seconds = run(config(tmp_path / "cut"))
    assert len(calls) == 4 + 3 and 1000 < seconds < 2000  # the third again, and the last two
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), whole.parameters(), strict=True))
    for found in (lines(tmp_path / name) for name in ("whole", "cut")):
        assert [line["update"] for line in found] == [2, 4, 5]
        assert all({"jsd_own", "jsd_text"} & line.keys() and "learning_rate" in line for line in found)


def test_a_logged_loss_is_that_of_the_batches(tmp_path, monkeypatch):
    """Two batches of two samples per update, without on-policy text, at a negligible learning rate."""
    seen = []
    compute = Trainer.compute_loss

    def spy(self, model, inputs, *args, **settings):
        seen.append(compute(self, model, inputs).item())  # without the other batch's tokens
        return compute(self, model, inputs, *args, **settings)

    monkeypatch.setattr(Trainer, "compute_loss", spy)
    run(config(tmp_path, lmbda=0.0, max_train_steps=2, gradient_accumulation=2, learning_rate=1e-12))
    (line,) = lines(tmp_path)
    assert len(seen) == 4 and line["jsd_text"] == pytest.approx(sum(seen) / 4, rel=1e-5)


@pytest.mark.parametrize("changes", [{"beta": 0.9}, {"learning_rate": 1e-5}, {"seed": 3}])
def test_a_finished_folder_is_kept_and_refused_to_other_settings(changes, tmp_path):
    student, seconds = run(config(tmp_path, max_train_steps=1))
    again, same = run(config(tmp_path, max_train_steps=1))
    assert same == seconds
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(InputError, match=f"which holds a run with {next(iter(changes))} = "):
        run(dataclasses.replace(config(tmp_path, max_train_steps=1), **changes))
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(("name", "theirs"), [("adamw", "adamw_torch_fused"), ("adamw8bit", "adamw_bnb_8bit")])
def test_the_optimizer_is_the_one_that_was_asked_for(name, theirs, tmp_path):
    trainer = make_trainer(
        config(tmp_path, optimizer=name), tiny_decoder(seed=2), tiny_decoder(seed=1).network, packed()
    )
    assert trainer.args.optim == theirs
    if name == "adamw":
        made = trainer.create_optimizer()
        assert type(made) is torch.optim.AdamW and made.defaults["fused"]


def test_a_teacher_is_kept_in_the_runs_precision_and_given_back(tmp_path):
    teacher, student = tiny_decoder(seed=2), tiny_decoder(seed=1).network
    whole, seen = {name: p.clone() for name, p in teacher.network.named_parameters()}, set()
    layers = [network.model.layers[0].mlp.up_proj for network in (teacher.network, student)]
    layers[0].register_forward_hook(lambda *_: seen.add(tuple(layer.weight.dtype for layer in layers)))
    teach(config(tmp_path, max_train_steps=1, mixed_precision="bf16"), teacher, student, packed())
    assert seen == {(torch.bfloat16, torch.float32)}
    assert all(torch.equal(p, whole[name]) for name, p in teacher.network.named_parameters())


def test_trained_in_half_precision_a_student_is_measured_in_full(tmp_path):
    student, _ = run(config(tmp_path, max_train_steps=1, mixed_precision="bf16"))
    plain = tiny_decoder(seed=3).network
    plain.load_state_dict(student.state_dict())
    ids = torch.arange(8)[None]
    assert torch.equal(logits(student, ids, EVERY), logits(plain, ids, EVERY))


def test_the_trackers_that_were_asked_for_hold_the_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard, of the extra `trackers`, is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(config(tmp_path, lmbda=0.0, trackers=("tensorboard",)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "stepdistill"))
    events.Reload()
    seen = {event.step: event.value for event in events.Scalars("jsd_text")}
    assert seen == pytest.approx({line["update"]: line["jsd_text"] for line in lines})


def test_a_dry_run_leaves_nothing(tmp_path):
    assert run(config(tmp_path / "run", dry_run=True))[1] == 0.0
    assert not (tmp_path / "run").exists()
