"""The benchmark: every model at every step count, on the same prompts and the same noise, one row per cell.

    results = evaluate("avatars,scheduler=ddim", "avatars-2k", steps=(1, 2, 4, 8, 50), out="out/bench")

Cells that are complete are not measured again, and cached batches are not generated again. If a cell fails, this is
reported and the others finish. Under `accelerate launch` all processes generate images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepdistill import holds, provenance
from stepdistill.errors import InputError
from stepdistill.evaluation import departures, records
from stepdistill.evaluation.bench import Bench, Failure
from stepdistill.evaluation.metrics import Instruments, prepare
from stepdistill.evaluation.pictures import Store
from stepdistill.evaluation.progress import ReferenceBar, progress_bar, say
from stepdistill.evaluation.protocols import Protocol, load_protocol
from stepdistill.evaluation.settings import Settings
from stepdistill.evaluation.spec import as_models, plan_of
from stepdistill.processes import Processes
from stepdistill.quiet import quiet

STEPS = (1, 2, 4, 8, 50)


@dataclass(frozen=True)
class Results:
    """The outcome of a benchmark.

    Attributes:
        rows: the requested cells, in order, floor rows first. failed: those that could not be measured.
        folder: of results.jsonl; None if nothing was written, and in all processes but the main one.
        store: the generated images. main: whether this is the process that writes; true for a single process.
    """

    rows: list[dict[str, Any]]
    failed: list[Failure] = field(default_factory=list)
    folder: Path | None = None
    store: Store | None = None
    main: bool = True


def evaluate(
    pipeline: Any,
    protocol: str | Path | Protocol = "avatars-2k",
    steps: Sequence[int] | None = None,
    *,
    out: str | Path | None = None,
    n: int | None = None,
    seed: int | Sequence[int] | None = None,
    settings: Settings | None = None,
    instruments: Instruments | None = None,
    command: str | None = None,
) -> Results:
    """Measures one or several models. If several processes were launched, each must call it with the same arguments.

    Args:
        pipeline: a SPEC, a ModelSpec, a loaded diffusers pipeline, a sequence of SPECs, or a mapping
            name -> any of these.
        protocol: a name, a .yaml file, or a Protocol. steps: step counts, 1 or more each; by default the model's own,
            else the protocol's, else STEPS.
        out: the folder of results.jsonl and the grids; rows already there are kept and not measured again, except for
            times taken on another device or with other settings.
        n: overrides the protocol's; another n is another protocol, with another hash.
        seed: overrides the protocol's; with several, each model has one row per seed.
        instruments: override those that the protocol names. command: to record; by default the process's own.

    Raises:
        InputError: bad steps or seeds, an unknown protocol, too few prompts, a bad SPEC, or a folder with something
            else, with rows of another protocol, or that another process is writing to.
        OSError: the results cannot be written, for lack of space or permission. Completed cells are kept.
    """
    settings = settings or Settings()
    team = Processes.found(settings.device)
    settings = dataclasses.replace(settings, progress=settings.progress and team.main)
    protocol = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    seeds = check_seeds(protocol.seed if seed is None else seed)
    protocol = dataclasses.replace(protocol, seed=seeds[0], n=protocol.n if n is None else n)
    plan = plan_of(as_models(pipeline), None if steps is None else check_steps(steps), protocol.steps or STEPS)
    if out is not None:
        records.check_folder(out)
    for line in departures.of_steps(plan, protocol, steps is not None) if settings.progress else ():
        say(line)
    # The bar counts network evaluations, guidance's included, plus `weight` per image for the metrics.
    weight = 4
    total = protocol.n * len(seeds) * sum(2 * s + weight for _, _, counts in plan for s in counts)
    for turn in (True, False) if instruments is None else ():  # the main process computes statistics, the others read
        with team.alike(), closing(ReferenceBar(settings.progress)) as progress:
            if team.main is turn:
                instruments = prepare(protocol, device=settings.device, batch=settings.batch_of(), progress=progress)
    with (
        progress_bar(total, settings.progress) as bar,
        quiet(),
        Store(settings.keep, out) as store,
        ExitStack() as held,
    ):
        with team.alike():
            command = command or provenance.command()
            place = records.create_folder(out) if team.main and out is not None else None
            if place is not None:  # before its rows are read: none are added by another process from then on
                held.enter_context(holds.claimed(place))
            bench = Bench(protocol, instruments, settings, command, place, bar, team, store, seeds)
        bench.real()
        for name, model, counts in plan:
            bench.model(name, model, counts, weight, explicit_steps=steps is not None)
        troubles = team.gather((store.broken, store.why_not))
        if team.main and not bench.failed:  # a failed cell may be resumed
            store.clear()
    store.broken = sum(broken for broken, _ in troubles)
    store.why_not = next((why for _, why in troubles if why), None)
    return Results(bench.rows, bench.failed, bench.book.folder, store, team.main)


def check_seeds(seed: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the seeds in order, without duplicates.

    Raises:
        InputError: none, or one that is not an integer.
    """
    seeds = (seed,) if isinstance(seed, int) else tuple(seed)
    if not seeds or any(not isinstance(s, int) for s in seeds):
        raise InputError(f"seed: got {' '.join(map(str, seeds)) or 'none'}; allowed: whole numbers; try 0 1 2")
    return tuple(dict.fromkeys(seeds))


def check_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """Returns the step counts in order, without duplicates.

    Raises:
        InputError: none, or one below 1.
    """
    if not steps or any(not isinstance(s, int) or s < 1 for s in steps):
        raise InputError(f"steps: got {' '.join(map(str, steps)) or 'none'}; allowed: 1 or more each; try 1 2 4 8 50")
    return tuple(dict.fromkeys(steps))
