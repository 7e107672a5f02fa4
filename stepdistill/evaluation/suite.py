"""The benchmark: every model at every step count, on the same prompts and the same noise, one row a cell.

    results = evaluate("avatars,scheduler=ddim", "avatars-2k", steps=(1, 2, 4, 8, 50), out="out/bench")

A cell that is done is not done again; a cell that fails is reported, and the others finish.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation import generate, hashes, latency, records
from stepdistill.evaluation.metrics import Instruments, Pass, prepare, row_of
from stepdistill.evaluation.models import call_of, even_of, fingerprint, guidance_of, load, training_record
from stepdistill.evaluation.places import check
from stepdistill.evaluation.progress import ReferenceBar, progress_bar, quiet
from stepdistill.evaluation.protocols import Protocol, load_protocol
from stepdistill.evaluation.spec import ModelSpec, as_models, plan_of
from stepdistill.files import unwritable

STEPS = (1, 2, 4, 8, 50)
EMBEDDINGS_LIMIT = 1 << 30  # bytes of prompt embeddings kept from one step count to the next


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, and why, in a line."""

    model: str
    steps: int | None
    reason: str


@dataclass(frozen=True)
class Results:
    """What a benchmark gave.

    Attributes:
        rows: the cells asked for, in order, floor rows first. failed: those that could not be measured.
        folder: where results.jsonl is; None where nothing was written.
    """

    rows: list[dict[str, Any]]
    failed: list[Failure] = field(default_factory=list)
    folder: Path | None = None


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run; none of it changes a quality figure.

    Attributes:
        batch: pictures drawn at a time. device: where. latency_repeats: timed calls of one picture, 0 are none;
            latency_batch: pictures in the calls of a second timing, 1 is none. compiled: time the network compiled.
        channels_last: lay UNets and autoencoders out so.
        floor: measure real pictures and reconstructions too. grid: pictures kept of each cell. progress: show a bar.

    Raises:
        InputError: a number out of range.
    """

    batch: int = 64
    device: str = "cpu"
    latency_batch: int = 1
    latency_repeats: int = 10
    compiled: bool = False
    channels_last: bool = False
    floor: bool = True
    grid: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("latency_batch", 1), ("latency_repeats", 0), ("grid", 0)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"{name}: got {value}; allowed: {least} or more")


def evaluate(
    pipeline: Any,
    protocol: str | Path | Protocol = "avatars-2k",
    steps: Sequence[int] | None = None,
    *,
    out: str | Path | None = None,
    n: int | None = None,
    seed: int | None = None,
    settings: Settings | None = None,
    instruments: Instruments | None = None,
    command: str | None = None,
) -> Results:
    """Measures one model or several.

    Args:
        pipeline: a SPEC, a ModelSpec, a loaded diffusers pipeline, a sequence of SPECs, or a mapping
            name -> any of these.
        protocol: a name, a .yaml file, or a Protocol. steps: step counts, 1 or more each; where not given a ready
            model's own, else the protocol's, else STEPS.
        out: the folder of results.jsonl and the grids; rows already there are kept, and not measured again.
        n, seed: in place of the protocol's. Another n is another protocol, with another hash.
        instruments: in place of those the protocol names. command: what to record; the process's own where not given.

    Raises:
        InputError: bad steps, an unknown protocol, too few prompts, a bad SPEC, a pipeline or LoRA that is not there,
            or a folder with something else or with rows of another protocol.
        OSError: the results cannot be written, for want of room or permission. What is done is kept.
    """
    settings = settings or Settings(device="cuda" if torch.cuda.is_available() else "cpu")
    protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    changes = {k: v for k, v in {"n": n, "seed": seed}.items() if v is not None}
    protocol = dataclasses.replace(protocol, **changes)
    plan = plan_of(as_models(pipeline), None if steps is None else check_steps(steps), protocol.steps or STEPS)
    for _, model, _ in plan:
        if isinstance(model, ModelSpec):
            check(model.path, model.lora)
    if out is not None:
        records.check_folder(out)
    # The bar counts network evaluations, guidance's included, and a few for the metrics: pictures cost unlike much.
    weight = 4
    total = protocol.n * sum(2 * s + weight for _, _, counts in plan for s in counts)
    if instruments is None:
        told = ReferenceBar(settings.progress)
        instruments = prepare(protocol, device=settings.device, batch=settings.batch, progress=told)
    with progress_bar(total, settings.progress) as bar, quiet():
        bench = _Bench(protocol, instruments, settings, command or " ".join(map(shlex.quote, sys.argv)), out, bar)
        for name, model, counts in plan:
            bench.model(name, model, counts, weight)
    return Results(bench.rows, bench.failed, bench.book.folder)


def check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """The step counts, each once, in order.

    Raises:
        InputError: none, or one below 1.
    """
    if not steps or any(not isinstance(s, int) or s < 1 for s in steps):
        raise InputError(f"steps: got {' '.join(map(str, steps)) or 'none'}; allowed: 1 or more each; try 1 2 4 8 50")
    return tuple(dict.fromkeys(steps))


class _Bench:
    """One run: its book of rows, and what was found on the way."""

    def __init__(
        self, protocol: Protocol, tools: Instruments, settings: Settings, command: str, out: str | Path | None, bar: Any
    ) -> None:
        self.protocol, self.tools, self.settings, self.bar = protocol, tools, settings, bar
        self.rows: list[dict[str, Any]] = []
        self.failed: list[Failure] = []
        self.facts = {
            "protocol": protocol.name, "protocol_hash": protocol.hash(dict(tools.content)),
            "n": protocol.n, "seed": protocol.seed,
            "settings": protocol.settings() | {"content": dict(tools.content)},
            "batch": settings.batch, "device": records.device_name(settings.device), "versions": records.versions(),
            "commit": records.commit(), "command": command,
        }  # fmt: skip
        self.book = records.Book(out, self.facts["protocol_hash"], protocol.name, self.facts["settings"])
        self.book.prompts(list((tools.prompts.prompts or [])[: settings.grid]))
        content = dict(tools.content)
        held_out = "reference" not in content or content["reference"] != content.get("prompts")
        if settings.floor and tools.prompts.pictures is not None and held_out:
            self._floor("real", tools.prompts.key[:16], lambda pictures: pictures)

    def _floor(self, name: str, weights: str, change) -> None:
        row = {"model": name, "method": "floor", "weights": weights, "steps": 0, "nfe": 0, "seed": None}
        batches = ((i, change(p)) for i, p in self.tools.prompts.batches(self.settings.batch, self.protocol.n))
        self._cell(row, batches)

    def model(self, name: str, model: Any, steps: Sequence[int], weight: int) -> None:
        """All cells of one model."""
        cells = self.protocol.n * sum(2 * s + weight for s in steps)
        spec = (
            model
            if isinstance(model, ModelSpec)
            else ModelSpec(path=getattr(model, "name_or_path", "") or name, name=name)
        )
        self.bar.set_description(f"{name}: loading")
        try:
            own = {"device": self.settings.device, "sampler": self.protocol.sampler}
            pipeline = load(spec, **own) if model is spec else model
            if self.settings.channels_last:
                latency.channels_last(pipeline)
            guidance, even = guidance_of(spec, pipeline, self.protocol.guidance), even_of(spec, pipeline)
            sampler = generate.Sampler(
                pipeline, guidance, self.protocol.seed, even, call_of(spec, pipeline), self.protocol.negative_prompt
            )
            if sampler.takes_prompts and self.tools.prompts.prompts is None:
                raise InputError(f"model {name}: got a set without prompts; allowed: a protocol with prompts")
            weights = fingerprint(pipeline)
        except Exception as error:  # whatever goes wrong with one model, the others are still measured
            self._fail(name, None, error)
            self.bar.update(cells)
            return
        if (
            self.settings.floor
            and self.tools.prompts.pictures is not None
            and getattr(pipeline, "vae", None) is not None
        ):
            self._reconstruction(name, pipeline)
        record = training_record(spec)
        student = record.get("teacher") or generate.told_guidance(pipeline)
        made = "lora" if spec.lora else "student" if student else "teacher"
        facts = {
            "model": name, "method": record.get("method") or made, "spec": str(spec),
            "teacher": record.get("teacher") or (spec.path if spec.lora else None),
            "weights": weights, "guidance": sampler.guidance,
            "scheduler": type(pipeline.scheduler).__name__, "sigmas": "even" if even else None,
            "dtype": str(generate.backbone(pipeline).dtype).removeprefix("torch."),
            "train_seconds": record.get("train_seconds"),
        }  # fmt: skip
        kept: dict[int, dict[str, Any]] = {}
        for count in steps:
            self.bar.set_description(f"{name}, {count} step{'s' * (count > 1)}")
            before = self.bar.n
            try:
                self._cell(facts | {"steps": count}, self._draw(sampler, count, kept, (2 * count + weight)), sampler)
            except Exception as error:
                self._fail(name, count, error)
            self.bar.update(self.protocol.n * (2 * count + weight) - (self.bar.n - before))

    def _reconstruction(self, name: str, pipeline) -> None:
        key = hashes.of_module(pipeline.vae)[:16]
        done = [row for row in self.rows if row["model"].startswith("reconstruction")]
        if any(row["weights"] == key for row in done):
            return
        title = "reconstruction" if not done else f"reconstruction ({name})"
        try:
            self._floor(title, key, lambda pictures: generate.reconstruct(pipeline, pictures))
        except Exception as error:
            self._fail(title, 0, error)

    def _draw(self, sampler: generate.Sampler, steps: int, kept: dict, unit: int) -> Iterator[tuple[int, Tensor]]:
        n, batch, prompts = self.protocol.n, self.settings.batch, self.tools.prompts.prompts
        for first in range(0, n, batch):
            count = min(batch, n - first)
            condition = kept.get(first)
            if condition is None:
                condition = sampler.encode(prompts[first : first + count]) if prompts is not None else {}
                size = sum(v.nbytes for v in condition.values() if isinstance(v, Tensor))
                if size * -(-n // batch) <= EMBEDDINGS_LIMIT:
                    kept[first] = condition
            yield first, sampler(condition, first=first, count=count, steps=steps)
            self.bar.update(count * unit)

    def _cell(
        self, row: dict[str, Any], batches: Iterator[tuple[int, Tensor]], sampler: generate.Sampler | None = None
    ) -> None:
        row = self.facts | row
        if (done := self.book.find(row)) is not None:
            self.rows.append(done)
            return
        measured = Pass(self.tools)
        shown: list[Tensor] = []
        with latency.Stages(sampler.pipeline) if sampler else nullcontext() as stages:
            for first, pictures in batches:
                measured.add(first, pictures)
                if sum(map(len, shown)) < self.settings.grid:
                    shown.append(pictures)
        found = measured.figures()
        row |= row_of(found, self.tools)
        if sampler is not None:
            row["nfe"] = round(stages.evaluations / self.protocol.n, 4)
            row |= self._timed(sampler, row["steps"])
        self.book.grid(row, torch.cat(shown)[: self.settings.grid] if shown and self.settings.grid else None)
        self.book.units(row, found)
        self.rows.append(self.book.add(row))

    def _timed(self, sampler: generate.Sampler, steps: int) -> dict[str, Any]:
        settings, prompts = self.settings, list(self.tools.prompts.prompts or [])[:64]
        if not settings.latency_repeats:
            return {}
        one, many = (
            latency.measure(
                sampler, prompts, steps=steps, batch=batch, repeats=settings.latency_repeats, compiled=settings.compiled
            ) if batch else None
            for batch in (1, settings.latency_batch if settings.latency_batch > 1 else 0)
        )  # fmt: skip
        return {
            "latency_ms": one.row(), "latency_ms_batch": many and many.row(), "peak_memory_mb": one.peak_memory_mb,
        }  # fmt: skip

    def _fail(self, name: str, steps: int | None, error: Exception) -> None:
        """Notes what could not be measured; a disk that is full or closed is no model's fault, and ends the run."""
        if unwritable(error):
            raise error
        reason = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, InputError):
            reason = f"{type(error).__name__}: {reason}"
        self.failed.append(Failure(name, steps, reason[:300]))
