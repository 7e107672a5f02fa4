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
from stepdistill.baselines.language.tokens import ask, prompt_ids
from stepdistill.draws import Draws
from stepdistill.errors import InputError

GREEDY = 1e-3  # temperature for held-out problems: in effect, the likeliest token is always taken


@dataclass(frozen=True)
class Said:
    """A sampled answer with its reasoning; `ended` if it reached its end of text within the limit."""

    text: str
    ended: bool


def opened(asked: str, text: str) -> str:
    """Adds the mark that opens reasoning to a text, if the template had put it at the end of the prompt."""
    return f"{OPEN}\n{text}" if asked.rstrip().endswith(OPEN) else text


def unopened(asked: str, text: str) -> str:
    """Removes that mark from a text, if the template of the model that learns it puts it at the end of the prompt."""
    return text.removeprefix(OPEN).removeprefix("\n") if asked.rstrip().endswith(OPEN) else text


def keep(problem: Problem, said: Sequence[Said], most: int) -> tuple[list[str], Counter[str]]:
    """Selects the answers worth learning: ended, right, with reasoning, without duplicates, the first `most`.

    Returns:
        their texts, and the number of the others by reason.
    """
    kept: dict[str, str] = {}
    fell: Counter[str] = Counter()
    for one in said:
        words = " ".join(one.text.split())
        if not one.ended:
            fell["too long"] += 1
        elif not right(one.text, problem.answer):
            fell["wrong"] += 1
        elif CLOSE not in one.text or not one.text.partition(CLOSE)[0].replace(OPEN, "").strip():
            fell["without reasoning"] += 1
        elif words in kept:
            fell["duplicate"] += 1
        elif len(kept) >= most:
            fell["beyond --keep"] += 1
        else:
            kept[words] = one.text
    return list(kept.values()), fell


def sample_all(
    file: Path, problems: Sequence[Problem], say: Callable[[int, Sequence[Problem]], list[list[Said]]], together: int,
    settings: dict,
) -> list[list[Said]]:  # fmt: skip
    """A teacher's answers to each problem: read from the file as far as it goes; new ones are appended.

    Args:
        say: takes the first problem's index and some problems; returns a list of answers for each. together: problems
            in one batch. settings: everything that the answers depend on.

    Raises:
        InputError: the file was written with other settings.
    """
    kept = file.read_text(encoding="utf-8") if file.exists() else ""
    head, *lines = kept.splitlines(keepends=True) or [""]
    if head and json.loads(head) != settings:
        raise InputError(f"--out: got {file}, sampled with other settings; allowed: the same; give another --out")
    lines = [line for line in lines if line.endswith("\n")]  # the last may have been cut
    if len(lines) < len(problems):
        lines = lines[: len(lines) // together * together]
    if (whole := "".join([json.dumps(settings) + "\n", *lines])) != kept:
        files.write(file, whole)
    found = [[Said(**one) for one in json.loads(line)] for line in lines]
    with (
        open(file, "a", encoding="utf-8") as out,
        tqdm(total=len(problems), initial=len(found), desc="sampling", dynamic_ncols=True) as bar,
    ):
        for first in range(len(found), len(problems), together):
            for said in say(first, problems[first : first + together]):
                out.write(json.dumps([asdict(one) for one in said]) + "\n")
                found.append(said)
                bar.update()
            out.flush()
    return found


def answer(
    one: Decoder, first: int, problems: Sequence[Problem], *, samples: int, new: int, temperature: float, seed: int
) -> list[list[Said]]:
    """`samples` answers to each problem, of `new` tokens at most; `first` is the index of the first in the run."""
    device = next(one.network.parameters()).device
    asked = [ask(one.tokenizer, problem.prompt) for problem in problems]
    rows = [ids for text in asked for ids in [prompt_ids(one.tokenizer, text)] * samples]
    ids = torch.full((len(rows), max(map(len, rows))), one.pad)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], attention[i, -len(row) :] = torch.tensor(row), True
    draws = Draws.at(seed, first * samples, len(rows), device)
    spoken = sample([(one.network, 1.0)], ids.to(device), attention.to(device), draws, new=new, eos=one.eos,
                    pad=one.pad, temperature=temperature)  # fmt: skip
    said = []
    for i, (row, counts) in enumerate(zip(spoken.ids.cpu(), spoken.counts.cpu(), strict=True)):
        tokens = row[counts].tolist()
        ended = one.eos in tokens
        text = one.tokenizer.decode(tokens[:-1] if ended else tokens, clean_up_tokenization_spaces=False)
        said.append(Said(opened(asked[i // samples], text), ended))
    return [said[i : i + samples] for i in range(0, len(said), samples)]


def solved(one: Decoder, held: Sequence[Problem], new: int, together: int) -> dict[str, float]:
    """`accuracy`, and the share that `ended` within the limit, of the likeliest answers."""
    count = Counter()
    for first in tqdm(range(0, len(held), together), "measuring", leave=False, dynamic_ncols=True):
        part = held[first : first + together]
        found = answer(one, first, part, samples=1, new=new, temperature=GREEDY, seed=0)
        for problem, (said,) in zip(part, found, strict=True):
            count["ended"] += said.ended
            count["accuracy"] += said.ended and right(said.text, problem.answer)
    return {name: count[name] / len(held) for name in ("accuracy", "ended")}
