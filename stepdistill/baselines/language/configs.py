"""Configurations of transformers models, copied and changed."""

from __future__ import annotations

import ast
import copy
from typing import TYPE_CHECKING

import torch

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MISFITS = (  # what a configuration raises whose settings do not fit each other
    ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError,
)  # fmt: skip


def plain(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without the settings that describe only how the teacher's file was quantised."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def from_config(config: PretrainedConfig, changes: str, *, seed: int) -> PreTrainedModel:
    """A causal language model with random weights, of this configuration with changes: `hidden_size=64,...`.

    Raises:
        InputError: there is no such setting, or the settings do not fit each other.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    config = plain(config)
    for pair in changes.split(","):
        key, _, value = pair.partition("=")
        if not value or not hasattr(config, key):
            near = "num_hidden_layers=2,hidden_size=64"
            raise InputError(f"student: got config:{pair}; allowed: settings of {type(config).__name__}, as {near}")
        if key == "vocab_size":
            raise InputError(f"student: got {pair}; allowed: the teacher's {config.vocab_size}; leave it out")
        try:
            typed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            typed = value
        try:
            setattr(config, key, typed)
        except StrictDataclassError as error:
            like = f"a value of the kind of the teacher's {getattr(config, key)}"
            raise InputError(f"student: got config:{pair}; allowed: {like}") from error
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        if isinstance(value := getattr(config, key), int) and value < 1:
            raise InputError(f"student: got config:{changes}, with {key} = {value}; allowed: 1 or more")
    width, heads = config.hidden_size, config.num_attention_heads
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        raise InputError(
            f"student: got config:{changes}; allowed: a hidden_size that is a multiple of its {heads} heads"
        )
    if "head_dim" in config.to_dict() and "head_dim" not in changes:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * config.num_hidden_layers)[: config.num_hidden_layers]
    torch.manual_seed(seed)
    try:
        student = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            student(torch.zeros(1, 2, dtype=torch.int64))  # some mismatches only show here
        return student
    except (*MISFITS, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"student: got config:{changes} ({reason}); allowed: settings that fit each other") from error
