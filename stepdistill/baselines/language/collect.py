"""The texts that a student of reasoning is trained on: a teacher's traces that a verifier accepted, as tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from stepdistill.baselines.language.models import Decoder, check_length
from stepdistill.baselines.language.problems import Problem
from stepdistill.baselines.language.prompts import chat_prompt, prompt_ids
from stepdistill.baselines.language.texts import Pair
from stepdistill.baselines.language.tokens import Tokens, pair_up
from stepdistill.baselines.language.traces import answer, keep, sample_all, unopened
from stepdistill.baselines.less_memory import as_in_training
from stepdistill.errors import InputError
from stepdistill.training.processes import in_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stepdistill.baselines.language.r1_traces import R1TracesConfig

Answered = list[tuple[Problem, list[str]]]  # problems, each with texts that answer it
SETTINGS = ("task", "digits", "problems", "teacher", "teacher_steps", "samples", "temperature", "completion",
            "together", "seed", "mixed_precision")  # fmt: skip


def check_room(one: Decoder, problems: Sequence[Problem], completion: int) -> None:
    """Raises InputError if a model has too few positions for a problem and an answer of this many tokens."""
    longest = max(len(prompt_ids(one.tokenizer, chat_prompt(one.tokenizer, problem.prompt))) for problem in problems)
    check_length(one.network, longest + completion, "the longest prompt and completion")


def collect(teacher: Decoder, problems: Sequence[Problem], config: R1TracesConfig) -> tuple[Answered, str]:
    """Samples the teacher's answers, resuming from <out>/traces.jsonl, and verifies them.

    Returns:
        the problems with answers that are kept, and what became of the other answers, in words.

    Raises:
        InputError: the verifier accepts none, or the file was sampled with other settings.
    """
    asked = hashlib.sha256("\0".join(problem.prompt for problem in problems).encode()).hexdigest()
    settings = {name: getattr(config, name) for name in SETTINGS} | {"prompts": asked}
    answer_batch = partial(
        answer, teacher, samples=config.samples, new=config.completion, temperature=config.temperature, seed=config.seed
    )
    file = config.out / "traces.jsonl"
    with in_turn(file), as_in_training(teacher.network, config.mixed_precision):
        answers = sample_all(file, problems, answer_batch, config.together, settings)
    dropped: Counter[str] = Counter()
    kept = []
    for problem, completions in zip(problems, answers, strict=True):
        texts, dropped_here = keep(problem, completions, config.keep)
        dropped += dropped_here
        kept += [(problem, texts)] if texts else []
    reasons = ", ".join(f"{count:,} {why}" for why, count in dropped.most_common())
    total = f"{len(problems) * config.samples:,}"
    if not kept:
        raise InputError(
            f"traces: got {total} answers, of which the verifier accepts none ({reasons}); allowed: one or more; raise "
            "--samples or --completion, or take a better --teacher"
        )
    return kept, (
        f"{sum(len(texts) for _, texts in kept):,} of {total} answers are kept, for {len(kept):,} of "
        f"{len(problems):,} problems; dropped: {reasons or 'none'}; the control is trained on the correct answers to "
        "all problems"
    )


def as_rows(tokenizer: PreTrainedTokenizerBase, texts: Answered, most: int) -> Tokens:
    """Prompts, each with its completion and end of text; completions of more than `most` tokens are dropped.

    Raises:
        InputError: all are.
    """
    pairs, sizes = [], []
    for problem, answers in texts:
        prompt_text = chat_prompt(tokenizer, problem.prompt)
        for pair in (Pair(prompt_text, unopened(prompt_text, text)) for text in answers):
            before = len(prompt_ids(tokenizer, prompt_text))
            after = len(tokenizer(pair.completion, add_special_tokens=False).input_ids)
            if after < most:  # and its end of text
                pairs.append(pair)
                sizes.append((before, after + 1))
    if not pairs:
        raise InputError(f"completion: got {most} tokens; allowed: at least the shortest answer's; raise it")
    prompt, completion = (max(each) for each in zip(*sizes, strict=True))
    return pair_up(pairs, tokenizer, prompt=prompt, completion=completion)
