"""A row's times and how they were taken; with another device or flag, a row is timed again.

how = requested(settings, "float16")
if not records.timed(row, how):
    row |= take(sampler, prompts, 4, how, command)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill import provenance
from stepdistill.evaluation import latency
from stepdistill.evaluation.generate import Sampler
from stepdistill.evaluation.merged import merged
from stepdistill.evaluation.settings import Settings


def requested(settings: Settings, dtype: str) -> dict[str, Any] | None:
    """Returns how times are to be taken; None for no timing. Without a set number of repeats, any is accepted.

    `merged` separates them from older rows, of students whose LoRA was computed beside the network.
    """
    if settings.latency_repeats == 0:
        return None
    often = {} if settings.latency_repeats is None else {"repeats": settings.latency_repeats}
    return {
        "device": provenance.device_name(settings.device), "dtype": dtype, "compiled": settings.compiled,
        "channels_last": settings.channels_last, "batch": settings.latency_batch, "merged": True, **often,
    }  # fmt: skip


def take(sampler: Sampler, prompts: Sequence[str], steps: int, how: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Measures the times of a row: for one image per call, and for `how["batch"]` images per call."""
    often = {"repeats": how["repeats"]} if "repeats" in how else {"seconds": latency.SECONDS}
    options = {"steps": steps, "compiled": how["compiled"]} | often
    with merged(sampler.pipeline):
        one = latency.measure(sampler, prompts, batch=1, **options)
        many = latency.measure(sampler, prompts, batch=how["batch"], **options) if how["batch"] > 1 else None
    made = {"torch": provenance.versions().get("torch"), "commit": provenance.commit(), "command": command}
    return {
        "timing": {**how, "repeats": one.repeats, **made}, "latency_ms": one.row(),
        "latency_ms_batch": many and many.row(), "pipeline_memory_mb": one.pipeline_memory_mb,
    }  # fmt: skip
