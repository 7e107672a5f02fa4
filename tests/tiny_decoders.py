"""Language models small enough to train in a test, and a text for them."""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from stepdistill.baselines.language.models import Decoder
from stepdistill.baselines.language.tiny import train_tokenizer


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of a small grammar."""
    rng = random.Random(seed)
    who, does, what = ("the cat", "a dog", "the old owl"), ("sees", "likes"), ("red hats", "green fish", "blue tea")
    return [f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)}." for _ in range(count)]


def write_text(file: Path, count: int = 400) -> str:
    """A text file of sentences; returns its path."""
    file.write_text("\n".join(sentences(count)) + "\n")
    return str(file)


def lines_of(stderr: str) -> list[str]:
    """Its lines, progress bars apart."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]


@lru_cache
def tokenizer():
    """A tokenizer trained on these sentences; pad is eos, as for GPT-2."""
    return train_tokenizer(sentences(50), 300)


def tiny_decoder(kind: str = "llama", *, seed: int = 0, layers: int = 2, **changes) -> Decoder:
    """A random model, 16 wide, with weights large enough for outputs that are not uniform."""
    torch.manual_seed(seed)
    end = tokenizer().eos_token_id
    common = {"vocab_size": len(tokenizer()), "bos_token_id": end, "eos_token_id": end, "initializer_range": 0.3}
    if kind == "llama":
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
        network = LlamaForCausalLM(LlamaConfig(**{**shape, **common, **changes}))
    else:
        shape = {"n_embd": 16, "n_layer": layers, "n_head": 4, "n_positions": 64}
        network = GPT2LMHeadModel(GPT2Config(**{**shape, **common, **changes}))
    return Decoder(network.eval(), tokenizer(), kind)


class Constant(nn.Module):
    """Returns the same probabilities for any input, and counts its calls."""

    def __init__(self, probs: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probs, dtype=torch.float64).log())
        self.calls = 0

    def forward(self, input_ids: Tensor, **_) -> CausalLMOutputWithPast:
        self.calls += 1
        return CausalLMOutputWithPast(logits=self.logits.expand(*input_ids.shape, -1), past_key_values=())
