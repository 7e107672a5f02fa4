"""On the same images and the same Inception, our figures equal torch-fidelity's, clean-fid's, pytorch-fid's and
torchmetrics': each tool uses its own resize and network, stepdistill the resize of that name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_speed import random_inception
from test_resize import THEIRS as RESIZED
from torch import Tensor, nn

from stepdistill.errors import InputError
from stepdistill.evaluation import features
from stepdistill.evaluation.features import Scaled, load_extractor
from stepdistill.evaluation.frechet import Moments, frechet_figure
from stepdistill.evaluation.kernel import mmd_figure, polynomial, within
from stepdistill.evaluation.manifold import prdc_figures, radii
from stepdistill.evaluation.resize import resize

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
pytest.importorskip("cleanfid")
pytest.importorskip("pytorch_fid")

TOOLS = {"torch-fidelity": "torch-fidelity", "torchmetrics": "bilinear", "clean-fid": "clean-fid",
         "pytorch-fid": "pytorch-fid"}  # fmt: skip


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    """A file of seeded random weights in the shape of FID's Inception, which distinguish images."""
    return random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


@pytest.fixture(autouse=True)
def named(inception, monkeypatch):
    monkeypatch.setenv(features.INCEPTION_PLACE, str(inception))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Twelve images of a model and twelve real ones: smooth, with contrast, and all but one of different colours."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(24, 3, 9, 9, generator=generator)
    rough[:11] *= torch.tensor([1.0, 0.6, 0.8]).view(3, 1, 1)
    smooth = nn.functional.interpolate(rough, size=(96, 96), mode="bicubic").clamp(0, 1)
    return (255 * smooth).round().to(torch.uint8)


def torch_fidelitys(file: Path, _: Path, pictures: Tensor) -> Tensor:
    return fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))(pictures)[0]


def torchmetrics_(file: Path, _: Path, pictures: Tensor) -> Tensor:
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))(pictures)


def clean_fids(file: Path, folder: Path, pictures: Tensor) -> Tensor:
    """Its network is TorchScript, so the random one is traced from torch-fidelity's layers."""
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    class Script(nn.Module):
        def __init__(self, layers) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, pixels):
            return self.layers(pixels)

    whole = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    layers = nn.Sequential(*[layer for name, layer in whole.named_children() if name != "fc"])
    torch.jit.trace(Script(layers).eval(), torch.zeros(1, 3, 299, 299)).save(folder / "inception-2015-12-05.pt")
    one = build_resizer("clean")
    pixels = [torch.from_numpy(one(picture.permute(1, 2, 0).numpy())).permute(2, 0, 1) for picture in pictures]
    return InceptionV3W(str(folder), download=False)(torch.stack(pixels))


def pytorch_fids(file: Path, folder: Path, pictures: Tensor) -> Tensor:
    from PIL import Image
    from pytorch_fid import fid_score, inception

    files = [folder / f"{i:02}.png" for i in range(len(pictures))]
    for place, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: torch.load(file, weights_only=True))
        net = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    return torch.from_numpy(fid_score.get_activations(files, net, batch_size=5, num_workers=0))


THEIRS: dict[str, Callable[[Path, Path, Tensor], Tensor]] = {
    "torch-fidelity": torch_fidelitys, "torchmetrics": torchmetrics_, "clean-fid": clean_fids,
    "pytorch-fid": pytorch_fids,
}  # fmt: skip


def their_distance(tool: str, x: Tensor, y: Tensor) -> float:
    """The Frechet distance by a tool's own function."""
    if tool == "torch-fidelity":
        from torch_fidelity import metric_fid

        sides = [metric_fid.fid_features_to_statistics(z.float()) for z in (x, y)]
        return metric_fid.fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    if tool == "torchmetrics":
        from torchmetrics.image.fid import _compute_fid

        (m1, s1), (m2, s2) = ((z.double().mean(0), torch.cov(z.double().T)) for z in (x, y))
        return _compute_fid(m1, s1, m2, s2).item()
    if tool == "clean-fid":
        from cleanfid.fid import fid_from_feats

        return fid_from_feats(x.numpy(), y.numpy())
    from pytorch_fid.fid_score import calculate_frechet_distance

    sides = [(z.numpy().mean(0), np.cov(z.numpy(), rowvar=False)) for z in (x, y)]
    return calculate_frechet_distance(*sides[0], *sides[1])


def their_kernel_distance(tool: str, x: Tensor, y: Tensor) -> float | None:
    """KID by a tool's own function, over all images at once; pytorch-fid has none."""
    if tool == "torch-fidelity":
        from torch_fidelity.metric_kid import kid_features_to_metric

        whole = {"kid_subsets": 1, "kid_subset_size": len(x), "verbose": False}
        return kid_features_to_metric(x, y, **whole)["kernel_inception_distance_mean"]
    if tool == "torchmetrics":
        from torchmetrics.image.kid import poly_mmd

        return poly_mmd(y, x).item()
    if tool == "clean-fid":
        from cleanfid.fid import kernel_distance

        return kernel_distance(x.numpy(), y.numpy(), num_subsets=1, max_subset_size=len(x))
    return None


def agree(tool: str, theirs: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor], columns: slice) -> None:
    """Checks every figure that a tool has against ours, to a relative 1e-4."""
    (x, y), (a, b) = theirs, ours
    distance = frechet_figure(a[:, columns], Moments.of(b[:, columns])).value
    assert distance == pytest.approx(their_distance(tool, x[:, columns], y[:, columns]), rel=1e-4)
    if (kernel := their_kernel_distance(tool, x, y)) is not None:
        assert mmd_figure(a, b, polynomial, within(b, polynomial)).value == pytest.approx(kernel, rel=1e-4)
    if tool == "torch-fidelity":
        from torch_fidelity.metric_prc import prc_features_to_metric

        want, found = prc_features_to_metric(x, y, verbose=False), prdc_figures(a, b, radii(b))
        assert 0 < want["precision"] < 1 and 0 < want["recall"] < 1
        assert {n: found[n].value for n in ("precision", "recall")} == pytest.approx(
            {n: want[n] for n in ("precision", "recall")}, rel=1e-4
        )


@pytest.mark.parametrize("tool", list(TOOLS))
def test_features_and_figures_of_pictures_are_the_tools_own(tool, inception, pictures, tmp_path):
    """Also precision and recall. The Frechet distance is of every eighth feature, as a matrix root of 2,048 takes
    minutes; torchmetrics, which has eigenvalues instead, is given them all."""
    with torch.inference_mode():
        theirs = THEIRS[tool](inception, tmp_path, pictures).float()
    ours = load_extractor("inception", resize=TOOLS[tool])(pictures)
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
    assert theirs.std(0).mean() > 0.02 * theirs.mean()  # images differ a thousand times more
    agree(tool, theirs.split(12), ours.split(12), slice(0, 2048, 1 if tool == "torchmetrics" else 8))


@pytest.mark.parametrize("tool", list(TOOLS))
def test_figures_of_sixty_pictures_are_the_tools_own_over_all_features(tool):
    """Each side through its own resize and a one-line network: distances, precision and recall of actual images."""
    generator = torch.Generator().manual_seed(2)
    rough = torch.rand(120, 3, 5, 5, generator=generator)
    rough[:60] *= torch.tensor([1.0, 0.8, 0.9]).view(3, 1, 1)
    smooth = nn.functional.interpolate(rough, size=(48, 48), mode="bicubic").clamp(0, 1)
    pictures = (255 * smooth).round().to(torch.uint8)
    network = Scaled(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 128.0, 128.0)
    how, resized, _ = RESIZED[tool]
    theirs = network(resized(pictures).float())
    ours = network(resize(pictures, 299, how))
    agree(tool, theirs.split(60), ours.split(60), slice(None))


@pytest.mark.parametrize("tool", list(TOOLS))
def test_figures_of_features_are_the_tools_own(tool):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(70, 12, generator=generator) for _ in range(2))
    x = 0.7 * x + 0.3
    agree(tool, (x, y), (x, y), slice(None))


def test_other_weights_than_fids_go_under_a_name_of_their_own(inception):
    found = load_extractor("inception")
    assert found.title == f"Inception-{features.sha256(inception)[:8]}" and found.size == 299
    assert found.identity == f"inception:{features.sha256(inception)}:torch-fidelity@299"


def test_a_file_that_holds_no_weights_or_wants_to_run_code_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(features.INCEPTION_PLACE, str(tmp_path / "none.pth"))
    with pytest.raises(InputError, match=f"{features.INCEPTION_PLACE}=.*no file"):
        load_extractor("inception")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "code.pth")
    for name in ("other.pth", "code.pth"):
        monkeypatch.setenv(features.INCEPTION_PLACE, str(tmp_path / name))
        with pytest.raises(InputError, match="holds no such weights") as caught:
            load_extractor("inception")
        assert "\n" not in str(caught.value)
