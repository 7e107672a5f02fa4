"""The report shows what the rows say, escapes foreign text, needs no external resources, and rejects broken input."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from stepdistill import cli
from stepdistill.errors import InputError
from stepdistill.evaluation.cells import Measured, cells, measured, read_folder
from stepdistill.evaluation.compare import compare
from stepdistill.evaluation.conditions import conditions, unlike
from stepdistill.evaluation.few import too_few
from stepdistill.evaluation.records import Book
from stepdistill.evaluation.report import curves, inline, plots, write_report
from stepdistill.evaluation.report.families import models_of
from stepdistill.evaluation.report.notes import commits_of, notes
from stepdistill.evaluation.report.tables import as_csv, cost_table, machines, tables
from stepdistill.evaluation.report.verdicts import duration, gains
from stepdistill.evaluation.report.verdicts import verdicts as verdicts_of
from stepdistill.evaluation.summary import columns, digits, spread

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


def figure(value: float, half: float, n: int = 5, of: str = "pictures"):
    return {"value": value, "low": value - half, "high": value + half, "n": n, "of": of}


def full(fd: float, clip: float, kid: float, recall: float):
    """The `metrics` of a current row: every figure with its interval."""
    return {"fd": figure(fd, fd / 10), "clip_score": figure(clip, 0.25), "attribute_accuracy": figure(0.9, 0.02),
            "kid": figure(kid, 0.0012), "recall": figure(recall, 0.031, 7, "prompts"),
            "attribute:left hat": figure(0.8, 0.03, 5)}  # fmt: skip


ROWS = [  # the first predates `metrics`
    row("real", 0, 2.0, None, method="floor"),
    row("teacher", 1, 100.0, 10.0, method="teacher", spec="t,scheduler=ddim", metrics=full(100.0, 28.5, 0.05, 0.2)),
    row("teacher", 50, 20.0, 400.0, method="teacher", spec="t,scheduler=ddim", metrics=full(20.0, 31.0, 0.004, 0.7)),
    row(
        "student <i>",
        1,
        30.0,
        8.0,
        method="lcm",
        teacher="t",
        metrics=full(30.0, 29.0, -0.0004, 0.4),
        train_seconds=180.0,
    ),
    row(
        "student <i>",
        4,
        25.0,
        40.0,
        method="lcm",
        teacher="t",
        metrics=full(25.0, 30.0, 0.006, 0.6),
        train_seconds=180.0,
    ),
    row("=1+1", 4, 24.0, 40.0, method="add", teacher="t", metrics=full(24.0, 30.5, 0.005, 0.65), train_seconds=7200.0),
]


def verdicts(found):
    return verdicts_of(gains(found), models_of(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    book = Book(path, {"protocol_hash": "abc123", "protocol": "tiny"})
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
        self.text = self.script = ""
        self.policy = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action") and v]
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.script += data
        else:
            self.text += data

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")


@pytest.fixture(scope="module")
def page(folder):
    reader = Reader()
    reader.feed((folder / "report.html").read_text())
    return reader


def test_what_others_wrote_is_escaped(folder, page):
    assert page.tags.count("script") == 1 and "b" in page.tags and "i" not in page.tags
    assert EVIL in page.text and "student <i>" in page.text and "alert" not in page.script
    markdown = (folder / "report.md").read_text()
    assert "<script>" not in markdown and "<i>" not in markdown and "&lt;script&gt;" in markdown


def test_the_page_needs_nothing_from_outside(folder, page):
    assert all(link.startswith(("data:", "#")) for link in page.links) and page.links
    key = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{key}'" in page.policy and "default-src 'none'" in page.policy
    text = (folder / "report.html").read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    outside = set(re.findall(r"https?://[^\s\"'<]+", text)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not outside


def test_the_page_has_the_protocol_figures_curves_and_grids(page):
    for said in ("tiny", "abc123", "FD-Pools", "it is not FID", "25.0", "22.5–27.5", "90.0 %", "c0ffee"):
        assert said in page.text
    drawn, empty = 2 * len(ROWS), 2  # the comparer's two are filled by the script
    assert page.tags.count("img") == drawn + empty and len(page.ids) == len(set(page.ids))
    assert "tiny, n = 5 per cell, seed 0." in page.text
    assert "5 images from the same prompts and seeds" in page.text and "initial noise" not in page.text
    # four main curves, two more figures, distance by training time, and the gap to the teacher
    assert page.tags.count("svg") == 8


def test_every_figure_stands_there_with_its_interval_and_count(folder, page):
    for text in (page.text, (folder / "report.md").read_text()):
        for value, ends in (("0.0500", "0.0488–0.0512"), ("−0.0004", "−0.0016 to 0.0008"), ("0.200", "0.169–0.231"),
                            ("30.50", "30.25–30.75"), ("24.0", "21.6–26.4"), ("90.0 %", "88.0–92.0"),
                            ("80.0 %", "77.0–83.0")):  # fmt: skip
            assert value in text and ends in text, (value, ends)
        assert "5 images" in text and "7 prompts" in text


def test_the_csv_has_every_row_and_figure_and_no_formulas(page):
    (link,) = (link for link in page.links if link.startswith("data:text/csv"))
    told = list(csv.DictReader(io.StringIO(base64.b64decode(link.partition("base64,")[2]).decode())))
    assert [(r["model"], r["steps"]) for r in told[:-1]] == [(r["model"], str(r["steps"])) for r in ROWS[:-1]]
    assert told[-1]["model"] == "'=1+1"
    for line, source in zip(told, ROWS, strict=True):
        for name, found in measured(source).items():
            shown = [line[f"{name}{part}"] for part in ("", "_low", "_high", "_n")]
            assert shown == ["" if v is None else str(v) for v in (found.value, found.low, found.high, found.n)]
    assert told[0]["kid"] == "" and float(told[3]["kid"]) == -0.0004 and told[2]["latency_ms_total_p50"] == "400.0"


def test_fewer_images_than_features_are_said_to_be_too_few_for_the_distances_order(tmp_path):
    """Of rows that do not record the number of features, those of known extractors."""
    own = ROWS[1] | {"n": 1000, "fd_extractor": "EfficientNet-Lite2"}
    line = "n = 1,000 is below the 1,280 features of EfficientNet-Lite2: FD’s bias differs between models and can turn "
    assert too_few(own).startswith(line) and too_few(own).endswith("rely on KID, or on FD∞ from n = 1,920")
    assert "2,048 features of Inception-0123abcd" in too_few(own | {"fd_extractor": "Inception-0123abcd"})
    for enough in ({"n": 1280}, {"fd_features": 900}, {"fd_extractor": "Pools"}, {"fd": None}, {"n": None}):
        assert too_few(own | enough) is None, enough
    assert too_few(ROWS[1] | {"fd_features": 6}).startswith("n = 5 is below the 6 features of Pools")
    book = Book(tmp_path, {"protocol_hash": "abc123", "protocol": "tiny"})
    for each in ROWS:
        book.add(each | {"fd_features": 6})
    write_report(tmp_path)
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_text().count("n = 5 is below the 6 features of Pools") == 1, name


def test_how_far_an_extrapolated_figure_may_be_off_is_noted_and_in_the_csv():
    bent = [each | {"metrics": full(20.0, 31.0, 0.004, 0.7) | {"fd_inf": figure(18.0, 2.0) | {"bend": bend}}}
            for each, bend in ((ROWS[1], -0.7), (ROWS[2], 0.25))]  # fmt: skip
    _, line = notes(cells([*bent, ROWS[3]]))
    assert "at most 0.7 here, for teacher at 1 step;" in line
    told = list(csv.DictReader(io.StringIO(as_csv([*bent, ROWS[3]]))))
    assert [each["fd_inf_bend"] for each in told] == ["-0.7", "0.25", ""] and len(notes(cells(ROWS))) == 1
    assert "fd_bend" not in told[0]


def test_whose_features_the_figures_are_of_is_noted_and_all_commits_are_named():
    (line,) = notes(cells(ROWS))
    assert line == (
        "FD, KID and recall are of Pools features; CLIP and attributes are of towers embeddings. "
        "Figures of other networks are not comparable."
    )
    rows = [each | {"commit": commit} for each, commit in zip(ROWS, ("aa", "bb+", "aa", None), strict=False)]
    assert commits_of(rows) == "Commits aa, bb+ (+: with uncommitted changes)"
    assert commits_of([{"commit": "aa"}]) == "Commit aa" and commits_of([{}]) == ""


def test_light_and_dark_and_small_screens_are_provided_for(folder):
    text = (folder / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text and "max-width: 640px" in text and "width=device-width" in text
    assert not set(inline.COLOURS) & set(re.findall(r"#[0-9a-f]{6}", text[text.index("<svg") :]))


def test_markdown_has_a_row_a_cell_and_its_pictures_exist(folder):
    markdown = (folder / "report.md").read_text()
    main = markdown[: markdown.index("![quality")]
    assert sum(line.startswith("| ") for line in main.splitlines()) == 1 + len(ROWS)
    files = re.findall(r"\]\(([^)]+)\)", markdown)
    assert len(files) == 2 + len(ROWS) and all((folder / name).is_file() for name in files)


def test_the_headline_is_the_students_few_steps_against_the_teachers_longest_with_what_they_cost():
    said, other = verdicts(cells(ROWS))
    assert said["model"] == "student <i>" and said["steps"] == "4 steps" and other["model"] == "=1+1"
    assert said["stats"] == [
        ("25.0", "FD ± 2.5, the teacher’s 20.0 ± 2.0"),
        ("1.25×", "the teacher’s FD at 50 steps (1.09–1.44): worse"),  # e^±0.141; 5 ± 3.2
        ("−1.00", "CLIP score (−1.35 to −0.65): worse"),  # ± 0.25 √2
        ("0.0", "points of attribute accuracy (−2.8 to 2.8): no difference found"),
        ("10.0×", "faster: 40.0 ms (p90 40.0) against 400.0 ms (p90 400.0)"),
    ]
    assert said["against"] == "against the teacher at 50 steps"
    near = [row("teacher", 50, 20.0, None, method="teacher"), row("s", 2, 22.0, None, method="lcm")]
    assert verdicts(cells(near))[0]["stats"][1][1].endswith(": no difference found")  # 2 ± 2.97


def test_all_cards_are_of_one_step_count_though_another_is_a_students_best():
    teacher = row("teacher", 50, 20.0, None, method="teacher")
    fds = {"a": {1: 60.0, 4: 30.0, 8: 26.0}, "b": {2: 24.0, 4: 31.0, 16: 22.0}, "c": {1: 50.0, 4: 32.0}, "d": {2: 40.0}}
    students = [row(name, steps, fd, None, method="lcm") for name, own in fds.items() for steps, fd in own.items()]
    said = verdicts(cells([teacher, *students]))
    shown = [(each["model"], each["steps"], each["stats"][0][0]) for each in said]
    assert shown == [("a", "4 steps", "30.0"), ("b", "4 steps", "31.0"), ("c", "4 steps", "32.0"),
                     ("d", "2 steps", "40.0")]  # fmt: skip
    both = [row(name, steps, 30.0, None, method="lcm") for name in "ab" for steps in (2, 4, 16)]
    assert {each["steps"] for each in verdicts(cells([teacher, *both]))} == {"4 steps"}  # the largest of several


def timed(model: str, steps: int, fd: float, ms: float, method: str, **how):
    timing = {"device": "a GPU", "dtype": "float16", "compiled": False, "channels_last": False, "merged": True} | how
    return row(model, steps, fd, ms, method=method, timing=timing)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, ""),
        ({"device": "a CPU"}, "a GPU against a CPU"),
        ({"dtype": "float32", "compiled": True}, "float16, not compiled against float32, compiled"),
        ({"channels_last": True}, "channels first against channels last"),
        ({"merged": None}, "LoRAs merged against LoRAs apart"),  # rows of before lack it
    ],
)
def test_times_are_compared_only_if_they_were_taken_alike(how, said, tmp_path):
    rows = [timed("teacher", 50, 20.0, 400.0, "teacher", **how), timed("teacher", 4, 60.0, 30.0, "teacher", **how),
            timed("s", 4, 25.0, 40.0, "lcm"), timed("s", 1, 50.0, 8.0, "lcm")]  # fmt: skip
    found = cells(rows)
    teacher, student = (next(c for c in found if c.model == name and c.steps == 4) for name in ("teacher", "s"))
    told = f"timed differently: {said}" if said else ""
    assert unlike(student, teacher) == told and (conditions(student) == conditions(teacher)) is not bool(said)
    (card,) = verdicts(found)
    faster = ("–", f"faster: {told}") if said else ("10.0×", "faster: 40.0 ms (p90 40.0) against 400.0 ms (p90 400.0)")
    assert card["stats"][-1] == faster
    axes = curves.curves(found)[curves.BY_LATENCY]().axes[0]
    fronts = {tuple(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines
              if line.get_drawstyle() == "steps-post"}  # fmt: skip
    own, theirs = ((8.0, 50.0), (40.0, 25.0)), ((30.0, 60.0), (400.0, 20.0))
    assert fronts == ({own, theirs} if said else {(*own, theirs[1])})
    assert any("timed differently" in text.get_text() for text in axes.texts) is bool(said)
    (lines,) = (table.lines for table in tables(found) if table.title == "Latency")
    shown = {cell.model: values[-1].text for cell, values in lines}
    assert shown["s"] == "float16, LoRAs merged" + (", a GPU" if "device" in how else "")
    assert (shown["teacher"] == shown["s"]) is not bool(said)


def test_of_copies_fewer_than_expected_are_no_better():
    few, many = ({"copies": figure(value, 0.002)} for value in (0.002, 0.02))
    one, other = cells([row("a", 4, 9.0, None, metrics=few), row("b", 4, 9.0, None, metrics=many)])
    assert [c.word for c in (*compare(one, other), *compare(other, one))] == ["lower", "higher"]


def seeded(method: str, fds, **more):
    return [row(f"{method}-{i}", steps, fd, None, method=method, teacher="t", **more)
            for i, own in enumerate(fds) for steps, fd in own.items()]  # fmt: skip


def test_trainings_of_one_model_with_other_seeds_are_drawn_as_one():
    teacher = [row("teacher", 50, 20.0, None, method="teacher", spec="t")]
    fds = [{1: 60.0, 4: 30.0}, {1: 50.0, 4: 18.0}, {1: 55.0, 4: 24.0}]
    found = cells(teacher + seeded("lcm", fds) + [row("add", 4, 22.0, None, method="add", teacher="t")])
    assert [(m.name, m.number, len(m.members)) for m in models_of(found)] == [
        ("teacher", 0, 1),
        ("lcm", 1, 3),
        ("add", 2, 1),
    ]
    (_, line, _) = curves._by_steps(found, {(c.model, c.steps): c.figures["fd"] for c in found})
    assert [(p.x, p.y, p.low, p.high) for p in line.points] == [(1, 55.0, 50.0, 60.0), (4, 24.0, 18.0, 30.0)]
    by_cost = curves._by_cost(found, lambda cell: cell.steps)[1:4]  # each training for itself, all in one colour
    assert [(c.name, c.colour, c.points[-1].y) for c in by_cost] == [
        (name, line.colour, y) for name, y in (("lcm", 30.0), ("", 18.0), ("", 24.0))
    ]
    card, other = verdicts(found)
    assert card["model"] == "lcm" and card["cell"].model == "lcm-1"
    assert card["against"] == "against the teacher at 50 steps; mean and range of 3 training seeds"
    assert card["stats"][:2] == [
        ("24.0", "FD (18.0–30.0), the teacher’s 20.0 ± 2.0"),
        ("1.20×", "the teacher’s FD at 50 steps (0.90–1.50): worse (2 of 3), no difference found (1 of 3)"),
    ]
    assert "seeds" not in other["against"] and len(tables(found)[0].lines) == len(found)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (seeded("lcm", [{4: 9.0}] * 2), ["lcm"]),
        (seeded("lcm", [{4: 9.0}]), ["lcm-0"]),
        (seeded("lcm", [{4: 9.0}] * 3)[1:], ["lcm-1", "lcm-2"]),  # of step counts or ranks, for all the rows say
        ([each | {"train_seed": seed} for seed, each in zip((1, 2), seeded("lcm", [{4: 9.0}] * 3)[1:], strict=True)],
         ["lcm"]),
        (seeded("lcm", [{4: 9.0}] * 2, train_seed=0), ["lcm-0", "lcm-1"]),  # numbered by something else
        ([*seeded("lcm", [{4: 9.0}] * 2), row("lcm", 4, 9.0, None, method="lcm")], ["lcm-0", "lcm-1", "lcm"]),
        (seeded("teacher", [{4: 9.0}] * 2), ["teacher-0", "teacher-1"]),
        ([each | {"teacher": f"t{i}"} for i, each in enumerate(seeded("lcm", [{4: 9.0}] * 2))], ["lcm-0", "lcm-1"]),
    ],
)  # fmt: skip
def test_only_students_of_one_method_and_teacher_numbered_by_their_seeds_are_one(rows, names):
    assert [model.name for model in models_of(cells(rows))] == names


def test_real_images_are_a_reference_and_no_bound(folder, page):
    assert "for reference" in page.text and "for reference" in (folder / "report.md").read_text()
    assert "best a model can reach" not in page.text + (folder / "report.md").read_text()


def test_gains_are_of_the_same_steps_and_gaps_of_the_teachers_longest():
    one, four, other = gains(cells(ROWS))
    assert one.of_same.value == pytest.approx(0.3) and four.of_same is None and other.last.steps == 50
    ends = [math.exp(sign * 0.02**0.5) for sign in (-1, 1)]  # each distance ± a tenth of it
    assert [one.of_same.low, one.of_same.high] == pytest.approx([0.3 * end for end in ends])
    (line,) = (values for cell, values in cost_table([one]).lines)
    assert (line[4].text, line[4].small) == ("3.3×", "2.9–3.8")
    gap = four.gaps["fd"].gap
    assert (gap.value, gap.paired) == (5.0, False) and gap.high - gap.value == pytest.approx((2.5**2 + 2.0**2) ** 0.5)
    assert [duration(s) for s in (None, 60.0, 180.0, 9000.0)] == ["–", "60 s", "3.0 min", "2.5 h"]


def test_without_a_teacher_nothing_is_compared_and_with_two_each_student_is_held_against_its_own(tmp_path):
    students = [row("a", 4, 30.0, 8.0, method="lora"), row("b", 4, 20.0, 8.0, method="lcm")]
    assert verdicts(cells(students)) == []
    book = Book(tmp_path, {"protocol_hash": "abc123", "protocol": "tiny"})
    for each in students:
        book.add(each)
    page = write_report(tmp_path).read_text()
    assert "the teacher" not in page and 'class="stats"' not in page
    teachers = [row("sd", 50, 10.0, 400.0, method="teacher", spec="sd,scheduler=ddim"),
                row("xl", 50, 5.0, 800.0, method="teacher", spec="xl")]  # fmt: skip
    mine = [row("of-xl", 4, 10.0, 80.0, method="lcm", teacher="xl"), row("of-none", 4, 20.0, 80.0, method="lcm")]
    said = {each["model"]: each for each in verdicts(cells(teachers + mine))}
    assert said["of-xl"]["stats"][0] == ("10.0", "FD ± 1.0, xl’s 5.0 ± 0.5")
    assert said["of-none"]["against"] == "against the baseline sd at 50 steps"
    assert said["of-none"]["stats"][-1] == ("5.0×", "faster: 80.0 ms (p90 80.0) against 400.0 ms (p90 400.0)")


def test_times_of_training_are_an_axis_only_where_they_differ():
    def drawn(*seconds: float) -> set[str]:
        students = [row(f"s{i}", 4, 30.0, None, method="lcm", train_seconds=each) for i, each in enumerate(seconds)]
        return set(curves.cost_curves(cells(students), []))

    assert drawn(4500.0, 4584.0, 4530.0) == drawn() == drawn(60.0) == set()  # three seeds of one recipe
    assert drawn(60.0, 90.0) == {"FD by training time"}


def test_a_student_whose_teacher_was_not_measured_is_held_against_nobody():
    teacher = row("sd15", 50, 10.0, 400.0, method="teacher", spec="sd15,guidance=7.5")
    of_another = row("bk-sdm", 4, 20.0, 80.0, method="bk-sdm", teacher="sd14")
    assert gains(cells([teacher, of_another])) == []
    of_none = row("odd", 4, 20.0, 80.0, method="student")
    (gain,) = gains(cells([teacher, of_another, of_none]))
    assert gain.cell.model == "odd" and not gain.own
    assert [head.name for head in cost_table([gain]).heads].count("baseline") == 2
    run = row("mine", 50, 10.0, 400.0, method="teacher", spec="out/teacher/export,scheduler=ddim")
    (gain,) = gains(cells([teacher, run, row("s", 4, 20.0, 80.0, method="lcm", teacher="out/teacher/")]))
    assert gain.own and gain.last.model == "mine"


def test_a_plot_says_of_how_many_of_what_its_own_figure_is():
    notes = {name: curves._axis(cells(ROWS), name, "by steps").note for name in ("fd", "recall")}
    assert notes == {"fd": "lower is better, n = 5", "recall": "higher is better, n = 7 prompts"}


def test_seeds_are_pooled_into_one_cell_whose_number_is_shown():
    both = [row("m", 4, 10.0, 5.0, metrics=full(10.0, 30.0, 0.1, 0.5)),
            row("m", 4, 20.0, 5.0, seed=1, metrics=full(20.0, 31.0, 0.3, 0.5))]  # fmt: skip
    found = cells(both)
    assert len(found) == 1 and found[0].fd == 15.0 and found[0].seeds == 2
    kid, recall, clip = (found[0].figures[name] for name in ("kid", "recall", "clip_score"))
    assert kid.value == pytest.approx(0.2) and recall.half == pytest.approx(0.031)
    within = (0.25 / 1.959964) ** 2  # of one seed; the two differ by far more than that
    student = 12.706205 * ((0.5 - within) / 2) ** 0.5
    assert clip.half == pytest.approx(math.hypot(0.25, student), rel=1e-5)
    assert columns(found)[0]["seeds"] == "2" and "seeds" not in columns(cells(both[:1]))[0]
    overview, everything, *_ = tables(found)
    assert overview.lines[0][1][2].text == "2" and everything.heads[1].note == "5 images × 2 seeds"


def test_a_column_without_a_figure_is_a_dash():
    found = cells([row("m", 4, 10.0, None, clip_score=None, attribute_accuracy=None), row("full", 4, 10.0, 5.0)])
    shown = columns(found)[0]
    assert shown["ms"] == shown["CLIP"] == shown["attributes"] == "–" and shown["FD"] == "10.0 ± 1.0"


def test_figures_are_shown_as_exactly_as_their_intervals_allow():
    assert [digits(name, cells(ROWS)) for name in ("fd", "clip_score", "attribute_accuracy", "kid", "recall")] == [
        1, 2, 1, 4, 3,
    ]  # fmt: skip


def test_the_pareto_front_is_what_none_beats_in_both():
    assert plots.pareto([(1, 9), (2, 5), (3, 6), (4, 5), (5, 1), (1, 10)]) == [(1, 9), (2, 5), (5, 1)]
    assert plots.pareto([]) == []


def test_a_bench_without_latency_or_prompts_is_reported_too(tmp_path):
    book = Book(tmp_path, {"protocol_hash": "abc123", "protocol": "tiny"})
    book.add(row("m", 2, 10.0, None, clip_score=None, attribute_accuracy=None))
    text = write_report(tmp_path).read_text()
    assert text.count("<svg ") == 1 and "<h2>Samples" not in text and 'id="comparer"' not in text


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


def test_large_pictures_go_into_the_page_as_photographs_and_small_ones_pixel_by_pixel(tmp_path):
    small, large = row("small", 2, 10.0, None), row("large", 2, 10.0, None)
    book = Book(tmp_path, {"protocol_hash": "abc123", "protocol": "tiny"})
    for each, side in ((small, 8), (large, 512)):
        book.grid(each, torch.zeros(2, 3, side, side, dtype=torch.uint8))
        book.add(each)
    text = write_report(tmp_path).read_text()
    for i in (1, 2):
        assert f'<img alt="small, 2 steps, {i}" src="data:image/png' in text
        assert f'<img alt="large, 2 steps, {i}" src="data:image/webp' in text
    assert text.count('class="row pixels"') == 1


def test_the_report_command_prints_the_table_and_where_the_page_is(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "bench")  # as in a demo's folder
    for place, page in ((folder, folder), (tmp_path, tmp_path / "bench")):
        assert cli.main(["report", str(place)]) == 0
        said = capsys.readouterr().out
        assert str(page / "report.html") in said.replace("\n", "") and "teacher" in said and "FD-Pools" in said


def test_an_interval_that_is_not_around_its_figure_is_shown_by_its_ends():
    found = Measured(1.0, 0.9923, 1.0, 500)
    assert spread("attribute_accuracy", found, 1) == "(99.2–100.0)"
    assert spread("attribute_accuracy", Measured(0.9, 0.872, 0.926, 500), 1) == "± 2.7"


@pytest.mark.parametrize(
    ("drawn", "timed", "said"),
    [
        (("a", "a"), (None, None), [("on", "a")]),
        (("a", "a"), ("a", "a"), [("on", "a")]),
        (("a", "a"), ("b", "b"), [("on", "a"), ("timed on", "b")]),
        (("a", "b"), ("b", "b"), [("on", "a"), ("on", "b"), ("timed on", "b")]),
    ],
)
def test_the_head_says_where_times_were_taken_if_it_was_elsewhere(drawn, timed, said):
    rows = [{"device": d, "timing": t and {"device": t}} for d, t in zip(drawn, timed, strict=True)]
    assert machines(rows) == said
