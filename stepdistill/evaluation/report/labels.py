"""Places names and numbers in a plot where they cover the fewest points and other labels.

room = Room(axes, points, levels)
room.number(x, y, "4", colour)
room.level(y, "real")
"""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.evaluation.report.inline import MUTE

SIZE = 8.0  # of the text, in points
LONGEST = 32  # characters of a name
AROUND = ((5, 5), (-5, 5), (5, -5), (-5, -5), (0, 7), (0, -7), (8, 0), (-8, 0), (11, 10), (-11, 10), (11, -10))
RADIUS = 4.0  # of a point's mark
Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


class Room:
    """Places labels in a plot whose axis limits are final, and tracks the occupied areas."""

    def __init__(self, axes, points: Sequence[tuple[float, float]], levels: Sequence[float] = ()) -> None:
        axes.figure.draw_without_rendering()  # lays the axes out
        self.axes, self.scale = axes, 72 / axes.figure.dpi
        places = [self._place(x, y) for x, y in points]
        self.taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
        frame = axes.get_window_extent()
        self.left, self.right = frame.x0 * self.scale, frame.x1 * self.scale
        heights = [self._place(axes.get_xlim()[0], y)[1] for y in levels]
        self.taken += [(self.left, y - 0.5, self.right, y + 0.5) for y in heights]

    def number(self, x: float, y: float, text: str, colour: str) -> None:
        """Writes a point's label next to it."""
        at, width = self._place(x, y), _width(text)
        boxes = [_beside(at, dx, dy, width) for dx, dy in AROUND]
        best = min(range(len(boxes)), key=lambda i: (self._covered(boxes[i]), i))
        self.taken.append(boxes[best])
        left, bottom, right, top = boxes[best]
        middle = ((left + right) / 2 - at[0], (bottom + top) / 2 - at[1])
        self._write(text, (x, y), "data", middle, colour, ha="center", va="center")

    def level(self, y: float, text: str) -> None:
        """Writes a horizontal line's name above or below it, at its left or right end."""
        text = shortened(text)
        width, at = _width(text), self._place(self.axes.get_xlim()[0], y)[1]
        ends = [(x, side, up) for up in (3, -3 - SIZE) for x, side in ((self.right, 1), (self.left, 0))]
        boxes = [  # each box includes the line, so that no other line lies between it and its name
            (x - width * side, min(at + up, at + 1), x + width * (1 - side), max(at + up + SIZE, at - 1))
            for x, side, up in ends
        ]
        best = min(range(len(boxes)), key=lambda i: (self._covered(boxes[i]), i))
        self.taken.append(boxes[best])
        _, side, up = ends[best]
        where = self.axes.get_yaxis_transform()
        self._write(text, (side, y), where, (0, up), MUTE, ha=("left", "right")[side], va="bottom")

    def _write(self, text: str, xy, coordinates, offset, colour: str, **align: str) -> None:
        self.axes.annotate(
            text, xy, xycoords=coordinates, xytext=offset, textcoords="offset points", fontsize=SIZE, color=colour,
            parse_math=False, annotation_clip=False, in_layout=False, **align,
        )  # fmt: skip

    def _place(self, x: float, y: float) -> tuple[float, float]:
        across, up = self.axes.transData.transform((x, y))
        return across * self.scale, up * self.scale

    def _covered(self, box: Box) -> float:
        """Returns the occupied area that a box would cover, plus a penalty for extending beyond the axes."""
        out = max(0.0, self.left - box[0]) + max(0.0, box[2] - self.right)
        return sum(_overlap(box, other) for other in self.taken) + SIZE * out


def shortened(name: str) -> str:
    """Truncates a name to the length that fits into a plot."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _beside(at: tuple[float, float], dx: float, dy: float, width: float) -> Box:
    """Returns a label's box at an offset from a point, on the side that the offset points to."""
    left = at[0] + dx - width * (0.0 if dx > 0 else 1.0 if dx < 0 else 0.5)
    bottom = at[1] + dy - SIZE * (0.0 if dy > 0 else 1.0 if dy < 0 else 0.5)
    return left, bottom, left + width, bottom + SIZE


def _width(text: str) -> float:
    return 0.62 * SIZE * len(text)


def _overlap(a: Box, b: Box) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0
