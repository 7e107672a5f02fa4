"""A teacher's answers to prompts without completions (sequence-level distillation, Kim and Rush 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stepdistill.baselines.language.models import TINY, Decoder
from stepdistill.baselines.language.problems import Problem
from stepdistill.baselines.language.prompts import chat_prompt
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.traces import answer, sample_all, unopened
from stepdistill.baselines.less_memory import as_in_training
from stepdistill.errors import InputError
from stepdistill.training.processes import in_turn

TOGETHER = 16  # prompts that are answered in one batch


def lacks_completions(texts: Sequence[str | Pair], teacher: Decoder) -> bool:
    """Whether these are prompts that the teacher has yet to complete.

    Raises:
        InputError: only some are, or the teacher is a tiny model, which is not trained yet.
    """
    without = sum(isinstance(text, Pair) and text.completion is None for text in texts)
    if 0 < without < len(texts):
        raise InputError(
            f"data: got {without} prompts without a completion, of {len(texts)}; allowed: none, or all; complete these"
        )
    if without and teacher.name in TINY:
        raise InputError(
            f"data: got prompts without completions for {teacher.name}, which learns from these; allowed: a teacher "
            "that can answer; give another --teacher, or completions"
        )
    return bool(without)


def answered(pairs: Sequence[Pair], teacher: Decoder, file: Path, *, new: int, seed: int, precision: str) -> list[Pair]:
    """Completes prompts with the teacher's answers, sampled at temperature 1: the control trains on them, and they are
    measured. Pairs that have completions are returned unchanged.

    Args:
        file: keeps the answers. new: tokens at most. precision: of the teacher: no, fp16 or bf16.

    Raises:
        InputError: see lacks_completions; or the file is of other prompts.
    """
    if not lacks_completions(pairs, teacher):
        return list(pairs)
    problems = [Problem(pair.prompt, "") for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    settings = {"teacher": teacher.name, "new": new, "seed": seed, "mixed_precision": precision, "prompts": prompts}
    answer_batch = partial(answer, teacher, samples=1, new=new, temperature=1.0, seed=seed)
    with in_turn(file), as_in_training(teacher.network, precision):
        answers = sample_all(file, problems, answer_batch, TOGETHER, settings)
    return [
        Pair(prompt, unopened(chat_prompt(teacher.tokenizer, prompt), completion.text), completion.ended)
        for prompt, (completion,) in zip(prompts, answers, strict=True)
    ]
