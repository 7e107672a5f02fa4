"""Whatever a results.jsonl contains, the report is a correct page of it, or a one-line error."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from test_report import COMMON, ROWS, Reader, figure, full, row

from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.evaluation.cells import cells, read_folder, read_run
from stepdistill.evaluation.records import Book, grid_name
from stepdistill.evaluation.report import plots, write_report
from stepdistill.evaluation.report.curves import curves
from stepdistill.evaluation.report.families import models_of
from stepdistill.evaluation.report.labels import Room, shortened
from stepdistill.evaluation.report.plots import Axis, Curve, Point
from stepdistill.evaluation.report.tables import as_csv, tables
from stepdistill.evaluation.summary import columns

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
VOID = ("meta", "link", "img", "input")  # tags that are never closed


def page_of(folder: Path, rows) -> Reader:
    """Writes and reads the report of rows; checks that SVGs are XML, tags are closed, and no nan or None is shown."""
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    text = write_report(folder).read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    html = [tag for tag in reader.tags if tag.strip("/") not in VOID]
    assert all(html.count(tag) == html.count(f"/{tag}") for tag in html if not tag.startswith("/"))
    for drawn in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawn)
    assert not re.search(r"\b(nan|NaN|inf|None|undefined)\b", reader.text)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert all((folder / name).is_file() for name in re.findall(r"!\[(?:\\.|[^\]\\])*\]\(([^)]+)\)", markdown))
    assert not re.search(r"\b(nan|inf|None)\b", markdown)
    return reader


def pictures(folder: Path, each, colours: torch.Tensor, height: int, width: int) -> None:
    """Writes a grid of single-colour images."""
    book = Book(None, {})
    book.folder = folder
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    book.grid(each, colours.view(-1, 3, 1, 1).expand(-1, 3, height, width))


def shown(folder: Path) -> list[Image.Image]:
    uris = re.findall(r'<img alt="[^"]*" src="data:image/\w+;base64,([^"]+)"', (folder / "report.html").read_text())
    return [Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB") for uri in uris]


def test_rows_without_a_distance_are_reported_by_what_they_have(tmp_path):
    bare = {"fd": None, "fd_low": None, "fd_high": None, "fd_extractor": None, "attribute_accuracy": None}
    rows = [row("t", 50, 0.0, 400.0, method="teacher") | bare, row("s", 4, 0.0, 40.0, method="lcm") | bare]
    page = page_of(tmp_path, rows)
    assert page.tags.count("svg") == 1 and "CLIP score by steps" in page.text and "30.00" in page.text
    assert "FD-" not in page.text and not (tmp_path / "quality.png").exists()
    bare |= {"clip_score": None}
    page = page_of(tmp_path / "less", [row("s", 4, 0.0, None) | bare])
    assert "svg" not in page.tags and "Curves" not in page.text and page.tags.count("table") == 1


@pytest.mark.parametrize(("value", "scale"), [(0.0, "linear"), (-0.3, "linear"), (0.5, "log")])
def test_an_axis_is_logarithmic_only_where_all_of_it_is_above_zero(value, scale):
    lines = [Curve("m", [Point(1, 90.0, 80.0, 100.0, 1), Point(4, value, value - 1, value + 1, 4)], 0)]
    for plot in (
        plots.quality_by_steps(lines, Axis("FD", log=True), []),
        plots.quality_by_cost(lines, Axis("FD", log=True), [], "ms", front=True),
        plots.quality_by_steps([Curve("m", lines[0].points[:1], 0)], Axis("FD", log=True), [("real", value)]),
    ):
        plot.draw_without_rendering()
        assert plot.axes[0].get_yscale() == scale
        low, high = plot.axes[0].get_ylim()
        assert low < value < 90 < high
    by_cost = plots.quality_by_cost([Curve("m", [Point(0.0, 5, None, None, 1), Point(9, 4, None, None, 2)], 0)],
                                    Axis("FD"), [], "ms", front=False)  # fmt: skip
    assert by_cost.axes[0].get_xscale() == "linear"


def test_negative_distances_and_times_of_zero_are_on_the_page(tmp_path):
    figures = full(20.0, 30.0, -0.0021, 0.5) | {"cmmd": {"value": -0.5, "low": -1.0, "high": 0.25, "n": 5}}
    figures |= {"fd_inf": {"value": -2.0, "low": -4.0, "high": 0.0, "n": 5}}
    zero = row("a", 4, 0.0, 40.0, fd_low=0.0, fd_high=0.0, metrics=full(0.0, 30.0, 0.0, 0.0), train_seconds=0.0)
    rows = [
        row("t", 50, 0.0, 90.0, method="teacher", metrics=figures),
        zero,
        row("b", 4, 1.0, None, train_seconds=60.0),
    ]
    page = page_of(tmp_path, rows)
    for said in ("−0.0021", "−0.50", "−1.00 to 0.25", "−2.0", "−4.0 to 0.0"):
        assert said in page.text, said


def test_a_row_alone_and_floors_alone_are_reported(tmp_path):
    page = page_of(tmp_path / "one", [row("m", 4, 10.0, 5.0)])
    assert page.tags.count("tr") == 2 * len(page_tables(page)) and page.tags.count("svg") == 4
    page = page_of(tmp_path / "floors", ROWS[:1])
    assert "svg" not in page.tags and "real" in page.text and "2.0" in page.text


def page_tables(page: Reader) -> list[str]:
    return [tag for tag in page.tags if tag == "table"]


NAMES = ("<b>\"x\"'</b><script>", "$\\frac$", "$a$ and {{ 7*7 }}", "_hidden", "🦊 模型", "a|b[c](d)", "\\",
         "#a00001 &amp;", 'id="x" url(#y)', "x" * 300, "", " ")  # fmt: skip


def test_a_model_may_have_any_name(tmp_path):
    floors = [row(name, 0, 5.0 + i, None, method="floor") for i, name in enumerate(NAMES)]
    drawn = [row(f"{name}2", 4, 10.0, 5.0, method="teacher") for name in NAMES]
    for each in floors + drawn:
        pictures(tmp_path, each, torch.zeros(2, 3, dtype=torch.uint8), 8, 8)
    page = page_of(tmp_path, floors + drawn)
    assert page.tags.count("script") == 1 and page.tags.count("b") == 7  # the facts
    assert page.tags.count("img") == 2 * 2 * len(NAMES) + 2
    plot = re.search(r"<svg.*?</svg>", (tmp_path / "report.html").read_text(encoding="utf-8"), re.S)[0]
    levels = {part.text for part in ElementTree.fromstring(plot).iter("text")}
    for name in NAMES:
        assert page.text.count(f"{name}2") >= 4 and (shortened(name) in levels or not name.strip())


def test_characters_that_cannot_be_written_are_replaced(tmp_path):
    page = page_of(tmp_path, [row("\ud800 \x1b[31m red", 4, 10.0, None, command="stepdistill \udcff")])
    assert "\N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}[31m red" in page.text


@pytest.mark.parametrize(("count", "height", "width"), [(3, 40, 80), (5, 300, 200), (1, 64, 64), (7, 8, 8), (2, 9, 31)])
def test_pictures_of_any_number_and_shape_are_each_shown_whole(count, height, width, tmp_path):
    colours = torch.arange(count * 3, dtype=torch.uint8).view(count, 3) * 10
    pictures(tmp_path, each := row("m", 4, 10.0, None), colours, height, width)
    page_of(tmp_path, [each])
    found = shown(tmp_path)
    assert len(found) == count
    for picture, colour in zip(found, colours.tolist(), strict=True):
        assert picture.width / picture.height == pytest.approx(width / height, rel=0.02)
        corners = [picture.getpixel(at) for at in ((0, 0), (picture.width - 1, picture.height - 1))]
        assert all(abs(a - b) <= 4 for corner in corners for a, b in zip(corner, colour, strict=True))


def test_a_strip_wider_than_a_picture_may_be_is_shown_in_its_pictures(tmp_path):
    """WebP is limited to 16,383 pixels, and so are many browsers' textures."""
    colours = torch.arange(64 * 3, dtype=torch.uint8).view(64, 3)
    for steps in (1, 4):
        pictures(tmp_path, row("m", steps, 10.0, None), colours, 384, 384)
    strip = Image.open(tmp_path / "grids" / grid_name(row("m", 4, 10.0, None)))
    assert strip.width == 64 * 384 > 16_383
    page = page_of(tmp_path, [row("m", steps, 10.0, None) for steps in (1, 4)])
    found = shown(tmp_path)
    assert len(found) == 2 * 16 and {picture.size for picture in found} == {(384, 384)}
    assert all(abs(a - b) <= 3 for a, b in zip(found[15].getpixel((9, 9)), colours[15].tolist(), strict=True))
    assert "The first 16 of 64 are shown; grids/ has all." in page.text


def test_strips_of_before_they_said_their_number_are_cut_into_squares_or_by_prompts(tmp_path):
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "prompts.json").write_text(json.dumps(["a", "b", "c"]))
    square, wide = row("square", 4, 10.0, None), row("wide", 4, 10.0, None)
    Image.new("RGB", (96 * 5, 96)).save(tmp_path / "grids" / grid_name(square))
    Image.new("RGB", (150 * 3, 96)).save(tmp_path / "grids" / grid_name(wide))
    page_of(tmp_path, [square, wide])
    assert [picture.size for picture in shown(tmp_path)] == [(96, 96)] * 5 + [(150, 96)] * 3


@pytest.mark.parametrize("damage", [b"", b"no picture", None])
def test_grids_that_are_missing_or_broken_leave_the_rest(damage, tmp_path, capsys):
    first, second = row("m", 4, 10.0, None), row("m", 8, 9.0, None)
    for each in (first, second):
        pictures(tmp_path, each, torch.zeros(2, 3, dtype=torch.uint8), 8, 8)
    (tmp_path / "grids" / "prompts.json").write_bytes(b"\xff{" if damage is None else b'{"a": 1}')
    file = tmp_path / "grids" / grid_name(first)
    file.write_bytes(damage) if damage is not None else file.unlink()
    assert page_of(tmp_path, [first, second]).tags.count("img") == 2
    assert ("cannot be shown" in capsys.readouterr().err) is (damage is not None)


def test_what_is_not_finite_was_not_measured(tmp_path):
    nan, infinite = float("nan"), float("inf")
    figures = {"fd": {"value": nan, "low": 1.0, "high": 2.0}, "kid": {"value": 0.5, "low": nan, "high": infinite}}
    rows = [
        row("a", 1, nan, 4.0, fd_low=nan, fd_high=infinite, clip_score=infinite),
        row("b", 2, 3.0, nan, guidance=nan, train_seconds=nan, method="lcm"),
        row("c", 4, 9.0, 5.0, metrics=figures, peak_memory_mb=nan, latency_ms={"total_p50": 4.0}),
    ]
    page = page_of(tmp_path, rows)
    found = {cell.model: cell for cell in read_run(tmp_path)}
    assert set(found["a"].figures) == {"attribute_accuracy"} and found["b"].latency is found["c"].latency is None
    assert set(found["c"].figures) == {"kid"} and found["c"].figures["kid"].half is None
    assert "0.5" in page.text


def test_every_field_may_be_missing_or_is_refused_in_one_line(tmp_path):
    whole = row("m", 4, 10.0, 5.0, metrics=full(10.0, 30.0, 0.1, 0.5), method="lcm", train_seconds=60.0,
                settings={"content": {"prompts": "k"}}, timing={"device": "cpu", "dtype": "float32", "compiled": False},
                attributes={"hat": 0.5}, peak_memory_mb=5.0, dtype="float32",
                scheduler="DDIMScheduler", spec="m", guidance=1.0)  # fmt: skip
    file, needed = tmp_path / "results.jsonl", ("model", "steps", "protocol_hash")
    for name in whole:
        for changed in ({k: v for k, v in whole.items() if k != name}, whole | {name: None}):
            file.write_text(json.dumps(changed) + "\n")
            if name in needed:
                with pytest.raises(InputError, match=r"line 1"):
                    read_folder(tmp_path)
            else:
                assert len(cells(read_folder(tmp_path))) == 1
        for odd in (5, "5", [5], {"a": 5}, True):
            file.write_text(json.dumps(whole | {name: odd}) + "\n")
            try:
                found = cells(read_folder(tmp_path))
            except InputError as error:
                assert "\n" not in str(error) and "line 1" in str(error)
            else:
                assert tables(found) and columns(found) and as_csv([cell.row for cell in found])
    for odd in (
        {"timing": {"repeats": 3}}, {"settings": {"content": "x"}},
        {"latency_ms": whole["latency_ms"] | {"quantiles": {"text": [1]}, "first": "x", "repeats": []}},
    ):  # fmt: skip
        page_of(tmp_path, [whole | odd])
    page_of(tmp_path, [{"model": "m", "steps": 4, "protocol_hash": "h"}])
    page_of(tmp_path, [whole | {"steps": 10**6}, whole | {"steps": 3, "n": None, "seed": None, "metrics": {}}])


def test_odd_fields_of_a_figure_reach_no_printer(tmp_path, capsys):
    """Each field of a figure missing, null, a text, or with the interval's ends swapped: report, gate and compare print
    what is left, and none ends in a traceback."""
    whole = figure(10.0, 1.0) | {"bend": 0.5, "seeds": 1}
    odd = [{k: v for k, v in whole.items() if k != name} for name in whole if name != "value"]
    odd += [whole | {name: value} for name in whole if name != "value" for value in (None, "x", [1])]
    odd += [whole | {"low": 11.0, "high": 9.0}]
    for number, each in enumerate(odd):
        rows = [row(name, 4, 10.0, None, metrics={"fd": each}, seed=seed) | {"n": None}
                for name in ("a", "b") for seed in (0, 1)]  # fmt: skip
        place = tmp_path / str(number)
        place.mkdir()
        page_of(place, rows)
        assert cli.main(["bench", "gate", str(place), "--model", "a", "--max-fd", "11"]) == 0
        known = all(isinstance(each.get(end), float) for end in ("low", "high")) and each["low"] < each["high"]
        code = cli.main(["bench", "compare", str(place), "--model-a", "a", "--model-b", "b"])
        assert code == (0 if known else 2), each
    (tmp_path / "results.jsonl").write_text(
        '{"model": "a", "steps": 1, "protocol_hash": "x", "fd": 3, "fd_low": 4, "fd_high": 2}\n'
    )
    assert cli.main(["bench", "gate", str(tmp_path), "--max-fd", "3"]) == 0
    assert "95 %" not in capsys.readouterr().out.splitlines()[-1]


def test_the_comparer_starts_with_the_first_models_longest_though_others_take_fewer_steps(tmp_path):
    rows = [row("teacher", 50, 10.0, None, method="teacher"), row("s", 1, 12.0, None, method="lcm")]
    for each in rows:
        pictures(tmp_path, each, torch.zeros(2, 3, dtype=torch.uint8), 8, 8)
    page_of(tmp_path, rows)
    assert 'data-left="1" data-right="0"' in (tmp_path / "report.html").read_text()  # strips are ordered by steps


def test_statistics_that_others_made_are_said_to_be(tmp_path):
    foreign = {"settings": {"content": {"statistics": "foreign: …"}}}
    assert "reference foreign statistics" in page_of(tmp_path / "a", [row("m", 4, 9.0, None, **foreign)]).text
    assert "foreign" not in page_of(tmp_path / "b", [row("m", 4, 9.0, None)]).text


def test_no_two_of_many_models_look_alike_and_each_looks_the_same_everywhere():
    rows = [row(f"m{i}", steps, 10.0 + i, 5.0) for i in range(20) for steps in (1, 4)]
    models = models_of(cells(rows))
    assert len({(model.colour, model.mark) for model in models}) == 20
    seen = []
    for make in curves(cells(rows)).values():
        marks = [line for line in make().axes[0].lines if line.get_label().startswith("m")]
        seen.append({line.get_label(): (line.get_color(), line.get_marker()) for line in marks})
    assert len(seen) == 4 and all(each == seen[0] for each in seen) and len(set(seen[0].values())) == 20


def test_labels_keep_off_points_and_each_other_where_there_is_room():
    from matplotlib.figure import Figure

    axes = Figure(figsize=(4, 3), layout="constrained").add_subplot()
    points = [(0.30, 0.50), (0.33, 0.50), (0.36, 0.50), (0.33, 0.56), (0.70, 0.2)]
    axes.plot(*zip(*points, strict=True), "o")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    room = Room(axes, points, [0.8, 0.82])
    taken = len(room.taken)
    for i, (x, y) in enumerate(points):
        room.number(x, y, str(i), "black")
    room.level(0.82, "upper")
    room.level(0.8, "lower")
    labels = room.taken[taken:]
    assert len(labels) == 7
    for i, a in enumerate(labels):
        for b in [*room.taken[: taken - 2], *labels[:i]]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    assert labels[5][1] > labels[6][3]  # the upper one's name is above it, the lower one's below


@pytest.mark.parametrize(
    "folder", sorted(file.parent for file in RESULTS.glob("*/results.jsonl")), ids=lambda f: f.name
)
def test_recorded_runs_are_still_readable(folder):
    found = read_run(folder)
    assert found and all(cell.figures["fd"].half > 0 for cell in found)
    assert curves(found)


def test_a_broken_row_ends_the_command_with_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text(json.dumps(COMMON | {"model": "m", "steps": 4, "fd": "low"}) + "\n")
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "line 1: got fd: low; allowed: a number" in error
