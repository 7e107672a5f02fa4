"""The methods that step distillation grew out of, for classifiers, language models and a diffusion model's network.

    stepdistill baselines list
    stepdistill baselines run hinton --quick

Every baseline trains a student with its teacher and, at the same budget, a control without, and ends with a table of
teacher, control and student. All share base.py (a run and its networks), learner.py (its loop), reduce.py (one masked
mean), results.py (the table, and the share of the gap that was closed) and stepdistill/hooks.py (what layers take in
and return).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from stepdistill.errors import InputError

FAMILIES = ("architecture", "classifier", "language")


@dataclass(frozen=True)
class Baseline:
    """A method: the class of its flags as "module:name", its paper, and a one-line description."""

    flags: str
    paper: str
    what: str

    @property
    def config(self) -> type:
        """The class of its flags; its `run` runs the baseline."""
        module, name = self.flags.split(":")
        return getattr(import_module(f"stepdistill.baselines.{module}"), name)


BASELINES = {
    "hinton": Baseline(
        "classifier.hinton:HintonConfig", "Hinton et al. 2015", "a classifier trained on a larger one's soft outputs"
    ),
    "forward_kl": Baseline(
        "language.forward_kl:ForwardKLConfig", "Hinton et al. 2015; Kim & Rush 2016",
        "a language model trained on a larger one's whole next-token distribution",
    ),
    "gkd": Baseline(
        "language.gkd:GKDConfig", "Agarwal et al. 2024",
        "a language model corrected by a larger one on text that it generates itself",
    ),
    "distillm": Baseline(
        "language.distillm:DistiLLMConfig", "Ko et al. 2024",
        "skewed divergences; student text as the validation loss requires it, from a replay buffer",
    ),
    "minillm": Baseline(
        "language.minillm:MiniLLMConfig", "Gu et al. 2024", "reverse KL divergence of whole texts, by policy gradient"
    ),
    "minitron": Baseline(
        "language.minitron:MinitronConfig", "Muralidharan et al. 2024",
        "a language model pruned by importance, then distilled from the unpruned one",
    ),
    "r1_traces": Baseline(
        "language.r1_traces:R1TracesConfig", "DeepSeek-AI 2025",
        "a language model trained on a larger one's reasoning that a verifier accepted",
    ),
    "distilbert": Baseline(
        "language.distilbert:DistilBertConfig", "Sanh et al. 2019",
        "an encoder initialised from half the layers: outputs, masked tokens, hidden states",
    ),
    "tinybert": Baseline(
        "language.tinybert:TinyBertConfig", "Jiao et al. 2020",
        "a narrower encoder trained on its teacher's layers, on text and then on a task",
    ),
    "bk_sdm": Baseline(
        "architecture.bk_sdm:BKSDMConfig", "Kim et al. 2023",
        "a diffusion UNet with blocks removed, distilled from the whole one",
    ),
    "snapfusion": Baseline(
        "architecture.snapfusion:SnapFusionConfig", "Li et al. 2023",
        "a diffusion UNet without dispensable blocks, trained to take one guided step for two",
    ),
    "prune_then_steps": Baseline(
        "architecture.prune_then_steps:PruneThenStepsConfig", "both kinds",
        "bk_sdm, then LCM or LADD of its result: fewer blocks and fewer steps on one plot",
    ),
}  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    if name in FAMILIES:
        return import_module(f"stepdistill.baselines.{name}")
    raise AttributeError(f"module 'stepdistill.baselines' has no attribute {name!r}")


def get(name: str) -> Baseline:
    """Returns the baseline of this name.

    Raises:
        InputError: no baseline has this name.
    """
    if name not in BASELINES:
        raise InputError(f"baseline: got {name!r}; allowed: {', '.join(BASELINES)}; see stepdistill baselines list")
    return BASELINES[name]
