"""The report's curves, drawn with matplotlib. A model has the same colour and mark in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepdistill.evaluation.report.inline import INK, LINE, MUTE, SERIES
from stepdistill.evaluation.report.labels import Room, shortened

MARKS = "os^D"  # of the first eight models, of the next eight, and so on
Level = tuple[str, float]  # name and y of a horizontal reference line


@dataclass(frozen=True)
class Point:
    """One measured cell of a curve: x, y, the interval of y (or None), the step count, and the kind of x: only points
    of one kind share a Pareto front."""

    x: float
    y: float
    low: float | None
    high: float | None
    steps: int
    kind: str = ""


@dataclass(frozen=True)
class Curve:
    """Points of a model, and its index among the page's models, which determines colour and mark. A further curve of
    the same model has no name, and is not in the legend."""

    name: str
    points: Sequence[Point]
    number: int

    @property
    def colour(self) -> str:
        """The placeholder of its colour."""
        return f"#a0000{self.number % SERIES + 1}"

    @property
    def mark(self) -> str:
        """matplotlib's letter for its mark."""
        return MARKS[self.number // SERIES % len(MARKS)]


@dataclass(frozen=True)
class Axis:
    """The y axis.

    Attributes:
        title: of the plot. note: the line below the title. log: whether it is logarithmic if all values are above 0.
        percent: whether it is a share.
    """

    title: str
    note: str = ""
    log: bool = False
    percent: bool = False


def quality_by_steps(curves: Sequence[Curve], axis: Axis, levels: Sequence[Level]):
    """Returns a figure of quality against step count."""
    figure, axes = _figure(axis)
    log = axis.log and _positive(curves, levels)
    for curve in curves:
        _draw(axes, curve, log=log, band=0.8 / max(5, len(curves)))
    ticks = sorted({p.steps for c in curves for p in c.points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("sampling steps")
    _finish(axes, curves, levels, axis, log)
    return figure


def quality_by_cost(curves: Sequence[Curve], axis: Axis, levels: Sequence[Level], cost: str, *, front: bool):
    """Returns a figure of distance against cost. front: mark the Pareto front of each kind of points, the cells that
    none beats in both."""
    figure, axes = _figure(axis)
    log = axis.log and _positive(curves, levels)
    for curve in curves:
        _draw(axes, curve, line=0.35)
    kinds = dict.fromkeys(p.kind for c in curves for p in c.points) if front else ()
    for i, kind in enumerate(kinds):
        best = pareto([(p.x, p.y) for c in curves for p in c.points if p.kind == kind])
        dashes = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3)), "drawstyle": "steps-post"}
        rings = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.2}
        axes.plot(*zip(*best, strict=True), **dashes, **rings, zorder=4, label="" if i else "Pareto front")
    xs = [p.x for c in curves for p in c.points]
    if min(xs) > 0 and max(xs) > 8 * min(xs):
        axes.set_xscale("log")
        _plain(axes.xaxis, min(xs), max(xs))
    axes.set_xlabel(f"{cost}; numbers are step counts")
    _finish(axes, curves, levels, axis, log, numbered=True)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that none beats in both coordinates (lower is better), by increasing x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _positive(curves: Sequence[Curve], levels: Sequence[Level]) -> bool:
    """Whether all values fit a logarithmic axis: an unbiased distance may be below 0."""
    return all(y > 0 for y in [p.y for c in curves for p in c.points] + [y for _, y in levels])


def _figure(axis: Axis):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(axis.title, loc="left", fontsize=10.5, color=INK, pad=24, parse_math=False)
    placement = {"xycoords": "axes fraction", "xytext": (0, 10), "textcoords": "offset points"}
    axes.annotate(axis.note, (0, 1), **placement, fontsize=8.5, color=MUTE, va="bottom", parse_math=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTE, labelsize=9, length=0, pad=5)
    axes.xaxis.label.set(color=MUTE, size=9)
    return figure, axes


def _draw(axes, curve: Curve, *, line: float = 1.0, log: bool = False, band: float = 0.0) -> None:
    """Draws a curve with its marks. line, band: their opacity."""
    points = sorted(curve.points, key=lambda p: p.x)
    x, y = [p.x for p in points], [p.y for p in points]
    if band and points and all(p.low is not None and p.high is not None for p in points):
        low = [max(p.low, p.y / 4) if log else p.low for p in points]  # a logarithmic axis cannot show 0
        axes.fill_between(x, low, [p.high for p in points], color=curve.colour, alpha=band, linewidth=0)
    axes.plot(x, y, color=curve.colour, linewidth=2.2 * max(line, 0.5), alpha=line, solid_capstyle="round", zorder=2)
    name = "\N{ZERO WIDTH SPACE}" * curve.name.startswith("_") + shortened(curve.name)  # the legend skips names with _
    axes.plot(x, y, color=curve.colour, linestyle="", marker=curve.mark, markersize=5.5, zorder=3, label=name)


def _finish(
    axes, curves: Sequence[Curve], levels: Sequence[Level], axis: Axis, log: bool, *, numbered: bool = False
) -> None:
    """Sets scales and draws levels and labels, once all points are drawn."""
    from matplotlib.ticker import FuncFormatter

    for _, y in levels:
        axes.axhline(y, color=MUTE, linewidth=1, linestyle=(0, (1, 2.5)), zorder=1)
    ys = [p.y for c in curves for p in c.points] + [y for _, y in levels]
    if log:
        axes.set_yscale("log")
        _plain(axes.yaxis, min(ys), max(ys))
    elif axis.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.margins(x=0.07, y=0.12)
    room = Room(axes, [(p.x, p.y) for c in curves for p in c.points], [y for _, y in levels])
    for curve in curves if numbered else ():
        for p in curve.points:
            room.number(p.x, p.y, str(p.steps), curve.colour)
    for name, y in levels:
        room.level(y, name)


def _plain(axis, low: float, high: float) -> None:
    """Puts a few plain numbers on a logarithmic axis, more of them if its range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    subs = (1, 2, 5) if high > 6 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())
