"""Students made from a teacher that is a causal language model.

layers:6           six of the teacher's layers, evenly spaced from first to last, and everything around them
layers:0,2,5       these layers
config:num_hidden_layers=2,hidden_size=64,...    the teacher's configuration with changes, random weights
and any model that a teacher may be
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from stepdistill.baselines.language.configs import from_config, plain
from stepdistill.baselines.language.models import TINY, Decoder, open_decoder
from stepdistill.baselines.language.vocabulary import match_vocabulary
from stepdistill.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TINY_RATE = 2e-3  # peak learning rate of tiny models, which start at random


def check_rate(flag: str, rate: float, student: str, teacher: str) -> None:
    """Raises InputError if this learning rate is one for tiny models, and a student's weights come from a training.

    Args:
        flag: for the message. student, teacher: their specs.
    """
    kind = student.partition(":")[0]
    start = teacher if kind in ("layers", "prune") else student
    if rate >= TINY_RATE and kind != "config" and start not in TINY:
        raise InputError(
            f"{flag}: got {rate:g} for {start}, which is pretrained; allowed: below {TINY_RATE:g}, which is for tiny "
            f"models; give --{flag.replace('_', '-')}, 1e-5 to 5e-4 as a rule"
        )


def make_student(spec: str, teacher: Decoder, *, seed: int = 0) -> PreTrainedModel:
    """The student that `spec` names, with the teacher's vocabulary; match_vocabulary may cut both.

    Raises:
        InputError: there are no such layers or settings, or vocabulary or tokenizer differ from the teacher's.
    """
    kind, _, details = spec.partition(":")
    if kind == "layers":
        return copy_layers(teacher.network, _layers(details, count_layers(teacher.network)))
    if kind == "config":
        return from_config(teacher.network.config, details, seed=seed)
    if spec in TINY:
        raise InputError(f"student: got {spec}, which is a teacher only; allowed: layers:N, config:..., or a model")
    student = open_decoder(spec, seed=seed)
    match_vocabulary(teacher, student)
    return student.network


def without_dropout(network: nn.Module) -> nn.Module:
    """Sets a network's dropout to 0, in place, so that it computes the same in training as in evaluation."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # a Llama's, which is not a module
            module.attention_dropout = 0.0
    return network


def count_layers(network: PreTrainedModel) -> int:
    """The number of decoder layers."""
    return network.config.num_hidden_layers


def copy_layers(network: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Returns a model of these layers only, in this order, and of everything around them; its weights are copies."""
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


def evenly(n: int, count: int) -> list[int]:
    """n of `count` indices, evenly spaced from the first to the last; only the first if n is 1."""
    return [round(i * (count - 1) / max(n - 1, 1)) for i in range(n)]


def _layers(layers: str, count: int) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", layers):
        raise InputError(f"student: got layers:{layers}; allowed: layers:N, or layers:0,2,5")
    numbers = [int(n) for n in layers.split(",")]
    if len(numbers) == 1 and 1 <= numbers[0] <= count:
        return evenly(numbers[0], count)
    if len(numbers) > 1 and max(numbers) < count and sorted(set(numbers)) == numbers:
        return numbers
    raise InputError(f"student: got layers:{layers}; allowed: 1 to {count}, or rising numbers below {count}")
