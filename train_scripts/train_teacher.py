"""Trains the embedded teacher and its scorer from nothing, in four stages, on the embedded avatars.

    python train_scripts/train_teacher.py --out out/teacher              # all stages; run it again to resume
    python train_scripts/train_teacher.py --out out/teacher --stages vae text --config my.yaml

Stages: `vae` (autoencoder), `decoder` (its second half again, on noisy latents), `text` (tokenizer and CLIP text
tower), `unet` (the denoiser), `scorer` (an open_clip model with attribute probes). When all are done, `--out` holds
`teacher/`, a StableDiffusionPipeline folder, and `scorer/`; copy both to assets/. The one config is
train_scripts/configs/avatars_teacher.yaml.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from stepdistill.cli._run import guard
from stepdistill.data import avatars
from stepdistill.errors import InputError
from stepdistill.evaluation import records

CONFIG = Path(__file__).parent / "configs" / "avatars_teacher.yaml"
Figures = dict[str, Any]
STAGES = ("vae", "decoder", "text", "unet", "scorer")


@dataclass(frozen=True)
class Config:
    """Trains the embedded teacher."""

    out: Path
    """Folder for checkpoints and results."""
    config: Path = CONFIG
    """Sizes and budgets of the stages."""
    stages: tuple[str, ...] = STAGES
    """Which stages to run, in this order."""
    seed: int = 0
    """Seed of weights and batches."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    checkpoint_every: int = 1000
    """Updates between checkpoints."""


@dataclass(frozen=True)
class Budget:
    """How long and how fast a stage trains."""

    updates: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 200
    decay: float = 0.25
    """Share of the updates, at the end, over which the learning rate falls to zero."""
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0


def learning_rate_at(update: int, budget: Budget) -> float:
    """Warm-up, plateau, linear decay to zero: a plateau can be lengthened without starting again."""
    rise = min(1.0, (update + 1) / budget.warmup)
    fall = min(1.0, (budget.updates - update) / max(1.0, budget.decay * budget.updates))
    return budget.learning_rate * min(rise, fall)


def train(
    name: str, model: nn.Module, loss: Callable[[torch.Generator], Tensor], budget: Budget, config: Config
) -> dict[str, Tensor]:
    """Runs one stage to its end and returns the averaged weights.

    `loss` draws its own batch from the generator it is given, which is seeded by the update, so a resumed run sees
    the same batches. Weights, averages and optimizer state go to `<out>/checkpoints/<name>.safetensors`.
    """
    path = config.out / "checkpoints" / f"{name}.safetensors"
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        named.values(), lr=0.0, betas=budget.betas, weight_decay=budget.weight_decay, fused=True
    )
    averages = {key: parameter.detach().clone() for key, parameter in named.items()}
    buffers = dict(model.named_buffers())
    first = 0
    if path.exists():
        saved = load_file(path, device=config.device)
        first = int(saved["update"])
        for key, parameter in named.items():
            parameter.data.copy_(saved[f"model.{key}"])
            averages[key].copy_(saved[f"average.{key}"])
            optimizer.state[parameter] = {
                part: saved[f"{part}.{key}"].cpu() if part == "step" else saved[f"{part}.{key}"]
                for part in ("step", "exp_avg", "exp_avg_sq")
            }
        for key, buffer in buffers.items():
            buffer.copy_(saved[f"buffer.{key}"])

    def save(update: int) -> None:
        tensors = {"update": torch.tensor(update)}
        for key, parameter in named.items():
            tensors[f"model.{key}"], tensors[f"average.{key}"] = parameter.data, averages[key]
            tensors |= {f"{part}.{key}": value for part, value in optimizer.state[parameter].items()}
        tensors |= {f"buffer.{key}": buffer for key, buffer in buffers.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    model.train()
    # On a CPU the fused kernel's backward takes a third of an update of the small UNet.
    attention = partial(sdpa_kernel, SDPBackend.MATH) if config.device == "cpu" else nullcontext
    log = config.out / f"{name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(first, budget.updates), name, initial=first, total=budget.updates, dynamic_ncols=True)
    running = torch.zeros((), device=config.device)
    for update in bar:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + update)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(update, budget)
        with torch.autocast(torch.device(config.device).type, torch.bfloat16), attention():
            value = loss(generator)
        value.backward()
        nn.utils.clip_grad_norm_(named.values(), budget.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(budget.ema_decay, (update + 1) / (update + 10))
        torch._foreach_lerp_(list(averages.values()), [p.data for p in named.values()], 1 - decay)
        running.lerp_(value.detach().float(), 1.0 if update == first else 0.02)
        if (update + 1) % 100 == 0:
            level = running.item()
            if not math.isfinite(level):
                raise InputError(f"{name}: loss is {level} at update {update + 1}; lower its learning_rate")
            bar.set_postfix(loss=f"{level:.4f}")
            with log.open("a") as file:
                file.write(json.dumps({"update": update + 1, "loss": round(level, 6)}) + "\n")
        if (update + 1) % config.checkpoint_every == 0 or update + 1 == budget.updates:
            save(update + 1)
    return averages


def last_loss(config: Config, name: str) -> float:
    """The last smoothed loss in a stage's log."""
    return json.loads((config.out / f"{name}.jsonl").read_text().splitlines()[-1])["loss"]


def images_of(split: str, device: str) -> Tensor:
    """The split's pictures, (N, 3, 32, 32) uint8."""
    return torch.from_numpy(avatars.load(split).images).permute(0, 3, 1, 2).contiguous().to(device)


def to_unit(images: Tensor) -> Tensor:
    """uint8 pictures to floats in [-1, 1]."""
    return images.float().div(127.5).sub(1)


# ---------------------------------------------------------------------------------------------------------------- vae


def build_vae(sizes: dict) -> nn.Module:
    """A small AutoencoderKL."""
    from diffusers import AutoencoderKL

    levels = len(sizes["block_out_channels"])
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=avatars.SIZE, **sizes,
    )  # fmt: skip


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + 2 L2."""
    return (y.float() - x).abs().mean() + 2 * (y.float() - x).square().mean()


def run_vae(config: Config, sizes: dict, budget: Budget, kl_weight: float) -> Figures:
    """Reconstruction with a whisper of KL, so that latents stay near a unit normal and decode sharply."""
    vae = build_vae(sizes).to(config.device, memory_format=torch.channels_last)
    train_images = images_of("train", config.device)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(train_images), (budget.batch_size,), generator=generator)
        x = to_unit(train_images[index]).to(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(y, x) + kl_weight * kl

    vae.load_state_dict(train("vae", vae, loss, budget, config))
    vae.eval()
    latents = latents_of(vae, train_images[:4000])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(config.out / "vae")
    return {"scaling_factor": vae.config.scaling_factor} | reconstruction_figures(vae, config)


def run_decoder(config: Config, budget: Budget, noise: float) -> Figures:
    """Teaches the decoder to forgive a sampler's small errors: latents shaken by up to `noise`, the encoder fixed."""
    vae = load_vae(config)
    images = images_of("train", config.device)
    latents = latents_of(vae, images)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    decoder.to(memory_format=torch.channels_last).requires_grad_(True)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (budget.batch_size,), generator=generator)
        level = noise * torch.rand(budget.batch_size, 1, 1, 1, generator=generator)
        shaken = level * torch.randn(budget.batch_size, *latents.shape[1:], generator=generator)
        z = latents[index] + shaken.to(config.device) / vae.config.scaling_factor
        y = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        return reconstruction_loss(y, to_unit(images[index]))

    decoder.load_state_dict(train("decoder", decoder, loss, budget, config))
    vae.eval().save_pretrained(config.out / "vae")
    return reconstruction_figures(vae, config)


def load_vae(config: Config) -> nn.Module:
    """The autoencoder of the `vae` stage, and of the `decoder` stage once that is done."""
    from diffusers import AutoencoderKL

    if not (config.out / "vae").is_dir():
        raise InputError(f"{config.out / 'vae'}: not there; run the stage vae first")
    return AutoencoderKL.from_pretrained(config.out / "vae").to(config.device).eval().requires_grad_(False)


@torch.no_grad()
def latents_of(vae: nn.Module, images: Tensor) -> Tensor:
    """(N, C, h, w) posterior means of uint8 pictures."""
    batches = tqdm(images.split(250), "latents", dynamic_ncols=True)
    return torch.cat([vae.encode(to_unit(batch)).latent_dist.mean for batch in batches])


@torch.no_grad()
def reconstruction_figures(vae: nn.Module, config: Config) -> Figures:
    """PSNR in dB of 1,000 held-out pictures, from exact latents and from ones shaken by 0.1."""
    test = to_unit(images_of("test", config.device)[:1000])
    figures = {}
    for name, level in (("held_out_psnr_db", 0.0), ("held_out_psnr_db_at_noise_0.1", 0.1)):
        errors = []
        for batch in test.split(250):
            z = vae.encode(batch).latent_dist.mean
            z = z + level / vae.config.scaling_factor * torch.randn(z.shape).to(z.device)
            errors.append(((vae.decode(z).sample.clamp(-1, 1) - batch) / 2).square().mean())
        figures[name] = round(-10 * torch.stack(errors).mean().log10().item(), 2)
    return figures


# --------------------------------------------------------------------------------------------------------------- text


def build_tokenizer(captions: list[str], max_length: int):
    """A byte-level BPE in CLIP's format, learned from the captions. As in CLIP, the end token has the highest id."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *dict.fromkeys("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def attribute_classes() -> dict[str, list[str]]:
    """Every attribute of the embedded set with its classes, sorted."""
    rows = avatars.load("train").attributes
    return {name: sorted({row[name] for row in rows}) for name in sorted(rows[0])}


def attribute_labels(split: str, *, mentioned_only: bool) -> Tensor:
    """(N, attributes) class indices; with `mentioned_only`, what a caption leaves open is the class after the last."""
    data, classes = avatars.load(split), attribute_classes()
    index = {name: {value: i for i, value in enumerate(values)} for name, values in classes.items()}
    return torch.tensor([
        [
            index[name][row[name]] if not mentioned_only or name in named else len(classes[name])
            for name in classes
        ]
        for row, named in zip(data.attributes, data.mentioned, strict=True)
    ])  # fmt: skip


class Heads(nn.Module):
    """One linear classifier for each attribute."""

    def __init__(self, width: int, counts: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in counts)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy over attributes: features (B, D), labels (B, attributes)."""
        losses = [
            nn.functional.cross_entropy(h(features).float(), y) for h, y in zip(self.heads, labels.T, strict=True)
        ]
        return torch.stack(losses).mean()

    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """(attributes,) share of right classes."""
        right = [(h(features).argmax(-1) == y).float().mean() for h, y in zip(self.heads, labels.T, strict=True)]
        return torch.stack(right)


def tokenize(tokenizer, captions: list[str], device: str) -> Tensor:
    """(N, max_length) token ids, padded as StableDiffusionPipeline pads."""
    options = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
    return tokenizer(captions, return_tensors="pt", **options).input_ids.to(device)


def run_text(config: Config, max_length: int, sizes: dict, budget: Budget) -> Figures:
    """Learns the text tower by reading captions: from its pooled state, which attributes are named, and which class."""
    from transformers import CLIPTextConfig, CLIPTextModel

    data = avatars.load("train")
    tokenizer = build_tokenizer(data.captions, max_length)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tower = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=max_length, **special, **sizes)
    )
    heads = Heads(sizes["hidden_size"], [len(values) + 1 for values in attribute_classes().values()])
    model = nn.ModuleDict({"tower": tower, "heads": heads}).to(config.device)
    ids, labels = (
        tokenize(tokenizer, data.captions, config.device),
        attribute_labels("train", mentioned_only=True).to(config.device),
    )

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (budget.batch_size,), generator=generator)
        return heads.loss(tower(ids[index]).pooler_output, labels[index])

    model.load_state_dict(train("text", model, loss, budget, config), strict=False)
    model.eval()
    with torch.no_grad():
        pooled = tower(tokenize(tokenizer, avatars.load("test").captions, config.device)).pooler_output
        accuracy = heads.accuracy(pooled, attribute_labels("test", mentioned_only=True).to(config.device)).mean()
    tower.save_pretrained(config.out / "text_encoder")
    tokenizer.save_pretrained(config.out / "tokenizer")
    return {"held_out_accuracy": round(accuracy.item(), 5)}  # of named and open attributes, read from the caption


# --------------------------------------------------------------------------------------------------------------- unet


def load_text(config: Config):
    """The tokenizer and text tower of the `text` stage."""
    from transformers import CLIPTextModel, CLIPTokenizer

    for name in ("tokenizer", "text_encoder"):
        if not (config.out / name).is_dir():
            raise InputError(f"{config.out / name}: not there; run the stage text first")
    tower = CLIPTextModel.from_pretrained(config.out / "text_encoder").to(config.device).eval()
    return CLIPTokenizer.from_pretrained(config.out / "tokenizer"), tower


def run_unet(config: Config, sizes: dict, scheduler: dict, budget: Budget, caption_dropout: float, dtype: str) -> None:
    """v-prediction on cached latents and text states (Salimans and Ho 2022, eq. 10), then writes the whole pipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    vae = load_vae(config)
    tokenizer, tower = load_text(config)
    noise_scheduler = DDIMScheduler(**scheduler)
    alpha_bar = noise_scheduler.alphas_cumprod.to(config.device)
    unet = UNet2DConditionModel(cross_attention_dim=tower.config.hidden_size, **sizes).to(config.device)
    latents = latents_of(vae, images_of("train", config.device)) * vae.config.scaling_factor
    with torch.no_grad():
        ids = tokenize(tokenizer, ["", *avatars.load("train").captions], config.device)
        states = torch.cat([tower(b).last_hidden_state.to(torch.bfloat16) for b in ids.split(500)])
    empty, states = states[:1], states[1:]

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (budget.batch_size,), generator=generator)
        t = torch.randint(len(alpha_bar), (budget.batch_size,), generator=generator).to(config.device)
        eps = torch.randn(budget.batch_size, *latents.shape[1:], generator=generator).to(config.device)
        drop = torch.rand(budget.batch_size, 1, 1, generator=generator).to(config.device) < caption_dropout
        x0, text = latents[index], torch.where(drop, empty, states[index])
        alpha, sigma = alpha_bar[t].sqrt().view(-1, 1, 1, 1), (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
        student_v = unet(alpha * x0 + sigma * eps, t, text).sample
        return (student_v.float() - (alpha * eps - sigma * x0)).square().mean()

    averages = train("unet", unet, loss, budget, config)
    unet.load_state_dict(averages)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=tower, tokenizer=tokenizer, unet=unet.eval(), scheduler=noise_scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(dtype=getattr(torch, dtype)).save_pretrained(config.out / "teacher")
    return {"parameters": sum(p.numel() for p in unet.parameters()), "v_loss": last_loss(config, "unet")}


# ------------------------------------------------------------------------------------------------------------- scorer


def run_scorer(
    config: Config, model_cfg: dict, budget: Budget, attribute_weight: float, probe_weight_decay: float
) -> Figures:
    """An open_clip model trained on pictures and captions, image embeddings sharpened by the attributes; then probes.

    The probes are fitted afterwards on the frozen, normalised embedding of clean pictures, by L-BFGS.
    """
    import open_clip
    from open_clip.model import CLIP

    data = avatars.load("train")
    tokenizer, _ = load_text(config)
    model_cfg["text_cfg"] |= {
        "vocab_size": len(tokenizer), "context_length": tokenizer.model_max_length, "hf_tokenizer_name": "local",
    }  # fmt: skip
    classes = attribute_classes()
    clip = CLIP(**model_cfg)
    heads = Heads(model_cfg["embed_dim"], [len(values) for values in classes.values()])
    model = nn.ModuleDict({"clip": clip, "heads": heads}).to(config.device)
    ids, images = tokenize(tokenizer, data.captions, config.device), images_of("train", config.device)
    size = (model_cfg["vision_cfg"]["image_size"],) * 2

    def pixels(pictures: Tensor) -> Tensor:
        return nn.functional.interpolate(to_unit(pictures), size, mode="bicubic").clamp(-1, 1)

    labels = attribute_labels("train", mentioned_only=False).to(config.device)
    criterion = open_clip.ClipLoss()

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(ids), (budget.batch_size,), generator=generator)
        image, text, scale = clip(pixels(images[index]), ids[index])
        return criterion(image.float(), text.float(), scale) + attribute_weight * heads.loss(10 * image, labels[index])

    model.load_state_dict(train("scorer", model, loss, budget, config), strict=False)
    model.eval().requires_grad_(False)

    def embed(split: str) -> Tensor:
        batches = images_of(split, config.device).split(500)
        return torch.cat([clip.encode_image(pixels(batch), normalize=True).float() for batch in batches])

    features, held_out = embed("train"), embed("test")
    test_labels = attribute_labels("test", mentioned_only=False).to(config.device)
    probes = Heads(model_cfg["embed_dim"], [len(values) for values in classes.values()]).to(config.device)
    optimizer = torch.optim.LBFGS(probes.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(head.weight.square().sum() for head in probes.heads)
        value = probes.loss(features, labels) + probe_weight_decay * penalty
        value.backward()
        return value

    optimizer.step(closure)
    accuracy = dict(zip(classes, probes.accuracy(held_out, test_labels).tolist(), strict=True))
    folder = config.out / "scorer"
    folder.mkdir(parents=True, exist_ok=True)
    mean_std = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": mean_std}, indent=2)
    )
    weights = {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
    fitted = {}
    for name, head in zip(classes, probes.heads, strict=True):
        fitted |= {f"{name}.weight": head.weight.detach(), f"{name}.bias": head.bias.detach()}
    save_file(fitted, folder / "probes.safetensors")
    (folder / "probes.json").write_text(json.dumps(classes, indent=2) + "\n")
    return {"held_out_accuracy": {name: round(share, 4) for name, share in accuracy.items()}}


# --------------------------------------------------------------------------------------------------------------- main


RUN = {"vae": run_vae, "decoder": run_decoder, "text": run_text, "unet": run_unet, "scorer": run_scorer}


def record(config: Config, stage: str, plan: dict, figures: Figures) -> None:
    """Adds a stage to <out>/record.json: its plan, what came of it, and what made it."""
    file = config.out / "record.json"
    whole = json.loads(file.read_text()) if file.is_file() else {}
    whole[stage] = {
        "figures": figures, "plan": plan, "seed": config.seed, "device": records.device_name(config.device),
        "commit": records.commit(), "versions": records.versions(), "command": " ".join(map(shlex.quote, sys.argv)),
    }  # fmt: skip
    file.with_suffix(".new").write_text(json.dumps(whole, indent=2) + "\n")
    os.replace(file.with_suffix(".new"), file)
    print(f"{stage}: {json.dumps(figures)}")


def run(config: Config) -> None:
    """Runs the stages asked for."""
    if unknown := set(config.stages) - set(STAGES):
        raise InputError(f"--stages: got {', '.join(sorted(unknown))}; allowed: {', '.join(STAGES)}")
    plan = yaml.safe_load(config.config.read_text())
    torch.manual_seed(config.seed)
    for stage in config.stages:
        section = dict(plan[stage])
        budget = Budget(**section.pop("budget"))
        figures = RUN[stage](config, budget=budget, **section)
        record(config, stage, plan[stage], figures)


if __name__ == "__main__":
    sys.exit(guard(lambda: run(tyro.cli(Config, description=__doc__))))
