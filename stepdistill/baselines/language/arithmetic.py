"""A verifiable task that a network of 80,000 parameters can reason about: addition, digit by digit.

347+85=<think>7+5+0=12,4+8+1=13,3+0+1=04</think>432
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stepdistill.baselines.language.problems import CLOSE, OPEN, Problem
from stepdistill.baselines.language.texts import Pair
from stepdistill.draws import mix
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END = "<end>"
TOKENS = (END, OPEN, CLOSE, *"0123456789+=,")


def sums(count: int, held_out: int, digits: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Distinct sums of two numbers of `digits` digits, the first not 0: `count` to train on, others held out.

    Raises:
        InputError: there are not as many sums.
    """
    each = 9 * 10 ** (digits - 1)
    if (asked := count + held_out) > each**2 // 2:
        raise InputError(f"problems: got {asked} with those held out; allowed: {each**2 // 2} of {digits} digits")
    generator = torch.Generator().manual_seed(mix(seed, digits))
    found: dict[tuple[int, int], Problem] = {}
    while len(found) < asked:
        a, b = (torch.randint(10 ** (digits - 1), 10**digits, (2,), generator=generator)).tolist()
        found.setdefault((a, b), Problem(f"{a}+{b}=", str(a + b)))
    problems = list(found.values())
    return problems[:count], problems[count:]


def worked(problem: Problem) -> Pair:
    """The sum worked step by step from the last digit: both digits, the carry, and their total."""
    a, b = problem.prompt.rstrip("=").split("+")
    steps, carry = [], 0
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return Pair(problem.prompt, f"{OPEN}{','.join(steps)}{CLOSE}{problem.answer}")


def build(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random Llama of two layers and 64 channels, and a tokenizer whose tokens are digits and signs."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    signs = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}))
    signs.pre_tokenizer = pre_tokenizers.Split(Regex(f"{OPEN}|{CLOSE}|."), "isolated")
    signs.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=signs, eos_token=END)
    torch.manual_seed(seed)
    network = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.05, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    ))  # fmt: skip
    return network.eval(), tokenizer
