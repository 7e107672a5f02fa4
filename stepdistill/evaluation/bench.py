"""Runs a benchmark: loads each model, generates or reads its images, measures and times them, and writes the rows.

`suite.evaluate` is the entry point. If several processes were launched, each generates and processes its share of the
batches, and the main process computes the figures and writes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import provenance
from stepdistill.errors import InputError
from stepdistill.evaluation import departures, generate, hashes, latency, records, timing
from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.generate import Drawn
from stepdistill.evaluation.measures import METRICS, Metric
from stepdistill.evaluation.metrics import Instruments, Pass, row_of
from stepdistill.evaluation.models import call_of, even_of, fingerprint, guidance_of, load, model_fields
from stepdistill.evaluation.pictures import LIBRARIES, Cell, Store, setup_of
from stepdistill.evaluation.progress import say
from stepdistill.evaluation.protocols import Protocol
from stepdistill.evaluation.settings import Settings, room
from stepdistill.evaluation.spec import ModelSpec
from stepdistill.files import unwritable
from stepdistill.processes import Processes, reason


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured, and the reason in one line."""

    model: str
    steps: int | None
    reason: str


@dataclass(frozen=True)
class Look:
    """A set of images to measure.

    Attributes:
        measured: the pass that receives them. draw: (first, count) -> batch. n, batch: number of images, in all and per
            batch. cell: where they are stored; None if they are not.
    """

    measured: Pass
    draw: Callable[[int, int], Drawn]
    n: int
    batch: int
    cell: Cell | None = None


class Bench:
    """One benchmark run: its rows and its failures.

    Args:
        seeds: noise seeds of the images, one row each. Models are timed at the first seed only.
    """

    def __init__(
        self, protocol: Protocol, tools: Instruments, settings: Settings, command: str, out: str | Path | None,
        bar: Any, team: Processes, store: Store, seeds: Sequence[int],
    ) -> None:  # fmt: skip
        self.protocol, self.tools, self.settings, self.bar = protocol, tools, settings, bar
        self.team, self.store, self.seeds = team, store, seeds
        self.rows: list[dict[str, Any]] = []
        self.failed: list[Failure] = []
        self.printed: set[str] = set()
        self.facts = {
            "protocol": protocol.name, "protocol_hash": protocol.hash(dict(tools.content)),
            "n": protocol.n, "settings": protocol.settings() | {"content": dict(tools.content)},
            "batch": settings.batch_of(), "channels_last": settings.channels_last,
            "device": provenance.device_name(settings.device), "versions": provenance.versions(),
            "commit": provenance.commit(), "command": command,
        }  # fmt: skip
        self.book = records.Book(out, self.facts)
        self.book.prompts(list((tools.prompts.prompts or [])[: settings.grid]))

    def real(self) -> None:
        """Measures the floor of real images, unless they are the reference itself."""
        content = dict(self.tools.content)
        held_out = "reference" not in content or content["reference"] != content.get("prompts")
        if self.settings.floor and self.tools.prompts.pictures is not None and held_out:
            self._floor("real", self.tools.prompts.key[:16], lambda pictures: pictures, self.settings.batch_of())

    def _floor(self, name: str, weights: str, change: Callable[[Tensor], Tensor], batch: int) -> None:
        row = {"model": name, "method": "floor", "weights": weights, "steps": 0, "nfe": 0, "seed": None, "batch": batch}
        prompts = self.tools.prompts
        prompts.check(self.protocol.n)

        def draw(first: int, count: int) -> Drawn:
            return Drawn(change(prompts.pictures(first, first + count)))

        self._cell(row, [Look(Pass(self.tools), draw, self.protocol.n, batch)])

    def model(self, name: str, model: Any, steps: Sequence[int], weight: int, *, explicit_steps: bool) -> None:
        """Measures all cells of one model. If it fails, the other models are still measured.

        Args:
            weight: network evaluations that the metrics of an image count for in the bar.
            explicit_steps: whether the user named the step counts; default ones beyond a scheduler's time grid are left
                out, and that is reported.
        """
        spec = model if isinstance(model, ModelSpec) else ModelSpec(getattr(model, "name_or_path", "") or name, name)
        self.bar.set_description(f"{name}: loading")
        try:
            with self.team.alike():
                sampler, weights = self._loaded(spec, None if model is spec else model)
        except Exception as error:
            self._note(name, None, error)
            self.bar.update(self.protocol.n * len(self.seeds) * sum(2 * count + weight for count in steps))
            return
        pipeline = sampler.pipeline
        if line := departures.of_loaded(name, sampler, self.protocol):
            self._say(line)
        batch = self.settings.batch_of(sampler.side)
        most = None if spec.timesteps else generate.most_steps(pipeline)
        if not explicit_steps and most and min(steps) <= most < max(steps):
            beyond = [count for count in steps if count > most]
            self._say(f"{name}: skipped at {' and '.join(map(str, beyond))} steps; its scheduler has {most}")
            self.bar.update(self.protocol.n * len(self.seeds) * sum(2 * count + weight for count in beyond))
            steps = [count for count in steps if count <= most]
        if (
            self.settings.floor
            and self.tools.prompts.pictures is not None
            and getattr(pipeline, "vae", None) is not None
        ):
            self._reconstruction(name, pipeline, batch)
        facts = {"model": name, "weights": weights, "setup": setup_of(pipeline, order=False), "batch": batch}
        facts |= model_fields(spec, sampler)
        single = generate.Series(sampler, self.tools.prompts.prompts, self.protocol.n, batch)
        kinds = sorted({(metric.each, metric.prompts) for metric in self._several()})
        series = {1: single} | {each: single.several(each, prompts) for each, prompts in kinds}
        setup_hash = setup_of(pipeline) if model is spec else None
        for count, seed in itertools.product(steps, self.seeds):
            at = f"{count} step{'s' * (count > 1)}" + f", seed {seed}" * (len(self.seeds) > 1)
            self.bar.set_description(f"{name}, {at}")
            before = self.bar.n
            seeded = {each: each_of.seeded(seed) for each, each_of in series.items()}
            try:
                if most and count > most:
                    raise InputError(f"steps: got {count}; allowed: 1 to {most}, the time grid of its scheduler")
                self._model_cell(facts | {"steps": count, "seed": seed}, seeded, setup_hash, 2 * count + weight)
            except Exception as error:
                self._fail(name, count, error)
            self.bar.update(self.protocol.n * (2 * count + weight) - (self.bar.n - before))

    def _say(self, line: str) -> None:
        """Prints a line once: a model whose SPEC depends on the step count is loaded in several parts."""
        if self.settings.progress and line not in self.printed:
            say(line)
        self.printed.add(line)

    def _loaded(self, spec: ModelSpec, pipeline: Any) -> tuple[generate.Sampler, str]:
        """Returns a model's sampler and the hash of its weights.

        Args:
            pipeline: one that was passed as an object; None to load the SPEC's.

        Raises:
            InputError: the model is missing, does not load, generates images of another size than the protocol
                compares, or needs prompts but there are none.
        """
        if pipeline is None:
            pipeline = load(spec, device=self.settings.device, sampler=self.protocol.sampler)
        if self.settings.channels_last:
            latency.channels_last(pipeline)
        guidance, even = guidance_of(spec, pipeline, self.protocol.guidance), even_of(spec, pipeline)
        call = call_of(spec, pipeline)
        sampler = generate.Sampler(pipeline, guidance, self.protocol.seed, even, call, self.protocol.negative_prompt)
        self.protocol.check_side(spec.name, sampler.side)
        if sampler.takes_prompts and self.tools.prompts.prompts is None:
            raise InputError(f"model {spec.name}: got a set without prompts; allowed: a protocol with prompts")
        return sampler, fingerprint(pipeline)

    def _model_cell(
        self, row: dict[str, Any], series: Mapping[int, generate.Series], setup: str | None, unit: int
    ) -> None:
        """Measures a cell; images that were generated before are read. Those of a pipeline passed as an object, which
        has no `setup`, are always generated: its weights and settings alone do not determine them.

        Args:
            series: by the number of images per prompt.
        """
        name = records.grid_name(self.facts | row).removesuffix(".png")
        looks, cells = [], {}
        with ExitStack() as stack:
            for each, own in series.items():
                cell = None
                if setup is not None:
                    cell = stack.enter_context(self.store.cell(self._key(row, own, setup), own.n))
                    cells[name if each == 1 else f"{name}-{each}"] = cell
                draw = self._drawer(own, row["steps"], cell, unit if each == 1 else 0)
                looks.append(Look(Pass(self.tools, each), draw, own.n, own.batch, cell))
            sampler = series[1].sampler
            self._cell(row, looks, sampler if sampler.seed == self.seeds[0] else None)
        wrote = self.team.gather([cell.begun for cell in cells.values()])  # from here on no process holds its cells
        if self.team.main:
            for (part, cell), begun in zip(cells.items(), zip(*wrote, strict=True), strict=True):
                self.store.finish(part, cell, wrote=any(begun))

    def _several(self) -> list[type[Metric]]:
        """The metrics that need several images per prompt."""
        listed = [METRICS[name] for name in self.tools.metrics]
        return [metric for metric in listed if metric.each > 1 and not metric.lacks(self.tools)]

    def _drawer(self, series: generate.Series, steps: int, cell: Cell | None, unit: int) -> Callable[[int, int], Drawn]:
        """Returns a function that generates a batch of a series, or reads it if it was generated before."""

        def draw(first: int, count: int) -> Drawn:
            drawn = cell.read(first, count) if cell else None
            if drawn is None:
                drawn = series.draw(steps, first, count)
                if cell:
                    cell.keep(first, drawn)
            self.bar.update(unit * min(count * self.team.count, series.n - first))
            return drawn

        return draw

    def _key(self, row: Mapping[str, Any], series: generate.Series, setup: str | None) -> dict[str, Any]:
        """Everything that determines an image bit for bit."""
        sampler = series.sampler
        settings = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(sampler) if f.name != "pipeline"}
        libraries = {name: self.facts["versions"].get(name) for name in LIBRARIES}
        named = {k: row[k] for k in ("weights", "steps", "dtype")}
        named |= {"batch": series.batch, "device": self.facts["device"]}
        each = {"each": series.each, "offset": series.offset} if series.each > 1 else {}
        prompts = self.tools.prompts.key
        return {"setup": setup, "prompts": prompts, "sampler": settings, "libraries": libraries} | named | each

    def _reconstruction(self, name: str, pipeline, batch: int) -> None:
        key = hashes.of_module(pipeline.vae)[:16]
        if any(row["weights"] == key for row in self.rows):
            return
        done = {row["weights"]: row["model"] for row in self.book.rows if row["model"].startswith("reconstruction")}
        title = done.get(key) or (f"reconstruction ({name})" if done else "reconstruction")
        try:
            self._floor(title, key, lambda pictures: generate.reconstruct(pipeline, pictures), batch)
        except Exception as error:
            self._fail(title, 0, error)

    def _cell(self, row: dict[str, Any], looks: Sequence[Look], sampler: generate.Sampler | None = None) -> None:
        """Measures this process's share of the images; the main process makes the row. If the row exists already,
        nothing is generated, and it is timed again only if its times were taken with other settings than requested.

        Args:
            sampler: timed if times are requested.
        """
        row = self.facts | row
        how = timing.requested(self.settings, row["dtype"]) if sampler else None
        known = self.book.find(row, how)
        shown, evaluations = [], 0
        if not self.team.broadcast(known is not None):
            (shown, evaluations), *_ = [self._look(look) for look in looks]
        with self.team.alike():
            if self.team.main and known is None:
                row = {"nfe": round(evaluations / self.protocol.n, 4)} | row
                row = self._written(row, [look.measured for look in looks], shown, self._timed(sampler, row, how))
            elif self.team.main:
                times = {} if records.timed(known, how) else self._timed(sampler, row, how)
                row = self.book.add(known | times) if times else self.book.again(known)
        self.rows.append(self.team.broadcast(row))

    def _look(self, look: Look) -> tuple[list[Tensor], int]:
        """Feeds all batches to the metrics; the main process then holds what every process kept.

        Returns:
            Images for the grid, and the number of network evaluations, of all processes.
        """
        batch, evaluations = look.batch, 0
        shown: dict[int, Tensor] = {}
        with self.team.alike(), room(batch):
            for first in self.team.share(range(0, look.n, batch)):
                drawn = look.draw(first, min(batch, look.n - first))
                look.measured.add(first, drawn.pictures)
                evaluations += drawn.evaluations
                if first < self.settings.grid:
                    shown[first] = drawn.pictures
            if look.cell:
                look.cell.flush()
        parts = self.team.gather((look.measured.kept, shown, evaluations))
        if self.team.main:
            for kept, pictures, _ in parts:
                look.measured.kept |= kept
                shown |= pictures
        return [shown[first] for first in sorted(shown)], sum(part[2] for part in parts)

    def _written(
        self, row: dict[str, Any], passes: Sequence[Pass], shown: list[Tensor], times: Mapping[str, Any]
    ) -> dict[str, Any]:
        found: dict[str, Figure] = {}
        for measured in passes:
            found |= measured.figures()
        row = row | row_of(found, self.tools) | times
        self.book.grid(row, torch.cat(shown)[: self.settings.grid] if shown else None)
        self.book.units(row, found)
        return self.book.add(row)

    def _timed(self, sampler: generate.Sampler | None, row: Mapping[str, Any], how: dict[str, Any] | None) -> dict:
        """Returns a row's times; none if not requested, or if timing fails: the figures are worth keeping without."""
        if how is None:
            return {}
        prompts = list(self.tools.prompts.prompts or [])[:64]
        try:
            return timing.take(sampler, prompts, row["steps"], how, self.facts["command"])
        except Exception as error:
            self._fail(row["model"], row["steps"], error)
            return {}

    def _fail(self, name: str, steps: int | None, error: Exception) -> None:
        """Records what could not be measured. A full or unwritable disk is not the model's fault and ends the run."""
        if unwritable(error):
            raise error
        self._note(name, steps, error)

    def _note(self, name: str, steps: int | None, error: Exception) -> None:
        failure = Failure(name, steps, reason(error)[:300])
        if failure not in self.failed:  # a model whose SPEC depends on the step count is loaded in several parts
            self.failed.append(failure)
