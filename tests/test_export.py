"""Exports: plain diffusers gets every tensor, rank and alpha, under its own names, under kohya's, or fused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tiny
import torch
from diffusers import LCMScheduler
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from stepdistill.denoiser.load import load_teacher
from stepdistill.errors import InputError
from stepdistill.evaluation.models import training_record
from stepdistill.evaluation.spec import parse
from stepdistill.export.card import model_card
from stepdistill.export.folder import ADAPTER, LORA_FILE
from stepdistill.export.fused import save_fused
from stepdistill.export.kohya import read_lora, save_kohya, to_kohya
from stepdistill.export.lora import save_lora
from stepdistill.methods.consistency import sample_lcm
from stepdistill.methods.schedulers import lcm_scheduler
from stepdistill.training.adapter import LORA_TARGETS

RANK, ALPHA = 4, 6.0

LOAD = """if True:
    import sys, torch
    from diffusers import DiffusionPipeline, LCMScheduler
    from safetensors.torch import load_file, save_file

    base, lora, scheduler, noise, out = sys.argv[1:]
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_pretrained(scheduler)
    x_T = load_file(noise)["x_T"]
    prompts = ["a red cat with a blue hat", "the green dog"]

    def draw():
        return pipe(prompts, num_inference_steps=1, guidance_scale=1.0, latents=x_T, output_type="latent").images

    before = draw()
    pipe.load_lora_weights(lora)
    config = pipe.unet.peft_config["default_0"]
    tensors = {k: v.detach().contiguous() for k, v in pipe.unet.named_parameters() if ".lora_" in k}
    layers = [m for m in pipe.unet.modules() if hasattr(m, "scaling")]
    scalings = torch.tensor([m.scaling["default_0"] for m in layers])
    ranks = torch.tensor([m.r["default_0"] for m in layers])
    assert not any(name.split(".")[0] == "stepdistill" for name in sys.modules)
    save_file({"before": before, "after": draw(), "scalings": scalings, "ranks": ranks, **tensors}, out)
"""


def trained(teacher) -> dict[str, torch.Tensor]:
    """Adds an adapter as training does, fills it with random values, and returns its tensors by parameter name."""
    targets = [t for t in LORA_TARGETS if any(n.endswith(t) for n, _ in teacher.denoiser.backbone.named_modules())]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="gaussian")
    teacher.denoiser.backbone.add_adapter(config, adapter_name=ADAPTER)
    assert tiny.stir_adapter(teacher.denoiser.backbone, ADAPTER)
    return {k: v.detach() for k, v in teacher.denoiser.backbone.named_parameters() if ".lora_" in k}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def student(request, tmp_path_factory):
    """A saved pipeline, the export of an adapter on it, that adapter, noise, and our sampler's output for it."""
    root = tmp_path_factory.mktemp(request.param)
    base = tiny.save(root / "base", request.param)
    teacher = load_teacher(base)
    adapter = trained(teacher)
    scheduler = lcm_scheduler(teacher, solver_steps=50, timestep_scaling=10.0)
    card = model_card(
        method="lcm-lora", teacher=str(base), out="OUT", scheduler="LCMScheduler", lora=True, prompt="a hat",
        settings={"rank": RANK}, grid=None,
    )  # fmt: skip
    record = {"teacher": str(base), "method": "lcm-lora", "train_seconds": 2.5}
    out = save_lora(teacher, root / "export", scheduler=scheduler, config=record, card=card)
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = sample_lcm(teacher.denoiser, x_T, teacher.conditioner.encode(tiny.PROMPTS), steps=1)
    return {"family": request.param, "base": base, "out": out, "adapter": adapter, "x_T": x_T, "ours": ours,
            "root": root}  # fmt: skip


def loaded_elsewhere(student, lora) -> dict[str, torch.Tensor]:
    """Returns what plain diffusers loads and samples in a process without stepdistill."""
    from safetensors.torch import save_file

    root = student["root"]
    save_file({"x_T": student["x_T"]}, root / "noise.safetensors")
    command = [sys.executable, "-c", LOAD, student["base"], lora, student["out"] / "scheduler",
               root / "noise.safetensors", root / "seen.safetensors"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(root / "seen.safetensors")


def check_loaded(student, seen: dict[str, torch.Tensor]) -> None:
    arrived = {name.replace(".default_0.", f".{ADAPTER}."): value for name, value in seen.items() if ".lora_" in name}
    assert arrived.keys() == student["adapter"].keys()
    assert all(torch.equal(arrived[name], value) for name, value in student["adapter"].items())
    assert set(seen["scalings"].tolist()) == {ALPHA / RANK}
    assert set(seen["ranks"].tolist()) == {RANK}
    scale = seen["after"].abs().max().clamp(min=1)
    assert (seen["after"] - student["ours"]).abs().max() < 1e-5 * scale
    assert (seen["after"] - seen["before"]).abs().max() > 1e-2 * scale


def test_every_tensor_rank_and_alpha_load_in_a_fresh_process_with_our_samplers_output(student):
    saved = load_file(student["out"] / LORA_FILE)
    assert len(saved) == len(student["adapter"])
    assert all(name.startswith("unet.") and (".lora_A.weight" in name or ".lora_B.weight" in name) for name in saved)
    check_loaded(student, loaded_elsewhere(student, student["out"]))


def test_the_kohya_file_loads_back_whole_with_an_equal_output(student):
    file = save_kohya(student["out"], student["root"] / "student.safetensors")
    stored = load_file(file)
    layers = len(student["adapter"]) // 2
    assert len(stored) == 3 * layers
    assert all(name.startswith("lora_unet_") for name in stored)
    assert {value.item() for name, value in stored.items() if name.endswith(".alpha")} == {ALPHA}
    down = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    own = f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.{ADAPTER}.weight"
    assert torch.equal(stored[down], student["adapter"][own])
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_dim"] == str(RANK)
        assert float(opened.metadata()["ss_network_alpha"]) == ALPHA
    check_loaded(student, loaded_elsewhere(student, file))
    record = training_record(parse(f"{student['base']},lora={file}"))
    assert record == {"teacher": str(student["base"]), "method": "lcm-lora", "train_seconds": 2.5}


def test_layers_of_another_alpha_keep_it_in_kohyas_file():
    state = {f"unet.{layer}.lora_{f}.weight": torch.ones(2, 2) for layer in ("a.to_q", "a.to_k") for f in "AB"}
    stored = to_kohya(state, {"lora_alpha": 3, "r": 2, "alpha_pattern": {"to_k": 5}})
    assert stored["lora_unet_a_to_q.alpha"] == 3
    assert stored["lora_unet_a_to_k.alpha"] == 5


def test_the_fused_folder_is_a_whole_pipeline_with_an_equal_output(student):
    out = save_fused(student["out"], student["root"] / "fused", teacher=str(student["base"]))
    assert training_record(parse(str(out))) == {
        "teacher": str(student["base"]), "method": "lcm-lora", "train_seconds": 2.5,
    }  # fmt: skip
    card = (out / "README.md").read_text()
    use = card.partition("```python\n")[2].partition("```")[0]
    assert "load_lora_weights" not in card and "LoRA fused into" in card and "- lora\n" not in card
    scope: dict = {}
    exec(use.rpartition("image = ")[0], scope)
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert not any("lora" in name for name in pipe.unet.state_dict())
    drawn = pipe(tiny.PROMPTS, num_inference_steps=1, guidance_scale=1.0, latents=student["x_T"], output_type="latent")
    assert (drawn.images - student["ours"]).abs().max() < 1e-5 * student["ours"].abs().max().clamp(min=1)


def test_the_exported_scheduler_is_lcms_on_the_teachers_own_betas(student):
    scheduler = LCMScheduler.from_pretrained(student["out"], subfolder="scheduler")
    own = load_teacher(student["base"]).source.scheduler
    assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert scheduler.config.original_inference_steps == 50
    assert scheduler.config.timestep_scaling == 10.0
    assert scheduler.config.prediction_type == own.config.prediction_type
    assert not scheduler.config.clip_sample


def test_what_is_no_lora_export_is_named(student, tmp_path):
    with pytest.raises(InputError, match=f"which holds no {LORA_FILE}"):
        read_lora(tmp_path)
    content = (student["out"] / LORA_FILE).read_bytes()
    (tmp_path / LORA_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="which is broken"):
        read_lora(tmp_path)
    from safetensors.torch import save_file

    save_file(load_file(student["out"] / LORA_FILE), tmp_path / LORA_FILE)  # as public scripts do, without metadata
    with pytest.raises(InputError, match="without its rank and alpha"):
        save_kohya(tmp_path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_lora_of_another_architecture_is_refused(student, tmp_path):
    other = tiny.save(tmp_path / "other", "sdxl" if student["family"] == "sd" else "sd")
    with pytest.raises(InputError, match=r"for which .* was not trained .*; allowed: its own"):
        save_fused(student["out"], tmp_path / "fused", teacher=str(other))
    assert not (tmp_path / "fused").exists()
