"""The commands cache, sample and export do what their help says, and report errors in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

from stepdistill.cli import cache, main
from stepdistill.data.cache import open_data
from stepdistill.denoiser.load import load_teacher
from stepdistill.export.folder import ADAPTER, LORA_FILE
from stepdistill.export.lora import save_lora
from stepdistill.methods.schedulers import lcm_scheduler


@pytest.fixture(scope="module")
def run(pipelines, tmp_path_factory) -> str:
    """A training run's folder, with an export."""
    folder = tmp_path_factory.mktemp("run")
    teacher = load_teacher(pipelines["sd"])
    targets = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v", "conv1"])
    teacher.denoiser.backbone.add_adapter(targets, adapter_name=ADAPTER)
    tiny.stir_adapter(teacher.denoiser.backbone, ADAPTER)
    scheduler = lcm_scheduler(teacher, solver_steps=50, timestep_scaling=10.0)
    save_lora(teacher, folder / "export", scheduler=scheduler, config={"teacher": pipelines["sd"]}, card="card")
    return str(folder)


def refused(capsys, *argv: object) -> str:
    """Returns the one line on stderr, apart from progress bars, of a command that must exit with 2."""
    assert main([str(word) for word in argv]) == 2
    *bars, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all("it/s" in bar or "img/s" in bar or not bar for bar in bars)
    return line


@pytest.mark.parametrize("command", ["cache", "sample", "export"])
def test_help_teaches(command, capsys):
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"stepdistill {command} " in said
    assert "--out" in said


def test_cache_makes_a_folder_that_training_takes_as_data(tmp_path, pipelines, pictures, capsys):
    out, teacher = tmp_path / "cache", pipelines["sdxl"]
    command = ["cache", "--teacher", teacher, "--data", pictures, "--out", str(out), "--resolution", "16", "--half"]
    assert main([*command, "--dry-run"]) == 0
    assert "would encode 6 images of 16x16 and 2 distinct captions" in capsys.readouterr().out
    assert not out.exists()
    for _ in range(2):  # the second time it exists already
        assert main(command) == 0
        assert "6 samples, 2 distinct captions" in capsys.readouterr().out
    cache = open_data(str(out), load_teacher(teacher))
    assert cache[0]["x0"].shape == (4, 4, 4)
    assert json.loads((out / "config.json").read_text())["resolution"] == 16


def test_cache_paints_for_prompts_alone(tmp_path, pipelines):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    out = tmp_path / "cache"
    command = ["cache", "--teacher", pipelines["sd"], "--data", str(tmp_path / "prompts.txt"), "--out", str(out)]
    assert main([*command, "--steps", "2", "--guidance", "3", "--seed", "4"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["painted"], manifest["steps"], manifest["guidance"], manifest["seed"]) == (True, 2, 3.0, 4)


@pytest.mark.parametrize(
    ("paints", "precision", "network"),
    [(False, "no", torch.bfloat16), (True, "no", torch.float32), (True, "bf16", torch.bfloat16)],
)
def test_cache_loads_only_the_network_that_it_needs(tmp_path, pipelines, monkeypatch, paints, precision, network):
    there = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *to, **_: there.append((type(self).__name__, to)) or self)
    config = cache.Config(out=tmp_path, teacher=pipelines["sd"], mixed_precision=precision)
    teacher = cache.open_teacher(config, "meta", paints=paints)
    assert next(teacher.denoiser.parameters()).dtype == network and teacher.vae.dtype == torch.float32
    moved = {name for name, to in there if "meta" in map(str, to)}
    assert moved == {"CLIPTextModel", "AutoencoderKL"} | ({"UNet2DConditionModel"} if paints else set())


def test_cache_says_what_is_wrong(tmp_path, pipelines, pictures, capsys):
    base = ["cache", "--teacher", pipelines["sd"], "--out", tmp_path / "cache"]
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(capsys, *base, "--data", tmp_path / "empty")
    assert "got 30; allowed: multiples of 4" in refused(capsys, *base, "--data", pictures, "--resolution", 30)
    assert "guidance: got 0.5; allowed" in refused(capsys, *base, "--data", pictures, "--guidance", 0.5)
    assert "steps: got 0; allowed" in refused(capsys, *base, "--data", pictures, "--steps", 0)
    assert "limit: got 0; allowed" in refused(capsys, *base, "--data", pictures, "--limit", 0)
    assert "limit: got -3; allowed" in refused(capsys, *base, "--data", pictures, "--limit", -3, "--dry-run")
    assert "guidance: got inf; allowed" in refused(capsys, *base, "--data", pictures, "--guidance", "inf")
    assert "seed: got 9223372036854775808" in refused(capsys, *base, "--data", pictures, "--seed", 2**63)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    assert "guidance: got none for" in refused(capsys, *base, "--data", tmp_path / "prompts.txt")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").touch()
    assert f"give {tmp_path / 'shards' / '*.tar'}" in refused(capsys, *base, "--data", tmp_path / "shards")
    there = ["--data", pictures, "--out", tmp_path / "cache"]
    assert "no model_index.json" in refused(capsys, "cache", "--teacher", tmp_path, *there)
    assert f"--data: got none for {pipelines['sd']}; allowed" in refused(capsys, *base)
    full = ["cache", "--teacher", pipelines["sd"], "--data", pictures, "--out", tmp_path]
    assert "which holds something else" in refused(capsys, *full)
    assert not (tmp_path / "cache").exists()


def test_sample_draws_a_row_a_prompt_with_the_same_noise_in_a_column(tmp_path, pipelines, run):
    def grid(name: str, *words: str):
        out = tmp_path / name
        command = ["sample", "--model", f"{pipelines['sd']},lora={run}/export", "--steps", "2", "--count", "2"]
        assert main([*command, "--out", str(out), *words]) == 0
        return Image.open(out), json.loads(out.with_suffix(".json").read_text())

    both, record = grid("both.png", "--prompt", "a cat", "--prompt", "a dog")
    side = 128  # 32 pixels, enlarged
    assert both.size == (2 * side + 4, 2 * side + 4)
    assert record["prompt"] == ["a cat", "a dog"]
    assert record["scheduler"] == "LCMScheduler" and record["guidance"] == 1.0
    (tmp_path / "prompts.txt").write_text("a dog\n")
    one, _ = grid("one.png", "--prompts", str(tmp_path / "prompts.txt"), "--batch", "1")
    row = both.crop((0, side + 4, 2 * side + 4, 2 * side + 4))
    difference = torch.tensor(list(row.tobytes())).int() - torch.tensor(list(one.tobytes())).int()
    assert difference.abs().max() <= 1
    shifted, _ = grid("shifted.png", "--prompt", "a dog", "--seed", "1")
    first, second = one.crop((side + 4, 0, 2 * side + 4, side)), shifted.crop((0, 0, side, side))
    assert (torch.tensor(list(first.tobytes())).int() - torch.tensor(list(second.tobytes())).int()).abs().max() <= 1


def test_sample_says_what_is_wrong(tmp_path, pipelines, capsys):
    base = ["sample", "--model", pipelines["sd"], "--out", tmp_path / "grid.png"]
    prompt = ["--prompt", "a cat"]
    assert "prompt: got none; allowed: one or more" in refused(capsys, *base)
    assert "(No such file or directory)" in refused(capsys, *base, "--prompts", tmp_path / "nowhere.txt")
    assert "steps: got 0; allowed: 1 or more" in refused(capsys, *base, *prompt, "--steps", 0)
    assert "guidance: got 0.5; allowed" in refused(capsys, *base, *prompt, "--guidance", 0.5)
    assert "guidance: got inf; allowed" in refused(capsys, *base, *prompt, "--guidance", "inf")
    assert "size: got 0; allowed: 1 or more" in refused(capsys, *base, *prompt, "--size", 0)
    assert "seed: got 9223372036854775808" in refused(capsys, *base, *prompt, "--seed", 2**63)
    assert "allowed: a .png" in refused(capsys, *base[:3], *prompt, "--out", tmp_path / "grid.gif")
    assert "does not draw that" in refused(capsys, *base, *prompt, "--size", 30)
    assert "does not exist" in refused(capsys, "sample", "--model", tmp_path / "nowhere", *prompt)
    assert main([str(word) for word in (*base, *prompt, "--dry-run")]) == 0
    assert not (tmp_path / "grid.png").exists()


def test_export_writes_each_format_from_a_runs_folder_or_its_export(tmp_path, run, pipelines):
    for folder in (run, f"{run}/export"):
        name = folder.rsplit("/", 1)[-1]
        assert main(["export", folder, "--format", "kohya", "--out", str(tmp_path / f"{name}.safetensors")]) == 0
        assert main(["export", folder, "--format", "fused", "--out", str(tmp_path / f"{name}-fused")]) == 0
        assert main(["export", folder, "--out", str(tmp_path / f"{name}-copy")]) == 0
        stored = load_file(tmp_path / f"{name}.safetensors")
        assert {value.item() for key, value in stored.items() if key.endswith(".alpha")} == {3.0}
        assert DiffusionPipeline.from_pretrained(tmp_path / f"{name}-fused").scheduler.config.timestep_scaling == 10.0
        copied = (tmp_path / f"{name}-copy" / LORA_FILE).read_bytes()
        with open(f"{run}/export/{LORA_FILE}", "rb") as own:
            assert copied == own.read()


def test_a_student_is_fused_into_the_files_it_was_trained_from(tmp_path, run, monkeypatch):
    folder = tmp_path / "export"
    shutil.copytree(f"{run}/export", folder)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"variant": "fp16", "revision": "abc"}))
    told = []
    monkeypatch.setattr("stepdistill.export.fused.save_fused", lambda *_, **files: told.append(files))
    main(["export", str(folder), "--format", "fused", "--out", str(tmp_path / "a")])
    main(["export", str(folder), "--format", "fused", "--out", str(tmp_path / "b"), "--teacher", "other"])
    assert told == [{"teacher": record["teacher"], "variant": "fp16", "revision": "abc"}, {"teacher": "other"}]


def test_export_goes_beside_the_folder_where_no_place_is_given(run, capsys):
    assert main(["export", run, "--format", "kohya"]) == 0
    out, err = capsys.readouterr()
    assert out.strip().endswith("export-kohya.safetensors")
    assert err.strip() == "use with: sampler LCM; CFG 1, as guidance is distilled in"
    assert "which is there already" in refused(capsys, "export", run, "--format", "kohya")


def test_export_says_what_is_wrong(tmp_path, run, pipelines, capsys):
    assert "which does not exist" in refused(capsys, "export", tmp_path / "nowhere")
    assert "which holds no export" in refused(capsys, "export", tmp_path)
    assert "a whole pipeline; allowed: diffusers" in refused(capsys, "export", pipelines["sd"], "--format", "fused")
    other = ["export", run, "--format", "fused", "--teacher", pipelines["sdxl"], "--out", tmp_path / "fused"]
    assert "was not trained" in refused(capsys, *other)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "a run that has not ended" in refused(capsys, "export", tmp_path / "run")
    assert "invalid choice" in refused(capsys, "export", run, "--format", "ckpt")
    assert not (tmp_path / "fused").exists()
