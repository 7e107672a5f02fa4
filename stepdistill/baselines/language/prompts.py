"""Prompts as a model is given them: in its chat template, after the tokens that begin a text."""

from __future__ import annotations

from datetime import date
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TODAY = date(2024, 7, 26)  # of all prompts; what Llama 3's template takes for want of a clock
_WRITTEN = "".join(f"|replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY")
_CLOCK = "{% macro strftime_now(format) %}{{ format" + _WRITTEN + " }}{% endmacro %}{{ '' }}"  # before a template


def begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before a text: Llama 3's <|begin_of_text|>; none for GPT-2 and Qwen2. A model
    that was always given them expects them."""
    first = tokenizer("").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A prompt as it is passed to a model: in its chat template if it has one, of which several write the date. It is
    always TODAY's, so that a run resumed on another day has the same tokens.

    Only prompts go through templates: several strip the reasoning from an assistant's reply.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return prompt
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], chat_template=_CLOCK + tokenizer.get_chat_template(),
        add_generation_prompt=True, tokenize=False, date_string=TODAY.strftime("%d %b %Y"),
    )  # fmt: skip


def prompt_ids(tokenizer: PreTrainedTokenizerBase, asked: str) -> list[int]:
    """The tokens of a prompt, after those of `begin`, which its chat template may already contain; the end of text, if
    there are none."""
    first, ids = begin(tokenizer), tokenizer(asked, add_special_tokens=False, verbose=False).input_ids
    return (ids if ids[: len(first)] == first else first + ids) or [tokenizer.eos_token_id]
