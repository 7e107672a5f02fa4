"""Timings have their own key: with other settings they are measured again, without generating any image again."""

from __future__ import annotations

import csv
import dataclasses
import io
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_suite import QUIET, TINY, instruments

from stepdistill import provenance
from stepdistill.evaluation import generate, latency, suite, timing
from stepdistill.evaluation.cells import cells
from stepdistill.evaluation.latency import PipelineMemory, resident
from stepdistill.evaluation.records import read_rows
from stepdistill.evaluation.report.tables import as_csv, tables

FIGURES = ("fd", "clip_score", "attribute_accuracy", "metrics", "weights", "nfe", "seed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("timing") / "base")


@pytest.fixture
def taken(monkeypatch) -> list[dict]:
    """How each timing was requested; the n-th is n ms, and takes no time."""
    asked: list[dict] = []

    def measure(sampler, prompts, *, steps, batch=1, repeats=10, compiled=False):
        asked.append({"steps": steps, "batch": batch, "repeats": repeats, "compiled": compiled, "seed": sampler.seed})
        ms = float(len(asked))
        quantiles = {stage: (ms, ms, ms) for stage in ("text", "denoiser_step", "decode", "total")}
        return latency.Timing(*[ms] * 6, quantiles, ms, 1.0, batch, repeats, "wall", compiled, 10.0 * ms)

    monkeypatch.setattr(latency, "measure", measure)
    return asked


def run(base, out, steps=(1,), seed=0, models=None, **changes):
    settings = dataclasses.replace(QUIET, **changes)
    models = models or {"t": f"{base},scheduler=ddim"}
    return suite.evaluate(models, TINY, steps, out=out, seed=seed, settings=settings, instruments=instruments())


def last(folder, steps=1):
    """The cell of a folder as the report shows it."""
    return next(cell for cell in cells(read_rows(folder / "results.jsonl"), folder) if cell.steps == steps)


CHANGES = {
    "compiled": {"compiled": True},
    "layout": {"channels_last": True},
    "batch": {"latency_batch": 2},
    "repeats": {"latency_repeats": 3},
    "device": {},
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_timing_flags_or_another_device_take_times_anew_and_draw_nothing(
    base, tmp_path, taken, monkeypatch, what
):
    first = run(base, tmp_path).rows[-1]
    assert first["timing"] | {"torch": 0, "commit": 0, "command": 0} == {
        "device": first["device"], "dtype": "float32", "compiled": False, "channels_last": False, "batch": 1,
        "merged": True, "repeats": 1, "torch": 0, "commit": 0, "command": 0,
    }  # fmt: skip
    taken.clear()
    monkeypatch.setattr(generate.Series, "draw", None)
    if what == "device":
        monkeypatch.setattr(provenance, "device_name", lambda _: "another card")
    row = run(base, tmp_path, **CHANGES[what]).rows[-1]
    assert [call["batch"] for call in taken] == [1, 2][: 1 + (what == "batch")]
    assert taken[0]["compiled"] == (what == "compiled") and taken[0]["repeats"] == (3 if what == "repeats" else 1)
    said = {"compiled": True, "channels_last": True, "batch": 2, "repeats": 3, "device": "another card"}
    name = {"layout": "channels_last"}.get(what, what)
    assert {k for k, v in row["timing"].items() if v != first["timing"][k]} == {name}
    assert row["timing"][name] == said[name]
    assert {k: row[k] for k in FIGURES} == {k: first[k] for k in FIGURES}
    assert (row["device"], row["channels_last"]) == (first["device"], False)  # as its images were generated
    assert (row["latency_ms_batch"] or {}).get("batch") == (2 if what == "batch" else None)
    assert read_rows(tmp_path / "results.jsonl")[-2:] == [first, row] and last(tmp_path).row["timing"] == row["timing"]


def test_calls_that_were_asked_for_are_made_and_else_as_many_as_there_is_time_for_are_recorded(
    base, tmp_path, taken, monkeypatch
):
    asked, measure = [], latency.measure

    def slow(*args, seconds=None, **options):
        asked.append(seconds)
        return measure(*args, **options | ({} if seconds is None else {"repeats": 4}))

    monkeypatch.setattr(latency, "measure", slow)
    rows = [run(base, tmp_path, latency_repeats=n).rows[-1] for n in (None, None, 100, None)]
    assert [row["timing"]["repeats"] for row in rows] == [4, 4, 100, 100] and asked == [20.0, None]


def test_what_was_asked_for_last_is_what_a_report_shows(base, tmp_path, taken):
    """Also if it was measured before: it is not measured again."""
    plain, compiled = run(base, tmp_path).rows[-1], run(base, tmp_path, compiled=True).rows[-1]
    assert last(tmp_path).latency == compiled["latency_ms"]["total_p50"]
    again = run(base, tmp_path).rows[-1]
    assert again == plain and len(taken) == 2 and last(tmp_path).latency == plain["latency_ms"]["total_p50"]
    assert len(read_rows(tmp_path / "results.jsonl")) == 4  # the floors, and one for each way of timing
    run(base, tmp_path, models={"t": f"{base},scheduler=lcm"})  # another model under the same name
    assert last(tmp_path).scheduler == "LCMScheduler"
    run(base, tmp_path)
    assert last(tmp_path).scheduler == "DDIMScheduler" and len(taken) == 3


def test_times_that_failed_or_were_left_out_are_taken_by_the_next_run_and_no_run_without_drops_them(
    base, tmp_path, taken, monkeypatch
):
    left_out = run(base, tmp_path, latency_repeats=0).rows[-1]
    assert left_out["timing"] is left_out["latency_ms"] is None and not taken
    with monkeypatch.context() as patch:
        patch.setattr(timing, "take", lambda *_: 1 / 0)
        failing = run(base, tmp_path)
        assert failing.rows[-1] == left_out and "ZeroDivisionError" in failing.failed[0].reason
    monkeypatch.setattr(generate.Series, "draw", None)
    row = run(base, tmp_path).rows[-1]
    assert row["latency_ms"]["total_p50"] == 1 and len(taken) == 1
    assert run(base, tmp_path, latency_repeats=0).rows[-1] == row and last(tmp_path).latency == 1


def test_several_seeds_give_a_row_each_of_the_same_noise_for_all_models_and_are_timed_once(
    base, tmp_path, taken, monkeypatch
):
    noise: dict[tuple, set] = {}
    encoded: list[int] = []
    draw, encode = generate.Series.draw, generate.Sampler.encode

    def spy(self, steps, first, count):
        from diffusers import StableDiffusionPipeline

        prepare = StableDiffusionPipeline.prepare_latents

        def latents(*args, **kwargs):
            x = prepare(*args, **kwargs)
            noise.setdefault((self.sampler.seed, first), set()).add(x.numpy().tobytes())
            return x

        with monkeypatch.context() as patch:
            patch.setattr(StableDiffusionPipeline, "prepare_latents", latents)
            return draw(self, steps, first, count)

    monkeypatch.setattr(generate.Series, "draw", spy)
    monkeypatch.setattr(generate.Sampler, "encode", lambda self, p: encoded.append(len(p)) or encode(self, p))
    models = {"a": f"{base},scheduler=ddim", "b": f"{base},scheduler=ddim,guidance=3"}
    rows = run(base, tmp_path, seed=(3, 0, 1), models=models).rows
    assert [(r["model"], r["seed"]) for r in rows[2:]] == [(m, s) for m in "ab" for s in (3, 0, 1)]
    assert all(len(same) == 1 for same in noise.values()) and len(set.union(*noise.values())) == len(noise) == 6
    assert encoded == [3, 2] * 2  # once per model, for any number of seeds
    assert [(call["seed"], row["seed"]) for call, row in zip(taken, (rows[2], rows[5]), strict=True)] == [(3, 3)] * 2
    found = [cell for cell in cells(rows) if cell.steps]
    assert [cell.seeds for cell in found] == [3, 3] and [cell.latency for cell in found] == [1, 2]
    assert found[0].fd == pytest.approx(sum(row["fd"] for row in rows[2:5]) / 3)
    alone = run(base, tmp_path / "alone", seed=1, models={"a": models["a"]}).rows[-1]
    assert {k: alone[k] for k in FIGURES} == {k: rows[4][k] for k in FIGURES}
    assert run(base, tmp_path, seed=(3, 0, 1), models=models).rows == rows and len(taken) == 3


def test_seeds_of_a_model_that_was_changed_since_are_not_averaged_with_the_new_ones(base, tmp_path, taken):
    old = run(base, tmp_path, seed=(0, 1, 2)).rows[-3:]
    new = run(base, tmp_path, seed=(0, 1), models={"t": f"{base},scheduler=lcm"}).rows[-2:]
    assert {row["weights"] for row in old}.isdisjoint(row["weights"] for row in new)
    assert [row["seed"] for row in last(tmp_path).rows] == [0, 1] and last(tmp_path).rows == tuple(new)


class Card:
    """A GPU's memory counters: bytes in use, and the peak since the last reset."""

    def __init__(self, monkeypatch, before: int) -> None:
        self.used = self.peak = before
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: self.used)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(self, "peak", self.used))

    def call(self, most: int, left: int = 0) -> None:
        self.peak = max(self.peak, self.used + most)
        self.used += left


def test_a_pipelines_memory_leaves_out_what_else_lies_on_the_card(monkeypatch):
    """The pipeline holds 60 MB, extractors and other models 500; its calls take 40 more, and the first one keeps 5."""
    mega = 2**20
    monkeypatch.setattr(latency, "backbone", lambda _: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(latency, "resident", lambda *_: 60 * mega)
    card = Card(monkeypatch, 560 * mega)
    memory = PipelineMemory(None)
    card.call(900 * mega, left=5 * mega)
    memory.reset()
    card.call(40 * mega)
    assert memory.read() == 60 + 5 + 40


def test_weights_are_counted_once_and_on_their_device_alone():
    pipe = tiny.sd()
    parts = [pipe.unet, pipe.vae, pipe.text_encoder]
    own = sum(p.numel() * p.element_size() for part in parts for p in (*part.parameters(), *part.buffers()))
    assert resident(pipe, torch.device("cpu")) == own and resident(pipe, torch.device("cuda:0")) == 0
    pipe.text_encoder.again = pipe.text_encoder.get_input_embeddings()
    assert resident(pipe, torch.device("cpu")) == own


def test_on_a_cpu_no_memory_is_told(base, tmp_path):
    row = run(base, tmp_path).rows[-1]
    assert row["pipeline_memory_mb"] is row["latency_ms"]["pipeline_memory_mb"] is None


def times(batch: int, p50: float, **more) -> dict:
    quantiles = {"text": [1.0, 1.5, 1.9], "denoiser_step": [2.0, 2.5, 2.9], "decode": [3.0, 3.5, 3.9]}
    return {
        "text": 1.0, "denoiser_step": 2.0, "decode": 3.0, "total_p50": p50, "total_p90": p50 + 8, "total_p99": p50 + 12,
        "quantiles": quantiles, "first": 4000.0, "batch": batch, "repeats": 10, "clock": "cuda events",
        "compiled": True, "pipeline_memory_mb": 512.0 * batch,
    } | more  # fmt: skip


HOW = {"device": "a card", "dtype": "float16", "compiled": True, "channels_last": True, "batch": 4, "repeats": 10}
COMMON = {"protocol": "p", "protocol_hash": "h", "n": 5, "seed": 0, "fd": 1.0, "dtype": "float16", "device": "a CPU"}
ROWS = [
    COMMON | {"model": "s", "steps": 4, "nfe": 4, "latency_ms": times(1, 40.0), "latency_ms_batch": times(4, 100.0),
              "timing": HOW, "scheduler": "FlowMatchEulerDiscreteScheduler", "sigmas": "even"},
    COMMON | {"model": "old", "steps": 1, "nfe": 2, "latency_ms": {"total_p50": 7.0, "total_p90": 9.0, "batch": 1}},
]  # fmt: skip


def test_the_latency_table_has_a_line_for_each_batch_with_all_that_was_measured():
    overview, _, table = tables(cells(ROWS))
    said = [[cell.model, *(value.text for value in values)] for cell, values in table.lines]
    how = "float16, compiled, channels last, a card"
    assert said == [
        ["s", "4", "4", "1", "40.0", "48.0", "52.0", "4,000.0", "1.00", "2.00", "3.00", "10", "512", how],
        ["s", "4", "4", "4", "25.0", "27.0", "28.0", "1,000.0", "1.00", "2.00", "3.00", "10", "2,048", how],
        ["old", "1", "2", "1", "7.0", "9.0", *["–"] * 7, "float16, a CPU"],
    ]
    assert [values[-1].text for _, values in overview.lines] == ["FlowMatchEulerDiscrete, even sigmas", "–"]
    alone = tables(cells(ROWS[1:]))[-1]
    assert [head.name for head in alone.heads] == ["steps", "NFE", "batch", "ms", "ms", "timing"]  # no empty columns
    assert [value.text for value in alone.lines[0][1]] == ["1", "2", "1", "7.0", "9.0", "float16"]
    (_, values), _ = tables(cells(ROWS[:1]))[-1].lines
    assert values[-1].text == "float16, compiled, channels last"  # the device only if there are several


def test_the_csv_has_every_time_a_value_a_column():
    one, old = csv.DictReader(io.StringIO(as_csv(ROWS)))
    for name, value in {
        "latency_ms_total_p99": 52.0, "latency_ms_first": 4000.0, "latency_ms_repeats": 10, "latency_ms_compiled": True,
        "latency_ms_denoiser_step_p90": 2.5, "latency_ms_decode_p99": 3.9, "latency_ms_batch_total_p50": 100.0,
        "latency_ms_batch_batch": 4, "latency_ms_batch_pipeline_memory_mb": 2048.0, "timing_device": "a card",
        "timing_channels_last": True, "timing_compiled": True, "timing_dtype": "float16", "sigmas": "even",
        "device": "a CPU",
    }.items():  # fmt: skip
        assert one[name] == str(value), name
    assert (old["latency_ms_total_p50"], old["latency_ms_batch_total_p50"], old["timing_device"]) == ("7.0", "", "")
    assert not any("{" in value for value in one.values())
