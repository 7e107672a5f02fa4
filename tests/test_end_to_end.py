"""What is exported is what was trained: loaded whole by plain diffusers, in a process that knows nothing of us."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from stepdistill.denoiser.load import load_teacher
from stepdistill.draws import Draws
from stepdistill.export.lora import LORA_FILE
from stepdistill.sampling import sample_lcm
from stepdistill.training.lcm import LCMConfig, distil
from stepdistill.training.roles import ADAPTER, adapter_layers

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
x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
latents = pipe("a red cat with a blue hat", num_inference_steps=1, guidance_scale=1.0,
               latents=x_T, output_type="latent").images
pipe.disable_lora()
base_latents = pipe("a red cat with a blue hat", num_inference_steps=1, guidance_scale=1.0,
                    latents=x_T, output_type="latent").images
save_file({"latents": latents, "base": base_latents, **{"lora:" + k: v for k, v in lora.items()}}, result)
print(json.dumps({"r": config.r, "alpha": config.lora_alpha}))
"""


def train(tmp_path, teacher: str, data: str, **more):
    settings = {
        "max_train_steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "rank": 4,
        "alpha": 6.0,
        "guidance": (2.0,),
    }
    return distil(LCMConfig(teacher=teacher, data=data, out=tmp_path / "run", **(settings | more)))


def test_every_saved_tensor_loads_in_a_fresh_process_and_gives_the_trainers_output(
    tmp_path, family, pipelines, pictures
):
    out = train(tmp_path, pipelines[family], pictures)
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

    teacher = load_teacher(pipelines[family])
    teacher.source.load_lora_weights(str(out))
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    ours = sample_lcm(teacher.denoiser, x_T, teacher.conditioner.encode([PROMPT]), steps=1, draws=Draws.at(0, 0, 1))
    assert (got["latents"] - ours).abs().max() < 1e-5
    assert (got["latents"] - got["base"]).abs().max() > 1e-3


@pytest.mark.parametrize("embed", [True, False])
def test_a_full_student_is_a_pipeline_folder_with_the_trainers_output(tmp_path, family, pipelines, pictures, embed):
    out = train(tmp_path, pipelines[family], pictures, lora=False, embed_guidance=embed, learning_rate=1e-3)
    pipeline = DiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scale = 4.0 if embed else 1.0
    latents = pipeline(PROMPT, num_inference_steps=1, guidance_scale=scale, latents=x_T, output_type="latent").images
    student = load_teacher(str(out))
    cond = student.conditioner.encode([PROMPT])
    if embed:
        cond["guidance"] = torch.tensor([scale - 1])
    ours = sample_lcm(student.denoiser, x_T, cond, steps=1, draws=Draws.at(0, 0, 1))
    assert (latents - ours).abs().max() < 1e-5
    assert pipeline.scheduler.config.original_inference_steps == 50


def test_training_leaves_every_base_weight_bit_identical(tmp_path, family, pipelines, pictures):
    from stepdistill.data.cache import open_data
    from stepdistill.training.trainer import Trainer

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
    out = train(tmp_path, pipelines["sd"], pictures)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert f'pipe.load_lora_weights("{out}")' in card
    assert "FID" not in card
    assert json.loads((out / "config.json").read_text())["rank"] == 4
