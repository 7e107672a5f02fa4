"""Attribute accuracy: the share of what prompts name that probes find in the images; see `evaluation.attributes`."""

from __future__ import annotations

from torch import Tensor

from stepdistill.evaluation.figures import Figure
from stepdistill.evaluation.measures.base import Metric, View, no_scorer

NO_PROBES = "got prompts of unknown attributes, or a scorer without probes; it needs both"


class Attributes(Metric):
    """`attribute_accuracy`, and `attribute:NAME` for each; -1 marks an attribute that the prompt does not name."""

    name, keeps, better = "attributes", "attributes", {"attribute_accuracy": "higher"}

    @classmethod
    def lacks(cls, tools) -> str | None:
        return no_scorer(tools) or (NO_PROBES if tools.probes is None else None)

    @staticmethod
    def see(view: View) -> Tensor:
        tools, last = view.tools, view.first + len(view.pictures)
        truth, named = (values[view.first : last] for values in (tools.prompts.attributes, tools.prompts.mentioned))
        return tools.probes.judge(view.embedding, truth, named)

    @staticmethod
    def figures(kept: Tensor, tools) -> dict[str, Figure]:
        shares = {"attribute_accuracy": _share(kept)}
        shares |= {f"attribute:{name}": _share(kept[:, i : i + 1]) for i, name in enumerate(tools.probes.classes)}
        return {name: share for name, share in shares.items() if share is not None}


def _share(judged: Tensor) -> Figure | None:
    """Correct answers over attributes asked: a ratio of sums, with influence (right - share asked) / mean(asked).

    Images whose prompts name no attribute are not counted; for one set of prompts they are the same for every model.
    """
    judged = judged[(judged >= 0).any(1)]
    if not len(judged):
        return None
    asked, right = (judged >= 0).double().sum(1), (judged == 1).double().sum(1)
    share = (right.sum() / asked.sum()).item()
    return Figure(share, (right - share * asked) / asked.mean(), trials=len(judged))
