"""bench, report and export reject bad input before doing any work, in one line with exit code 2, and damage nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_suite import Pools

from stepdistill.cli import main
from stepdistill.cli.command import guard
from stepdistill.errors import InputError
from stepdistill.evaluation import features, metrics, places, sets
from stepdistill.evaluation.catalogue import catalogue
from stepdistill.export.folder import LORA_FILE


def run(capsys, *argv: object) -> tuple[int, str, list[str]]:
    """Returns the exit code, stdout, and the lines of stderr without progress bars."""
    code = main([str(word) for word in argv])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, [line for line in said.err.splitlines() if line and "elapsed" not in line]


def refused(capsys, *argv: object) -> str:
    """Returns the one error line of a command that must exit with 2."""
    code, _, lines = run(capsys, *argv)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture
def pools(monkeypatch):
    """Replaces EfficientNet's features by twelve others, and makes Inception unavailable."""
    pools = features.Extractor("efficientnet_lite2", "Pools", Pools(), 12, 32, "bilinear", "w")
    monkeypatch.setitem(features.EXTRACTORS, "efficientnet_lite2", lambda size, resize: pools)
    monkeypatch.setattr(features, "default_extractor", lambda: "efficientnet_lite2")


@pytest.fixture
def nothing_is_measured(monkeypatch):
    """Fails if anything after the checks is reached."""

    def never(*_, **__):
        raise AssertionError("measured before it was checked")

    monkeypatch.setattr(metrics, "open_set", never)


@pytest.fixture
def full(tmp_path):
    """A disk of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=False).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Seven captioned images of several sizes; one is rotated, according to its EXIF."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(1)
    lines = []
    for i, (width, height) in enumerate([(32, 32), (48, 32), (32, 64), (40, 40), (100, 33), (16, 16), (32, 48)]):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = picture.getexif()
        exif[0x0112] = 6 if i == 6 else 1
        picture.save(folder / f"{i}.png", exif=exif)
        lines.append(json.dumps({"file_name": f"{i}.png", "text": tiny.PROMPTS[i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.usefixtures("nothing_is_measured")
def test_bench_refuses_what_cannot_be_measured_before_it_measures(tmp_path, pipelines, capsys):
    good, out = f"good={pipelines['sd']}", ["--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    for flags, words in (
        (["--model", f"bad={pipelines['sd']},guidance=0.5"], "guidance: got 0.5; allowed: 1.0"),
        (["--steps", "0"], "steps: got 0"),
        (["--n", "1"], "n=1; allowed: 2 or more"),
        (["--batch", "0"], "batch: got 0; allowed: 1"),
        (["--latency-batch", "0"], "latency_batch: got 0; allowed: 1"),
        (["--latency-repeats", "-1"], "latency_repeats: got -1; allowed: 0"),
        (["--protocol", "imagefolder"], "give --data FOLDER"),
        (["--protocol", "avatars-2k", "--data", tmp_path], "pictures of its own"),
        (["--data", tmp_path / "nowhere"], "which is no folder"),
        (["--data", tmp_path / "empty"], "got no pictures"),
    ):
        assert words in refused(capsys, "bench", "--model", good, *flags, *out)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def missing(tmp_path, pipelines, monkeypatch) -> dict[str, tuple[str, str]]:
    """name -> (SPEC, expected message) of models that do not exist or cannot be read."""
    for folder in ("cut/checkpoints", "empty", "closed"):
        (tmp_path / folder).mkdir(parents=True)
    look, sd = os.stat, pipelines["sd"]

    def closed(path, *args, **kwargs):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(str(tmp_path / "closed")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", closed)  # root may read every folder
    return {
        "nothing": (f"{tmp_path / 'empty'}", "no model_index.json"),
        "nowhere": (f"{tmp_path / 'nowhere'}", "does not exist"),
        "hub": ("nobody/no-such-model", "the hub cannot be reached"),
        "locked": (f"{tmp_path / 'closed'}", "(Permission denied); allowed: a folder that can be read"),
        "no-lora": (f"{sd},lora={tmp_path / 'nowhere'}", "does not exist"),
        "empty-lora": (f"{sd},lora={tmp_path / 'empty'}", "no .safetensors"),
        "cut-lora": (f"{sd},lora={tmp_path / 'cut'}", "a run that has ended"),
        "locked-lora": (f"{sd},lora={tmp_path / 'closed'}", "(Permission denied); allowed: a folder that can be read"),
        "flow": ("avatars-flow,scheduler=ddim", "got ddim for a flow model; allowed: flow-euler, flow-lcm"),
    }


@pytest.mark.usefixtures("pools")
@pytest.mark.parametrize("dry", [True, False])
def test_models_that_are_missing_are_told_in_a_line_each_and_the_others_measured(
    tmp_path, pipelines, mixed, capsys, missing, dry
):
    models = [f"{name}={text}" for name, (text, _) in missing.items()]
    models.insert(3, f"good={pipelines['sd']}")
    command = ["bench", "--data", mixed, "--steps", 1, "--latency-repeats", 0, "--no-floor", "--out", tmp_path / "out"]
    command += [word for model in models for word in ("--model", model)]
    code, _, lines = run(capsys, *command, *["--dry-run"] * dry)
    told = {name: words for name, (_, words) in missing.items() if not (dry and name == "hub")}  # not queried
    assert code == 2 and len(lines) == len(told)
    for line, (name, words) in zip(lines, told.items(), strict=True):
        assert line.startswith(f"failed: {name}: ") and words in line
    if not dry:
        (row,) = (json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines())
        assert row["model"] == "good" and (tmp_path / "out" / "report.html").is_file()


@pytest.mark.usefixtures("nothing_is_measured")
def test_where_all_models_are_missing_nothing_is_measured(tmp_path, capsys, missing):
    command = [word for name, (text, _) in missing.items() for word in ("--model", f"{name}={text}")]
    code, _, lines = run(capsys, "bench", *command, "--out", tmp_path / "out")
    assert code == 2 and [line.split(":")[1].strip() for line in lines] == list(missing)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_sample_refuses_what_bench_refuses_before_it_loads_anything(tmp_path, capsys, missing, monkeypatch, dry):
    monkeypatch.setattr("stepdistill.evaluation.models.load", None)
    command = ["sample", "--prompt", "a cat", "--out", tmp_path / "grid.png", *["--dry-run"] * dry]
    for name, (text, words) in missing.items():
        if not (dry and name == "hub"):
            assert words in refused(capsys, *command, "--model", text)


@pytest.mark.usefixtures("nothing_is_measured")
def test_published_models_and_protocols_are_planned_without_a_network(tmp_path, capsys):
    models = ["--model", "@sdxl", "--model", "fast=@hyper-sdxl,dtype=fp32", "--dry-run"]
    place = tmp_path / "coco10k"
    place.mkdir()
    Image.new("RGB", (8, 8)).save(place / "0.png")
    plan = ["bench", *models, "--protocol", "coco10k-512", "--prompts", tmp_path / "p.txt", "--reference"]
    assert f"got {place} of 1 pictures; allowed: 10000" in refused(capsys, *plan, place)
    code, said, _ = run(capsys, *plan, tmp_path / "statistics.npz")
    assert code == 0 and "coco10k-512: 10000 images per cell, 5 cells" in said
    for words in (
        "euler,guidance=5.0",
        "Hyper-SDXL-4steps-lora.safetensors",
        "dtype=fp32",
        "at 8 steps",
        "at 50 steps",
    ):
        assert words in said
    line = refused(capsys, "bench", *models, "--protocol", "coco10k-512", "--prompts", tmp_path / "p.txt")
    assert "got no --reference; give the path of yours; DMD2's scripts/download_sdxl.sh" in line
    assert "got 50 for fast, which is for 1 2 4 8" in refused(capsys, "bench", *models, "--steps", 50)
    sample = ["sample", "--prompt", "a cat", "--dry-run", "--model"]
    assert "in 4 steps with stabilityai/stable-diffusion-xl" in run(capsys, *sample, "@hyper-sdxl")[1]
    assert "in 50 steps with black-forest-labs" in run(capsys, *sample, "@flux-dev")[1]
    code, said, _ = run(capsys, "bench", "--list-models")
    assert code == 0 and said.count("\n@") + 1 == len(catalogue()) and "stabilityai/sdxl-turbo" in said


@pytest.mark.usefixtures("pools")
def test_two_timings_dtype_and_layout_are_in_the_rows(tmp_path, pipelines, mixed, capsys):
    out = tmp_path / "out"
    command = ["bench", "--model", f"t={pipelines['sd']}", "--steps", 1, "--data", mixed, "--out", out, "--no-floor"]
    flags = ["--latency-batch", 2, "--latency-repeats", 1, "--dtype", "bf16", "--channels-last"]
    assert run(capsys, *command, *flags)[0] == 0
    (row,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert (row["latency_ms"]["batch"], row["latency_ms_batch"]["batch"], row["dtype"]) == (1, 2, "bfloat16")
    assert row["channels_last"] and row["timing"]["channels_last"] and row["timing"]["dtype"] == "bfloat16"
    assert len(row["latency_ms"]["quantiles"]["total"]) == 3 and row["latency_ms"]["compiled"] is False
    assert row["settings"]["name"] == "imagefolder" and row["settings"]["content"]["reference"]


@pytest.mark.usefixtures("pools")
def test_several_seeds_are_rows_and_the_table_shows_their_mean(tmp_path, pipelines, mixed, capsys):
    out = tmp_path / "out"
    command = ["bench", "--model", f"t={pipelines['sd']}", "--steps", 1, "--data", mixed, "--out", out, "--no-floor"]
    command += ["--latency-repeats", 1]
    code, said, _ = run(capsys, *command, "--seeds", 0, 1, "--dry-run")
    assert code == 0 and "2 cells" in said
    code, said, _ = run(capsys, *command, "--seeds", 0, 1)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert code == 0 and [row["seed"] for row in rows] == [0, 1] and rows[0]["fd"] != rows[1]["fd"]
    assert [row["latency_ms"] is not None for row in rows] == [True, False]
    shown = [line.split() for line in said.splitlines() if line.strip().startswith("t ")]
    mean = sum(row["fd"] for row in rows) / 2
    assert len(shown) == 1 and shown[0][3] == "2"  # seeds
    assert float(shown[0][4].replace(",", "")) == pytest.approx(mean, rel=1e-2)
    assert "seeds 0, 1" in (out / "report.md").read_text()
    assert run(capsys, *command, "--seed", 2)[0] == 0
    assert [json.loads(line)["seed"] for line in (out / "results.jsonl").read_text().splitlines()] == [0, 1, 2]


@pytest.mark.usefixtures("nothing_is_measured")
def test_bench_leaves_what_is_no_benchmark_alone(tmp_path, pipelines, capsys):
    student = tmp_path / "student"
    (student / "checkpoints").mkdir(parents=True)
    (student / "config.json").write_text("mine")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / LORA_FILE).write_bytes(b"")
    (tmp_path / "file").write_text("")
    bench = ["bench", "--model", pipelines["sd"], "--out"]
    for place, held in (
        (student, "config.json"),
        (pipelines["sd"], "model_index.json"),
        (tmp_path / "lora", LORA_FILE),
    ):
        assert f"which holds something else ({held})" in refused(capsys, *bench, place)
    assert "which is a file" in refused(capsys, *bench, tmp_path / "file")
    assert (student / "config.json").read_text() == "mine" and not (student / "grids").exists()


@pytest.mark.usefixtures("nothing_is_measured")
def test_models_of_another_size_are_not_measured_against_the_embedded_pictures(tmp_path, capsys):
    large = tiny.sd()
    large.unet.register_to_config(sample_size=16)
    large.save_pretrained(tmp_path / "large")
    small = tiny.save(tmp_path / "small")
    capsys.readouterr()  # diffusers' progress bars of saving
    line = refused(capsys, "bench", "--model", tmp_path / "large", "--out", tmp_path / "out")
    assert "got a model of 64 pixels, and avatars-2k has 32" in line and "--data FOLDER" in line
    asked = refused(
        capsys, "bench", "--model", tmp_path / "large", "--protocol", "avatars-2k", "--out", tmp_path / "out"
    )
    assert asked == line
    line = refused(capsys, "bench", "--model", tmp_path / "large", "--model", small, "--data", tmp_path)
    assert "several sizes (large 64, small 32)" in line


@pytest.mark.usefixtures("pools")
def test_bench_on_ones_own_pictures(tmp_path, pipelines, mixed, capsys):
    out = tmp_path / "out"
    command = ["bench", "--model", f"t={pipelines['sd']}", "--steps", "1", "--latency-repeats", "1", "--out", out]
    code, said, lines = run(capsys, *command, "--data", mixed, "--dry-run")
    assert code == 0 and "imagefolder: 7 images per cell, 1 cells" in said and not lines and not out.exists()
    code, said, lines = run(capsys, *command, "--data", mixed)
    assert (code, lines) == (0, []) and "FD-Pools" in said
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    # prompts and reference are of the same images, so there is no held-out floor
    assert [row["model"] for row in rows] == ["reconstruction", "t"]
    assert {(row["protocol"], row["n"], row["clip_score"]) for row in rows} == {("imagefolder", 7, None)}
    assert rows[1]["guidance"] == 7.5  # the pipeline's own
    assert json.loads((out / "bench.json").read_text())["data"] == str(mixed) and not (out / "config.json").exists()
    before = (out / "results.jsonl").read_text()
    shutil.copytree(mixed, tmp_path / "moved")
    assert run(capsys, *command, "--data", tmp_path / "moved")[0] == 0  # the same images elsewhere: nothing to measure
    assert (out / "results.jsonl").read_text() == before
    assert "n=5" in refused(capsys, *command, "--data", mixed, "--n", "5").replace("n=7", "n=5")


@pytest.mark.usefixtures("pools")
def test_pictures_without_captions_do_for_models_without_prompts(tmp_path, pipelines, mixed, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(mixed, plain, ignore=shutil.ignore_patterns("metadata.jsonl"))
    pixel = tiny.save(tmp_path / "pixel", "pixel")
    command = ["bench", "--steps", "1", "--latency-repeats", "0", "--data", plain, "--out", tmp_path / "out", "--model"]
    assert "which has no captions, for a text" in refused(capsys, *command, pipelines["sd"])
    assert run(capsys, *command, pixel)[0] == 0


def test_a_folders_pictures_are_brought_to_a_size_as_training_brings_them(mixed, tmp_path):
    found = sets.open_set(str(mixed), 24)
    pictures = found.pictures(0, 7)
    assert pictures.shape == (7, 3, 24, 24) and pictures.dtype == torch.uint8 and found.prompts[1] == tiny.PROMPTS[1]
    upright = np.asarray(Image.open(mixed / "6.png").transpose(Image.Transpose.ROTATE_270))
    crop = upright[:, 8:40]  # 48 x 32 pixels, rotated, cropped at the centre
    assert np.array_equal(sets.open_set(str(mixed), 32).pictures(6, 7)[0].permute(1, 2, 0).numpy(), crop)
    assert sets.open_set(str(mixed), 32).key != found.key
    with pytest.raises(InputError, match=r"several sizes.*give the protocol a size"):
        sets.open_set(str(mixed)).pictures(0, 7)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../x.png", "text": "a"}\n')
    with pytest.raises(InputError, match="leads out of the folder"):
        sets.open_set(str(tmp_path))


@pytest.mark.usefixtures("pools")
def test_a_set_that_is_broken_uneven_or_too_small_is_told_in_one_line_and_leaves_nothing(
    tmp_path, pipelines, mixed, capsys
):
    command = ["bench", "--model", pipelines["sd"], "--steps", 1, "--out", tmp_path / "out", "--batch", 2]
    broken = tmp_path / "broken"
    shutil.copytree(mixed, broken)
    (broken / "4.png").write_bytes((mixed / "4.png").read_bytes()[:300])
    line = refused(capsys, *command, "--data", broken)
    assert f"got {broken / '4.png'}, which is broken" in line and "replace or remove it" in line
    line = refused(capsys, *command, "--data", mixed, "--n", 9)
    assert "got 7 prompts for n=9; lower n or add prompts" in line
    (tmp_path / "uneven.yaml").write_text(
        f"name: uneven\nn: 7\nprompts: {mixed}\nreference: {mixed}\nextractor: {{name: efficientnet_lite2}}\n"
    )
    line = refused(capsys, *command, "--protocol", tmp_path / "uneven.yaml")
    assert "several sizes (1.png of 48 x 32 among others of 32 x 32); allowed: one; give the protocol a size" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("pools")
def test_bench_says_where_the_pictures_are_and_keeps_none_where_it_is_told_so(
    tmp_path, pipelines, mixed, capsys, monkeypatch
):
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    command = ["bench", "--model", f"t={pipelines['sd']}", "--data", mixed, "--steps", 1, "--latency-repeats", 0]
    for flags, out in ((["--no-keep-pictures"], "none"), ([], "kept")):
        code, said, _ = run(capsys, *command, *flags, "--out", tmp_path / out)
        assert code == 0 and ("images: 1 cells, 0.0 MB in" in said) == (out == "kept")
        (*_, settings) = json.loads((tmp_path / out / "bench.json").read_text()).values()
        folders = [tmp_path / "cache" / "pictures" / f.name for f in tmp_path.glob("cache/pictures/*")]
        assert list(settings.values()) == [str(f) for f in folders] and len(folders) == (out == "kept")


@pytest.mark.usefixtures("pools")
def test_a_model_that_fails_later_is_told_and_the_others_finish_with_exit_code_2(tmp_path, pipelines, mixed, capsys):
    shutil.copytree(pipelines["sd"], tmp_path / "bad")
    (tmp_path / "bad" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    models = ["--model", tmp_path / "bad", "--model", f"good={pipelines['sd']}"]
    out = tmp_path / "out"
    code, _, lines = run(capsys, "bench", *models, "--data", mixed, "--steps", 1, "--latency-repeats", 0, "--out", out)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("failed: bad: ")
    assert '"model": "good"' in (out / "results.jsonl").read_text() and (out / "report.html").is_file()


@pytest.mark.usefixtures("pools")
def test_a_full_disk_ends_a_benchmark_in_one_line_and_fails_no_model(tmp_path, pipelines, mixed, full, capsys):
    command = ["bench", "--model", pipelines["sd"], "--data", mixed, "--steps", 1, "--latency-repeats", 0, "--out"]
    (full / "filler").write_bytes(bytes(48 << 10))
    line = refused(capsys, *command, full / "bench")
    assert "got no space left" in line and "run the same command again" in line
    assert run(capsys, *command, tmp_path / "bench")[0] == 0
    shutil.rmtree(full / "bench")
    shutil.copy(tmp_path / "bench" / "results.jsonl", full)
    assert "got no space left" in refused(capsys, "report", full)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "fused"])
def test_a_full_disk_ends_an_export_in_one_line(tmp_path, pipelines, full, form, capsys):
    pipe = tiny.sd()
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    settings = LoraConfig(r=64, lora_alpha=2, target_modules=["to_q", "conv1"])
    pipe.unet.add_adapter(settings)
    state, metadata = get_peft_model_state_dict(pipe.unet), settings.to_dict()
    type(pipe).save_lora_weights(tmp_path / "export", unet_lora_layers=state, unet_lora_adapter_metadata=metadata)
    command = ["export", tmp_path, "--format", form, "--teacher", pipelines["sd"], "--out"]
    assert "got no space left" in refused(capsys, *command, full / "student")
    assert not (full / "student").exists()


def test_a_place_closed_to_the_user_is_told_in_one_line_and_other_faults_are_not_hidden(capsys):
    def closed():
        raise PermissionError(13, "Permission denied", "/root/x")

    def broken():
        raise FileNotFoundError(2, "No such file", "/root/x")

    assert guard(closed) == 2
    assert capsys.readouterr().err == (
        "error: file: got /root/x (Permission denied); allowed: a place that can be read and written; choose another, "
        "or fix its permissions\n"
    )
    with pytest.raises(FileNotFoundError):
        guard(broken)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "sana"])
def test_a_models_picture_size_is_that_which_its_pipeline_draws_untold(family, tmp_path):
    """Sana's autoencoder names its blocks differently."""
    pipe = tiny.make(family)
    network = pipe.components.get("transformer") or pipe.unet
    tiny.save(tmp_path, family)
    assert places.picture_size(str(tmp_path)) == network.config.sample_size * pipe.vae_scale_factor
