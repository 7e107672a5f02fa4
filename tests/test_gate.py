"""A gate passes figures within their bounds, fails others, and rejects what it cannot judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill import cli
from stepdistill.evaluation.cells import cells
from stepdistill.evaluation.gate import Bound, Gate, judge
from stepdistill.evaluation.records import Book

ROOT = Path(__file__).parents[1]
MLPERF = ROOT / "benchmarks" / "gates" / "mlperf-sdxl.yaml"


def row(model: str, steps: int, fd: float, clip: float, **more):
    metrics = {"fd": {"value": fd, "low": fd - 2, "high": fd + 2, "n": 500, "of": "pictures"},
               "clip_score": {"value": clip, "low": clip - 0.1, "high": clip + 0.1, "n": 500, "of": "pictures"},
               "kid": {"value": fd / 1e4, "low": 0.0, "high": 1.0, "n": 500, "of": "pictures"}}  # fmt: skip
    timing = {"text": 1.0, "denoiser_step": 2.0, "decode": 3.0, "total_p50": 80.0, "total_p90": 90.0, "batch": 2}
    return {"protocol": "tiny", "protocol_hash": "abc", "n": 500, "model": model, "weights": model, "steps": steps,
            "seed": 0, "metrics": metrics, "latency_ms": timing} | more  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    book = Book(tmp_path / "bench", {"protocol_hash": "abc", "protocol": "tiny"})
    real = row("real", 0, 5.0, 33.0)
    for each in (real, row("teacher", 50, 20.0, 32.0), row("student", 1, 60.0, 29.0), row("student", 4, 25.0, 31.0)):
        book.add(each)
    return tmp_path / "bench"


def gate(capsys, folder, *flags: object) -> tuple[int, list[str], str]:
    code = cli.main(["bench", "gate", str(folder), *map(str, flags)])
    told = capsys.readouterr()
    return code, told.out.splitlines(), told.err


@pytest.mark.parametrize(
    ("flags", "codes"),
    [
        (["--max-fd", 25.0], "11"),  # at most: the bound itself is met
        (["--max-fd", 24.9], "10"),
        (["--min-clip", 31.1], "10"),
        (["--max-fd", 30, "--min-clip", 30], "1111"),
        (["--max-fd", 30, "--min-clip", 32], "1110"),
        (["--max", "kid=0.0025", "--min", "kid=0.002"], "1111"),
        (["--window", "clip_score=30.9,31.1"], "01"),
        (["--window", "clip=30.9,31.1", "--max", "ms=40"], "1011"),  # ms per image: 80 in a batch of 2
        (["--max", "ms=39.9"], "00"),
    ],
)
def test_bounds_are_met_or_missed_a_line_each(folder, capsys, flags, codes):
    code, lines, err = gate(capsys, folder, "--steps", 4, 50, *flags)
    assert ["1" if line.startswith("met ") else "0" for line in lines] == list(codes) and not err
    assert all(line.startswith(("met ", "missed ")) for line in lines)
    assert code == (0 if "0" not in codes else 1)


def test_a_line_says_the_figure_its_interval_its_count_and_the_bound(folder, capsys):
    code, lines, _ = gate(capsys, folder, "--model", "student", "--steps", 4, "--max-fd", 24)
    assert code == 1
    assert lines == ["missed student, 4 steps: fd 25 (95 %: 23.0 to 27.0, n = 500), at most 24"]


def test_a_line_of_a_time_says_what_its_median_is_of():
    times = {"total_p50": 80.0, "total_p90": 90.0, "batch": 2, "repeats": 12}
    how = {"device": "a GPU", "dtype": "float16", "compiled": True, "channels_last": False, "merged": True}
    (found,) = judge(cells([row("m", 4, 0, 0, latency_ms=times, timing=how)]), Gate((Bound("ms", high=41),)))
    taken = "p90 45.0, 12 calls, float16, compiled, LoRAs merged, a GPU"
    assert str(found) == f"met    m, 4 steps: ms 40 ({taken}), at most 41"


def test_a_line_shows_shares_and_large_figures_as_they_are_bounded():
    figures = {
        "attribute_accuracy": {"value": 0.52341, "low": 0.5013, "high": 0.5455, "n": 500, "of": "pictures"},
        "fd": {"value": 23.01085757, "low": 22.9, "high": 23.1, "n": 500, "of": "pictures"},
    }
    found = cells([row("m", 4, 0, 0, metrics=figures)])
    share, distance = map(str, judge(found, Gate((Bound("attributes", low=0.5), Bound("fd", low=23.01085758)))))
    assert share == "met    m, 4 steps: attribute_accuracy 0.52341 (95 %: 0.501 to 0.545, n = 500), at least 0.5"
    assert distance == "missed m, 4 steps: fd 23.01085757 (95 %: 22.90 to 23.10, n = 500), at least 23.01085758"


def test_without_a_model_or_steps_every_cell_but_the_floors_is_judged(folder, capsys):
    code, lines, _ = gate(capsys, folder, "--max-fd", 100)
    assert code == 0 and [line.split(":")[0].split(None, 1)[1] for line in lines] == [
        "teacher, 50 steps",
        "student, 1 step",
        "student, 4 steps",
    ]


def test_nan_never_passes():
    (nan,) = judge(cells([row("m", 4, float("nan"), 31.0)]), Gate((Bound("fd", high=1e9),)))
    assert not nan.met


def test_mlperfs_windows_ship_and_open_for_figures_inside_them_only(tmp_path, capsys):
    told = {"protocol": "mlperf-sdxl-5k", "n": 5000, "fd_extractor": "Inception", "guidance": 8.0,
            "clip_model": "ViT-B-32/openai", "scheduler": "EulerDiscreteScheduler", "spacing": "leading"}  # fmt: skip
    for i, (fd, clip, expected) in enumerate([(23.5, 31.75, 0), (23.0, 31.75, 1), (23.5, 31.82, 1), (23.95, 31.69, 0)]):
        Book(tmp_path / str(i), {"protocol_hash": "abc", "protocol": "tiny"}).add(row("sdxl", 20, fd, clip, **told))
        code, lines, _ = gate(capsys, tmp_path / str(i), "--gate", MLPERF)
        assert code == expected and len(lines) == 2 and "within 23.01085758 and 23.95007626" in lines[0]
    Book(tmp_path / "other", {"protocol_hash": "abc", "protocol": "tiny"}).add(
        row("sdxl", 20, 23.5, 31.75, **told | {"n": 500})
    )
    code, _, err = gate(capsys, tmp_path / "other", "--gate", MLPERF)
    assert code == 2 and "got sdxl with n 500; allowed: n 5000" in err
    for spacing in ("trailing", None):
        place = tmp_path / f"{spacing}"
        other = row("sdxl", 20, 23.5, 31.75, **told | {"spacing": spacing})
        Book(place, {"protocol_hash": "abc", "protocol": "tiny"}).add(other)
        code, _, err = gate(capsys, place, "--gate", MLPERF)
        assert code == 2 and f"got sdxl with spacing {spacing}; allowed: spacing leading" in err
    Book(tmp_path / "as-sdxl", {"protocol_hash": "abc", "protocol": "tiny"}).add(
        row("sdxl", 50, 23.5, 31.75, **told | {"guidance": 5.0})
    )
    code, _, err = gate(capsys, tmp_path / "as-sdxl", "--gate", MLPERF)  # the first difference is reported
    assert code == 2 and "got sdxl with guidance 5.0; allowed: guidance 8.0" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "got no bounds"),
        (["--max-fd", "low"], "bench gate --help"),
        (["--max", "fd"], "--max: got fd; allowed: NAME=VALUE"),
        (["--max", "fd=nan"], "--max: got fd=nan"),
        (["--window", "fd=3"], "allowed: NAME=LOW,HIGH"),
        (["--window", "fd=3,1"], "got a window from 3 to 1"),
        (["--max", "recall=1"], "got recall; allowed: fd, clip_score, kid, ms"),
        (["--max-fd", "9", "--model", "nobody"], "got nobody; allowed: teacher, student"),
        (["--max-fd", "9", "--steps", "2"], "got bounds of 2, and a run of 1, 4, 50"),
        (["--max-fd", "9", "--model", "student", "--steps", "50"], "got bounds of 50, and a run of 1, 4"),
        (["--gate", "nowhere.yaml"], "got nowhere.yaml; allowed: mlperf-sdxl, or a path"),
    ],
)
def test_what_cannot_be_judged_ends_with_2_and_one_line(folder, capsys, flags, words):
    code, lines, err = gate(capsys, folder, *flags)
    assert code == 2 and not lines and err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(
    "text",
    ["figures: 3", "figures: {fd: 3}", "figures: {fd: {most: 3}}", "figures: {fd: {max: low}}", "a: 1", "- 1", "x: [",
     "figures: {fd: {max: 1}}\nsteps: 4", "figures: {fd: {min: 2, max: 1}}", "figures: {fd: {max: 1}}\nrows: 3"],
)  # fmt: skip
def test_a_broken_gate_file_is_refused(tmp_path, folder, capsys, text):
    (tmp_path / "gate.yaml").write_text(text)
    code, _, err = gate(capsys, folder, "--gate", tmp_path / "gate.yaml")
    assert code == 2 and err.count("\n") == 1 and "gate.yaml" in err


def test_flags_are_added_to_a_gate_file_and_their_steps_take_its_place(tmp_path, folder, capsys):
    (tmp_path / "gate.yaml").write_text("steps: [1]\nfigures: {clip: {min: 28}}")
    code, lines, _ = gate(capsys, folder, "--gate", tmp_path / "gate.yaml", "--max-fd", 70)
    assert code == 0 and [line.split(", ")[1].split(":")[0] for line in lines] == ["1 step", "1 step"]
    code, lines, _ = gate(capsys, folder, "--gate", tmp_path / "gate.yaml", "--steps", 4, 50)
    assert code == 0 and len(lines) == 2
