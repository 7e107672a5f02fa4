"""Exports equal what was trained: plain diffusers loads every tensor, in a process without stepdistill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, LCMScheduler
from PIL import Image
from safetensors.torch import load_file

from stepdistill.data.cache import open_data
from stepdistill.denoiser.load import load_teacher
from stepdistill.errors import InputError
from stepdistill.evaluation.models import call_of, load
from stepdistill.evaluation.spec import parse
from stepdistill.export.card import model_card
from stepdistill.export.folder import ADAPTER, LORA_FILE
from stepdistill.methods.consistency import sample_lcm
from stepdistill.training.adapter import adapter_layers
from stepdistill.training.lcm import LCMConfig
from stepdistill.training.run import distil
from stepdistill.training.trainer import Trainer
from stepdistill.training.validation import evaluating

PROMPT = "a red cat with a blue hat"

LOAD = """
import json, sys, torch
from diffusers import DiffusionPipeline, LCMScheduler
from peft.utils import get_peft_model_state_dict
base, out, result = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(base)
pipe.load_lora_weights(out)
pipe.scheduler = LCMScheduler.from_pretrained(out, subfolder="scheduler")
assert "stepdistill" not in sys.modules
from safetensors.torch import save_file
name = next(iter(pipe.unet.peft_config))
lora = {k: p.detach().contiguous() for k, p in pipe.unet.named_parameters() if ".lora_" in k}
config = pipe.unet.peft_config[name]
pipe.set_progress_bar_config(disable=True)
def draw(steps):
    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(1, 4, 8, 8, generator=generator)
    return pipe("a red cat with a blue hat", num_inference_steps=steps, guidance_scale=1.0, latents=x_T,
                generator=generator, output_type="latent").images
drawn = {"1": draw(1), "4": draw(4)}
pipe.disable_lora()
save_file({**drawn, "base": draw(1), **{"lora:" + k: v for k, v in lora.items()}}, result)
print(json.dumps({"r": config.r, "alpha": config.lora_alpha}))
"""


def train(tmp_path, teacher: str, data: str, **more) -> tuple[Trainer, Path]:
    """Trains for two updates and exports; the trainer keeps its networks."""
    settings = {"max_train_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "rank": 4, "alpha": 6.0,
                "guidance": (2.0,)}  # fmt: skip
    config = LCMConfig(teacher=teacher, data=data, out=tmp_path / "run", **(settings | more))
    loaded = load_teacher(teacher)
    run = Trainer(config.method(), loaded, open_data(data, loaded), config)
    return run, run.fit()


def drawn_by(run: Trainer, steps: int, cond: dict[str, torch.Tensor]) -> torch.Tensor:
    """Samples the trainer's student from the noise that a pipeline draws with seed 3."""
    generator = torch.Generator().manual_seed(3)
    x_T, *noises = (torch.randn(1, *run.teacher.sample_shape, generator=generator) for _ in range(steps))
    with run.models.shown() as student, evaluating(student.backbone):
        return sample_lcm(student, x_T, cond, steps=steps, noises=noises)


def assert_same(got: torch.Tensor, ours: torch.Tensor) -> None:
    assert (got - ours).abs().max() < 1e-5 * ours.abs().max().clamp(min=1)


@pytest.mark.parametrize("export_ema", [0.0, 0.5])
def test_every_saved_tensor_loads_in_a_fresh_process_and_gives_the_trainers_output(
    tmp_path, family, pipelines, pictures, export_ema
):
    run, out = train(tmp_path, pipelines[family], pictures, export_ema=export_ema)
    saved = load_file(out / LORA_FILE)
    result = tmp_path / "result.safetensors"
    command = [sys.executable, "-c", LOAD, pipelines[family], str(out), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"r": 4, "alpha": 6.0}
    got = load_file(result)
    loaded = {k.removeprefix("lora:"): v for k, v in got.items() if k.startswith("lora:")}
    assert len(loaded) == len(saved) > 0
    for name, tensor in loaded.items():
        key = "unet." + name.replace(f".{name.split('.')[-2]}.weight", ".weight")
        assert torch.equal(tensor, saved[key]), key

    cond = run.teacher.conditioner.encode([PROMPT])
    for steps in (1, 4):
        assert_same(got[str(steps)], drawn_by(run, steps, cond))
    assert (got["1"] - got["base"]).abs().max() > 1e-3
    trained = run.models.trained["student"]
    exported = {name: saved["unet." + name.replace(f".{ADAPTER}.weight", ".weight")] for name in trained}
    assert all(torch.equal(exported[name], p) for name, p in trained.items()) == (not export_ema)


@pytest.mark.parametrize(("embed", "export_ema"), [(True, 0.0), (False, 0.0), (True, 0.5)])
def test_a_full_student_is_a_pipeline_folder_with_the_trainers_output(
    tmp_path, family, pipelines, pictures, embed, export_ema
):
    full = {"lora": False, "embed_guidance": embed, "learning_rate": 1e-3, "guidance": (2.0, 6.0)}
    run, out = train(tmp_path, pipelines[family], pictures, export_ema=export_ema, **full)
    pipeline = DiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    cond = run.teacher.conditioner.encode([PROMPT])
    scale = 4.0 if embed else 1.0
    if embed:
        cond["guidance"] = torch.tensor([scale - 1])
    for steps in (1, 4):
        generator = torch.Generator().manual_seed(3)
        options = {"latents": torch.randn(1, 4, 8, 8, generator=generator), "generator": generator}
        latents = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=scale, output_type="latent", **options)
        assert_same(latents.images, drawn_by(run, steps, cond))
    assert pipeline.scheduler.config.original_inference_steps == 50
    assert f"num_inference_steps=4, guidance_scale={scale})" in (out / "README.md").read_text()
    exported, trained = pipeline.unet.state_dict(), run.models.trained["student"]
    assert all(torch.equal(exported[name], p) for name, p in trained.items()) == (not export_ema)


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_a_full_student_of_a_pixel_model_is_a_pipeline_with_the_trainers_output(tmp_path, pictures, kind):
    source = tiny.pixel("sample")
    kind(unet=source.unet, scheduler=source.scheduler).save_pretrained(tmp_path / "teacher")
    full = {"lora": False, "learning_rate": 1e-3, "guidance": (1.0,)}
    run, out = train(tmp_path, str(tmp_path / "teacher"), pictures, **full)
    pipeline = DiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    for steps in (1, 4):
        generator = torch.Generator().manual_seed(3)
        images = pipeline(1, num_inference_steps=steps, generator=generator, output_type="np").images
        ours = (drawn_by(run, steps, {}) / 2 + 0.5).clamp(0, 1)
        assert ((ours > 0) & (ours < 1)).float().mean() > 0.1  # otherwise clamping would hide everything
        assert (torch.from_numpy(images).permute(0, 3, 1, 2) - ours).abs().max() < 1e-5
    assert "pipe(num_inference_steps=4)" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora": False, "embed_guidance": True}, r"embed_guidance: got a teacher with a UNet2DModel; .*--no-embed"),
        ({"lora": False, "guidance": (2.0,)}, r"guidance: got 2 with .*, a pixel model without text; allowed: 1"),
    ],
)
def test_what_a_pixel_model_cannot_be_is_said_before_data_are_encoded(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("stepdistill.data.cache.open_data", lambda *_, **__: pytest.fail("opened the data"))
    teacher = str(tiny.save(tmp_path / "teacher", "pixel"))
    with pytest.raises(InputError, match=message):
        distil(LCMConfig(teacher=teacher, data="avatars", out=tmp_path / "run", **({"guidance": (1.0,)} | flags)))


def test_training_leaves_every_base_weight_bit_identical(tmp_path, family, pipelines, pictures):
    before = {k: v.clone() for k, v in load_teacher(pipelines[family]).denoiser.backbone.state_dict().items()}
    teacher = load_teacher(pipelines[family])
    config = LCMConfig(
        teacher=pipelines[family], data=pictures, out=tmp_path / "run", max_train_steps=3, batch_size=2, rank=2
    )
    Trainer(config.method(), teacher, open_data(pictures, teacher), config).fit()
    after = {
        k.replace(".base_layer", ""): v for k, v in teacher.denoiser.backbone.state_dict().items() if ".lora_" not in k
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    moved = [layer.lora_B[ADAPTER].weight.abs().max().item() for layer in adapter_layers(teacher.denoiser.backbone)]
    assert min(moved) > 0, "an adapted layer was not trained"


def test_the_card_says_how_to_load_it_and_claims_no_figure(tmp_path, pipelines, pictures):
    _, out = train(tmp_path, pipelines["sd"], pictures)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "base_model" not in card
    assert f'DiffusionPipeline.from_pretrained("{pipelines["sd"]}", torch_dtype=torch.float32)' in card
    assert f'pipe.load_lora_weights("{out}")' in card
    assert "num_inference_steps=4, guidance_scale=1.0)" in card
    assert "FID" not in card
    assert json.loads((out / "config.json").read_text())["rank"] == 4


def test_a_card_names_its_base_model_where_the_hub_knows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    rest = {"method": "lcm", "out": "o", "scheduler": "S", "lora": True, "prompt": 'a "hat"', "settings": {}}
    for teacher in ("avatars", "runs/teacher", "./a", "/a/b", "a/b/c", "~/a"):
        assert "base_model" not in model_card(teacher=teacher, grid=None, **rest)
    card = model_card(teacher="org/model-1.5", grid=None, **rest)
    assert card.startswith("---\nbase_model: org/model-1.5\nlibrary_name: diffusers\n")
    assert r'pipe("a \"hat\"", num_inference_steps=4, guidance_scale=1.0)' in card


@pytest.mark.parametrize(("side", "call"), [(16, {"height": 16, "width": 16}), (None, {})])
def test_a_student_is_drawn_at_the_size_it_was_trained_at(tmp_path, pipelines, pictures, side, call):
    config = LCMConfig(
        teacher=pipelines["sd"], data=pictures, out=tmp_path, resolution=side, max_train_steps=1, batch_size=2, rank=2,
    )  # fmt: skip
    export = distil(config)
    spec = parse(f"{pipelines['sd']},lora={export}")
    assert call_of(spec, load(spec)) == call
    assert ("height=16, width=16" in (export / "README.md").read_text()) == bool(call)
    assert Image.open(export / "grid.png").width == 4 * 128 + 3 * 4  # enlarged from either size
    own = parse(f"{pipelines['sd']},lora={export},size=24")
    assert call_of(own, load(own)) == {"height": 24, "width": 24}
