"""Each resize equals that of the tool it is named after, pixel by pixel, when enlarging and when reducing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.errors import InputError
from stepdistill.evaluation.resize import RESIZES, resize

SIDES = [32, 150, 299, 512]  # resized to 299, as the tools do


def pictures(side: int, count: int = 2) -> torch.Tensor:
    """Noise, in which every mistake shows."""
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (count, 3, side, side + (side > 299) * 40), generator=generator, dtype=torch.uint8)


def off(how: str, given: torch.Tensor, theirs: torch.Tensor, size: int = 299) -> float:
    """The largest deviation of a pixel, in 0..1."""
    ours = resize(given, size, how)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    return (ours - theirs.float()).abs().max().item() / 255


def torchmetrics_(given: torch.Tensor) -> torch.Tensor:
    inception, seen = pytest.importorskip("torchmetrics.image.fid").NoTrainInceptionV3, []

    class StopError(Exception):
        pass

    def see(pixels):
        seen.append(pixels)
        raise StopError

    net = inception.__new__(inception)
    torch.nn.Module.__init__(net)
    net.use_antialias, net.features_list, net.INPUT_IMAGE_SIZE = True, ["2048"], 299
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setattr(inception, "Conv2d_1a_3x3", staticmethod(see), raising=False)
        net._torch_fidelity_forward(given)
    return seen[0] * 128 + 128


def torch_fidelitys(given: torch.Tensor) -> torch.Tensor:
    tool = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    return tool.interpolate_bilinear_2d_like_tensorflow1x(given.float(), size=(299, 299), align_corners=False)


def clean_fids(given: torch.Tensor) -> torch.Tensor:
    one = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    return torch.stack([torch.from_numpy(one(picture.permute(1, 2, 0).numpy())).permute(2, 0, 1) for picture in given])


def pytorch_fids(given: torch.Tensor) -> torch.Tensor:
    tool = pytest.importorskip("pytorch_fid.inception").InceptionV3
    net = tool.__new__(tool)
    torch.nn.Module.__init__(net)
    net.resize_input, net.normalize_input, net.output_blocks, net.last_needed_block = True, True, [0], 0
    net.blocks = [torch.nn.Identity()]
    return (net(given.float() / 255)[0] + 1) * 127.5


THEIRS = {  # tool -> the resize of its name, its own for uint8 (B, 3, H, W), and the tolerance for rounding
    "torchmetrics": ("bilinear", torchmetrics_, 1e-6), "torch-fidelity": ("torch-fidelity", torch_fidelitys, 0.0),
    "clean-fid": ("clean-fid", clean_fids, 0.0), "pytorch-fid": ("pytorch-fid", pytorch_fids, 1e-6),
}  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("tool", list(THEIRS))
def test_a_resize_is_that_of_the_tool_it_is_named_after(tool, side):
    (how, theirs, within), given = THEIRS[tool], pictures(side)
    assert off(how, given, theirs(given)) <= within


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
    assert (found["bilinear"] - found["pytorch-fid"]).abs().max() < 1e-3  # no effect when enlarging
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
