"""Images are framed as by torchvision, to the pixel, and only once: CLIP's own frame replaces the protocol's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from test_protocols import POOLS, batch, picture
from test_suite import Towers, words
from torchvision import transforms

from stepdistill.evaluation import metrics, sets
from stepdistill.evaluation.clip import ClipModel
from stepdistill.evaluation.frame import Frame
from stepdistill.evaluation.frechet import Moments
from stepdistill.evaluation.measures import View
from stepdistill.evaluation.metrics import Instruments
from stepdistill.evaluation.protocols import ExtractorSpec, Protocol, ScorerSpec

TOWERS = ClipModel("towers", Towers(), words, None, (16, 16), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("size", [(117, 78), (78, 117), (201, 134), (154, 231), (77, 77), (41, 40), (40, 41)])
def test_a_side_is_rounded_as_torchvision_rounds_it(size):
    """40 / 78 x 117 is 59.999... in floats, and 40 x 117 / 78 is 60."""
    given = picture(*size)
    for name, mode in (("bilinear", 2), ("lanczos", 1), ("bicubic", 3)):
        wanted = transforms.Compose([transforms.Resize(40, mode), transforms.CenterCrop(40)])(given)
        assert np.array_equal(np.asarray(Frame(40, "cover", name)(given)), np.asarray(wanted))
        square = transforms.CenterCrop(min(size))(given).resize((40, 40), Image.Resampling(mode))
        assert np.array_equal(np.asarray(Frame(40, "square", name)(given)), np.asarray(square))


def test_clips_own_frame_takes_the_place_of_the_protocols(tmp_path, monkeypatch):
    """For generated and real images: both go from the original directly to CLIP's frame."""
    given, own = picture(90, 61), Frame(16)
    pictures = own.batch(batch(given))
    assert not torch.equal(pictures, own.batch(Frame(40).batch(batch(given))))
    clip = dataclasses.replace(TOWERS, frame=own)
    tools = Instruments(sets.EvalSet("none", "k", 0), POOLS, Moments.empty(12), clip=clip, frame=Frame(40))
    view = View(tools, 0, batch(given))
    assert torch.equal(view.embedding, TOWERS.images(pictures))
    assert torch.equal(view.features, POOLS(Frame(40).batch(batch(given))))
    several = Instruments(sets.EvalSet("four", "k", 4, list("abcd")), POOLS, Moments.empty(12), clip=TOWERS)
    seen = batch(given).expand(4, -1, -1, -1)
    assert list(View(several, 2, seen, each=2).prompts) == list("bbcc")
    assert torch.equal(View(several, 0, seen, each=2).text, TOWERS.texts(list("aabb")))
    assert torch.equal(View(several, 0, seen).text, TOWERS.texts(list("abcd")))  # not the embeddings of the other pass

    for i in range(2):
        given.save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a red cat")
    monkeypatch.setattr(metrics, "load_extractor", lambda *_, **__: POOLS)
    monkeypatch.setattr(metrics, "load_clip", lambda *_, **__: TOWERS)
    protocol = Protocol(
        "p", 2, str(tmp_path), str(tmp_path), ExtractorSpec("pools"), ScorerSpec("towers", frame=own),
        metrics=("fd", "cmmd"), frame=Frame(40),
    )  # fmt: skip
    real = metrics.prepare(protocol).real
    assert torch.equal(real.embeddings, TOWERS.images(pictures).expand(2, -1))
    assert torch.equal(real.features, POOLS(Frame(40).batch(batch(given))).expand(2, -1))
