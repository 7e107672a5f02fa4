"""The methods that step distillation grew out of, for classifiers, language models and a diffusion model's network.

    stepdistill baselines list
    stepdistill baselines run hinton --quick

Every baseline trains a student with its teacher and, at the same budget, a control without, and ends with a table of
teacher, control and student. All share base.py (a run and its networks), reduce.py (one masked mean), results.py (the
table, and the share of the gap that was closed) and stepdistill/hooks.py (what layers take in and return).
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
        "classifier.hinton:HintonConfig", "Hinton et al. 2015", "a classifier learns a larger one's softened answers"
    ),
    "forward_kl": Baseline(
        "language.forward_kl:ForwardKLConfig", "Hinton et al. 2015; Kim & Rush 2016",
        "a language model learns all that a larger one says might come next",
    ),
    "gkd": Baseline(
        "language.gkd:GKDConfig", "Agarwal et al. 2024",
        "a language model is corrected by a larger one on what it says itself",
    ),
    "distillm": Baseline(
        "language.distillm:DistiLLMConfig", "Ko et al. 2024",
        "skewed divergences; its own text as far as the validation loss asks for it, kept and used again",
    ),
    "minillm": Baseline(
        "language.minillm:MiniLLMConfig", "Gu et al. 2024", "reverse divergence of whole texts, by a policy gradient"
    ),
    "minitron": Baseline(
        "language.minitron:MinitronConfig", "Muralidharan et al. 2024",
        "a language model loses what of it matters least, and learns from what it was",
    ),
    "r1_traces": Baseline(
        "language.r1_traces:R1TracesConfig", "DeepSeek-AI 2025",
        "a language model learns reasoning that a larger one wrote and a verifier accepted",
    ),
    "distilbert": Baseline(
        "language.distilbert:DistilBertConfig", "Sanh et al. 2019",
        "an encoder of half the layers, begun with them: answers, masked tokens, hidden states",
    ),
    "tinybert": Baseline(
        "language.tinybert:TinyBertConfig", "Jiao et al. 2020",
        "a narrower encoder follows its teacher layer by layer, on text and then on a task",
    ),
    "bk_sdm": Baseline(
        "architecture.bk_sdm:BKSDMConfig", "Kim et al. 2023",
        "a diffusion model's UNet loses blocks and learns from the whole one",
    ),
    "snapfusion": Baseline(
        "architecture.snapfusion:SnapFusionConfig", "Li et al. 2023",
        "a diffusion model's UNet loses the blocks it can spare and learns to take one guided step for two",
    ),
    "prune_then_steps": Baseline(
        "architecture.prune_then_steps:PruneThenStepsConfig", "both kinds",
        "bk_sdm, then LCM or LADD of what it made: fewer blocks and fewer steps on one plot",
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
