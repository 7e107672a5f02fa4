"""The tests use no network, a single thread and their own caches."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

if TYPE_CHECKING:
    from stepdistill.training.lcm import LCMConfig

torch.set_num_threads(1)
PROMPTS = ("a red cat with a blue hat", "the green dog")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Puts the caches of data and statistics into a folder of this session."""
    os.environ["STEPDISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", params=["sd", "sdxl"])
def family(request) -> str:
    """Each pipeline family in turn."""
    return request.param


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> dict[str, str]:
    """A saved tiny pipeline of each family."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: str(tiny.save(root / name, name)) for name in ("sd", "sdxl")}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> str:
    """Six random images, 32 x 32, with metadata.jsonl."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": PROMPTS[i % 2]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def settings(tmp_path, pipelines, pictures) -> LCMConfig:
    """A run of four updates on a tiny pipeline."""
    from stepdistill.training.lcm import LCMConfig

    return LCMConfig(
        teacher=pipelines["sd"], data=pictures, out=tmp_path / "run", batch_size=2, rank=2, guidance=(2.0,),
        learning_rate=1e-3, max_train_steps=4, checkpoint_every=2, log_every=1,
    )  # fmt: skip
