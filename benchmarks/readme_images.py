"""Makes the README's two images from a benchmark's folder.

    python benchmarks/readme_images.py benchmarks/results/students --out docs/images

grid.png has a row for each of --rows, with the same prompt and noise in each column, and the prompts below; quality.png
has the report's plots of --plots side by side.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageDraw, ImageFont

from stepdistill.cli.command import guard, parse
from stepdistill.errors import InputError
from stepdistill.evaluation.cells import of_run, read_run
from stepdistill.evaluation.records import grid_name
from stepdistill.evaluation.report import inline
from stepdistill.evaluation.report.curves import curves

GAP, LABEL, LINE, INK, MUTE = 10, 170, 17, "#1c2024", "#60646c"


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/readme_images.py."""

    folder: tyro.conf.Positional[Path]
    """A folder written by `stepdistill bench` or `stepdistill demo`."""
    out: Path = Path("docs/images")
    """Folder for the images."""
    rows: tuple[str, ...] = (
        "teacher:50", "teacher:4", "lcm-lora-0:4", "progressive-lora-0:4", "add-lora-0:4", "ladd-lora-0:4",
        "teacher:1", "lcm-lora-0:1", "progressive-lora-0:1", "add-lora-0:1", "ladd-lora-0:1",
    )  # fmt: skip
    """Rows of the grid, MODEL:STEPS."""
    plots: tuple[str, ...] = ("FD by steps", "CMMD by steps")
    """Titles of the report's plots."""


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns the sans font that comes with matplotlib, so it is available wherever the plots are."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def grid(folder: Path, wanted: tuple[str, ...]) -> Image.Image:
    """Returns an image with a row for each MODEL:STEPS, labelled with model, step count and distance, and the columns'
    prompts. Models that differ in the training seed alone have one label."""
    grids, cells = of_run(folder) / "grids", {f"{cell.model}:{cell.steps}": cell for cell in read_run(folder)}
    strips = {name: grids / grid_name(cell.row) for name, cell in cells.items()}
    if missing := [name for name in wanted if name not in strips or not strips[name].is_file()]:
        raise InputError(f"--rows: got {missing[0]}; allowed: {', '.join(n for n in strips if strips[n].is_file())}")
    rows = [(cells[name], Image.open(strips[name]).convert("RGB")) for name in wanted]
    width, height = rows[0][1].size
    count = width // height
    prompts = json.loads((grids / "prompts.json").read_text())[:count]
    wrapped = [textwrap.wrap(f"{i}  {prompt}", 2 * width // 15) for i, prompt in enumerate(prompts, 1)]
    text = sum(map(len, wrapped)) * LINE + 2 * GAP
    sheet = Image.new("RGB", (LABEL + width + GAP, (height + GAP) * len(rows) + 3 * GAP + text), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(count):
        draw.text((LABEL + i * height + height // 2, GAP), str(i + 1), MUTE, font(13), anchor="mm")
    for i, (cell, strip) in enumerate(rows):
        top = 2 * GAP + i * (height + GAP)
        sheet.paste(strip, (LABEL, top))
        middle = top + height // 2
        draw.text(
            (GAP * 2, middle - 20), re.sub(r"-lora-\d+$", "-lora", cell.model), INK, font(15, bold=True), anchor="lm"
        )
        if cell.steps:
            draw.text((GAP * 2, middle + 2), f"{cell.steps} step{'s' * (cell.steps > 1)}", INK, font(14), anchor="lm")
        draw.text((GAP * 2, middle + 23 * bool(cell.steps)), f"FD {cell.fd:.1f}", MUTE, font(13), anchor="lm")
    top = 3 * GAP + (height + GAP) * len(rows)
    for line in (line for lines in wrapped for line in lines):
        draw.text((LABEL, top), line, MUTE, font(13))
        top += LINE
    return sheet


def plots(folder: Path, titles: tuple[str, ...]) -> Image.Image:
    """Returns some of the report's plots side by side."""
    drawn = curves(read_run(folder))
    if missing := [title for title in titles if title not in drawn]:
        raise InputError(f"--plots: got {missing[0]!r}; allowed: {', '.join(drawn)}")
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / f"{i}.png" for i in range(len(titles))]
        for title, file in zip(titles, files, strict=True):
            inline.png(drawn[title], file)
        pictures = [Image.open(file).convert("RGB") for file in files]
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (sum(p.width for p in pictures[:i]), 0))
    return sheet


def main(config: Config) -> None:
    """Writes both images."""
    config.out.mkdir(parents=True, exist_ok=True)
    for name, image in (("grid", grid(config.folder, config.rows)), ("quality", plots(config.folder, config.plots))):
        image.save(config.out / f"{name}.png", optimize=True)
        print(config.out / f"{name}.png")


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
