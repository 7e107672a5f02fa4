"""DistiLLM: when the student generates, what its replay buffer holds, and that both survive an interruption."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from test_resume import stop_at
from tiny_decoders import sentences, tiny_decoder, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from stepdistill.baselines.base import Batch, TeacherStudent
from stepdistill.baselines.language import losses
from stepdistill.baselines.language.distillm import DistiLLM, DistiLLMConfig, turn
from stepdistill.baselines.language.generate import TokenBatch
from stepdistill.baselines.language.measure import mean_nll
from stepdistill.baselines.language.memory import Replay
from stepdistill.baselines.language.models import logits
from stepdistill.baselines.language.tokens import Tokens, pack
from stepdistill.baselines.learner import Learner, learn
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.methods.base import Clock
from stepdistill.training.config import LoopConfig

PROMPT, BLOCK = 4, 12


def data() -> Tokens:
    return pack(sentences(30), tokenizer(), BLOCK, prompt=PROMPT)


def objective(**changes) -> DistiLLM:
    settings = {"divergence": "skew_kl", "alpha": 0.1, "look_every": 2, "held": data()[-2:], "prompt": PROMPT,
                "eos": 2, "pad": 0, "seed": 0}  # fmt: skip
    return DistiLLM(**settings | changes)


def teacher_student(threshold: float, capacity: int = 5) -> TeacherStudent:
    student, teacher = (tiny_decoder(seed=seed).network for seed in (1, 2))
    return TeacherStudent(student, teacher, replay=Replay(capacity, BLOCK, threshold))


def repeated(*first: int) -> TokenBatch:
    """Rows that each repeat one of these tokens."""
    ids = torch.tensor(first)[:, None].expand(-1, BLOCK).clone()
    return TokenBatch(ids, ids > 0, ids > 0)


class Written(TorchDispatchMode):
    """Notes the places that values are assigned to by index."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index_put_.default:
            self.places.append(args[1][0].tolist())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("share", "threshold", "progress", "full", "what"),
    [
        (0.0, 0.0, 0.0, False, "corpus"),  # at threshold 0 it never generates
        (0.3, 0.5, 0.2, True, "generate"),  # 0.3 < 0.5 (1 - 0.2)
        (0.45, 0.5, 0.2, True, "replay"),  # 0.4 <= 0.45 < 0.5
        (0.45, 0.5, 0.2, False, "generate"),  # while there is room
        (0.5, 0.5, 0.0, False, "corpus"),
        (0.2, 0.5, 1.0, True, "replay"),
        (0.99, 1.0, 0.0, True, "generate"),
    ],
)
def test_whose_text_an_update_is_on(share, threshold, progress, full, what):
    assert turn(share, threshold, progress, full) == what


def test_the_threshold_rises_by_a_tenth_as_the_validation_loss_rises_by_a_tenth():
    replay = Replay(2, BLOCK, 0.0)
    seen = []
    for update, loss in enumerate([3.0, 2.0, 2.09, 2.11, 2.2, 2.21, 1.9, 2.05]):
        replay.look(loss, update)
        seen.append(round(replay.threshold.item(), 6))
    assert seen == [0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.3]  # 2.11 >= 2.0 + 0.1; then from 2.11; from 1.9 again
    for update in range(30):
        replay.look(update, update)
    assert replay.threshold.item() == 1


def test_the_oldest_rows_are_forgotten_first():
    replay = Replay(3, BLOCK, 0.5)
    replay.keep(repeated(1, 2))
    assert replay.filled == 2 and replay.ids[:, 0].tolist() == [1, 2, 0]
    replay.keep(repeated(3, 4))
    assert replay.filled == 3 and replay.ids[:, 0].tolist() == [4, 2, 3]


def test_of_more_rows_than_there_is_room_for_the_last_are_kept():
    """None is written twice: which of two would stay is not defined on a GPU."""
    replay, written = Replay(3, BLOCK, 0.5), Written()
    with written:
        replay.keep(repeated(1, 2, 3, 4, 5, 6, 7))
    assert replay.filled == 3 and replay.ids[:, 0].tolist() == [7, 5, 6]
    assert [sorted(places) for places in written.places] == 3 * [[0, 1, 2]]
    replay.keep(repeated(8))
    assert replay.ids[:, 0].tolist() == [7, 8, 6]


def test_rows_are_replayed_by_the_samples_own_numbers_and_only_such_as_there_are():
    replay = Replay(100, BLOCK, 0.5)
    replay.keep(repeated(7, 8, 9))
    rows = replay.recall(Draws.at(0, 0, 40)).ids[:, 0]
    assert rows.tolist() == [7 + i for i in Draws.at(0, 0, 40).integers(3).tolist()]
    assert set(rows.tolist()) == {7, 8, 9}


@pytest.mark.parametrize("alpha", [0.1, 0.3])
@pytest.mark.parametrize("divergence", ["skew_kl", "skew_reverse_kl"])
def test_at_threshold_0_the_loss_is_the_skewed_divergence_on_the_text(divergence, alpha):
    models, rows = teacher_student(0.0), data().batch([0, 1])
    own = objective(divergence=divergence, alpha=alpha)
    loss = own.loss("student", Batch(rows, Draws.at(0, 0, 2)), models, Clock(1, 10))
    s, t = (logits(m, rows["ids"], rows["attention"])[:, :-1] for m in (models.student, models.teacher))
    hand = getattr(losses, divergence)(s, t, rows["counts"][:, 1:], alpha=alpha)
    assert loss.total.item() == hand.item() and f"{divergence}_corpus" in loss.terms
    assert models.replay.filled == 0


def test_what_the_student_says_is_kept_and_used_again():
    models, rows = teacher_student(1.0, capacity=2), Batch(data().batch([0, 1]), Draws.at(0, 0, 2))
    first = objective().loss("student", rows, models, Clock(1, 10))
    assert "skew_kl_generate" in first.terms and models.replay.filled == 2
    assert torch.equal(models.replay.ids[:, :PROMPT], rows["ids"][:, :PROMPT])
    kept = models.replay.ids.clone()
    later = objective().loss("student", Batch(rows.items, Draws.at(0, 2, 2)), models, Clock(10, 10))
    assert "skew_kl_replay" in later.terms and torch.equal(models.replay.ids, kept)
    places = Draws.at(0, 2, 2).integers(2)
    s, t = (logits(m, kept[places], models.replay.attention[places])[:, :-1] for m in (models.student, models.teacher))
    hand = losses.skew_kl(s, t, models.replay.counts[places][:, 1:])
    assert later.total.item() == pytest.approx(hand.item(), rel=1e-6)


def test_the_validation_loss_is_looked_at_once_an_update_and_without_dropout():
    network = tiny_decoder("gpt2", resid_pdrop=0.5).network
    models = TeacherStudent(network, tiny_decoder("gpt2", seed=2).network, replay=Replay(5, BLOCK, 0.0))
    quiet = mean_nll(network, data()[-2:])
    network.train()
    rows = Batch(data().batch([0, 1]), Draws.at(0, 0, 2))
    objective().loss("student", rows, models, Clock(0, 10))
    assert models.replay.lowest.item() == pytest.approx(quiet, rel=1e-6) and network.training
    models.replay.lowest.fill_(-1.0)
    objective().loss("student", rows, models, Clock(0, 10))  # another batch of the same update
    objective().loss("student", rows, models, Clock(1, 10))
    assert models.replay.lowest.item() == -1 and models.replay.threshold.item() == 0
    objective().loss("student", rows, models, Clock(2, 10))
    assert models.replay.threshold.item() == pytest.approx(0.1)


def test_a_cut_run_goes_on_with_the_same_memory(tmp_path):
    """Student, replay buffer and threshold are bit-identical with and without an interruption."""
    config = LoopConfig(out=tmp_path / "cut", max_train_steps=8, batch_size=2, learning_rate=1e-2, checkpoint_every=3,
                        gradient_accumulation=2, lr_scheduler="cosine")  # fmt: skip

    def start(out) -> tuple[Learner, TeacherStudent]:
        models = teacher_student(0.6, capacity=7)
        return Learner(objective(), models, data(), dataclasses.replace(config, out=out)), models

    cut, models = start(tmp_path / "cut")
    stop_at(cut, 5)
    assert models.replay.filled > 0
    again, resumed = start(tmp_path / "cut")
    again.fit()
    whole, straight = start(tmp_path / "whole")
    whole.fit()
    a, b = (load_file(tmp_path / name / "weights" / "student.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name, buffer in straight.replay.named_buffers():
        assert torch.equal(buffer, dict(resumed.replay.named_buffers())[name]), name
    fresh = Learner(
        objective(), teacher_student(0.6, capacity=7), data(), dataclasses.replace(config, out=tmp_path / "cut")
    )
    assert fresh.models.replay.filled == 0 < resumed.replay.filled  # it came from the checkpoint


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = LoopConfig(out=tmp_path, max_train_steps=2, batch_size=2)
    first, again = teacher_student(0.6), teacher_student(0.6)
    seconds = learn(objective(), first, data(), config)

    def never() -> Tokens:
        raise AssertionError("data was asked for")

    assert learn(objective(), again, never, config) == seconds
    pairs = zip(first.bare.parameters(), again.bare.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("changes", [{"alpha": 0.0}, {"alpha": 1.0}, {"threshold": 2.0}, {"look_every": 0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(InputError, match=f"{next(iter(changes))}.*: got"):
        DistiLLMConfig(**changes).check()
