"""Two models with one tokenizer: divergences compare their logits of the same tokens, index by index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from stepdistill.baselines.language.models import Decoder


def match_vocabulary(teacher: Decoder, student: Decoder) -> None:
    """Makes two vocabularies equal if they differ only in rows behind the tokenizer's last token, as those of
    Qwen2.5-7B and -0.5B do: such rows pad a matrix and are never used, so both networks lose theirs.

    Raises:
        InputError: the tokenizers differ, or a network has no rows for some of their tokens.
    """
    tokens = teacher.tokenizer.get_vocab()
    if tokens != student.tokenizer.get_vocab():
        raise InputError(
            f"student: got {student.name}, whose tokenizer is not that of {teacher.name}; allowed: the same tokens in "
            "the same places; take a student of the teacher's family, or layers:N"
        )
    needed = max(tokens.values()) + 1
    networks = teacher.network, student.network
    sizes = {network.config.vocab_size for network in networks}
    if len(sizes) > 1 and min(sizes) < needed:
        raise InputError(
            f"student: got {student.name} with a vocabulary of {student.network.config.vocab_size}, and "
            f"{teacher.network.config.vocab_size} of {teacher.name}; allowed: the same, or {needed} and more, their "
            "tokenizer's tokens; take a student of the teacher's family, or layers:N"
        )
    if len(sizes) > 1:
        for network in networks:
            network.resize_token_embeddings(needed)
