"""Several processes share the building of a cache: the same files as from one, errors in all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
from PIL import Image

from stepdistill.data import build, cache
from stepdistill.data.cache import ALONE, LatentCache, open_data
from stepdistill.denoiser.load import as_teacher
from stepdistill.errors import InputError
from stepdistill.processes import Processes


@dataclass(frozen=True)
class Thread(Processes):
    """A process of a team that is a thread here."""

    barrier: threading.Barrier = None
    values: dict[int, object] = field(default_factory=dict)

    def gather(self, own):
        self.values[self.rank] = own
        self.barrier.wait(60)
        gathered = [self.values[rank] for rank in range(self.count)]
        self.barrier.wait(60)
        return gathered


def together(count: int, work) -> list:
    """What `work(team)` returns, or the error that it raises, in each of the threads."""
    barrier, values = threading.Barrier(count), {}

    def outcome(rank: int):
        try:
            return work(Thread(rank, count, barrier, values))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(outcome, range(count)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def opened(data: str, folder: Path, team: Processes = ALONE) -> LatentCache:
    """Each process has its own teacher, and they are all the same."""
    return open_data(data, as_teacher(tiny.sd(), "tiny"), cache_dir=folder, team=team)


@pytest.fixture
def small_shards(monkeypatch):
    for module in (build, cache):
        monkeypatch.setattr(module, "SHARD", 2)
    monkeypatch.setattr(build, "BATCH", 1)


def pictures_of(folder: Path, broken: tuple[int, ...] = (), count: int = 7) -> str:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (32, 32), (30 * i, 90, 10)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"cat {i % 5}")
        if i in broken:
            (folder / f"{i}.png").write_bytes(b"no picture")
    return str(folder)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_team_builds_the_same_files_as_one_process(tmp_path, small_shards, monkeypatch, count):
    data = pictures_of(tmp_path / "set", broken=(3,))
    alone = opened(data, tmp_path / "alone")
    made = {}
    own = build.Plan._latents

    def latents(plan, indices, bar):
        made.setdefault(threading.get_ident(), []).append(indices[0] // 2)
        return own(plan, indices, bar)

    monkeypatch.setattr(build.Plan, "_latents", latents)
    found = together(count, lambda team: opened(data, tmp_path / "team", team))
    assert [each.key for each in found] == [alone.key] * count
    assert files_of(tmp_path / "team" / f"data-{alone.key}") == files_of(tmp_path / "alone" / f"data-{alone.key}")
    assert sorted(made.values()) == [list(range(4))[rank::count] for rank in range(min(count, 4))]
    assert not list((tmp_path / "team").glob(".*.building"))


def test_a_team_of_another_size_resumes_a_build(tmp_path, small_shards, monkeypatch):
    data = pictures_of(tmp_path / "set", broken=(2,))
    alone = opened(data, tmp_path / "alone")
    own = build.save_file

    def stops(tensors, file):
        if "shards-00003" in str(file):
            raise RuntimeError("cut off")
        own(tensors, file)

    def work(team):
        return opened(data, tmp_path / "team", team)

    monkeypatch.setattr(build, "save_file", stops)
    cut = together(2, work)
    assert isinstance(cut[1], RuntimeError)  # shard 3 is the second process's
    assert isinstance(cut[0], InputError) and "cut off" in str(cut[0])
    monkeypatch.setattr(build, "save_file", own)
    assert [each.key for each in together(3, work)] == [alone.key] * 3
    assert files_of(tmp_path / "team" / f"data-{alone.key}") == files_of(tmp_path / "alone" / f"data-{alone.key}")


def test_broken_pictures_of_all_shares_count_together(tmp_path, small_shards):
    data = pictures_of(tmp_path / "set", broken=(0, 2))  # one in each share; one is allowed
    found = together(2, lambda team: opened(data, tmp_path / "team", team))
    for error in found:
        assert isinstance(error, InputError)
        assert "which is broken" in str(error) and "and 1 before it; allowed: 1 of 7" in str(error)
    assert [file.suffix for file in (tmp_path / "team").iterdir()] == [".lock"]


def test_processes_without_a_common_disk_are_refused(tmp_path, small_shards):
    data = pictures_of(tmp_path / "set")
    found = together(2, lambda team: opened(data, tmp_path / f"disk-{team.rank}", team))
    for error in found:
        assert isinstance(error, InputError)
        assert "processes: got no conditions-00001.safetensors from another one in" in str(error)


def test_launched_processes_share_stepdistill_cache(tmp_path, pipelines, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
    script = tmp_path / "small.py"
    script.write_text(
        "import sys\nfrom stepdistill.cli import main\nfrom stepdistill.data import build, cache\n"
        "build.SHARD = cache.SHARD = 1\nsys.exit(main(sys.argv[1:]))\n"
    )
    flags = ["cache", "--teacher", pipelines["sd"], "--data", str(tmp_path / "prompts.txt"), "--steps", "2"]
    flags += ["--guidance", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, by in (("one", []), ("two", launcher)):
        words = [sys.executable, *by, str(script), *flags, "--device", "cpu", "--out", str(tmp_path / name)]
        done = subprocess.run(words, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("3 samples, 3 distinct captions") == 1
    one, two = (files_of(tmp_path / name) for name in ("one", "two"))
    assert json.loads(one.pop("config.json"))["out"] != json.loads(two.pop("config.json"))["out"]
    assert one == two
    assert one["shards-00002.safetensors"]
