"""The benchmark of a benchmark's overhead: what each of its ratios contains."""

from __future__ import annotations

import pytest
import tiny
from test_train_scripts import script

from stepdistill.evaluation.generate import Sampler, Series

# ms of two batches in each of three rounds
TAKEN = {"cell": [22.0, 24.0, 23.0], "forwards": [16.0] * 3, "decodes": [4.0] * 3, "pipeline": [21.0] * 3,
         "text": [2.0, 4.0, 3.0]}  # fmt: skip


def test_text_is_outside_the_ratio_of_a_cell_and_inside_the_one_that_is_named_after_it(tmp_path, monkeypatch):
    overhead, encoded = script("harness_overhead", "benchmarks"), []
    encode = Sampler.encode
    monkeypatch.setattr(Sampler, "encode", lambda self, prompts: encoded.append(len(prompts)) or encode(self, prompts))

    def by_turns(jobs, rounds, device, seconds):
        jobs["cell"]()  # the untimed round
        encoded.clear()
        counts = {}
        for name, job in jobs.items():
            job()
            counts[name] = len(encoded)
            encoded.clear()
        assert counts == {"cell": 0, "forwards": 0, "decodes": 0, "pipeline": 0, "text": 2}
        return TAKEN

    monkeypatch.setattr(overhead, "by_turns", by_turns)
    series = Series(Sampler(tiny.sd(), 2.0), ["a red cat", "the green dog"] * 2, 4, 2)
    found = overhead.compare(series, steps=2, rounds=3, seconds=0, folder=tmp_path)
    # (22 + 2, 24 + 4, 23 + 3) / 20; without text, 23 / 20
    assert (found["ratio"], found["ratio_with_text"], found["ratio_pipeline"]) == pytest.approx((1.15, 1.3, 1.05))
    assert (found["text_ms"], found["generation_ms"], found["forward_ms"]) == pytest.approx((1.5, 11.5, 4.0))


@pytest.mark.parametrize(("n", "k"), [(3, 1), (6, 1), (9, 2), (20, 6), (1500, 712)])
def test_the_interval_of_a_median_is_that_of_the_tables(n, k):
    low, high = script("turns", "benchmarks").median_interval([float(i) for i in range(n, 0, -1)])
    assert (low, high) == (k, n + 1 - k)


def test_rounds_go_on_until_their_seconds_are_over(monkeypatch):
    turns, now = script("turns", "benchmarks"), [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])

    def job():
        now[0] += 2.0

    device = turns.torch.device("cpu")
    assert [len(turns.by_turns({"job": job}, 3, device, seconds)["job"]) for seconds in (0, 6, 7)] == [3, 3, 4]
