"""Reasoning that is kept if its answer is right: sampled, verified, deduplicated (DeepSeek-AI 2025, *DeepSeek-R1*,
sections 2.3.3 and 2.4).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from stepdistill import files
from stepdistill.baselines.language.generate import sample
from stepdistill.baselines.language.models import Decoder
from stepdistill.baselines.language.problems import CLOSE, OPEN, Problem, right
from stepdistill.baselines.language.prompts import chat_prompt, prompt_ids
from stepdistill.draws import Draws
from stepdistill.errors import InputError

GREEDY = 1e-3  # temperature for held-out problems: in effect, the likeliest token is always taken


@dataclass(frozen=True)
class Completion:
    """A sampled answer with its reasoning; `ended` if it reached its end of text within the limit."""

    text: str
    ended: bool


def opened(prompt: str, text: str) -> str:
    """Adds the mark that opens reasoning to a text, if the template had put it at the end of the prompt."""
    return f"{OPEN}\n{text}" if prompt.rstrip().endswith(OPEN) else text


def unopened(prompt: str, text: str) -> str:
    """Removes that mark from a text, if the template of the model that learns it puts it at the end of the prompt."""
    return text.removeprefix(OPEN).removeprefix("\n") if prompt.rstrip().endswith(OPEN) else text


def keep(problem: Problem, completions: Sequence[Completion], most: int) -> tuple[list[str], Counter[str]]:
    """Selects the answers worth learning: ended, right, with reasoning, without duplicates, the first `most`.

    Returns:
        their texts, and the number of the others by reason.
    """
    kept: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    for completion in completions:
        words = " ".join(completion.text.split())
        if not completion.ended:
            dropped["too long"] += 1
        elif not right(completion.text, problem.answer):
            dropped["wrong"] += 1
        elif CLOSE not in completion.text or not completion.text.partition(CLOSE)[0].replace(OPEN, "").strip():
            dropped["without reasoning"] += 1
        elif words in kept:
            dropped["duplicate"] += 1
        elif len(kept) >= most:
            dropped["beyond --keep"] += 1
        else:
            kept[words] = completion.text
    return list(kept.values()), dropped


def sample_all(
    file: Path, problems: Sequence[Problem], answer_batch: Callable[[int, Sequence[Problem]], list[list[Completion]]],
    together: int, settings: dict,
) -> list[list[Completion]]:  # fmt: skip
    """A teacher's answers to each problem: read from the file as far as it goes; new ones are appended.

    Args:
        answer_batch: takes the first problem's index and some problems; returns a list of answers for each.
        together: problems in one batch. settings: everything that the answers depend on.

    Raises:
        InputError: the file was written with other settings.
    """
    written = file.read_text(encoding="utf-8") if file.exists() else ""
    head, *lines = written.splitlines(keepends=True) or [""]
    if head and json.loads(head) != settings:
        raise InputError(f"--out: got {file}, sampled with other settings; allowed: the same; give another --out")
    lines = [line for line in lines if line.endswith("\n")]  # the last may have been cut
    if len(lines) < len(problems):
        lines = lines[: len(lines) // together * together]
    if (valid := "".join([json.dumps(settings) + "\n", *lines])) != written:
        files.write(file, valid)
    answers = [[Completion(**fields) for fields in json.loads(line)] for line in lines]
    with (
        open(file, "a", encoding="utf-8") as out,
        tqdm(total=len(problems), initial=len(answers), desc="sampling", dynamic_ncols=True) as bar,
    ):
        for first in range(len(answers), len(problems), together):
            for completions in answer_batch(first, problems[first : first + together]):
                out.write(json.dumps([asdict(completion) for completion in completions]) + "\n")
                answers.append(completions)
                bar.update()
            out.flush()
    return answers


def answer(
    model: Decoder, first: int, problems: Sequence[Problem], *, samples: int, new: int, temperature: float, seed: int
) -> list[list[Completion]]:
    """`samples` answers to each problem, of `new` tokens at most; `first` is the index of the first in the run."""
    device = next(model.network.parameters()).device
    prompts = [chat_prompt(model.tokenizer, problem.prompt) for problem in problems]
    rows = [ids for text in prompts for ids in [prompt_ids(model.tokenizer, text)] * samples]
    ids = torch.full((len(rows), max(map(len, rows))), model.pad)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], attention[i, -len(row) :] = torch.tensor(row), True
    draws = Draws.at(seed, first * samples, len(rows), device)
    generated = sample([(model.network, 1.0)], ids.to(device), attention.to(device), draws, new=new, eos=model.eos,
                       pad=model.pad, temperature=temperature)  # fmt: skip
    completions = []
    for i, (row, counts) in enumerate(zip(generated.ids.cpu(), generated.counts.cpu(), strict=True)):
        tokens = row[counts].tolist()
        ended = model.eos in tokens
        text = model.tokenizer.decode(tokens[:-1] if ended else tokens, clean_up_tokenization_spaces=False)
        completions.append(Completion(opened(prompts[i // samples], text), ended))
    return [completions[i : i + samples] for i in range(0, len(completions), samples)]


def solved(model: Decoder, held: Sequence[Problem], new: int, together: int) -> dict[str, float]:
    """`accuracy`, and the share that `ended` within the limit, of the likeliest answers."""
    count = Counter()
    for first in tqdm(range(0, len(held), together), "measuring", leave=False, dynamic_ncols=True):
        part = held[first : first + together]
        answers = answer(model, first, part, samples=1, new=new, temperature=GREEDY, seed=0)
        for problem, (completion,) in zip(part, answers, strict=True):
            count["ended"] += completion.ended
            count["accuracy"] += completion.ended and right(completion.text, problem.answer)
    return {name: count[name] / len(held) for name in ("accuracy", "ended")}
