"""The structure of decoders that can be pruned: names of their parts, and what the axes of tensors index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """The structure of a kind of decoder.

    Attributes:
        layers: the name of their list. norms, attended, fired: the modules of a layer at which activations are read:
            the norms' outputs, and the inputs of the projections after attention and the MLP's non-linearity.
        axes: what the axes of each tensor index, by the end of its name.
        inner, epsilon: the configuration's names of the MLP's width and the norms' epsilon.
        tied: whether heads times their size must equal the channels.
    """

    layers: str
    norms: tuple[str, ...]
    attended: str
    fired: str
    axes: Mapping[str, tuple[str | None, ...]]
    inner: str
    epsilon: str
    tied: bool = False


_LLAMA = Family(
    "model.layers", ("input_layernorm", "post_attention_layernorm"), "self_attn.o_proj", "mlp.down_proj",
    {
        "embed_tokens.weight": (None, "channels"), "lm_head.weight": (None, "channels"),
        "norm.weight": ("channels",),
        "q_proj.weight": ("queries", "channels"), "q_proj.bias": ("queries",),
        "k_proj.weight": ("keys", "channels"), "k_proj.bias": ("keys",),
        "v_proj.weight": ("keys", "channels"), "v_proj.bias": ("keys",),
        "o_proj.weight": ("channels", "queries"), "o_proj.bias": ("channels",),
        "gate_proj.weight": ("neurons", "channels"), "gate_proj.bias": ("neurons",),
        "up_proj.weight": ("neurons", "channels"), "up_proj.bias": ("neurons",),
        "down_proj.weight": ("channels", "neurons"), "down_proj.bias": ("channels",),
    },
    "intermediate_size", "rms_norm_eps",
)  # fmt: skip
_GPT2 = Family(
    "transformer.h", ("ln_1", "ln_2"), "attn.c_proj", "mlp.c_proj",
    {  # Conv1D stores its weight as (in, out)
        "wte.weight": (None, "channels"), "wpe.weight": (None, "channels"), "lm_head.weight": (None, "channels"),
        "ln_1.weight": ("channels",), "ln_1.bias": ("channels",), "ln_2.weight": ("channels",),
        "ln_2.bias": ("channels",), "ln_f.weight": ("channels",), "ln_f.bias": ("channels",),
        "c_attn.weight": ("channels", "fused"), "c_attn.bias": ("fused",),
        "attn.c_proj.weight": ("queries", "channels"), "attn.c_proj.bias": ("channels",),
        "c_fc.weight": ("channels", "neurons"), "c_fc.bias": ("neurons",),
        "mlp.c_proj.weight": ("neurons", "channels"), "mlp.c_proj.bias": ("channels",),
    },
    "n_inner", "layer_norm_epsilon", tied=True,
)  # fmt: skip
FAMILIES = {"llama": _LLAMA, "qwen2": _LLAMA, "gpt2": _GPT2}


def family(config: PretrainedConfig) -> Family:
    """Returns the structure of decoders of this configuration.

    Raises:
        InputError: they cannot be pruned here.
    """
    if config.model_type not in FAMILIES:
        raise InputError(f"teacher: got a {config.model_type}; allowed, to be pruned: {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def head_size(config: PretrainedConfig) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def shares_keys(config: PretrainedConfig) -> bool:
    """Whether groups of query heads, all of one size, share keys and values."""
    return getattr(config, "num_key_value_heads", config.num_attention_heads) != config.num_attention_heads
