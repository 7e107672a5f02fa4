"""The benchmark: every model at every step count, on the same prompts and the same noise, one row a cell.

    results = evaluate("avatars,scheduler=ddim", "avatars-2k", steps=(1, 2, 4, 8, 50), out="out/bench")

A cell that is done is not done again, nor is a batch that was drawn before; a cell that fails is reported, and the
others finish. Under `accelerate launch` all processes draw.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import InputError
from stepdistill.evaluation import generate, hashes, latency, records
from stepdistill.evaluation.generate import Drawn
from stepdistill.evaluation.metrics import Instruments, Pass, prepare, row_of
from stepdistill.evaluation.models import call_of, even_of, fingerprint, guidance_of, load, training_record
from stepdistill.evaluation.pictures import LIBRARIES, Store, setup_of
from stepdistill.evaluation.places import check
from stepdistill.evaluation.processes import Processes, reason
from stepdistill.evaluation.progress import ReferenceBar, progress_bar, quiet
from stepdistill.evaluation.protocols import Protocol, load_protocol
from stepdistill.evaluation.spec import ModelSpec, as_models, plan_of
from stepdistill.files import unwritable

STEPS = (1, 2, 4, 8, 50)


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
        folder: where results.jsonl is; None where nothing was written, and in all processes but the main one.
        store: where the drawn pictures are. main: whether this is the process that wrote; the only one is.
    """

    rows: list[dict[str, Any]]
    failed: list[Failure] = field(default_factory=list)
    folder: Path | None = None
    store: Store | None = None
    main: bool = True


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run; none of it changes a quality figure.

    Attributes:
        batch: pictures drawn at a time. device: where. latency_repeats: timed calls of one picture, 0 are none;
            latency_batch: pictures in the calls of a second timing, 1 is none. compiled: time the network compiled.
        channels_last: lay UNets and autoencoders out so.
        keep: keep the drawn pictures of cells up to 2 GiB (see `pictures`); others only until they are measured.
        floor: measure real pictures and reconstructions too. grid: pictures kept of each cell. progress: show a bar.

    Raises:
        InputError: a number out of range.
    """

    batch: int = 64
    device: str = "cpu"
    latency_batch: int = 1
    latency_repeats: int = 10
    keep: bool = True
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
    """Measures one model or several. Where several processes were launched, each must call it, with the same arguments.

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
    team = Processes.found(settings.device)
    settings = dataclasses.replace(settings, progress=settings.progress and team.main)
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
    for turn in (True, False) if instruments is None else ():  # statistics are made once, and then read
        with team.alike(), closing(ReferenceBar(settings.progress)) as told:
            if team.main is turn:
                instruments = prepare(protocol, device=settings.device, batch=settings.batch, progress=told)
    with progress_bar(total, settings.progress) as bar, quiet(), Store(settings.keep) as store:
        with team.alike():
            command = command or " ".join(map(shlex.quote, sys.argv))
            bench = _Bench(protocol, instruments, settings, command, out if team.main else None, bar, team, store)
        bench.real()
        for name, model, counts in plan:
            bench.model(name, model, counts, weight)
        troubles = team.gather((store.broken, store.why_not))
    store.broken = sum(broken for broken, _ in troubles)
    store.why_not = next((why for _, why in troubles if why), None)
    return Results(bench.rows, bench.failed, bench.book.folder, store, team.main)


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
        self, protocol: Protocol, tools: Instruments, settings: Settings, command: str, out: str | Path | None,
        bar: Any, team: Processes, store: Store,
    ) -> None:  # fmt: skip
        self.protocol, self.tools, self.settings, self.bar = protocol, tools, settings, bar
        self.team, self.store = team, store
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

    def real(self) -> None:
        """The floor of real pictures, where they are not those that are compared with."""
        content = dict(self.tools.content)
        held_out = "reference" not in content or content["reference"] != content.get("prompts")
        if self.settings.floor and self.tools.prompts.pictures is not None and held_out:
            self._floor("real", self.tools.prompts.key[:16], lambda pictures: pictures)

    def _floor(self, name: str, weights: str, change: Callable[[Tensor], Tensor]) -> None:
        row = {"model": name, "method": "floor", "weights": weights, "steps": 0, "nfe": 0, "seed": None}
        prompts = self.tools.prompts
        prompts.check(self.protocol.n)
        self._cell(row, lambda first, count: Drawn(change(prompts.pictures(first, first + count))))

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
            with self.team.alike():
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
        series = generate.Series(sampler, self.tools.prompts.prompts, self.protocol.n, self.settings.batch)
        kept = setup_of(pipeline) if model is spec else None
        for count in steps:
            self.bar.set_description(f"{name}, {count} step{'s' * (count > 1)}")
            before = self.bar.n
            try:
                self._model_cell(facts | {"steps": count}, series, kept, 2 * count + weight)
            except Exception as error:
                self._fail(name, count, error)
            self.bar.update(self.protocol.n * (2 * count + weight) - (self.bar.n - before))

    def _model_cell(self, row: dict[str, Any], series: generate.Series, setup: str | None, unit: int) -> None:
        """A cell that is drawn, or read where it was drawn before. A pipeline that was handed over as an object, which
        has no `setup`, is always drawn: what it does is not in its weights and settings alone."""
        key = self._key(row, series.sampler, setup)
        cell = None if setup is None else self.store.cell(key, self.protocol.n)

        def draw(first: int, count: int) -> Drawn:
            drawn = cell.read(first, count) if cell else None
            if drawn is None:
                drawn = series.draw(row["steps"], first, count)
                if cell:
                    cell.keep(first, drawn)
            self.bar.update(unit * min(count * self.team.count, self.protocol.n - first))
            return drawn

        with cell or nullcontext():
            self._cell(row, draw, series.sampler)
        if cell and self.team.main:
            self.store.finish(records.grid_name(self.facts | row).removesuffix(".png"), cell)

    def _key(self, row: Mapping[str, Any], sampler: generate.Sampler, setup: str | None) -> dict[str, Any]:
        """All that a picture's bits depend on."""
        told = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(sampler) if f.name != "pipeline"}
        libraries = {name: self.facts["versions"].get(name) for name in LIBRARIES}
        named = {k: row[k] for k in ("weights", "steps", "dtype")} | {k: self.facts[k] for k in ("batch", "device")}
        return {"setup": setup, "prompts": self.tools.prompts.key, "sampler": told, "libraries": libraries} | named

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

    def _cell(
        self, row: dict[str, Any], draw: Callable[[int, int], Drawn], sampler: generate.Sampler | None = None
    ) -> None:
        """Has this process's share of the pictures looked at, and the main process make the row."""
        row = self.facts | row
        if (done := self.team.tell(self.book.find(row))) is not None:
            self.rows.append(done)
            return
        n, batch = self.protocol.n, self.settings.batch
        measured, evaluations = Pass(self.tools), 0
        shown: dict[int, Tensor] = {}
        with self.team.alike():
            for first in self.team.share(range(0, n, batch)):
                drawn = draw(first, min(batch, n - first))
                measured.add(first, drawn.pictures)
                evaluations += drawn.evaluations
                if first < self.settings.grid:
                    shown[first] = drawn.pictures
        parts = self.team.gather((measured.kept, shown, evaluations))
        with self.team.alike():
            if self.team.main:
                for kept, pictures, _ in parts:
                    measured.kept |= kept
                    shown |= pictures
                nfe = {"nfe": round(sum(part[2] for part in parts) / n, 4)} if sampler else {}
                row = self._written(row | nfe, measured, [shown[first] for first in sorted(shown)], sampler)
        self.rows.append(self.team.tell(row))

    def _written(
        self, row: dict[str, Any], measured: Pass, shown: list[Tensor], sampler: generate.Sampler | None
    ) -> dict[str, Any]:
        found = measured.figures()
        row |= row_of(found, self.tools)
        if sampler is not None:
            row |= self._timed(sampler, row["steps"])
        self.book.grid(row, torch.cat(shown)[: self.settings.grid] if shown else None)
        self.book.units(row, found)
        return self.book.add(row)

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
        self.failed.append(Failure(name, steps, reason(error)[:300]))
