"""The models of the page: students of one recipe that differ only in their training seed are drawn as one.

models_of(found)[1]     # Model("lcm-lora", 1, ("lcm-lora-0", "lcm-lora-1", "lcm-lora-2"))
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from stepdistill.evaluation.cells import Cell, Measured
from stepdistill.evaluation.figures import Difference, Ratio
from stepdistill.evaluation.report import plots


@dataclass(frozen=True)
class Model:
    """A model of the page.

    Attributes:
        number: its index on the page, which determines colour and mark. members: the rows' models; several if they are
            trainings of one with other seeds.
    """

    name: str
    number: int
    members: tuple[str, ...]

    @property
    def colour(self) -> int:
        """The number of its CSS variable, from 1; 0 is for real images."""
        return self.number % plots.SERIES + 1

    @property
    def mark(self) -> str:
        """The CSS class of its mark in legends and tables."""
        return f"m{self.number // plots.SERIES % len(plots.MARKS)}"


def over_seeds(found: Sequence[Measured | Difference | Ratio]) -> Measured:
    """Returns a value with its interval; of several, one per training seed, their mean with their range."""
    values = [each.value for each in found]
    ends = (min(values), max(values)) if len(found) > 1 else (found[0].low, found[0].high)
    return Measured(sum(values) / len(values), *ends)


def models_of(found: Sequence[Cell]) -> list[Model]:
    """Returns the models in order of appearance, without the rows of real images."""
    names = list(dict.fromkeys(cell.model for cell in found if cell.steps > 0))
    family = {member: (stem, members) for stem, members in _seeded(found).items() for member in members}
    own = dict.fromkeys(family.get(name, (name, (name,))) for name in names)
    return [Model(name, number, members) for number, (name, members) in enumerate(own)]


def _seeded(found: Sequence[Cell]) -> dict[str, tuple[str, ...]]:
    """Returns the students named NAME-SEED by NAME, if there are several of one method and teacher.

    SEED is the one that the rows record. Rows without it are of a seed only if the numbers count from 0: LoRAs may also
    be numbered by rank or step count.
    """
    groups: dict[tuple[str, str | None, str | None], dict[int, Cell]] = {}
    for cell in found:
        parts = re.fullmatch(r"(.+)-(\d+)", cell.model)
        if parts and cell.steps > 0 and cell.method != "teacher":
            groups.setdefault((parts[1], cell.method, cell.teacher), {})[int(parts[2])] = cell
    names, stems = {cell.model for cell in found}, Counter(stem for stem, *_ in groups)
    return {
        stem: tuple(cell.model for _, cell in sorted(group.items()))
        for (stem, *_), group in groups.items()
        if len(group) > 1 and stem not in names and stems[stem] == 1 and _of_seeds(group)
    }


def _of_seeds(group: dict[int, Cell]) -> bool:
    recorded = {number: cell.train_seed for number, cell in group.items()}
    if set(recorded.values()) == {None}:
        return sorted(recorded) == list(range(len(recorded)))
    return all(number == seed for number, seed in recorded.items())
