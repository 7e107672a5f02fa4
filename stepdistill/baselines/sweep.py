"""Comparison of runs that differ in one setting: a table, a plot, sweep.json."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from stepdistill.baselines.base import BaselineConfig, first_word
from stepdistill.errors import InputError
from stepdistill.training.from_yaml import spelled
from stepdistill.typed import built, parse_yaml

COLOURS = {"teacher": "#6b7280", "control": "#d97706", "student": "#2563eb"}
SPLIT = {"batch_size", "gradient_accumulation"}  # free on resume only if their product stays the same
OWN = ("out", "config", "quick", "dry_run")  # flags of the sweep as a whole


def parse_over(spec: str, kind: type[BaselineConfig]) -> tuple[str, list]:
    """The flag and the values of `FLAG=A,B,C`, or of `FLAG=A;B;C` if there are commas within a value.

    Raises:
        InputError: no such flag, no values, or a value that is no YAML.
    """
    name, _, values = spec.partition("=")
    flag = name.strip().replace("-", "_")
    texts = [text.strip() for text in values.split(";" if ";" in values else ",")]
    if flag in OWN or flag not in {field.name for field in dataclasses.fields(kind)} or not all(texts):
        example = f"{kind.SWEEP[0]}={','.join(map(str, kind.SWEEP[1][:1]))}"
        raise InputError(f"--over: got {spec}; allowed: a flag and its values, as in {example}; or with ; between them")
    return flag, [None if text.lower() == "none" else parse_yaml(text.encode(), "--over", spec) for text in texts]


def variants(config: BaselineConfig, flag: str, values: Sequence) -> dict[object, BaselineConfig]:
    """The configuration with each value of a flag, by value; each has a folder of its own within `out`.

    Args:
        values: as in a YAML file.

    Raises:
        InputError: a value is there twice, or of another type, or the configuration with it does not pass its check.
    """
    found: dict[object, BaselineConfig] = {}
    for value in values:
        changed = built(type(config), spelled({flag: value}, type(config)), "--over", config)
        value = getattr(changed, flag)
        if value in found:
            raise InputError(f"--over: got {flag}={shown(value)} twice; allowed: each once; drop one")
        place = re.sub(r"[/\\]", "-", f"{flag}-{shown(value)}")
        found[value] = dataclasses.replace(changed, out=config.out / place)
        found[value].check()
    return found


def shown(value: object) -> str:
    """A value of a flag as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def take_over(done: BaselineConfig, other: BaselineConfig) -> None:
    """Links what one run has trained into another's folder, if their settings for it are equal; existing files stay.

    If links cannot be created, it is trained again.
    """
    measured = {"results.json", "run.json", "generations.md", *done.DRAWN}
    for place in sorted(done.out.iterdir()) if done.out.is_dir() else ():
        link = other.out / place.name
        if place.name in measured or link.exists():
            continue
        if _part_settings(done, place.name) == _part_settings(other, place.name):
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                link.symlink_to(os.path.relpath(place, link.parent), target_is_directory=place.is_dir())


def _part_settings(config: BaselineConfig, name: str) -> dict:
    run = config.shared if first_word(name) in ("teacher", "control", "answers") else config
    record = run.part(name).record() | {"out": name}
    return {key: value for key, value in record.items() if key not in config.FREE - SPLIT}


def points(records: Mapping[object, Mapping]) -> list[dict]:
    """For each value: the primary figure of teacher, control and student (mean and each seed), their other figures'
    means, their parameters by network, and the gaps closed."""
    rows = []
    for value, record in records.items():
        row: dict = {"value": json.loads(json.dumps(value, default=str))}
        for role in COLOURS:
            of_role = [r for r in record["rows"] if r["role"] == role]
            each = {name: [r["figures"][name] for r in of_role] for name in (of_role[0]["figures"] if of_role else ())}
            if of_role:
                row[role] = {
                    "mean": statistics.fmean(each[record["figure"]]),
                    "seeds": each.pop(record["figure"]),
                    "other_figures": {name: statistics.fmean(values) for name, values in each.items()},
                    "parameters": {r["name"]: r["parameters"] for r in of_role},
                }
        rows.append(row | {"gap_closed": record["gap_closed"]})
    return rows


def write_sweep(out: Path, flag: str, records: Mapping[object, Mapping]) -> Path:
    """Writes sweep.json and sweep.png, prints the table, and returns the JSON's path. `records`: of runs, by value."""
    from rich.console import Console
    from rich.table import Table

    from stepdistill.evaluation.records import write_record
    from stepdistill.training.processes import on_cpu

    first = next(iter(records.values()))
    rows = points(records)
    record = {"method": first["method"], "flag": flag, "figure": first["figure"], "n": first["n"], "points": rows}
    write_record(out / "sweep.json", record, "cpu" if on_cpu() else "cuda")
    plot(rows, list(records), flag, first, out / "sweep.png")
    times = [name for name in rows[0]["student"]["other_figures"] if name.endswith("_ms")]
    extra_columns = ("student's parameters", *(f"its {name.replace('_', ' ')}" for name in times))
    table = Table(flag.replace("_", " "), *COLOURS, "gap closed", *extra_columns,
                  title=f"{first['method']}: {first['figure']} over {first['n']}, mean of seeds")  # fmt: skip
    for value, row in zip(records, rows, strict=True):
        means = (f"{row[role]['mean']:.4g}" if role in row else "–" for role in COLOURS)
        gaps = ("–" if gap is None else f"{gap:.1%}" for gap in row["gap_closed"].values())
        sizes = (f"{count:,}" for count in row["student"]["parameters"].values())
        rest = (f"{row['student']['other_figures'][name]:.4g}" for name in times)
        table.add_row(shown(value), *means, ", ".join(gaps), ", ".join(sizes), *rest)
    Console().print(table)
    return out / "sweep.json"


def plot(rows: list[dict], values: Sequence, flag: str, record: Mapping, file: Path) -> None:
    """Plots the primary figure against the setting: the mean over seeds, and each seed as a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    for role, colour in COLOURS.items():
        kept = [(x, row[role]) for x, row in zip(places, rows, strict=True) if role in row]
        style = "--" if role == "teacher" else "-"
        axes.plot([x for x, _ in kept], [y["mean"] for _, y in kept], style, color=colour, label=role, linewidth=1.8)
        for x, y in kept if role != "teacher" else []:
            axes.plot([x] * len(y["seeds"]), y["seeds"], ".", color=colour, alpha=0.55)
    axes.set_xticks(list(places), [f"{v:g}" if type(v) in (int, float) else shown(v) for v in values])
    axes.set(xlabel=flag.replace("_", " "), ylabel=record["figure"].replace("_", " "))
    axes.set_title(f"{record['method']}, {record['n']}; dots are single seeds", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
