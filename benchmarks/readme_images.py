"""Makes the README's two images from a benchmark's folder.

    python benchmarks/readme_images.py benchmarks/results/steps --steps 1 4 50 --out docs/images

grid.png has a row for each model and step count, with the same prompt and noise in each column, and the prompts below;
quality_latency.png has the report's two plots side by side.
"""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageDraw, ImageFont

from stepdistill.cli.command import guard, parse
from stepdistill.errors import InputError
from stepdistill.evaluation.cells import of_run, read_run
from stepdistill.evaluation.records import grid_name
from stepdistill.evaluation.report import write_report

GAP, LABEL, LINE, INK, MUTE = 10, 170, 17, "#1c2024", "#60646c"


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/readme_images.py."""

    folder: tyro.conf.Positional[Path]
    """A folder written by `stepdistill bench` or `stepdistill demo`."""
    out: Path = Path("docs/images")
    """Folder for the images."""
    steps: tuple[int, ...] = (1, 2, 4, 50)
    """Step counts in the grid, for models that have them."""


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns the sans font that comes with matplotlib, so it is available wherever the plots are."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def grid(folder: Path, steps: tuple[int, ...]) -> Image.Image:
    """Returns an image with a row for real images and for each cell, labelled with model, step count and distance, and
    the columns' prompts."""
    grids, rows = of_run(folder) / "grids", []
    for cell in read_run(folder):
        strip = grids / grid_name(cell.row)
        if (cell.steps in steps or cell.model == "real") and strip.is_file():
            rows.append((cell, Image.open(strip).convert("RGB")))
    if not rows:
        raise InputError(f"grid: got {folder}, which has no images at {' '.join(map(str, steps))} steps; give others")
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
        draw.text((GAP * 2, middle - 20), cell.model, INK, font(15, bold=True), anchor="lm")
        if cell.steps:
            draw.text((GAP * 2, middle + 2), f"{cell.steps} step{'s' * (cell.steps > 1)}", INK, font(14), anchor="lm")
        draw.text((GAP * 2, middle + 23 * bool(cell.steps)), f"FD {cell.fd:.1f}", MUTE, font(13), anchor="lm")
    top = 3 * GAP + (height + GAP) * len(rows)
    for line in (line for lines in wrapped for line in lines):
        draw.text((LABEL, top), line, MUTE, font(13))
        top += LINE
    return sheet


def curves(folder: Path) -> Image.Image:
    """Returns the report's two PNG plots side by side."""
    page = write_report(folder)
    pictures = [Image.open(page.with_name(name)).convert("RGB") for name in ("quality.png", "latency.png")]
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    sheet.paste(pictures[0], (0, 0))
    sheet.paste(pictures[1], (pictures[0].width, 0))
    return sheet


def main(config: Config) -> None:
    """Writes both images."""
    config.out.mkdir(parents=True, exist_ok=True)
    grid(config.folder, config.steps).save(config.out / "grid.png", optimize=True)
    curves(config.folder).save(config.out / "quality_latency.png", optimize=True)
    print(f"{config.out / 'grid.png'}\n{config.out / 'quality_latency.png'}")


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
