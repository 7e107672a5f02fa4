"""Which blocks a UNet can spare (Li et al. 2023, section 3.1 and algorithm 1), by error added per millisecond saved.

rounds = evolve(Shape.of(unet), measure, saving=0.3)
rounds[-1].shape                                        # the efficient UNet
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill import files
from stepdistill.baselines.architecture.prune import Shape
from stepdistill.errors import InputError
from stepdistill.training.processes import in_turn


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a UNet's call, and the distance of its output from the whole UNet's."""

    ms: float
    distance: float


@dataclass(frozen=True)
class Round:
    """One removal.

    Attributes:
        before: the cost of the UNet that was cut. candidates: the costs without each block. removed: the one removed.
        shape: of what is left.
    """

    before: Cost
    candidates: Mapping[str, Cost]
    removed: str
    shape: Shape


def removals(shape: Shape) -> dict[str, Shape]:
    """Returns the shape without each removable block, by the block's name.

    A block is the attention of a down or up stage, the middle block, or a pair of a stage (the last of the down stage,
    the last but one of the up stage: a skip joins them). The paper removes single blocks, a stock configuration only
    whole stages; the paper's efficient UNet has no attention in the outermost ones. The last cross-attention stays:
    without it the network would ignore the caption.
    """
    found = {}
    stages = shape.stages
    for part, places in (("down", range(stages)), ("up", [stages - 1 - i for i in range(stages)])):
        own = getattr(shape, part)
        for stage in range(stages):
            if own[stage]:
                less = tuple(has and i != stage for i, has in enumerate(own))
                found[f"{part}_blocks.{places[stage]}.attentions"] = dataclasses.replace(shape, **{part: less})
    if shape.mid:
        found["mid_block"] = dataclasses.replace(shape, mid=False)
    for stage, pairs in enumerate(shape.pairs):
        if pairs > 1:
            less = tuple(n - (i == stage) for i, n in enumerate(shape.pairs))
            name = f"down_blocks.{stage} and up_blocks.{stages - 1 - stage}, a pair"
            found[name] = dataclasses.replace(shape, pairs=less)
    return {name: left for name, left in found.items() if any((*left.down, *left.up))}


def evolve(shape: Shape, measure: Callable[[Shape], Cost], saving: float) -> list[Round]:
    """Repeatedly removes the block that adds the least distance per millisecond saved, until a call takes at most
    1 - saving of its initial time. Costs are measured again after each removal.

    Raises:
        InputError: removing all removable blocks does not save as much.
    """
    cost = first = measure(shape)
    rounds: list[Round] = []
    while cost.ms > (1 - saving) * first.ms:
        left = removals(shape)
        candidates = {name: measure(less) for name, less in left.items()}
        faster = {name: c for name, c in candidates.items() if c.ms < cost.ms}
        if not faster:
            most = math.floor(100 * (1 - cost.ms / first.ms)) / 100
            raise InputError(
                f"saving: got {saving:g}; allowed: up to {most:g}, what all blocks that can be spared save here; ask "
                "for less"
            )
        removed = min(faster, key=lambda name: (faster[name].distance - cost.distance) / (cost.ms - faster[name].ms))
        rounds.append(Round(cost, candidates, removed, left[removed]))
        shape, cost = left[removed], candidates[removed]
    return rounds


def kept_rounds(file: Path, settings: Mapping[str, Any], make: Callable[[], list[Round]]) -> list[Round]:
    """Returns the rounds recorded in a file, or makes and records them: timings differ between measurements, and a
    resumed run, and every process of one, must keep the same blocks.

    Raises:
        InputError: the file was written with other settings.
    """
    settings = json.loads(json.dumps(settings))
    with in_turn(file):
        if file.is_file():
            record = json.loads(file.read_text())
            if record["settings"] != settings:
                raise InputError(
                    f"--out: got {file.parent}, whose blocks were chosen with {record['settings']} (now {settings}); "
                    "allowed: the same settings; give another --out"
                )
            return [_round(row) for row in record["rounds"]]
        rounds = make()
        rows = [dataclasses.asdict(round_) for round_ in rounds]
        files.write(file, json.dumps({"settings": settings, "rounds": rows}, indent=2) + "\n")
    return rounds


def _round(row: Mapping[str, Any]) -> Round:
    shape = {name: tuple(v) if isinstance(v, list) else v for name, v in row["shape"].items()}
    candidates = {name: Cost(**cost) for name, cost in row["candidates"].items()}
    return Round(Cost(**row["before"]), candidates, row["removed"], Shape(**shape))


def show(rounds: list[Round]) -> None:
    """Prints the importance of each block in the first round, and the order of removal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("block", "ms saved", "distance added", "per ms", "removed", title="importance of each block")
    before, removed = rounds[0].before, [r.removed for r in rounds]
    for name, cost in rounds[0].candidates.items():
        saved, added = before.ms - cost.ms, cost.distance - before.distance
        order = str(removed.index(name) + 1) if name in removed else ""
        table.add_row(name, f"{saved:.2f}", f"{added:.3g}", f"{added / saved:.3g}" if saved > 0 else "–", order)
    Console().print(table)
