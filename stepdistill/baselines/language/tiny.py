"""Random language models of half a million parameters, small enough to be trained at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCABULARY = 512  # tokens at most
END = "<|endoftext|>"
READ = 1_000_000  # characters of text that the tokenizer is trained on


def build(spec: str, texts: Sequence[str], *, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama ("tiny") or GPT-2 ("tiny-gpt2") of four layers and 512 positions, and a tokenizer of the texts.

    Raises:
        InputError: there is no text.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(texts, VOCABULARY)
    end = tokenizer.eos_token_id
    common = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    torch.manual_seed(seed)
    if spec == "tiny":
        shape = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True}  # fmt: skip
        return LlamaForCausalLM(LlamaConfig(**shape, **common)).eval(), tokenizer
    shape = {"n_embd": 96, "n_layer": 4, "n_head": 4, "n_positions": 512}
    return GPT2LMHeadModel(GPT2Config(**shape, **common)).eval(), tokenizer


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE as GPT-2's: it can encode any text, and its one special token ends texts.

    Args:
        size: of the vocabulary, at most.

    Raises:
        InputError: there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    sample, seen = [], 0
    for text in texts:
        sample.append(text[: READ - seen])
        if (seen := seen + len(sample[-1])) >= READ:
            break
    if not seen:
        raise InputError("corpus: got no text; allowed: some to make a tokenizer from; give another --data")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)
