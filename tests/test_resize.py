"""Each resize equals that of the tool it is named after, pixel by pixel, upwards and downwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.errors import InputError
from stepdistill.evaluation.resize import RESIZES, resize

SIDES = [32, 150, 299, 512]  # brought to 299, as the tools do


def pictures(side: int, count: int = 2) -> torch.Tensor:
    """Noise, where every mistake shows."""
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (count, 3, side, side + (side > 299) * 40), generator=generator, dtype=torch.uint8)


def off(how: str, given: torch.Tensor, theirs: torch.Tensor, size: int = 299) -> float:
    """The largest deviation of a pixel, in 0..1."""
    ours = resize(given, size, how)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return (ours - theirs.float()).abs().max().item() / 255


@pytest.mark.parametrize("side", SIDES)
def test_bilinear_is_torchmetrics(side, monkeypatch):
    inception = pytest.importorskip("torchmetrics.image.fid").NoTrainInceptionV3
    given, seen = pictures(side), []

    class StopError(Exception):
        pass

    def see(pixels):
        seen.append(pixels)
        raise StopError

    net = inception.__new__(inception)
    torch.nn.Module.__init__(net)
    net.use_antialias, net.features_list, net.INPUT_IMAGE_SIZE = True, ["2048"], 299
    monkeypatch.setattr(inception, "Conv2d_1a_3x3", staticmethod(see), raising=False)
    with pytest.raises(StopError):
        net._torch_fidelity_forward(given)
    assert off("bilinear", given, seen[0] * 128 + 128) < 1e-6


@pytest.mark.parametrize("side", SIDES)
def test_torch_fidelity_is_torch_fidelitys_to_the_bit(side):
    tool = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    given = pictures(side)
    theirs = tool.interpolate_bilinear_2d_like_tensorflow1x(given.float(), size=(299, 299), align_corners=False)
    assert off("torch-fidelity", given, theirs) == 0


@pytest.mark.parametrize("side", SIDES)
def test_clean_fid_is_clean_fids(side):
    tool = pytest.importorskip("cleanfid.resize")
    given, one = pictures(side), tool.build_resizer("clean")
    theirs = [torch.from_numpy(one(picture.permute(1, 2, 0).numpy())).permute(2, 0, 1) for picture in given]
    assert off("clean-fid", given, torch.stack(theirs)) == 0


@pytest.mark.parametrize("side", SIDES)
def test_pytorch_fid_is_pytorch_fids(side):
    tool = pytest.importorskip("pytorch_fid.inception").InceptionV3
    given = pictures(side)
    net = tool.__new__(tool)
    torch.nn.Module.__init__(net)
    net.resize_input, net.normalize_input, net.output_blocks, net.last_needed_block = True, True, [0], 0
    net.blocks = [torch.nn.Identity()]
    theirs = net(given.float() / 255)[0]
    assert off("pytorch-fid", given, (theirs + 1) * 127.5) < 1e-6


@pytest.mark.parametrize("side", SIDES)
def test_lanczos_is_pillows_on_bytes(side):
    given = pictures(side)
    theirs = [Image.fromarray(p.permute(1, 2, 0).numpy()).resize((256, 256), Image.Resampling.LANCZOS) for p in given]
    theirs = torch.from_numpy(np.stack([np.asarray(picture) for picture in theirs])).permute(0, 3, 1, 2)
    assert off("lanczos", given, theirs, 256) == 0


def test_two_tools_do_not_agree_which_is_why_they_are_named():
    given = pictures(150)
    names = ["bilinear", "torch-fidelity", "clean-fid", "pytorch-fid", "lanczos", "nearest"]
    found = {how: resize(given, 299, how) for how in names}
    closest = min((found[a] - found[b]).abs().mean().item() for a in names for b in names if a < b if
                  {a, b} != {"bilinear", "pytorch-fid"})  # fmt: skip
    assert closest > 2  # of 255
    assert (found["bilinear"] - found["pytorch-fid"]).abs().max() < 1e-3  # antialiasing does nothing upwards
    assert (resize(given, 64, "bilinear") - resize(given, 64, "pytorch-fid")).abs().mean() > 2


@pytest.mark.parametrize("how", list(RESIZES))
def test_pictures_of_the_right_size_are_left_alone_and_flat_ones_stay_flat(how):
    given = pictures(24)
    assert torch.equal(resize(given, 24, how), given.float())
    flat = torch.full((1, 3, 20, 20), 200, dtype=torch.uint8)
    assert (resize(flat, 33, how) - 200).abs().max() < 1e-3


def test_an_unknown_resize_is_refused():
    with pytest.raises(InputError, match="'box'; allowed: bilinear, torch-fidelity"):
        resize(pictures(8), 4, "box")
