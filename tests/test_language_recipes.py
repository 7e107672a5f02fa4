"""The recipes of the language baselines are configurations that their methods take."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.baselines import get
from stepdistill.training.config import from_yaml

FOLDER = Path(__file__).parents[1] / "train_scripts" / "configs" / "baselines"
RECIPES = {
    "distilbert_bert": "distilbert", "distilbert_minilm": "distilbert", "tinybert_bert": "tinybert",
    "tinybert_minilm": "tinybert", "minitron_llama": "minitron", "minitron_qwen": "minitron",
    "minitron_smollm2": "minitron", "r1_qwen": "r1_traces",
}  # fmt: skip


@pytest.mark.parametrize(("file", "name"), RECIPES.items())
def test_a_recipe_is_a_configuration_of_its_method(file, name):
    text = (FOLDER / f"{file}.yaml").read_text()
    config = from_yaml(FOLDER / f"{file}.yaml", get(name).config)
    config.check()
    assert f"baselines/{file}.yaml" in text and f" {name} " in text


def test_other_methods_take_the_pruned_student_and_its_controls():
    file = FOLDER / "minitron_smollm2.yaml"
    own = from_yaml(file, get("minitron").config)
    for name in ("forward_kl", "gkd", "distillm", "minillm"):
        other = from_yaml(file, get(name).config)
        assert other.shared == own.shared and other.student.startswith("prune:")
