"""The report's curves, drawn by matplotlib: as SVG whose colours follow the page's light or dark mode, or as PNG files.

matplotlib draws in placeholder colours; in the SVG each is replaced by a CSS variable of the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SERIES = 8
# placeholder in the SVG -> (CSS variable, colour in a PNG)
COLOURS = {
    "#111213": ("--ink", "#1c2024"),
    "#717273": ("--mute", "#60646c"),
    "#d1d2d3": ("--line", "#e2e4e8"),
    "#a00001": ("--s1", "#2f6fde"),
    "#a00002": ("--s2", "#e0592a"),
    "#a00003": ("--s3", "#0f9b76"),
    "#a00004": ("--s4", "#9250d6"),
    "#a00005": ("--s5", "#c2930a"),
    "#a00006": ("--s6", "#d6408f"),
    "#a00007": ("--s7", "#2d9dc4"),
    "#a00008": ("--s8", "#76808f"),
}
INK, MUTE, LINE = list(COLOURS)[:3]


@dataclass(frozen=True)
class Point:
    """One measured cell of a curve: x, y, the interval of y (or None), and how many steps it took."""

    x: float
    y: float
    low: float | None
    high: float | None
    steps: int


@dataclass(frozen=True)
class Curve:
    """A model's points, and which of the page's colours it has (0 is the first)."""

    name: str
    points: Sequence[Point]
    colour: int


def _series_colour(index: int) -> str:
    return f"#a0000{index % SERIES + 1}"


def quality_by_steps(
    curves: Sequence[Curve], ylabel: str, floors: Sequence[tuple[str, float]], *, log: bool, better: str | None
):
    """A figure of a quality against the number of steps. floors: (name, y) of levels that are no models."""
    figure, axes = _figure(f"{ylabel} ({better} is better)" if better else ylabel)
    ticks = sorted({p.steps for c in curves for p in c.points})
    for curve in curves:
        _draw(axes, curve, log=log)
    _floors(axes, floors)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps")
    _finish(axes, log)
    return figure


def quality_by_cost(
    curves: Sequence[Curve], ylabel: str, floors: Sequence[tuple[str, float]], xlabel: str, *, front: bool
):
    """A figure of a distance against what it costs. front: draw that of cells which no other beats in both."""
    figure, axes = _figure(f"{ylabel} (low and left is better)")
    for curve in curves:
        _draw(axes, curve, line=0.35)
        for p in curve.points:
            axes.annotate(
                str(p.steps),
                (p.x, p.y),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color=_series_colour(curve.colour),
            )
    best = pareto([(p.x, p.y) for c in curves for p in c.points]) if front else []
    if len(best) > 1:
        dashes = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3)), "drawstyle": "steps-post"}
        axes.plot(*zip(*best, strict=True), **dashes, zorder=1, label="Pareto front")
    _floors(axes, floors)
    xs = [p.x for c in curves for p in c.points]
    if max(xs) > 8 * min(xs):
        axes.set_xscale("log")
        _plain(axes.xaxis)
    axes.set_xlabel(xlabel)
    _finish(axes, log=True)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that none beats in both (lower is better), by rising x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def _figure(title: str):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTE, labelsize=9, length=0, pad=5)
    axes.xaxis.label.set_color(MUTE)
    axes.xaxis.label.set_size(9.5)
    return figure, axes


def _draw(axes, curve: Curve, line: float = 1.0, log: bool = False) -> None:
    points = sorted(curve.points, key=lambda p: p.x)
    x, y, colour = [p.x for p in points], [p.y for p in points], _series_colour(curve.colour)
    if points and all(p.low is not None and p.high is not None for p in points):
        low = [max(p.low, p.y / 4) if log else p.low for p in points]  # a logarithmic axis has no room for 0
        axes.fill_between(x, low, [p.high for p in points], color=colour, alpha=0.16, linewidth=0)
    axes.plot(x, y, color=colour, linewidth=2.2 * max(line, 0.5), alpha=line, solid_capstyle="round", zorder=2)
    axes.plot(x, y, color=colour, linestyle="", marker="o", markersize=5.5, zorder=3, label=curve.name)


def _floors(axes, floors: Sequence[tuple[str, float]]) -> None:
    for i, (name, y) in enumerate(floors):  # one at the left, one at the right: close levels keep their names apart
        axes.axhline(y, color=MUTE, linewidth=1, linestyle=(0, (1, 2.5)), zorder=1)
        x, side = ((0.01, "left"), (1, "right"))[i % 2]
        where = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(name, (x, y), **where, ha=side, fontsize=8, color=MUTE)


def _finish(axes, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        _plain(axes.yaxis)
    axes.margins(x=0.07, y=0.12)


def _plain(axis) -> None:
    """Few, plain numbers on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(LogLocator(base=10, subs=(), numticks=1))


def svg(figure, label: str) -> str:
    """A figure as inline SVG: scales with its box, coloured by the page, with a label for screen readers."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    text = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", text)
    text = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
        lambda m: f'<svg viewBox="{m[1]}" role="img" aria-label="{label}">',
        text,
        count=1,
    )
    stem = re.sub(r"\W+", "-", label)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{stem}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{stem}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{stem}-\1"', text).replace("xlink:href", "href")
    for placeholder, (variable, _) in COLOURS.items():
        text = text.replace(placeholder, f"var({variable})")
    return text


def png(make: Callable[[], object], file: Path) -> None:
    """A figure as a PNG file on white, with its legend."""
    from matplotlib.colors import to_hex

    figure = make()
    legend = figure.axes[0].legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="best")
    for artist in [*figure.findobj(), *legend.findobj()]:
        for kind in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            getter, setter = getattr(artist, f"get_{kind}", None), getattr(artist, f"set_{kind}", None)
            if getter is None or setter is None:
                continue
            try:
                known = COLOURS.get(to_hex(getter()))
            except (ValueError, TypeError):
                continue
            if known:
                setter(known[1])
    figure.savefig(file, dpi=180, facecolor="white")
