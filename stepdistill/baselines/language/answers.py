"""What a teacher says to prompts that come without completions (sequence-level distillation, Kim and Rush 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from accelerate import PartialState

from stepdistill.baselines.language.models import TINY, Decoder
from stepdistill.baselines.language.problems import Problem
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.tokens import ask
from stepdistill.baselines.language.traces import answer, sample_all, unopened
from stepdistill.errors import InputError
from stepdistill.training.processes import on_cpu

TOGETHER = 16  # prompts that are answered at once


def answered(pairs: Sequence[Pair], teacher: Decoder, file: Path, *, new: int, seed: int) -> list[Pair]:
    """Prompts with what the teacher says to them, drawn at temperature 1: what a control learns, and what is measured.
    Pairs that have completions stay as they are.

    Args:
        file: that keeps what is said. new: tokens at most.

    Raises:
        InputError: some have completions and some have not, the teacher has not learnt to speak yet, or the file is of
            other prompts.
    """
    without = sum(pair.completion is None for pair in pairs)
    if not without:
        return list(pairs)
    if without < len(pairs):
        raise InputError(
            f"data: got {without} prompts without a completion, of {len(pairs)}; allowed: none, or all; complete these"
        )
    if teacher.name in TINY:
        raise InputError(
            f"data: got prompts without completions for {teacher.name}, which learns from these; allowed: a teacher "
            "that can answer; give another --teacher, or completions"
        )
    problems = [Problem(pair.prompt, "") for pair in pairs]
    settings = {"teacher": teacher.name, "new": new, "seed": seed, "prompts": [pair.prompt for pair in pairs]}
    say = partial(answer, teacher, samples=1, new=new, temperature=1.0, seed=seed)
    with PartialState(cpu=on_cpu()).main_process_first():
        file.parent.mkdir(parents=True, exist_ok=True)
        said = sample_all(file, problems, say, TOGETHER, settings)
    return [
        Pair(pair.prompt, unopened(ask(teacher.tokenizer, pair.prompt), texts[0].text))
        for pair, texts in zip(pairs, said, strict=True)
    ]
