"""Students of a class-conditional pixel model, for every method: the card's code generates what the trainer does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_matrix import METHODS, Given, distilled, settings_of

from stepdistill.denoiser.load import load_teacher
from stepdistill.errors import InputError
from stepdistill.evaluation.models import load
from stepdistill.evaluation.spec import parse
from stepdistill.training.validation import evaluating

CLASSES = 3
CASES = [(method, lora) for method in METHODS for lora in (True, False)]

FRESH = """
import json, sys, numpy, torch
from safetensors.torch import save_file
drawn = {}
for name, code in json.load(open(sys.argv[1])).items():
    variables = {}
    exec(code.replace("labels = ", "torch.manual_seed(3); labels = "), variables)  # peft draws an adapter first
    drawn[name] = variables["x"].contiguous()
    drawn[name + "-image"] = torch.from_numpy(numpy.array(variables["image"]))
save_file(drawn, sys.argv[2])
assert "stepdistill" not in sys.modules
"""


def name_of(method: str, lora: bool) -> str:
    return f"{method}-{'lora' if lora else 'full'}"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> str:
    """Six random images, 8 x 8, whose captions are their classes."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": str(i % CLASSES)}) for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def students(tmp_path_factory, labelled):
    """By case: the trainer's samples of classes 0 and 1, and the export; and the samples by the card's code."""
    root = tmp_path_factory.mktemp("classes")
    teacher = str(tiny.save(root / "teacher", "pixel", "sample", classes=CLASSES))
    ours, cards = {}, {}
    for method, lora in CASES:
        kind, own = settings_of(method, "pixel")
        config = kind(
            teacher=teacher, data=labelled, out=root / name_of(method, lora), max_train_steps=2, batch_size=2, rank=4,
            learning_rate=1e-2 if lora else 1e-3, lr_scheduler="constant", lora=lora, **own,
        )  # fmt: skip
        export, run, _ = distilled(method, config)[0]
        torch.manual_seed(3)
        noises = [torch.randn(1, *run.teacher.sample_shape) for _ in range(run.method.steps)]
        drawn = []
        with run.models.shown() as student, evaluating(student.backbone):
            for prompt in ("0", "1"):
                given = Given(noises[1:] or noises)
                cond = run.teacher.conditioner.encode([prompt])
                drawn.append(run.method.sample(student, noises[0], cond, steps=run.method.steps, draws=given))
        ours[name_of(method, lora)] = *drawn, export
        cards[name_of(method, lora)] = re.search(r"```python\n(.*?)```", (export / "README.md").read_text(), re.S)[1]
    (root / "cards.json").write_text(json.dumps(cards))
    words = [sys.executable, "-c", FRESH, str(root / "cards.json"), str(root / "drawn.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, load_file(root / "drawn.safetensors")


@pytest.mark.parametrize(("method", "lora"), CASES)
def test_the_code_of_the_card_draws_in_plain_diffusers_what_the_trainer_draws(students, method, lora):
    ours, theirs = students
    mine, other, _ = ours[name_of(method, lora)]
    assert (mine - theirs[name_of(method, lora)]).abs().max() < 1e-4 * mine.abs().max().clamp(min=1)
    pixels = 255 * (mine[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0)
    assert (pixels - theirs[f"{name_of(method, lora)}-image"]).abs().max() < 0.51
    assert (mine - other).abs().max() > 1e-3  # the class has an effect


@pytest.mark.parametrize("method", ["add", "ladd"])
def test_the_heads_have_a_place_for_every_class(tmp_path, method):
    kind, own = settings_of(method, "pixel")
    settings = {"condition_on_image": False} if method == "add" else {}
    teacher = load_teacher(tiny.save(tmp_path, "pixel", "sample", classes=CLASSES))
    heads = kind(**own, **settings).method().networks(teacher)["discriminator"].heads.heads
    noise = 0 if method == "add" else 8
    assert {head.projection[0].in_features for head in heads} == {CLASSES + noise}


def test_what_draws_through_the_pipeline_says_that_it_cannot(tmp_path):
    path = Path(tiny.save(tmp_path / "classes", "pixel", classes=CLASSES))
    with pytest.raises(
        InputError, match=r"model: got .*, which is class-conditional, while DDPMPipeline takes no class"
    ):
        load(parse(str(path)))
