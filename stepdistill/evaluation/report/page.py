"""report.html: one file that asks for nothing from outside, with its script's hash in its content security policy."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stepdistill import files
from stepdistill.errors import InputError
from stepdistill.evaluation.cells import Cell, cells, read_folder
from stepdistill.evaluation.records import TILE, grid_name
from stepdistill.evaluation.report import plots
from stepdistill.evaluation.report.curves import by_model, cost_curves, curves, main_curves
from stepdistill.evaluation.report.markdown import markdown
from stepdistill.evaluation.report.tables import as_csv, cost_table, tables
from stepdistill.evaluation.report.verdicts import gains, verdicts

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Strip:
    """A cell's pictures in a row.

    Attributes:
        colour: number of the model's. uri: the picture itself. count: pictures in it. ratio: of one, width by height.
        pixels: whether they are small pictures enlarged, which stay sharp at any size.
    """

    model: str
    steps: int
    colour: int
    uri: str
    count: int
    ratio: float
    pixels: bool


def write_report(folder: str | Path, *, title: str = "Quality and latency by number of steps") -> Path:
    """Writes report.md, its two PNG plots and report.html into the folder.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder holds no results, or matplotlib or jinja2 is not installed.
    """
    folder = Path(folder)
    rows = read_folder(folder)
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"report: needs {error.name}, which is not installed; pip install 'stepdistill[demo]'"
        ) from error
    found = cells(rows, folder)
    gained = gains(found)
    drawn, cost, said, shown = curves(found), cost_curves(found, gained), verdicts(gained), tables(found)
    prompts, strips = _prompts(folder), _strips(folder, found)
    main = {name: make for name, make in drawn.items() if name in main_curves()}
    others = {name: make for name, make in drawn.items() if name not in main}
    script, costs = (HERE / "page.js").read_text(), cost_table(gained)
    context = {
        "title": title, "first": rows[0], "verdicts": said, "models": by_model(found), "tables": shown,
        "costs": costs if costs.lines else None, "strips": strips, "chosen": _chosen(strips, said), "prompts": prompts,
        "by_steps": [(n, [s for s in strips if s.steps == n]) for n in sorted({s.steps for s in strips})],
        "svgs": _svgs(main), "more_svgs": _svgs(others), "cost_svgs": _svgs(cost),
        "colours": {name: colour for name, colour, _ in by_model(found)},
        "averaged": any(cell.seeds > 1 for cell in found), "timed": "FD by latency" in drawn,
        "commands": list(dict.fromkeys(row["command"] for row in rows if row.get("command"))),
        "seeds": sorted({row["seed"] for row in rows if row.get("seed") is not None}),
        "devices": list(dict.fromkeys(row["device"] for row in rows if row.get("device"))),
        "csv": base64.b64encode(as_csv(rows).encode()).decode(), "style": (HERE / "page.css").read_text(),
        "script": script, "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }  # fmt: skip
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string((HERE / "page.html.j2").read_text()).render(context)
    for file, name in (("quality.png", "FD by steps"), ("latency.png", "FD by latency")):
        if name in drawn:
            plots.png(drawn[name], folder / file)
    more = [table for table in (*shown[1:], costs) if table.lines]
    files.write(folder / "report.md", markdown(title, rows, found, said, more, prompts, "FD by latency" in drawn))
    files.write(folder / "report.html", page)
    return folder / "report.html"


def _svgs(makes: dict) -> list[str]:
    return [plots.svg(make(), name) for name, make in makes.items()]


def _prompts(folder: Path) -> list[str]:
    try:
        found = json.loads((folder / "grids" / "prompts.json").read_text())
    except (OSError, ValueError):
        return []
    return [str(prompt) for prompt in found] if isinstance(found, list) else []


def _strips(folder: Path, found: Sequence[Cell]) -> list[Strip]:
    """The strips that are there, of each cell's first seed."""
    from PIL import Image

    colours = {name: colour for name, colour, _ in by_model(found)}
    strips = []
    for cell in found:
        file = folder / "grids" / grid_name(cell.rows[0])
        if not file.is_file():
            continue
        with Image.open(file) as picture:
            width, height = picture.size
            count = width // height if width % height == 0 else max(1, len(_prompts(folder)))
            uri = _uri(file, picture, small=height < 2 * TILE)
        strips.append(
            Strip(
                cell.model,
                cell.steps,
                colours.get(cell.model, 0),
                uri,
                count,
                width / count / height,
                height < 2 * TILE,
            )
        )
    return sorted(strips, key=lambda strip: strip.steps)  # as the page has them


def _uri(file: Path, picture, *, small: bool) -> str:
    """A strip as it is on the disk, or as WebP where it holds large pictures, which are photographs as a rule."""
    if small:
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    target = io.BytesIO()
    picture.convert("RGB").save(target, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(target.getvalue()).decode()


def _chosen(strips: Sequence[Strip], said: Sequence[dict]) -> tuple[int, int]:
    """The two strips that are compared at first: the first model's longest, and the best student's headline."""
    drawn = [i for i, strip in enumerate(strips) if strip.steps > 0]
    if not drawn:
        return 0, max(0, len(strips) - 1)
    left = [i for i in drawn if strips[i].model == strips[drawn[0]].model][-1]
    if said:
        best = min((verdict["cell"] for verdict in said), key=lambda cell: cell.fd)
        for i in drawn:
            if (strips[i].model, strips[i].steps) == (best.model, best.steps):
                return left, i
    return left, next((i for i in drawn if strips[i].model != strips[left].model), drawn[0])
