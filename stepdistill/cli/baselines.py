"""Baselines: classifier, language-model and architecture distillation.

stepdistill baselines list
stepdistill baselines run hinton --quick
stepdistill baselines sweep hinton --over temperature=1,2,4,8,16
stepdistill baselines sweep minitron --over "student=prune:layers=0.5;prune:layers=0.25,neurons=0.4"
stepdistill baselines eval out/hinton
stepdistill baselines eval out/bk-sdm --pictures 2000
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from stepdistill import files
from stepdistill.baselines import BASELINES, get, results
from stepdistill.baselines.base import BaselineConfig
from stepdistill.baselines.shown import show
from stepdistill.cli.training import parse_training
from stepdistill.errors import InputError
from stepdistill.training.from_yaml import from_yaml, spelled
from stepdistill.typed import built

VERBS = ("list", "run", "sweep", "eval")


def main(argv: Sequence[str]) -> None:
    """Runs `stepdistill baselines` with these arguments."""
    verb, rest = (argv[0], list(argv[1:])) if argv else ("list", [])
    if {"-h", "--help"} & {verb, *rest[:1]}:
        print(f"{__doc__}\nNames: {', '.join(BASELINES)}. `stepdistill baselines run NAME --help` lists its flags.")
    elif verb == "list" and rest:
        raise InputError(f"baselines list: got {' '.join(rest)}; allowed: nothing behind it; drop the rest")
    elif verb == "list":
        list_all()
    elif verb in VERBS and not rest:
        allowed = "a run's folder" if verb == "eval" else f"a name: {', '.join(BASELINES)}"
        raise InputError(f"baselines {verb}: got nothing behind it; allowed: {allowed}")
    elif verb == "run":
        finish(flags(rest[0], rest[1:]))
    elif verb == "sweep":
        sweep(rest[0], rest[1:])
    elif verb == "eval":
        measure(Path(rest[0]), rest[1:])
    else:
        raise InputError(f"baselines: got {verb!r}; allowed: {', '.join(VERBS)}")


def list_all() -> None:
    """Prints all baselines, one per line."""
    from rich.console import Console
    from rich.table import Table

    table = Table("baseline", "paper", "description")
    for name, baseline in BASELINES.items():
        table.add_row(name, baseline.paper, baseline.what)
    Console().print(table)


def flags(name: str, argv: Sequence[str], **defaults: object) -> BaselineConfig:
    """Parses the flags of a baseline; --quick replaces the defaults by its small values, `defaults` either."""
    kind = get(name).config
    small = kind(quick=True, **kind.QUICK) if "--quick" in argv else kind()
    base = built(kind, spelled(defaults, kind), "--over", small)
    return parse_training(kind, kind.__doc__, list(argv), default=base)


def finish(config: BaselineConfig) -> dict:
    """Runs a baseline, prints its table, writes results.json; returns its content, or {} for a dry run."""
    from stepdistill.training.processes import world

    out, record = Path(config.out), config.record()
    found = config.run()
    if config.dry_run:
        return {}
    state = world()
    if state.is_main_process:
        file = found.write(out, record)
        files.write(out / "run.json", json.dumps(record, indent=2) + "\n")  # of a complete run, for `eval`
        show(results.read(out))
        print(f"results: {file}")
    state.wait_for_everyone()
    return results.read(out)


def sweep(name: str, argv: Sequence[str]) -> None:
    """Runs a baseline once per value of one flag, `--over flag=a,b,c`, and tabulates the rows. What the flag does not
    affect, such as the teacher, is trained in the first run and linked by the others."""
    from stepdistill.baselines.sweep import parse_over, take_over, variants, write_sweep

    argv = list(argv)
    kind = get(name).config
    flag, values = kind.SWEEP
    if "--over" in argv:
        at = argv.index("--over")
        flag, values = parse_over(" ".join(argv[at + 1 : at + 2]), kind)
        del argv[at : at + 2]
    config = flags(name, argv, **{flag: values[0]})  # its own default may be refused, and is not used
    runs = variants(config, flag, values)
    first, found = next(iter(runs.values())), {}
    for value, run in runs.items():
        if not config.dry_run:
            take_over(first, run)
        found[value] = finish(run)
    if not config.dry_run:
        print(f"sweep: {write_sweep(Path(config.out), flag, found)}")


def measure(out: Path, more: Sequence[str] = ()) -> None:
    """Measures a finished run again, from its weights.

    Args:
        more: flags that change only the measurement, such as --pictures.
    """
    from stepdistill.baselines.learner import ONLY_LOADING
    from stepdistill.training.processes import world

    kind = get(results.read(out)["method"]).config
    if not (out / "run.json").is_file():
        raise InputError(f"baselines eval: got {out}, which has no run.json; allowed: a finished run's folder")
    config = dataclasses.replace(from_yaml(out / "run.json", kind), out=out)
    if more:
        config = _measured_by(config, more)
    token, state = ONLY_LOADING.set(True), world()
    try:
        with ExitStack() as kept:
            for name in kind.DRAWN if state.is_main_process else ():
                kept.enter_context(files.set_aside(out / name))
            state.wait_for_everyone()
            finish(config)
    finally:
        ONLY_LOADING.reset(token)


def _measured_by(config: BaselineConfig, argv: Sequence[str]) -> BaselineConfig:
    """A run's configuration with the flags of another measurement.

    Raises:
        InputError: they would also change what was trained.
    """
    changed = parse_training(type(config), config.__doc__, list(argv), default=config)
    differing = [f.name for f in dataclasses.fields(config) if getattr(changed, f.name) != getattr(config, f.name)]
    if not set(differing) <= set(config.MEASURED):
        flags = ", ".join("--" + name.replace("_", "-") for name in config.MEASURED)
        allowed = f"{flags}, which change only the measurement" if flags else "a run's folder alone; drop the rest"
        raise InputError(f"baselines eval: got {' '.join(argv)} for {config.out}; allowed: {allowed}")
    return changed
