"""Generated images are reused, whole or not at all; a killed or shared benchmark gives the same figures."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_suite import PROMPTS, TINY, instruments
from test_trainer import environment

from stepdistill import holds, provenance
from stepdistill.draws import Draws
from stepdistill.errors import InputError
from stepdistill.evaluation import generate, models, pictures, records, spec, suite
from stepdistill.evaluation.records import read_rows
from stepdistill.files import cache_folder
from stepdistill.processes import Processes

TIMES = (*records.TIMES, "command")
SETTINGS = suite.Settings(batch=2, latency_repeats=0, grid=3, floor=False, progress=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("pictures") / "base")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[int, int]]:
    """(steps, first) of every batch that is generated."""
    calls: list[tuple[int, int]] = []
    draw = generate.Series.draw

    def spy(self, steps, first, count):
        calls.append((steps, first))
        return draw(self, steps, first, count)

    monkeypatch.setattr(generate.Series, "draw", spy)
    return calls


def run(base, out=None, steps=(2,), protocol=TINY, model=None, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    models = {"t": model or f"{base},scheduler=ddim"}
    return suite.evaluate(models, protocol, steps, out=out, settings=settings, instruments=instruments())


def figures(rows):
    """Rows without times and commands."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def same_files(a: Path, b: Path) -> int:
    """Number of images, manifests and influences under one folder; checks that the other folder has equal ones."""
    files = [f for f in a.rglob("*") if f.suffix in (".png", ".safetensors") or f.name.startswith("batch-")]
    for file in files:
        other = b / file.relative_to(a)
        if file.suffix != ".safetensors":
            assert file.read_bytes() == other.read_bytes()
            continue
        ours, theirs = load_file(file), load_file(other)  # the order in a header is arbitrary
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    return len(files)


def test_pictures_that_were_drawn_are_read_and_give_the_same_figures(base, cache, tmp_path, drawn):
    first = run(base, tmp_path / "a", (1, 2))
    assert drawn == [(1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4)]
    again = run(base, tmp_path / "b", (1, 2))
    assert len(drawn) == 6 and [row["nfe"] for row in again.rows] == [2, 4]
    assert figures(again.rows) == figures(first.rows)
    assert same_files(tmp_path / "a", tmp_path / "b") == 4
    assert again.store.cells == first.store.cells and "2 cells" in again.store.line()
    assert run(base, tmp_path / "b", (1, 2)).store.cells == first.store.cells and len(drawn) == 6


def test_a_cells_folder_holds_the_pictures_as_plain_png_files(base, cache):
    (folder,) = run(base).store.cells.values()
    assert folder.parent == cache / "pictures" and json.loads((folder / "cell.json").read_text())["steps"] == 2
    assert sorted(f.name for f in folder.glob("*.png")) == [f"{i:06d}.png" for i in range(5)]
    pipe = models.load(spec.parse(f"{base},scheduler=ddim"))
    generators = Draws.at(0, 2, 2).generators
    images = pipe(PROMPTS[2:4], num_inference_steps=2, guidance_scale=2.0, generator=generators).images
    for i, image in enumerate(images, 2):
        kept = np.asarray(Image.open(folder / f"{i:06d}.png"))
        assert (kept == np.asarray(image)).all()


def test_of_another_n_the_pictures_of_one_prompt_are_drawn_anew(base, cache, tmp_path, monkeypatch):
    """Their noise starts where the cell's ends, so it differs."""
    monkeypatch.setattr("stepdistill.evaluation.measures.diversity.trunk", lambda: False)

    def diversity(n: int) -> float:
        several = dataclasses.replace(instruments(), metrics=("fd", "diversity"))
        few = dataclasses.replace(TINY, n=n)
        asked = {
            "steps": (1,),
            "settings": suite.Settings(batch=3, latency_repeats=0, floor=False, progress=False),
            "instruments": several,
        }
        rows = suite.evaluate(f"teacher={base},scheduler=ddim", few, **asked).rows
        return rows[-1]["metrics"]["diversity_features"]["value"]

    diversity(5)
    warm = diversity(4)
    shutil.rmtree(cache)
    assert warm == diversity(4)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a bit of a picture": lambda cell: flip(cell / "000002.png"),
    "half a picture": lambda cell: (cell / "000003.png").write_bytes((cell / "000003.png").read_bytes()[:50]),
    "no picture": lambda cell: (cell / "000003.png").unlink(),
    "another picture": lambda cell: shutil.copy(cell / "000000.png", cell / "000002.png"),
    "an empty manifest": lambda cell: (cell / "batch-000002.json").write_bytes(b""),
    "another manifest": lambda cell: shutil.copy(cell / "batch-000000.json", cell / "batch-000002.json"),
    "no table": lambda cell: (cell / "batch-000002.json").write_text("[]"),
    "another NFE": lambda cell: (cell / "batch-000002.json").write_text(
        (cell / "batch-000002.json").read_text().replace('"evaluations": 8', '"evaluations": 4')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_batch_that_is_damaged_is_drawn_again_and_no_other(base, cache, drawn, damage):
    first = run(base)
    (cell,) = first.store.cells.values()
    before = {file.name: file.read_bytes() for file in cell.iterdir()}
    DAMAGES[damage](cell)
    assert {file.name: file.read_bytes() for file in cell.iterdir()} != before
    drawn.clear()
    again = run(base)
    assert drawn == [(2, 2)] and figures(again.rows) == figures(first.rows)
    assert "1 cached batches were damaged and generated again" in again.store.line()
    assert {file.name: file.read_bytes() for file in cell.iterdir()} == before
    assert run(base).store.broken == 0 and drawn == [(2, 2)]


def test_whatever_can_change_a_picture_changes_its_folder(base, cache, tmp_path, monkeypatch):
    def folder(**options) -> Path:
        (found,) = run(base, **options).store.cells.values()
        return found

    rescaled = tiny.sd(vae_options={"scaling_factor": 0.25})  # the same weights: only the settings differ
    rescaled.save_pretrained(tmp_path / "rescaled")
    seeded = dataclasses.replace(TINY, seed=1)
    others = [
        folder(), folder(steps=(3,)), folder(protocol=seeded), folder(batch=3), folder(model=f"{base},scheduler=lcm"),
        folder(model=f"{base},scheduler=ddim,guidance=3"), folder(model=f"{base},scheduler=ddim,dtype=bf16"),
        folder(model=f"{tmp_path / 'rescaled'},scheduler=ddim"),
    ]  # fmt: skip
    shutil.copytree(base, tmp_path / "moved")
    same = [folder(model=f"{tmp_path / 'moved'},scheduler=ddim"), folder(protocol=dataclasses.replace(TINY, n=4))]
    assert set(same) == {others[0]}
    monkeypatch.setattr(provenance, "versions", lambda: {"torch": "0"})
    assert len({*others, folder()}) == len(others) + 1


def test_a_smaller_n_is_a_prefix_but_for_a_batch_of_another_size(base, cache, drawn):
    run(base)
    drawn.clear()
    run(base, protocol=dataclasses.replace(TINY, n=4))
    assert drawn == []
    run(base, protocol=dataclasses.replace(TINY, n=3))
    assert drawn == [(2, 2)]


@pytest.mark.parametrize("keep", [True, False])
def test_a_cut_cell_goes_on_where_it_was_and_stays_only_where_it_is_to_be_kept(
    base, cache, tmp_path, drawn, monkeypatch, keep
):
    whole = figures(run(base, tmp_path / "whole", keep=False).rows)
    assert not [*cache.glob("*/*")] and len(drawn) == 3
    with monkeypatch.context() as patch:
        count = generate.evaluated

        def cut(*call):
            if drawn[-1] == (2, 4):
                raise KeyboardInterrupt
            return count(*call)

        patch.setattr(generate, "evaluated", cut)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "cut", keep=keep)
    drawn.clear()
    assert figures(run(base, tmp_path / "cut", keep=keep).rows) == whole and drawn == [(2, 4)]
    assert [place.parent.name for place in cache.glob("*/*")] == ["pictures"] * keep


def test_a_cell_above_the_limit_is_not_kept(base, cache, monkeypatch):
    monkeypatch.setenv("STEPDISTILL_PICTURES_GIB", "1e-6")
    assert run(base).store.line() is None and not [*cache.glob("*/*")]
    monkeypatch.setenv("STEPDISTILL_PICTURES_GIB", "1")
    assert run(base).store.cells
    for told in ("many", "-1", "nan"):
        monkeypatch.setenv("STEPDISTILL_PICTURES_GIB", told)
        with pytest.raises(InputError, match=rf"STEPDISTILL_PICTURES_GIB: got '{told}'; allowed: GiB, 0 or more"):
            run(base)


@pytest.mark.parametrize("unwanted", ["over the limit", "without keeping"])
def test_a_kept_cell_that_grows_is_kept_no_longer_than_a_new_one_would_be(base, cache, drawn, monkeypatch, unwanted):
    few, keep = dataclasses.replace(TINY, n=3), unwanted == "over the limit"
    whole = figures(run(base, keep=False).rows)
    (cell,) = run(base, protocol=few).store.cells.values()
    if unwanted == "over the limit":
        monkeypatch.setenv("STEPDISTILL_PICTURES_GIB", str(sum(pictures._sizes(cell)) / 2**30))
    assert list(run(base, protocol=few, keep=keep).store.cells.values()) == [cell]  # nothing was added to it
    drawn.clear()
    again = run(base, keep=keep)
    assert figures(again.rows) == whole and drawn == [(2, 2), (2, 4)]
    assert again.store.cells == {} and not [*cache.glob("*/*")]


def test_a_kept_cell_grows_within_the_limit_and_not_on_a_disk_without_room(base, cache, monkeypatch):
    few, usage = dataclasses.replace(TINY, n=3), shutil.disk_usage(cache.parent)
    (cell,) = run(base, protocol=few).store.cells.values()
    before = {file.name: file.read_bytes() for file in cell.iterdir()}
    room = 2 * 2 * 3 * 32 * 32  # twice that of the two missing images
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room - 1))
    assert "has not twice the room" in run(base).store.line()
    assert {file.name: file.read_bytes() for file in cell.iterdir()} == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room))
    assert list(run(base).store.cells.values()) == [cell] and len(pictures._sizes(cell)) == 5


def test_a_cell_that_another_process_of_the_run_added_to_is_not_kept_against_the_users_will(cache):
    cell = cache / "pictures" / pictures._hash([pictures.FORMAT, {}])[:32]
    for wrote in (False, True):
        cell.mkdir(parents=True, exist_ok=True)
        with pictures.Store(keep=False) as store:
            store.finish("t", store.cell({}, 0), wrote=wrote)
        assert cell.is_dir() is not wrote


def test_a_cache_that_cannot_be_written_ends_no_benchmark(base, cache):
    cache.write_text("a file")
    results = run(base)
    assert len(results.rows) == 1 and not results.failed
    assert "some could not be cached" in results.store.line() and str(cache) in results.store.line()


def test_a_write_that_fails_once_costs_one_cell_and_no_other(base, cache, monkeypatch):
    write, calls = Path.write_bytes, []

    def fails_once(file, data):
        if file.name == "000002.png" and not calls:
            calls.append(file)
            raise OSError(errno.EIO, "Input/output error")
        return write(file, data)

    monkeypatch.setattr(Path, "write_bytes", fails_once)
    results = run(base, steps=(1, 2, 3))
    kept = [json.loads((folder / "cell.json").read_text())["steps"] for folder in results.store.cells.values()]
    assert len(results.rows) == 3 and kept == [2, 3]
    assert "2 cells" in results.store.line() and "some could not be cached ([Errno 5]" in results.store.line()
    assert not [*cache.glob("drawing/*")]


def cut(base, out, monkeypatch, at=(2, 4), **changes) -> Path:
    """Interrupts a run while it generates a batch; returns the folder that it leaves."""
    draw = generate.Series.draw

    def stops(self, steps, first, count):
        if (steps, first) == at:
            raise KeyboardInterrupt
        return draw(self, steps, first, count)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Series, "draw", stops)
        with pytest.raises(KeyboardInterrupt):
            run(base, out, **changes)
    (left,) = cache_folder().glob("drawing/*")
    assert (left / "batch-000002.json").is_file()
    return left


def test_what_a_cut_run_left_is_cleared_by_the_next_into_its_folder_that_has_no_use_for_it(
    base, cache, tmp_path, monkeypatch
):
    left = cut(base, tmp_path / "mine", monkeypatch)
    run(base, tmp_path / "other", steps=(1,))
    run(base, steps=(3,))
    assert left.is_dir()  # it belongs to another run
    failed = run(base, tmp_path / "mine", steps=(1, 2000))
    assert failed.failed and left.is_dir()  # what failed may be resumed
    run(base, tmp_path / "mine", steps=(1,))
    assert not left.is_dir() and len([*cache.glob("pictures/*")]) == 2


HOLDS = """
import sys
from pathlib import Path

from stepdistill import holds

handle = holds.hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_what_a_live_process_draws_in_is_not_cleared_and_what_a_killed_one_drew_in_is(
    base, cache, tmp_path, monkeypatch
):
    left = cut(base, tmp_path / "mine", monkeypatch)
    words = [sys.executable, "-c", HOLDS, str(left)]
    with subprocess.Popen(words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        run(base, tmp_path / "mine", steps=(1,))
        assert left.is_dir()
        other.kill()
    run(base, tmp_path / "mine", steps=(1,))
    assert not left.is_dir()


def test_halves_of_files_are_removed_only_where_nobody_writes(base, cache):
    (cell,) = run(base).store.cells.values()
    half = cell / ".000000.png.1-1.new"
    half.write_bytes(b"half")
    handle = holds.hold(cell)
    run(base)
    assert half.is_file()
    holds.release(handle)
    run(base)
    assert not half.is_file() and not [*cell.glob(".*")]


def test_a_hold_goes_with_a_folder_and_one_that_was_cleared_is_made_again(tmp_path, monkeypatch):
    handle = holds.hold(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    with holds.alone(tmp_path / "b") as free:
        assert free is False
    holds.release(handle)
    with holds.alone(tmp_path / "b") as free:
        assert free is True
    opened = os.open

    def cleared(folder, flags):
        handle = opened(folder, flags)
        monkeypatch.setattr(os, "open", opened)
        shutil.rmtree(folder)
        return handle

    monkeypatch.setattr(os, "open", cleared)
    handle = holds.hold(tmp_path / "b")
    with holds.alone(tmp_path / "b") as free:
        assert free is False
    holds.release(handle)


def test_where_a_disk_has_no_locks_only_what_is_ones_own_is_cleared(base, cache, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(holds.fcntl, "flock", none)
    left = cut(base, tmp_path / "mine", monkeypatch)
    run(base, tmp_path / "mine", steps=(1,), keep=False)
    assert [*cache.glob("*/*")] == [left]


def test_a_disk_without_room_for_the_whole_cell_is_not_filled(base, cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent)._replace(free=2 * 5 * 3 * 32 * 32 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert run(base).store.line().startswith("images: some could not be cached") and not [*cache.glob("*/*")]


def test_a_pipeline_that_is_handed_over_is_always_drawn(cache, drawn):
    pipe = tiny.sd()
    for _ in range(2):
        results = suite.evaluate({"p": pipe}, TINY, (1,), settings=SETTINGS, instruments=instruments())
        assert results.store.line() is None
    assert len(drawn) == 6


KILLED = """
import os, random, signal, sys, traceback
from pathlib import Path

from test_pictures import run

base, root = sys.argv[1], Path(sys.argv[2])
writes, kill_at = [], None


def hook(event, told):
    # The process ends at its kill_at-th write or rename under root.
    if event == "os.rename" or (event == "open" and isinstance(told[1], str) and set(told[1]) & set("wax")):
        if str(told[0]).startswith(str(root)):
            writes.append(told[0])
            if len(writes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def bench(name):
    os.environ["STEPDISTILL_CACHE"] = str(root / name / "cache")
    run(base, root / name / "out", (1, 2))


def forked(name):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    try:
        writes.clear()
        bench(name)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


sys.addaudithook(hook)
bench("whole")
for i, point in enumerate(random.Random(0).sample(range(1, len(writes)), 5)):
    kill_at = point
    assert forked(f"cut-{i}") == signal.SIGKILL, f"it ended before write {point} of {len(writes)}"
    kill_at = None
    assert forked(f"cut-{i}") == 0
"""


def test_a_benchmark_killed_at_five_random_points_ends_with_the_same_figures(base, tmp_path):
    path = f"{Path(__file__).parent}:{environment()['PYTHONPATH']}"
    words = [sys.executable, "-c", KILLED, str(base), str(tmp_path)]
    done = subprocess.run(words, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = tmp_path / "whole"
    for cut in (tmp_path / f"cut-{i}" for i in range(5)):
        assert figures(read_rows(cut / "out" / "results.jsonl")) == figures(read_rows(whole / "out" / "results.jsonl"))
        assert same_files(whole, cut) == 2 * (5 + 3 + 1 + 1)  # images, manifests, the grid and the units of two cells


SHARED = """
import json, os, sys
from pathlib import Path

from test_pictures import generate, run

base, root, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
os.environ["STEPDISTILL_CACHE"] = str(root / "cache")
results = [run(base, root / "two", (1, 2), latency_repeats=1, floor=True)]
draw = generate.Series.draw


def breaks(self, steps, first, count):
    if rank == 1 and steps == 3:
        raise RuntimeError("out of luck")
    return draw(self, steps, first, count)


generate.Series.draw = breaks
results.append(run(base, root / "failing", (3, 4)))
told = [{"rows": r.rows, "failed": [(f.steps, f.reason) for f in r.failed], "main": r.main} for r in results]
(root / f"{rank}.json").write_text(json.dumps(told))
"""


def test_two_processes_share_a_benchmark_and_fail_together(base, cache, tmp_path):
    one = run(base, tmp_path / "one", (1, 2), floor=True)
    shutil.rmtree(cache)
    (tmp_path / "shared.py").write_text(SHARED)
    path = f"{Path(__file__).parent}:{environment()['PYTHONPATH']}"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "shared.py")]
    done = subprocess.run(
        [sys.executable, *words, str(base), str(tmp_path)], env=environment() | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (whole, failing), (other, also) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert figures(whole["rows"]) == figures(other["rows"]) == figures(one.rows)
    assert read_rows(tmp_path / "two" / "results.jsonl") == whole["rows"] and (whole["main"], other["main"]) == (1, 0)
    assert same_files(tmp_path / "one", tmp_path / "two") == 8
    assert failing["failed"] == also["failed"] == [[3, "RuntimeError: out of luck"]]
    assert [row["steps"] for row in failing["rows"]] == [row["steps"] for row in also["rows"]] == [4]


def test_launched_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    import accelerate

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = SimpleNamespace(num_processes=1, process_index=0)
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: alone)
    with pytest.raises(InputError, match="got 2 launched, which do not find each other on cpu"):
        Processes.found("cpu")


def test_a_drawn_picture_lies_in_memory_as_one_that_is_read():
    images = torch.rand(2, 3, 8, 8)
    drawn = generate.to_uint8(images.to(memory_format=torch.channels_last))
    assert drawn.is_contiguous() and torch.equal(drawn, generate.to_uint8(images.permute(0, 2, 3, 1).numpy()))


def test_every_part_of_a_pipelines_settings_is_in_its_hash():
    pipe = tiny.sd()
    before = pictures.setup_of(pipe)
    assert before == pictures.setup_of(tiny.sd())
    pipe.unet.register_to_config(sample_size=16)
    larger = pictures.setup_of(pipe)
    pipe.text_encoder.config.num_attention_heads = 1
    fewer = pictures.setup_of(pipe)
    pipe.vae.to(memory_format=torch.channels_last)
    assert len({before, larger, fewer, pictures.setup_of(pipe)}) == 4


def test_nothing_of_a_cell_is_read_while_its_manifest_is_missing(base, cache, drawn):
    (cell,) = run(base).store.cells.values()
    (cell / "batch-000000.json").unlink()
    again = run(base)
    assert drawn[3:] == [(2, 0)] and again.store.broken == 0
