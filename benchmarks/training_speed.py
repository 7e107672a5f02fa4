"""Time of a training step relative to its unavoidable part, and to our re-implementation of the public scripts' step.

    python benchmarks/training_speed.py --out benchmarks/results/training_speed.json
    python benchmarks/training_speed.py --size sd15 --mixed-precision bf16 --compile --batch 16

Weights are random; sizes are those of the embedded teacher (`avatars`) or of Stable Diffusion 1.5 (`sd15`). The
following take turns, so that a busy machine slows all alike:

    step         one update of `Trainer`: data, noise, loss, backward, clipping, optimizer, averages
    unavoidable  only the network calls of this update, replayed: the guided teacher's forward on 2B, the target's on
                 B, the student's forward and backward on B. Goal: step at most 1.10 times their sum
    script       LCM-LoRA's update as public scripts compute it, re-implemented here: a second network for the teacher,
                 separate forwards for prompt and empty prompt, peft's own adapter layers, text encoded in every step.
                 Goal: at least 1.3 times `step`
    pictures     the same, also encoding the images in every step, as those scripts do with image folders

Peak memory is measured in a separate process for each.
"""

from __future__ import annotations

import copy
import gc
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor
from turns import by_turns

from stepdistill.cli.command import guard, parse
from stepdistill.denoiser.unet import UNetDenoiser
from stepdistill.errors import InputError
from stepdistill.evaluation import records
from stepdistill.methods.base import huber
from stepdistill.methods.consistency import boundary_scalings
from stepdistill.schedules import AlphaBar, match
from stepdistill.training.adapter import LORA_TARGETS, matching
from stepdistill.training.lcm import LCMConfig
from stepdistill.training.networks import trainable
from stepdistill.training.processes import HALF
from stepdistill.training.roles import keep_in
from stepdistill.training.trainer import Trainer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNETS = {
    "avatars": {
        "sample_size": 16, "in_channels": 8, "out_channels": 8,
        "block_out_channels": (64, 96, 160), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4, "norm_num_groups": 16, "cross_attention_dim": 128,
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
}  # fmt: skip
VAES = {
    "avatars": {"block_out_channels": (32, 64), "latent_channels": 8, "layers_per_block": 1, "norm_num_groups": 16,
                "mid_block_add_attention": False},
    "sd15": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 4, "layers_per_block": 2},
}  # fmt: skip
TEXTS = {
    "avatars": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
                "max_position_embeddings": 48, "vocab_size": 1024},
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "max_position_embeddings": 77, "vocab_size": 49408},
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Flags of benchmarks/training_speed.py."""

    size: Literal["avatars", "sd15"] = "avatars"
    """Size of the network, the autoencoder and the text encoder."""
    batch: int = 16
    """Batch size."""
    rank: int = 64
    """Rank of the adapter."""
    rounds: int = 9
    """Rounds; each times everything once."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision, for both."""
    compile: bool = False
    """torch.compile the networks of both."""
    gradient_checkpointing: bool = False
    """Use gradient checkpointing in both."""
    memory: bool = True
    """Measure peak memory, each in its own process."""
    seed: int = 0
    """Seed of weights and data."""
    out: Path | None = None
    """JSON file for the figures."""
    alone: Literal["", "step", "script"] = ""
    """Internal: run a few steps of one of the two and print the peak memory in MiB."""


class Parts:
    """Networks with random weights, and matching samples."""

    def __init__(self, config: Config) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(config.seed)
        self.unet = UNet2DConditionModel(**UNETS[config.size]).requires_grad_(False).eval()
        vae = VAES[config.size]
        blocks = len(vae["block_out_channels"])
        down, up = ("DownEncoderBlock2D",) * blocks, ("UpDecoderBlock2D",) * blocks
        self.vae = AutoencoderKL(down_block_types=down, up_block_types=up, **vae).requires_grad_(False).eval()
        text = CLIPTextConfig(eos_token_id=2, bos_token_id=0, pad_token_id=1, **TEXTS[config.size])
        self.text = CLIPTextModel(text).requires_grad_(False).eval()
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        factor = 2 ** (blocks - 1)
        self.length, self.width, self.vocabulary = text.max_position_embeddings, text.hidden_size, text.vocab_size
        self.pictures = torch.randn(config.batch, 3, factor * side, factor * side).clamp(-1, 1)
        self.x0 = torch.randn(4 * config.batch, channels, side, side)


class Cached:
    """Latents and text embeddings in memory, as a LatentCache holds them."""

    def __init__(self, parts: Parts) -> None:
        self.x0 = parts.x0
        self.text = torch.randn(len(self.x0), parts.length, parts.width)
        self.uncond = {"text": torch.randn(1, parts.length, parts.width)}
        self.captions = [""] * len(self.x0)

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, indices: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.tensor(indices)
        return self.x0[rows], {"text": self.text[rows]}


def our_trainer(config: Config, parts: Parts, folder: str) -> Trainer:
    """Returns the trainer itself, on cached samples."""
    from diffusers import DDIMScheduler

    schedule = AlphaBar.from_scheduler(DDIMScheduler(**BETAS))
    denoiser = UNetDenoiser(parts.unet, schedule, "eps")
    run = LCMConfig(
        out=Path(folder) / "run", batch_size=config.batch, rank=config.rank, mixed_precision=config.mixed_precision,
        compile=config.compile, gradient_checkpointing=config.gradient_checkpointing, seed=config.seed,
    )  # fmt: skip
    data, source = Cached(parts), SimpleNamespace(components={})
    coder = SimpleNamespace(encode=lambda prompts, size: data.batch([*range(len(prompts))])[1])  # of validation prompts
    teacher = SimpleNamespace(denoiser=denoiser, conditioner=coder, source=source, image_size=None, to=denoiser.to)
    return Trainer(run.method(), teacher, data, run)


def unavoidable(trainer: Trainer) -> dict[str, Callable[[], None]]:
    """Returns the network calls of one update, each as a function that only repeats the call."""
    seen: list[tuple[tuple, dict]] = []
    hook = trainer.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    trainer.step()
    hook.remove()
    models, network = trainer.models, trainer.models.student.backbone
    (teacher, target, student), weights = seen, list(models.trained["student"].values())

    def forward(call: tuple[tuple, dict], context: Callable) -> Callable[[], None]:
        def job() -> None:
            with torch.no_grad(), context():
                network(*call[0], **call[1])

        return job

    def both() -> None:
        y = network(*student[0], **student[1])[0]
        y.backward(torch.ones_like(y))
        for p in weights:
            p.grad = None

    average = models.averages.in_place if models.averages else nullcontext
    return {"teacher": forward(teacher, models._switch.off), "target": forward(target, average), "student": both}


class Script:
    """Our re-implementation of the public scripts' update; none of the scripts themselves is run."""

    def __init__(self, config: Config, parts: Parts, device: torch.device) -> None:
        from accelerate import Accelerator
        from diffusers import DDIMScheduler
        from peft import LoraConfig

        self.config, self.device = config, device
        self.half = HALF[config.mixed_precision] or torch.float32
        self.schedule = AlphaBar.from_scheduler(DDIMScheduler(**BETAS))
        self.student, self.text, self.vae = (m.to(device) for m in (parts.unet, parts.text, parts.vae))
        for module in (self.student, self.text, self.vae):
            keep_in(HALF[config.mixed_precision], module)
        self.teacher = copy.deepcopy(self.student)
        names = matching(self.student, LORA_TARGETS)
        self.student.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=names))
        self.weights = list(trainable(self.student).values())
        for p in self.weights:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4)
        if config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        if config.compile:
            self.student.compile()
            self.teacher.compile()
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=config.mixed_precision)
        self.network = self.accelerator.prepare(self.student)
        self.x0, self.pictures = parts.x0[: config.batch].to(device), parts.pictures.to(device)
        self.tokens = torch.randint(3, parts.vocabulary, (config.batch, parts.length), device=device)
        self.empty = self.text(self.tokens[:1])[0].expand(config.batch, -1, -1)

    def step(self, encode_pictures: bool = False) -> None:
        """One update."""
        schedule, size, autocast = self.schedule, self.config.batch, self.accelerator.autocast
        with torch.no_grad():
            text = self.text(self.tokens)[0]
            x0 = self.vae.encode(self.pictures.to(self.half)).latent_dist.mean.float() if encode_pictures else self.x0
        t = 20.0 * torch.randint(1, 51, (size,), device=self.device).double() - 1
        s = (t - 20).clamp(min=0)
        scale = 4 + 12 * torch.rand(size, device=self.device)[:, None, None, None]
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)

        def clean(eps: Tensor, x: Tensor, time: Tensor) -> Tensor:
            alpha, sigma = (match(c, x) for c in schedule.coeffs(time))
            return (x - sigma * eps) / alpha

        def end(eps: Tensor, x: Tensor, time: Tensor) -> Tensor:
            skip, out = (match(c, x) for c in boundary_scalings(time, schedule))
            return skip * x + out * clean(eps, x, time)

        student = end(self.network(x_t, t.float(), text, return_dict=False)[0].float(), x_t, t)
        with torch.no_grad(), autocast():
            cond, uncond = (
                self.teacher(x_t.to(self.half), t.float(), e, return_dict=False)[0].float() for e in (text, self.empty)
            )
        with torch.no_grad():
            x0_cond, x0_uncond = clean(cond, x_t, t), clean(uncond, x_t, t)
            x0_guided, eps = x0_uncond + scale * (x0_cond - x0_uncond), uncond + scale * (cond - uncond)
            alpha_s, sigma_s = (match(c, x_t) for c in schedule.coeffs(s))
            x_s = alpha_s * x0_guided + sigma_s * eps
            target = end(self.network(x_s, s.float(), text, return_dict=False)[0].float(), x_s, s)
        loss = huber(student - target, 1e-3)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.detach().item()


def measure(config: Config) -> dict[str, object]:
    """Returns medians over the rounds in ms, and the medians and quartiles of the rounds' ratios."""
    parts = Parts(config)
    spare = replace_weights(parts)
    with tempfile.TemporaryDirectory() as folder:
        trainer = our_trainer(config, parts, folder)
        script = Script(config, spare, trainer.device)
        jobs: dict[str, Callable[[], object]] = {"step": trainer.step, **unavoidable(trainer)}
        jobs |= {"script": script.step, "pictures": lambda: script.step(encode_pictures=True)}
        taken = by_turns(jobs, config.rounds, trainer.device)
    figures: dict[str, object] = {f"{name}_ms": round(statistics.median(values), 2) for name, values in taken.items()}
    rows = [dict(zip(taken, values, strict=True)) for values in zip(*taken.values(), strict=True)]
    ratios = {
        "step_over_unavoidable": [r["step"] / (r["teacher"] + r["target"] + r["student"]) for r in rows],
        "script_over_step": [r["script"] / r["step"] for r in rows],
        "script_with_pictures_over_step": [r["pictures"] / r["step"] for r in rows],
    }
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        figures[name] = {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
    return figures


def replace_weights(parts: Parts) -> Parts:
    """Returns the same parts with a copy of the network, for the other implementation."""
    other = copy.copy(parts)
    other.unet = copy.deepcopy(parts.unet)
    return other


def peak_memory(config: Config) -> float:
    """Returns the peak memory in MiB of three steps: allocated on the GPU, or resident beyond what imports use."""
    gpu, before = torch.cuda.is_available(), resident("VmRSS")
    parts = Parts(config)
    if config.alone == "step":
        del parts.vae, parts.text  # latents and text are cached, so neither is loaded
    with tempfile.TemporaryDirectory() as folder:
        if config.alone == "step":
            job = our_trainer(config, parts, folder).step
        else:
            job = Script(config, parts, torch.device("cuda" if gpu else "cpu")).step
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        for _ in range(3):
            job()
    return torch.cuda.max_memory_allocated() / 2**20 if gpu else resident("VmHWM") - before


def resident(field: str) -> float:
    """Returns VmRSS or its high-water mark VmHWM of this process in MiB; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def in_a_process(config: Config, alone: str) -> float:
    """Runs `peak_memory` for one of the two in a separate process."""
    flags = ["--alone", alone]
    for name in ("size", "batch", "rank", "mixed_precision", "seed"):
        flags += [f"--{name}", str(getattr(config, name))]
    flags += [f"--{name}" for name in ("gradient_checkpointing", "compile") if getattr(config, name)]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"memory of {alone}: got {done.stderr.strip().splitlines()[-1:]}; leave it out with --no-memory"
        )
    return float(done.stdout.split()[-1])


def main(config: Config) -> None:
    """Measures, prints and writes the figures."""
    if config.rounds < 2 or config.batch < 1:
        raise InputError(
            f"got rounds={config.rounds}, batch={config.batch}; allowed: 2 or more rounds, 1 or more samples"
        )
    if config.alone:
        print(f"{peak_memory(config):.1f}")
        return
    found = measure(config)
    ms = {name: found[f"{name}_ms"] for name in ("step", "teacher", "target", "student", "script", "pictures")}

    def ratio(name: str) -> str:
        low, high = found[name]["quartiles"]
        return f"{found[name]['median']:.3f} ({low:.3f} to {high:.3f})"

    print(f"our step                    {ms['step']:9.1f} ms")
    parts = f"teacher {ms['teacher']:.1f} + target {ms['target']:.1f} + student and backward {ms['student']:.1f} ms"
    print(f"step / unavoidable          {ratio('step_over_unavoidable')}, goal 1.10 at most; {parts}")
    print(f"public scripts' step, our re-implementation: {ms['script']:.1f} ms")
    print(f"  / our step                {ratio('script_over_step')}, goal 1.3 at least")
    print(f"  with encoding each step   {ms['pictures']:9.1f} ms, / our step {ratio('script_with_pictures_over_step')}")
    if config.memory:
        found["peak_memory_mb"] = {name: in_a_process(config, name) for name in ("step", "script")}
        memory = found["peak_memory_mb"]
        print(f"peak memory                 ours {memory['step']:.0f} MiB, theirs {memory['script']:.0f} MiB")
    if config.out is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = {k: v for k, v in vars(replace(config, out=None)).items() if k not in ("out", "alone")}
        record = {
            "what": "training step / unavoidable calls; our re-implementation of the public scripts' step / our step",
            "goals": {"step_over_unavoidable": 1.10, "script_over_step": 1.3}, **settings, "figures": found,
        }  # fmt: skip
        records.write_record(config.out, record, device)


if __name__ == "__main__":
    sys.exit(guard(lambda: main(parse(Config, description=__doc__))))
