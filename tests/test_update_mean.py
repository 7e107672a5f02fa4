"""A loss is the mean over the tokens of its update, however these are split into batches and processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_encoders import MASKING, bert, lines
from test_resume import stop_at
from test_trainer import in_two_processes
from tiny_decoders import sentences, tiny_decoder, tokenizer

from stepdistill.baselines import BASELINES
from stepdistill.baselines.base import BaselineConfig, Data, Objective, TeacherStudent
from stepdistill.baselines.language.cross_entropy import CrossEntropy
from stepdistill.baselines.language.distillm import DistiLLM
from stepdistill.baselines.language.forward_kl import ForwardKL
from stepdistill.baselines.language.gkd import GKD
from stepdistill.baselines.language.layers import Layers, Projections
from stepdistill.baselines.language.masked import MaskedLM, MaskedModelling
from stepdistill.baselines.language.memory import Replay, Rollouts
from stepdistill.baselines.language.policy import MiniLLM
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.tokens import Tokens, pair_up
from stepdistill.baselines.language.triple import DistilBert
from stepdistill.baselines.learner import Learner
from stepdistill.errors import InputError
from stepdistill.training import folder

PROMPT, BLOCK, ROWS = 6, 20, 8


def completions() -> Tokens:
    """Of unequal lengths, so that batches have other numbers of tokens."""
    pairs = [Pair("the cat", " " + " ".join(sentences(3, seed=i))[: 3 + 12 * (i % 4)]) for i in range(24)]
    return pair_up(pairs, tokenizer(), prompt=PROMPT, completion=BLOCK - PROMPT)


TEXTS, PIECES = completions(), lines(*[4 + 5 * i % 9 for i in range(24)])


def decoders(**others: torch.nn.Module) -> TeacherStudent:
    return TeacherStudent(*(tiny_decoder(seed=seed).network.double() for seed in (2, 1)), **others)


def encoders(**others: torch.nn.Module) -> TeacherStudent:
    return TeacherStudent(MaskedLM(bert(seed=1)), MaskedLM(bert(4)), **others)


def layer_by_layer() -> TeacherStudent:
    torch.manual_seed(0)
    beside = Projections(8, 12).double()
    return TeacherStudent(bert(2, 8, seed=1).base_model, bert(4, 12).base_model, projections=beside)


END = tokenizer().eos_token_id
SAID = {"prompt": PROMPT, "eos": END, "pad": END}
CASES: dict[str, tuple[Objective, Callable[[], TeacherStudent], Data]] = {
    "cross_entropy": (CrossEntropy(), decoders, TEXTS),
    "forward_kl": (ForwardKL(2.0, 0.7, 0.3), decoders, TEXTS),
    "gkd_text": (GKD(0.0, 0.5, 1.0, **SAID, seed=0), decoders, TEXTS),
    "gkd_own": (GKD(1.0, 0.5, 1.0, **SAID, seed=0), decoders, TEXTS),
    # new text in two updates, in the second of which the memory is full half-way, then kept text
    "distillm": (DistiLLM("skew_kl", 0.1, look_every=2, held=TEXTS[-3:], **SAID, seed=1),
                 lambda: decoders(replay=Replay(12, BLOCK, 1.0)), TEXTS),
    "minillm": (MiniLLM(0.2, 0.2, 2, 0.7, **SAID), lambda: decoders(rollouts=Rollouts(ROWS, BLOCK)), TEXTS),
    "masked": (MaskedModelling(MASKING), encoders, PIECES),
    "distilbert": (DistilBert(MASKING, 2.0, 5.0, 2.0, 1.0, "all"), encoders, PIECES),
    "distilbert_masked": (DistilBert(MASKING, 2.0, 5.0, 2.0, 1.0, "masked"), encoders, PIECES),
    "tinybert": (Layers(), layer_by_layer, PIECES),
}  # fmt: skip
TWO = ("gkd_own", "distillm", "minillm", "distilbert", "tinybert")


def learner(case: str, out: Path, size: int, accumulation: int = 1) -> Learner:
    """Three updates. Adam's epsilon keeps rounding from deciding the sign of a step."""
    objective, models, data = CASES[case]
    config = BaselineConfig(out=out, max_train_steps=3, batch_size=size, gradient_accumulation=accumulation,
                            learning_rate=1e-2, adam_epsilon=1e-3, log_every=1, checkpoint_every=1)  # fmt: skip
    return Learner(objective, models(), data, config)


def trained(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The terms of each update, and all trained weights, by file and name."""
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    terms = [{k: v for k, v in line.items() if k != "seconds_per_update"} for line in logged]
    files = (out / "weights").iterdir()
    return terms, {f"{file.stem}.{k}": v for file in files for k, v in load_file(file).items()}


def assert_equal(out: Path, other: Path) -> None:
    (terms, weights), (mine, own) = trained(out), trained(other)
    for one, two in zip(terms, mine, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert weights.keys() == own.keys()
    assert all(torch.allclose(own[name], value, rtol=0, atol=1e-7) for name, value in weights.items())


def test_batches_have_other_numbers_of_tokens():
    predicted = TEXTS.counts.sum(1)
    assert predicted.min() * 3 < predicted.max() and PIECES.attention.sum(1).unique().numel() > 5


@pytest.mark.parametrize("case", CASES)
def test_an_update_in_four_batches_is_that_of_one(case, tmp_path):
    learner(case, tmp_path / "whole", ROWS).fit()
    learner(case, tmp_path / "split", ROWS // 4, 4).fit()
    assert_equal(tmp_path / "whole", tmp_path / "split")


def test_an_update_on_two_processes_is_that_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_update_mean import TWO, learner\n"
        f"for case in TWO:\n    learner(case, Path({str(tmp_path)!r}) / 'two' / case, 2, 2).fit()\n"
    )
    in_two_processes([sys.executable, str(script)])
    for case in TWO:
        learner(case, tmp_path / "one" / case, ROWS).fit()
        assert_equal(tmp_path / "one" / case, tmp_path / "two" / case)


def test_a_run_may_go_on_with_its_updates_split_otherwise(tmp_path):
    learner("forward_kl", tmp_path / "whole", ROWS).fit()
    stop_at(learner("forward_kl", tmp_path / "cut", ROWS), 2)
    learner("forward_kl", tmp_path / "cut", ROWS // 2, 2).fit()
    assert_equal(tmp_path / "whole", tmp_path / "cut")


VARIANTS = {"gkd with trl": ("gkd", {"trainer": "trl"}), "snapfusion unbalanced": ("snapfusion", {"balanced": False})}
FORBID = ("hinton", "snapfusion", "gkd with trl")


@pytest.mark.parametrize("name", [*BASELINES, *VARIANTS])
def test_what_compares_within_a_batch_forbids_it(name, tmp_path):
    """Batch normalisation, SnapFusion's balance of two losses, and trl's mean over a batch's tokens."""
    method, more = VARIANTS.get(name, (name, {}))
    config = BASELINES[method].config
    folder.claim(config(out=tmp_path, batch_size=8, **more), 1, write=True)
    (tmp_path / "metrics.jsonl").touch()
    again = config(out=tmp_path, batch_size=2, gradient_accumulation=4, **more)
    if name in FORBID:
        with pytest.raises(InputError, match=r"which holds a run with batch_size = 8 \(now 2\)"):
            folder.claim(again, 1, write=False)
    else:
        folder.claim(again, 1, write=False)


@pytest.mark.parametrize("balanced", [True, False])
def test_of_snapfusion_only_a_balanced_student_forbids_it(balanced, tmp_path):
    config = BASELINES["snapfusion"].config(out=tmp_path, balanced=balanced)
    assert ("batch_size" in config.part("student-0").FREE) == (not balanced)
    assert "batch_size" in config.part("control-0").FREE
