"""Validates the rows of a results.jsonl that may have been written by other tools or by hand.

What was not measured becomes None, and so do a figure that is not finite and a timing without its total.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from stepdistill.errors import InputError

TEXTS = ("protocol", "protocol_hash", "model", "method", "teacher", "spec", "weights", "scheduler", "spacing",
         "fd_extractor", "clip_model", "dtype", "device", "commit", "command", "train_settings",
         "train_commit")  # fmt: skip
NUMBERS = ("nfe", "guidance", "n", "seed", "fd", "fd_low", "fd_high", "clip_score", "attribute_accuracy",
           "pipeline_memory_mb", "peak_memory_mb", "batch", "train_seconds", "train_seed")  # fmt: skip
MAPS = ("settings", "attributes", "metrics", "latency_ms", "latency_ms_batch", "timing", "versions")
WORDS = dict.fromkeys(TEXTS, "text") | dict.fromkeys(NUMBERS, "a number") | dict.fromkeys(MAPS, "a mapping")
STAGES = ("text", "denoiser_step", "decode")
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # control characters and lone surrogates


def sound(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a row with finite numbers, printable texts, and no incomplete figure or timing.

    Args:
        where: the row's location, for error messages.

    Raises:
        InputError: a field has the wrong type.
    """
    row = _clean(row)
    for name, kind in WORDS.items():
        value = row.get(name)
        if value is None and name not in ("model", "protocol_hash"):
            continue
        if not (_number(value) if kind == "a number" else isinstance(value, str if kind == "text" else dict)):
            raise InputError(f"{where}: got {name}: {str(value)[:40]}; allowed: {kind}; fix or delete the line")
    if not isinstance(row["steps"], int) or isinstance(row["steps"], bool) or row["steps"] < 0:
        raise InputError(f"{where}: got steps: {row['steps']}; allowed: a whole number, 0 of floors; fix the line")
    row |= {name: end for name, end in _ends(row, "fd_low", "fd_high").items() if name in row}
    if row.get("metrics"):
        row["metrics"] = {name: figure for name, each in row["metrics"].items() if (figure := _figure(each))}
    for name in ("latency_ms", "latency_ms_batch"):
        if row.get(name):
            row[name] = _timing(row[name])
    if row.get("timing") and not {"device", "dtype", "compiled"} <= row["timing"].keys():
        row["timing"] = None
    return row


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(name): _clean(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_clean(each) for each in value]
    if isinstance(value, str):
        return UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(figure: Any) -> dict[str, Any] | None:
    """Returns a figure of `metrics` with both ends of its interval or neither, without an invalid count or unit."""
    if not isinstance(figure, dict) or not _number(figure.get("value")):
        return None
    figure = figure | _ends(figure, "low", "high")
    invalid = {name for name in ("n", "bend", "seeds", "trials") if not _number(figure.get(name))}
    invalid |= {"of"} if not isinstance(figure.get("of"), str) else set()
    return {name: value for name, value in figure.items() if name not in invalid}


def _ends(values: Mapping[str, Any], low: str, high: str) -> dict[str, Any]:
    """Returns the ends of an interval; None for both if one is missing, or they are the wrong way round."""
    ends = {name: values.get(name) for name in (low, high)}
    return ends if all(map(_number, ends.values())) and ends[low] <= ends[high] else dict.fromkeys(ends)


def _timing(timing: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a timing if its totals are valid, with invalid stages set to None; else None."""
    required = [timing.get("total_p50"), timing.get("total_p90"), timing.get("batch", 1)]
    if not all(_number(value) and value > 0 for value in required):
        return None
    others = (*STAGES, "total_p99", "first", "repeats", "pipeline_memory_mb")
    quantiles = timing.get("quantiles")
    stages = quantiles.items() if isinstance(quantiles, dict) else ()
    valid = {stage: q for stage, q in stages if isinstance(q, list) and len(q) == 3 and all(map(_number, q))}
    return timing | {name: None for name in others if not _number(timing.get(name))} | {"quantiles": valid}
