"""Problems with verifiable answers, and the verifier.

addition             random sums of numbers of --digits digits
FILE.jsonl           "prompt" and "answer" per line; its last tenth is held out unless --test names a file
owner/name:config    a `datasets` name with columns "question", "problem" or "prompt", and "answer"; splits train, test
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from stepdistill.baselines.language.texts import held_apart, read_file, read_table
from stepdistill.errors import InputError

KINDS = "addition, a .jsonl file, or a datasets name (owner/name:config)"
OPEN, CLOSE = "<think>", "</think>"  # around reasoning
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_AROUND = re.compile(r"\\text\{[^{}]*\}|\\[,!;: ]|\\(?=[$%])")  # what LaTeX has around a number


@dataclass(frozen=True)
class Problem:
    """A prompt and its correct answer."""

    prompt: str
    answer: str


def open_problems(
    spec: str, count: int, held_out: int, *, digits: int, seed: int, test: str | None = None
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on, `count` at most, and held-out ones.

    Args:
        spec: see above. digits, seed: of sums. test: for a file, the held-out file.

    Raises:
        InputError: there are none.
    """
    if spec == "addition":
        from stepdistill.baselines.language.arithmetic import sums

        return sums(count, held_out, digits, seed)
    if Path(spec).suffix == ".jsonl":
        train = _file(Path(spec).expanduser())
        train, held = (train, _file(Path(test).expanduser())) if test else held_apart(train)
    else:
        train, held = (_dataset(spec, split) for split in ("train", "test"))
    if not train or not held:
        raise InputError(f"--task: got {len(train)} problems and {len(held)} held out in {spec}; allowed: 1 of each")
    return train[:count], held[:held_out]


def _file(path: Path) -> list[Problem]:
    def parse(text: str) -> list[Problem]:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return [Problem(row["prompt"], str(row["answer"])) for row in rows]

    return read_file(path, parse, "--task", "lines with prompt and answer")


def _dataset(spec: str, split: str) -> list[Problem]:
    rows = read_table(spec, split, "--task", KINDS)
    asked = next((column for column in ("question", "problem", "prompt") if column in rows.column_names), None)
    if asked is None or "answer" not in rows.column_names:
        got = ", ".join(rows.column_names)
        raise InputError(f"--task: got {spec} with columns {got}; allowed: question, problem or prompt, and answer")
    return [Problem(row[asked], str(row["answer"])) for row in rows]


def final_answer(text: str) -> str | None:
    r"""The final answer of a text: after its reasoning the last \boxed{}, else the last number, else the last line.

    None if reasoning is opened but not closed, or nothing follows it.
    """
    if OPEN in text and CLOSE not in text:
        return None
    told = text.rpartition(CLOSE)[2].strip()
    if (at := told.rfind(r"\boxed{")) >= 0:
        depth, begin = 0, at + len(r"\boxed")
        for i, sign in enumerate(told[begin:], begin):
            depth += (sign == "{") - (sign == "}")
            if not depth:
                return told[begin + 1 : i].strip()
        return None
    if numbers := _NUMBER.findall(told):
        return numbers[-1]
    return told.splitlines()[-1].strip() if told else None


def bare_answer(answer: str) -> str:
    """The final answer of a reference answer, without its derivation; unchanged if none is found."""
    return final_answer(answer) or answer


def right(text: str, answer: str) -> bool:
    """Whether a text's final answer is an answer: compared as numbers if both are, else as words, ignoring case."""
    found = final_answer(text)
    return found is not None and _plain(found) == _plain(bare_answer(answer))


def _plain(answer: str) -> Decimal | str:
    bare = _AROUND.sub("", answer).strip().strip("$.% ").replace(",", "")
    try:
        return Decimal(bare)
    except InvalidOperation:
        return " ".join(answer.lower().split())
