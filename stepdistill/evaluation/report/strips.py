"""A cell's images for the page, one by one, so that a browser can lay them out and compare any two."""

from __future__ import annotations

import base64
import io
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from stepdistill.evaluation.cells import Cell
from stepdistill.evaluation.records import TILE, grid_name

SHOWN = 16  # images of a cell on the page; grids/ has all
SIDE = 1024  # their largest side in pixels


@dataclass(frozen=True)
class Strip:
    """A cell's images.

    Attributes:
        uris: the images as data URIs. ratio: width / height of one. of: number of images, including those not shown.
        pixels: whether they are enlarged small images, to be scaled without smoothing.
    """

    model: str
    steps: int
    uris: Sequence[str]
    ratio: float
    of: int
    pixels: bool


def prompts_of(folder: Path) -> list[str]:
    """Returns the prompts of the images; empty if they were not stored."""
    try:
        found = json.loads((folder / "grids" / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(prompt) for prompt in found] if isinstance(found, list) else []


def strips_of(folder: Path, found: Sequence[Cell]) -> list[Strip]:
    """Returns the existing strips, of each cell's first seed, sorted by step count as on the page."""
    prompts, strips = prompts_of(folder), []
    for cell in found:
        file = folder / "grids" / grid_name(cell.rows[0])
        if file.is_file():
            try:
                with Image.open(file) as picture:
                    strips.append(_strip(cell, picture, len(prompts)))
            except Exception as error:  # Pillow's decoders raise many types; all mean the same
                print(f"report: {file} cannot be shown ({str(error)[:80]})", file=sys.stderr)
    return sorted(strips, key=lambda strip: strip.steps)


def chosen(strips: Sequence[Strip], headlines: Sequence[Mapping], models: Sequence[str]) -> tuple[int, int]:
    """Returns the two strips compared first: the first model's at its largest step count, and the best student's."""
    drawn = [i for i, strip in enumerate(strips) if strip.steps > 0]
    if not drawn:
        return 0, max(0, len(strips) - 1)
    first = min((strips[i].model for i in drawn), key=models.index)
    left = [i for i in drawn if strips[i].model == first][-1]
    if headlines:
        best = min((headline["cell"] for headline in headlines), key=lambda cell: cell.fd)
        for i in drawn:
            if (strips[i].model, strips[i].steps) == (best.model, best.steps):
                return left, i
    return left, next((i for i in drawn if strips[i].model != strips[left].model), drawn[0])


def _strip(cell: Cell, picture: Image.Image, prompts: int) -> Strip:
    count = _count(picture, cell, prompts)
    width, small = picture.width / count, picture.height < 2 * TILE
    edges = [round(i * width) for i in range(min(count, SHOWN) + 1)]
    tiles = (picture.crop((left, 0, right, picture.height)) for left, right in itertools.pairwise(edges))
    uris = [_uri(tile.convert("RGB"), small) for tile in tiles]
    return Strip(cell.model, cell.steps, uris, width / picture.height, count, small)


def _count(picture: Image.Image, cell: Cell, prompts: int) -> int:
    """Returns the number of images in a strip: as recorded in it; for older strips, squares, else one per prompt."""
    recorded = str(picture.info.get("pictures", ""))
    if recorded.isdecimal() and 0 < int(recorded) <= picture.width:
        return int(recorded)
    if picture.width % picture.height == 0:
        return picture.width // picture.height
    return max(1, min(prompts, int(cell.n or prompts), picture.width))


def _uri(tile: Image.Image, small: bool) -> str:
    """Returns an image as a data URI: PNG if small, else WebP."""
    target = io.BytesIO()
    tile.thumbnail((SIDE, SIDE))
    if small:
        tile.save(target, "PNG", optimize=True)
    else:
        tile.save(target, "WEBP", quality=88)
    return f"data:image/{'png' if small else 'webp'};base64,{base64.b64encode(target.getvalue()).decode()}"
