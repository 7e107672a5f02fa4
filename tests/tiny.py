"""Tiny random pipelines of the real classes, small enough that a test trains one in seconds."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["a", "the", "person", "with", "red", "blue", "hat", "hair", "on", "left", "right", "cat"]


def tokenizer(length: int = 16):
    """A CLIP tokenizer of letters and a few words."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)] + [",", "."]
    tokens = letters + [f"{c}</w>" for c in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                tokens.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    vocabulary = {t: i for i, t in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def _text_config(tok, width: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tok), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=tok.model_max_length, projection_dim=width, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id,
    )  # fmt: skip


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_size=16, scaling_factor=0.5,
    )  # fmt: skip


def _scheduler(prediction_type: str):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def _unet(width: int, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=2, **more,
    )  # fmt: skip


def stable_diffusion(prediction_type: str = "epsilon", seed: int = 0):
    """A StableDiffusionPipeline of 16x16 pictures and 8x8x4 latents."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    tok = tokenizer()
    pipeline = StableDiffusionPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_text_config(tok, 16)).eval(), tokenizer=tok, unet=_unet(16),
        scheduler=_scheduler(prediction_type), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion_xl(prediction_type: str = "epsilon", seed: int = 0):
    """A StableDiffusionXLPipeline of 16x16 pictures and 8x8x4 latents."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tok = tokenizer()
    unet = _unet(
        32, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_text_config(tok, 16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tok, 16)).eval(), tokenizer=tok, tokenizer_2=tok,
        unet=unet, scheduler=_scheduler(prediction_type), add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


FAMILIES = {"sd": stable_diffusion, "sdxl": stable_diffusion_xl}


def save(folder: Path, family: str = "sd", **options) -> str:
    """Writes a tiny pipeline and returns its path."""
    FAMILIES[family](**options).save_pretrained(folder)
    return str(folder)


def image_folder(folder: Path, count: int = 6, size: int = 16, seed: int = 0) -> str:
    """Random pictures with metadata.jsonl."""
    import json

    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {WORDS[4 + i % 2]} hat"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)
