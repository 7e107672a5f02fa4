"""Renders a matplotlib figure as inline SVG whose colours follow the page's light or dark mode, or as a PNG file.

Figures use placeholder colours; in the SVG each is replaced by a CSS variable of the page.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

SERIES = 8
COLUMNS = 3  # of a legend in a PNG
# placeholder in the SVG -> (CSS variable, colour in a PNG)
COLOURS = {
    "#111213": ("--ink", "#1c2024"),
    "#717273": ("--mute", "#60646c"),
    "#d1d2d3": ("--line", "#e2e4e8"),
    "#a00001": ("--s1", "#2f6fde"),
    "#a00002": ("--s2", "#e0592a"),
    "#a00003": ("--s3", "#0f9b76"),
    "#a00004": ("--s4", "#9250d6"),
    "#a00005": ("--s5", "#b98a06"),
    "#a00006": ("--s6", "#d6408f"),
    "#a00007": ("--s7", "#2590b8"),
    "#a00008": ("--s8", "#76808f"),
}
INK, MUTE, LINE = list(COLOURS)[:3]


def svg(figure, label: str) -> str:
    """Returns a figure as inline SVG that scales with its box, is coloured by the page, and has an ARIA label."""
    import matplotlib

    target = io.StringIO()
    fonts = {"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}
    with matplotlib.rc_context(fonts), _any_character():
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(target.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    stem = f"p{hashlib.sha256(label.encode()).hexdigest()[:8]}-"  # keeps ids unique among the figures of a page
    for part in root.iter():
        part.tag = part.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in part.attrib.items()}
        part.attrib.clear()
        part.attrib.update({name: _of_page(name, value, stem) for name, value in attributes.items()})
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _of_page(name: str, value: str, stem: str) -> str:
    """Adapts an attribute to the page: its font, its colours, and unique ids."""
    if name == "id":
        return stem + value
    if name == "href" and value.startswith("#"):
        return f"#{stem}{value[1:]}"
    value = re.sub(r"url\(#([^)]+)\)", rf"url(#{stem}\1)", value)
    value = re.sub(r'font: (?:[^;"]*? )?([\d.]+)px [^;"]*', r"font-size: \1px", value)
    for placeholder, (variable, _) in COLOURS.items():
        value = value.replace(placeholder, f"var({variable})")
    return value


def png(make: Callable[[], object], file: Path) -> None:
    """Writes a figure with its legend to a PNG file, on white."""
    from matplotlib.colors import to_hex
    from matplotlib.patheffects import withStroke

    figure = make()
    for text in figure.axes[0].texts:  # the page's CSS does the same
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
    entries = list(zip(*figure.axes[0].get_legend_handles_labels(), strict=True))
    by_row = [entry for column in range(COLUMNS) for entry in entries[column::COLUMNS]]  # matplotlib fills columns
    look = {"loc": "outside lower center", "ncols": COLUMNS, "frameon": False, "fontsize": 8.5}
    legend = figure.legend(*zip(*by_row, strict=True), **look)
    for text in legend.get_texts():
        text.set(parse_math=False, color=INK)
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
    with _any_character():
        figure.savefig(file, dpi=180, facecolor="white", bbox_inches="tight", pad_inches=0.15)


@contextmanager
def _any_character() -> Iterator[None]:
    """Ignores characters missing from matplotlib's font: a browser has other fonts, a PNG shows a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield
