"""The report says what the rows say, escapes what others wrote, needs nothing from outside, refuses what is broken."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.evaluation import plots
from stepdistill.evaluation.records import Book
from stepdistill.evaluation.report import write_report
from stepdistill.evaluation.summary import cells, columns, read_folder, verdicts

EVIL = 'a <script>alert(1)</script> hat & "more" | {{ 7*7 }}'
COMMON = {
    "protocol": "tiny", "protocol_hash": "abc123", "n": 5, "seed": 0, "fd_extractor": "Pools", "clip_model": "towers",
    "device": "a CPU", "command": "stepdistill bench --model 'x=<b>'", "versions": {"torch": "2"}, "commit": "c0ffee",
}  # fmt: skip


def row(model: str, steps: int, fd: float, ms: float | None, **more):
    timing = (
        {"text": 1.0, "denoiser_step": 2.0, "decode": 3.0, "total_p50": ms, "total_p90": ms, "batch": 1} if ms else None
    )
    figures = {"fd": fd, "fd_low": fd * 0.9, "fd_high": fd * 1.1, "clip_score": 30.0, "attribute_accuracy": 0.9}
    return (
        COMMON | figures | {"model": model, "steps": steps, "nfe": steps, "latency_ms": timing, "weights": model} | more
    )


ROWS = [
    row("real", 0, 2.0, None, method="floor"),
    row("teacher", 1, 100.0, 10.0, method="teacher"),
    row("teacher", 50, 20.0, 400.0, method="teacher"),
    row("student <i>", 1, 30.0, 8.0, method="lcm"),
    row("student <i>", 4, 25.0, 40.0, method="lcm"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    book = Book(path, "abc123", "tiny")
    book.prompts([EVIL, "a cat"])
    for i, each in enumerate(ROWS):
        book.grid(each, torch.full((2, 3, 8, 8), 40 * i, dtype=torch.uint8))
        book.add(each)
    write_report(path)
    return path


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action") and v]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(folder):
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    return reader


def test_what_others_wrote_is_escaped(folder, page):
    assert "script" not in page.tags and "b" in page.tags and "i" not in page.tags
    assert EVIL in page.text and "student <i>" in page.text
    markdown = (folder / "report.md").read_text()
    assert "<script>" not in markdown and "<i>" not in markdown and "&lt;script&gt;" in markdown


def test_the_page_needs_nothing_from_outside(folder, page):
    assert all(link.startswith(("data:", "#")) for link in page.links) and page.links
    text = (folder / "report.html").read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text) and "default-src 'none'" in text
    outside = set(re.findall(r"https?://[^\s\"'<]+", text)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not outside


def test_the_page_has_the_protocol_figures_curves_and_grids(page):
    for said in ("tiny", "abc123", "FD-Pools", "it is not FID", "25.0", "22.5–27.5", "90.0 %", "c0ffee"):
        assert said in page.text
    assert page.tags.count("svg") == 4 and page.tags.count("img") == 5 and len(page.ids) == len(set(page.ids))


def test_light_and_dark_and_small_screens_are_provided_for(folder):
    text = (folder / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text and "max-width: 640px" in text and "width=device-width" in text
    assert not set(plots.COLOURS) & set(re.findall(r"#[0-9a-f]{6}", text[text.index("<svg") :]))


def test_markdown_has_a_row_a_cell_and_its_pictures_exist(folder):
    markdown = (folder / "report.md").read_text()
    assert sum(line.startswith("| ") for line in markdown.splitlines()) == 1 + len(ROWS)
    files = re.findall(r"\]\(([^)]+)\)", markdown)
    assert len(files) == 2 + len(ROWS) and all((folder / name).is_file() for name in files)


def test_the_headline_is_the_students_best_few_steps_against_the_teachers_longest():
    (said,) = verdicts(cells(ROWS))
    assert said["model"] == "student <i>" and said["steps"] == "4 steps"
    assert said["stats"] == [
        ("25.0", "FD, where the teacher has 20.0 at 50 steps"),
        ("1.25×", "the teacher’s distance at 50 steps"),
        ("10.0×", "faster than the teacher at 50 steps"),
    ]


def test_without_a_teacher_nothing_is_compared_and_with_two_each_student_is_held_against_its_own(tmp_path):
    students = [row("a", 4, 30.0, 8.0, method="lora"), row("b", 4, 20.0, 8.0, method="lcm")]
    assert verdicts(cells(students)) == []
    book = Book(tmp_path, "abc123", "tiny")
    for each in students:
        book.add(each)
    page = write_report(tmp_path).read_text()
    assert "the teacher" not in page and 'class="stats"' not in page
    teachers = [row("sd", 50, 10.0, 400.0, method="teacher", spec="sd,scheduler=ddim"),
                row("xl", 50, 5.0, 800.0, method="teacher", spec="xl")]  # fmt: skip
    mine = [row("of-xl", 4, 10.0, 80.0, method="lcm", teacher="xl"), row("of-none", 4, 20.0, 80.0, method="lcm")]
    said = {each["model"]: each["stats"] for each in verdicts(cells(teachers + mine))}
    assert said["of-xl"][0] == ("10.0", "FD, where xl has 5.0 at 50 steps")
    assert said["of-none"][-1] == ("5.0×", "faster than sd at 50 steps")


def test_seeds_are_averaged_into_one_cell():
    found = cells([row("m", 4, 10.0, 5.0), row("m", 4, 20.0, 5.0, seed=1)])
    assert len(found) == 1 and found[0].fd == 15.0 and found[0].seeds == 2


def test_a_column_without_a_figure_is_a_dash():
    cell = cells([row("m", 4, 10.0, None, clip_score=None, attribute_accuracy=None)])[0]
    shown = columns(cell)
    assert shown["ms"] == shown["CLIP"] == shown["attributes"] == "–" and shown["FD"] == "10.0"


def test_the_pareto_front_is_what_none_beats_in_both():
    assert plots.pareto([(1, 9), (2, 5), (3, 6), (4, 5), (5, 1), (1, 10)]) == [(1, 9), (2, 5), (5, 1)]
    assert plots.pareto([]) == []


def test_a_bench_without_latency_or_prompts_is_reported_too(tmp_path):
    book = Book(tmp_path, "abc123", "tiny")
    book.add(row("m", 2, 10.0, None, clip_score=None, attribute_accuracy=None))
    text = write_report(tmp_path).read_text()
    assert text.count("<svg ") == 1 and "The same seeds" not in text


def test_folders_that_are_no_benchmark_are_refused_in_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "results.jsonl" in error
    for content, words in (("", "empty"), ("{broken", "line 1"), ('{"a": 1}\n', "no benchmark row")):
        (tmp_path / "results.jsonl").write_text(content)
        with pytest.raises(InputError, match=words):
            read_folder(tmp_path)
    rows = [json.dumps(row("m", 1, 1.0, None)), json.dumps(row("m", 1, 1.0, None, protocol_hash="other"))]
    (tmp_path / "results.jsonl").write_text("\n".join(rows))
    with pytest.raises(InputError, match=r"abc123.*other.*cannot be compared"):
        read_folder(tmp_path)


def test_the_report_command_prints_the_table_and_where_the_page_is(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "bench")  # as in a demo's folder
    for place, page in ((folder, folder), (tmp_path, tmp_path / "bench")):
        assert cli.main(["report", str(place)]) == 0
        said = capsys.readouterr().out
        assert str(page / "report.html") in said.replace("\n", "") and "teacher" in said and "FD-Pools" in said
