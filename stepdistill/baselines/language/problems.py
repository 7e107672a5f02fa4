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

from stepdistill.baselines.base import check_unused
from stepdistill.baselines.language.texts import encodable, held_apart, read_file, read_table
from stepdistill.errors import InputError

KINDS = "addition, a .jsonl file, or a datasets name (owner/name:config)"
ROWS = "a prompt, which is text, and an answer, text or a number, per line"
OPEN, CLOSE = "<think>", "</think>"  # around reasoning
_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+)")
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
    if Path(spec).suffix != ".jsonl":
        check_unused("--test", test, f"--task {spec}")
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
        return [_problem(row["prompt"], row["answer"]) for row in rows]

    return read_file(path, parse, "--task", ROWS)


def _dataset(spec: str, split: str) -> list[Problem]:
    rows = read_table(spec, split, "--task", KINDS)
    asked = next((column for column in ("question", "problem", "prompt") if column in rows.column_names), None)
    if asked is None or "answer" not in rows.column_names:
        got = ", ".join(rows.column_names)
        raise InputError(f"--task: got {spec} with columns {got}; allowed: question, problem or prompt, and answer")
    try:
        return [_problem(row[asked], row["answer"]) for row in rows]
    except (TypeError, ValueError) as error:
        raise InputError(f"--task: got {spec}, which cannot be read ({error}); allowed: {ROWS}") from error


def _problem(prompt: object, answer: object) -> Problem:
    """Raises TypeError or ValueError unless the prompt is text and the answer is text or a number."""
    if not isinstance(prompt, str):
        raise TypeError(f"{json.dumps(prompt)} is no prompt")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise TypeError(f"{json.dumps(answer)} is no answer")
    return Problem(encodable(prompt), encodable(str(answer)))


def right(text: str, answer: str) -> bool:
    r"""Whether a text's final answer is that of a reference.

    It follows the reasoning and is what the last \boxed{} holds. Without one, it is the last number, if the reference
    is a number, or the last line, of what follows the last #### or of all. Numbers are compared by value, others as
    words, ignoring case.
    """
    conclusion = text.rpartition(CLOSE)[2].strip()
    if not conclusion or (OPEN in text and CLOSE not in text):  # nothing follows the reasoning, or it was cut
        return False
    reference, candidate = bare_answer(answer), _boxed(conclusion)
    value = _number(reference)
    if candidate is None:
        candidates = (str.splitlines if value is None else _NUMBER.findall)(_end(conclusion))
        candidate = candidates[-1] if candidates else ""
    return _words(candidate) == _words(reference) if value is None else _number(candidate) == value


def bare_answer(answer: str) -> str:
    r"""A reference answer without its derivation: what its last \boxed{} holds, or follows its last ####; else all."""
    return _boxed(answer) or _end(answer)


def _end(text: str) -> str:
    return text.rpartition("####")[2].strip()


def _boxed(text: str) -> str | None:
    r"""What the last \boxed{} holds; empty if it is never closed, None if there is none."""
    if (at := text.rfind(r"\boxed{")) < 0:
        return None
    depth, begin = 0, at + len(r"\boxed")
    for i, sign in enumerate(text[begin:], begin):
        depth += (sign == "{") - (sign == "}")
        if not depth:
            return text[begin + 1 : i].strip()
    return ""


def _number(text: str) -> Decimal | None:
    """The value of a text that is one number, with its unit if LaTeX marks it as text; else None."""
    bare = _AROUND.sub("", text).strip().lstrip("$ ").rstrip("$.% ").replace(",", "")
    try:
        return Decimal(bare) if bare[-1:].isdigit() else None  # not inf or nan
    except InvalidOperation:
        return None


def _words(text: str) -> list[str]:
    return text.lower().split()
