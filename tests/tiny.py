"""Tiny pipelines of the real classes with random weights, which tests load, train, save and load again.

`save` writes a whole pipeline folder that plain diffusers opens, and returns its path. Weights depend on the seed
alone. Networks are small enough for a forward of a few milliseconds, and have every kind of layer of the real ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from oracle import BETAS
from torch import nn

LATENT = 8  # side of the latents
FACTOR = 4  # pixels per latent, so images are 32 x 32
WORDS = ("a", "red", "blue", "green", "hat", "cat", "dog", "face", "with", "and", "of", "the", "on", "in")
PROMPTS = ["a red cat with a blue hat", "the green dog"]


def tokenizer(max_length: int = 16, pad_token: str | None = None):
    """A CLIP tokenizer: byte-level BPE with merges for a few whole words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            pieces = ["".join(pair), *pieces[2:]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    options = {} if pad_token is None else {"pad_token": pad_token}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length, **options)


def text_tower(words, width: int = 16, *, projection: int | None = None):
    """A CLIP text encoder of two layers; with `projection`, the one that also returns pooled text."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=2, projection_dim=projection or width,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def autoencoder(**options):
    """An AutoencoderKL of factor FACTOR and 4 latent channels."""
    from diffusers import AutoencoderKL

    blocks = FACTOR.bit_length()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks, layers_per_block=1, norm_num_groups=4, latent_channels=4,
        sample_size=FACTOR * LATENT, **({"scaling_factor": 0.5} | options),
    )  # fmt: skip


def unet(width: int, **options):
    """A text-conditioned UNet with attention, down- and upsampling, convolutional shortcuts and time projections."""
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": LATENT, "in_channels": 4, "out_channels": 4, "cross_attention_dim": width,
        "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "attention_head_dim": 2,
        "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**settings | options)


DEEP = {  # a small Stable Diffusion 1.5: the innermost stage has no attention and the width of the one outside it
    "block_out_channels": (8, 16, 16), "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def awaken(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Gives every parameter its own random values, so that no initialisation to 0 or 1 hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            if parameter.ndim > 1:
                parameter.copy_(gain * noise / fan_in**0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def scheduler(kind: str, **options):
    """A DDIMScheduler, by default on Stable Diffusion's betas; `kind` is diffusers' prediction_type."""
    from diffusers import DDIMScheduler

    settings = BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1} | options
    return DDIMScheduler(prediction_type=kind, **settings)


def sd(kind: str = "epsilon", seed: int = 0, unet_options: dict | None = None, vae_options: dict | None = None):
    """A StableDiffusionPipeline; `kind` is epsilon, v_prediction or sample."""
    from diffusers import StableDiffusionPipeline

    words = tokenizer()
    parts = {
        "vae": autoencoder(**(vae_options or {})),
        "text_encoder": text_tower(words),
        "unet": unet(16, **(unet_options or {})),
    }
    for index, module in enumerate(parts.values()):
        awaken(module.eval(), 10 * seed + index)
    pipe = StableDiffusionPipeline(
        **parts, tokenizer=words, scheduler=scheduler(kind), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(kind: str = "epsilon", seed: int = 0, *, zeros_for_empty: bool = True, unet_options: dict | None = None):
    """A StableDiffusionXLPipeline with both text towers, pooled text and size conditioning."""
    from diffusers import StableDiffusionXLPipeline

    words, words_2 = tokenizer(), tokenizer(pad_token="!")
    added = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 24 + 6 * 4,
        "use_linear_projection": True, "transformer_layers_per_block": (1, 1),
    }  # fmt: skip
    parts = {
        "vae": autoencoder(scaling_factor=0.13025),
        "text_encoder": text_tower(words, 16),
        "text_encoder_2": text_tower(words_2, 24, projection=24),
        "unet": unet(16 + 24, **added, **(unet_options or {})),
    }
    for index, module in enumerate(parts.values()):
        awaken(module.eval(), 100 + 10 * seed + index)
    pipe = StableDiffusionXLPipeline(
        **parts, tokenizer=words, tokenizer_2=words_2, scheduler=scheduler(kind), add_watermarker=False,
        force_zeros_for_empty_prompt=zeros_for_empty,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixel(kind: str = "epsilon", seed: int = 0, *, classes: int | None = None, learned_variance: bool = False):
    """A DDPMPipeline of an 8 x 8 UNet2DModel, class-conditional if `classes` is given."""
    from diffusers import DDPMPipeline, UNet2DModel

    network = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=6 if learned_variance else 3, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, attention_head_dim=2, norm_num_groups=4, num_class_embeds=classes,
    )  # fmt: skip
    awaken(network.eval(), 1000 + seed)
    pipe = DDPMPipeline(unet=network, scheduler=scheduler(kind))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def word_tokenizer(max_length: int = 16):
    """A tokenizer of whole words, in place of T5's and Gemma's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "</s>", "<unk>", "<bos>", *WORDS]
    words = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<bos>",
        model_max_length=max_length,
    )  # fmt: skip


def t5(width: int = 16):
    """A T5 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=4 + len(WORDS), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    )


def flow_scheduler(**options):
    """A FlowMatchEulerDiscreteScheduler, shifted like SD3's."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | options))


def _awake(parts: dict[str, nn.Module], seed: int) -> dict[str, nn.Module]:
    for index, module in enumerate(parts.values()):
        awaken(module.eval(), seed + index)
    return parts


def sd3(seed: int = 0):
    """A StableDiffusion3Pipeline with both CLIP towers and T5."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    words = tokenizer()
    parts = _awake({
        "vae": autoencoder(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": text_tower(words, 16, projection=16),
        "text_encoder_2": text_tower(words, 16, projection=16),
        "text_encoder_3": t5(32),
        "transformer": SD3Transformer2DModel(
            sample_size=LATENT, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
            pos_embed_max_size=LATENT, qk_norm="rms_norm", dual_attention_layers=(0,),
        ),
    }, 2000 + 10 * seed)  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        **parts, tokenizer=words, tokenizer_2=words, tokenizer_3=word_tokenizer(), scheduler=flow_scheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(seed: int = 0, *, guidance_embeds: bool = True):
    """A FluxPipeline: like dev with `guidance_embeds`, like schnell without."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    words = tokenizer()
    parts = _awake({
        "vae": autoencoder(scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": text_tower(words, 16),
        "text_encoder_2": t5(16),
        "transformer": FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 2, 2),
            guidance_embeds=guidance_embeds,
        ),
    }, 3000 + 10 * seed)  # fmt: skip
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(**parts, tokenizer=words, tokenizer_2=word_tokenizer(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart(seed: int = 0, *, sized: bool = False):
    """A PixArtSigmaPipeline; with `sized` a PixArtAlphaPipeline conditioned on the image size."""
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    parts = _awake({
        "vae": autoencoder(),
        "text_encoder": t5(16),
        "transformer": PixArtTransformer2DModel(
            sample_size=LATENT, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=12,
            num_attention_heads=2, cross_attention_dim=24, caption_channels=16, use_additional_conditions=sized,
        ),
    }, 4000 + 10 * seed)  # fmt: skip
    kind = PixArtAlphaPipeline if sized else PixArtSigmaPipeline
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    pipe = kind(**parts, tokenizer=word_tokenizer(), scheduler=scheduler("epsilon", **betas))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sana(seed: int = 0, *, sprint: bool = False):
    """A SanaPipeline with a two-layer Gemma 2 and an AutoencoderDC; with `sprint` a SanaSprintPipeline."""
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaSprintPipeline,
        SanaTransformer2DModel,
        SCMScheduler,
    )
    from transformers import Gemma2Config, Gemma2Model

    blocks = {
        "encoder_block_types": ("ResBlock",) * 3, "decoder_block_types": ("ResBlock",) * 3,
        "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8),
        "encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((), (), ()), "decoder_qkv_multiscales": ((), (), ()),
        "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "upsample_block_type": "interpolate",
    }  # fmt: skip
    parts = _awake({
        "vae": AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **blocks),
        "text_encoder": Gemma2Model(Gemma2Config(
            vocab_size=4 + len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=3,
        )),
        "transformer": SanaTransformer2DModel(
            sample_size=LATENT, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
            caption_channels=16, **({"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if sprint else {}),
        ),
    }, 5000 + 10 * seed)  # fmt: skip
    flow = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    kind = SanaSprintPipeline if sprint else SanaPipeline
    pipe = kind(**parts, tokenizer=word_tokenizer(), scheduler=SCMScheduler() if sprint else flow)
    pipe.set_progress_bar_config(disable=True)
    return pipe


MAKERS = {"sd": sd, "sdxl": sdxl, "pixel": pixel, "sd3": sd3, "flux": flux, "pixart": pixart, "sana": sana}


def make(family: str, kind: str = "epsilon", seed: int = 0, **options):
    """A pipeline of `family`; `kind` applies to the families that support several prediction types."""
    asked = {"kind": kind} if family in ("sd", "sdxl", "pixel") else {}
    return MAKERS[family](seed=seed, **asked, **options)


def save(folder: Path, family: str = "sd", kind: str = "epsilon", seed: int = 0, **options) -> Path:
    """Writes a pipeline of `family` as a folder of safetensors, and returns it."""
    make(family, kind, seed, **options).save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def stir_adapter(backbone: nn.Module, adapter: str, seed: int = 0, gain: float = 0.3) -> int:
    """Gives both factors of every LoRA layer random values, as training would; returns how many tensors it filled."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if f".lora_A.{adapter}." in name or f".lora_B.{adapter}." in name:
                parameter.copy_(gain * torch.randn(parameter.shape, generator=generator))
                count += 1
    return count
