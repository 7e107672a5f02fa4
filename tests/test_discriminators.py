"""Discriminator heads and their losses against hand computations and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stepdistill.errors import InputError
from stepdistill.methods.discriminators import (
    LOSSES,
    Head,
    Heads,
    approximate_r1,
    check_loss,
    groups_of,
    laid_out,
    noise_features,
    pooled_text,
    r1,
)
from stepdistill.schedules import EDM, Cosine, RectifiedFlow

REAL = [torch.tensor([[0.5, 2.0]]), torch.tensor([[-1.0, 1.0]])]
FAKE = [torch.tensor([[-2.0, 0.0]]), torch.tensor([[0.5, -0.5]])]


def maps(tokens: int = 6, channels: int = 5, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """A head whose logit at every token is w_k . token, so that dD/dtoken = w_k / N."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weights)

    def forward(self, maps):
        return [tokens @ w for tokens, w in zip(maps, self.weights, strict=True)]


def test_hinge_has_the_values_worked_out_by_hand():
    judge, deceive = LOSSES["hinge"]
    first = (0.5 + 0.0) / 2 + (0.0 + 1.0) / 2  # relu(1 - real), relu(1 + fake), token by token
    second = (2.0 + 0.0) / 2 + (1.5 + 0.5) / 2
    assert judge(REAL, FAKE).item() == pytest.approx((first + second) / 2)
    assert deceive(FAKE).item() == pytest.approx(-(-1.0 + 0.0) / 2)


def test_softplus_has_the_values_worked_out_by_hand():
    def soft(x: float) -> float:
        return math.log1p(math.exp(x))

    judge, deceive = LOSSES["softplus"]
    first = (soft(-0.5) + soft(-2.0)) / 2 + (soft(-2.0) + soft(0.0)) / 2
    second = (soft(1.0) + soft(-1.0)) / 2 + (soft(0.5) + soft(-0.5)) / 2
    assert judge(REAL, FAKE).item() == pytest.approx((first + second) / 2)
    fake = (soft(2.0) + soft(0.0)) / 2, (soft(-0.5) + soft(0.5)) / 2
    assert deceive(FAKE).item() == pytest.approx(sum(fake) / 2)


def test_softplus_is_binary_cross_entropy_on_logits():
    bce = nn.functional.binary_cross_entropy_with_logits
    expected = sum(bce(r, torch.ones_like(r)) + bce(f, torch.zeros_like(f)) for r, f in zip(REAL, FAKE, strict=True))
    assert LOSSES["bce"][0](REAL, FAKE).item() == pytest.approx(expected.item() / 2)


@pytest.mark.parametrize("name", LOSSES)
def test_every_head_has_the_same_say_however_many_tokens_it_sees(name):
    many = [REAL[0].repeat(1, 50), REAL[1]], [FAKE[0].repeat(1, 50), FAKE[1]]
    for loss, got, expected in zip(LOSSES[name], (many, many[1:]), ((REAL, FAKE), (FAKE,)), strict=True):
        assert loss(*got).item() == pytest.approx(loss(*expected).item())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_half_precision_logits_is_float32(name):
    half = [[each.bfloat16() for each in logits] for logits in (REAL, FAKE)]
    assert LOSSES[name][0](*half).dtype == LOSSES[name][1](half[1]).dtype == torch.float32


def test_an_unknown_loss_is_refused():
    with pytest.raises(InputError, match="got 'wasserstein'; allowed: hinge, softplus, bce"):
        check_loss("wasserstein")


def test_r1_of_a_linear_head_is_its_weights_norm():
    """D is the sum over N tokens, so each token's slope is w and the squares sum to N ||w||²."""
    weights = [torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]), torch.tensor([2.0, 1.0])]
    features = [maps(6, 5), maps(4, 2)]
    expected = sum(w.square().sum().item() * tokens.shape[1] for w, tokens in zip(weights, features, strict=True)) / 2
    assert r1(Linear(weights), features).item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_r1_is_that_of_its_closed_form():
    head = Linear([torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])])
    r1(head, [maps(6, 5)]).backward()
    assert torch.allclose(head.weights[0].grad, 2 * head.weights[0].detach() * 6)


def test_approximate_r1_is_on_average_the_exact_one():
    """For a linear D and noise n of unit variance, E (w . n / N)² over the tokens is ||w||² / N."""
    w, size = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64), 0.01
    features = maps(6, 5, batch=20000).double()
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = approximate_r1([features @ w], [(features + size * noise) @ w], size).item()
    exact = w.square().sum().item() / 6
    assert abs(got - exact) < 4 * exact * math.sqrt(2 / 20000)  # a squared normal's deviation is sqrt(2) times its mean


@pytest.mark.parametrize("planar", [False, True])
def test_a_head_does_not_see_how_the_batch_is_split(planar):
    torch.manual_seed(0)
    heads = Heads([32, 8], 3, planar).eval()
    features, condition = [maps(12, 32, 4), maps(48, 8, 4)], torch.randn(4, 3)
    whole = heads(features, condition, (3, 4))
    halves = [heads([m[i : i + 2] for m in features], condition[i : i + 2], (3, 4)) for i in (0, 2)]
    for logits, first, second in zip(whole, *halves, strict=True):
        assert torch.allclose(logits, torch.cat([first, second]), atol=1e-6)


@pytest.mark.parametrize("planar", [False, True])
def test_a_head_on_a_wide_network_is_narrower_inside(planar):
    """3 x 3 convolutions of 3,072 channels, Flux's, would have 94 million parameters a head."""
    head = Head(1024, 3, planar)
    assert [conv.weight.shape[:2] for conv in (head.first.conv, head.second.conv)] == [(512, 1024), (512, 512)]
    assert head.out.weight.shape[:2] == (64, 512)


def test_every_convolution_has_spectral_norm_one():
    torch.manual_seed(0)
    for planar in (False, True):
        head = Head(32, 3, planar)
        features = maps(16, 32, 2).transpose(1, 2)
        for _ in range(200):  # power iterations
            head(features.unflatten(2, (4, 4)) if planar else features, torch.randn(2, 3))
        head.eval()
        for conv in (head.first.conv, head.second.conv, head.out):
            top = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2).item()
            assert top == pytest.approx(1, abs=1e-3)


def test_a_head_is_conditioned_by_projection():
    """Its logit is <out(features), projection(condition)> / sqrt(width), so it is zero if `projection` returns zero."""
    torch.manual_seed(0)
    head = Head(32, 3).eval()
    features = maps(6, 32).transpose(1, 2)
    condition = torch.randn(3, 3)
    h = head.first(features)
    out = head.out((h + head.second(h)) / math.sqrt(2))
    expected = torch.einsum("bwn,bw->bn", out, head.projection(condition)) / 8
    assert torch.allclose(head(features, condition), expected, atol=1e-6)
    with torch.no_grad():
        for p in head.projection[2].parameters():
            p.zero_()
    assert torch.equal(head(features, condition), torch.zeros(3, 6))


def test_a_flat_head_is_circular_and_works_on_fewer_tokens_than_its_kernel():
    torch.manual_seed(0)
    head = Head(32).eval()
    features = maps(5, 32).transpose(1, 2)
    assert torch.allclose(head(features.roll(2, 2)), head(features).roll(2, 1), atol=1e-5)


def test_a_planar_head_sees_a_tokens_neighbours_above_and_below():
    torch.manual_seed(0)
    head = Head(32, planar=True).eval()
    norms = [head.first.norm, head.second.norm]
    for norm in norms:
        norm.forward = lambda x: x  # the norm itself spans the whole sample
    features = maps(30, 32, 1).transpose(1, 2).unflatten(2, (6, 5)).requires_grad_(True)
    head(features)[0, 2 * 5 + 2].backward()  # row 2, column 2
    reached = features.grad[0].abs().sum(0) > 0
    expected = torch.zeros(6, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(reached, expected)


@pytest.mark.parametrize(
    ("count", "size", "shape"),
    [
        (12, (6, 8), (3, 4)), (48, (6, 8), (6, 8)), (12, (8, 6), (4, 3)), (8, (16, 32), (2, 4)), (5, (), (1, 5)),
        (1, (64, 64), (1, 1)),
    ],
)  # fmt: skip
def test_tokens_are_laid_out_as_the_picture(count, size, shape):
    tokens = torch.arange(count).float()[None, :, None]
    planes = laid_out(tokens, size)
    assert planes.shape == (1, 1, *shape) and torch.equal(planes.flatten(), torch.arange(count).float())


def test_tokens_that_make_no_rectangle_are_refused():
    with pytest.raises(InputError, match=r"blocks: got one of 77 tokens for a sample of 64 x 64; allowed: "):
        laid_out(torch.zeros(1, 77, 4), (64, 64))


@pytest.mark.parametrize(("channels", "groups"), [(1280, 32), (320, 20), (1536, 32), (64, 4), (96, 6), (24, 1), (7, 1)])
def test_groups_have_sixteen_channels_or_more(channels, groups):
    assert groups_of(channels) == groups and channels % groups == 0


def test_pooled_text_is_the_pipelines_else_the_mean_of_the_tokens_that_count():
    text = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [50.0, 50.0]]])
    assert torch.equal(pooled_text({"pooled": torch.ones(1, 3), "text": text}, 1), torch.ones(1, 3))
    masked = pooled_text({"text": text, "text_mask": torch.tensor([[1, 1, 0]])}, 1)
    assert torch.equal(masked, torch.tensor([[2.0, 3.0]]))
    assert torch.equal(pooled_text({"text": text}, 1), torch.tensor([[18.0, 56 / 3]]))
    assert pooled_text({}, 2).shape == (2, 0)


def test_heads_are_conditioned_on_the_class():
    condition = pooled_text({"labels": torch.tensor([2, 0])}, 2, classes=3)
    assert torch.equal(condition, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))


def test_a_noise_level_reads_the_same_on_every_schedule():
    log_snr_half = torch.tensor([2.0, 0.0, -1.0])
    read = [noise_features(*s.coeffs(s.time_at(log_snr_half))) for s in (Cosine(), RectifiedFlow(), EDM())]
    assert all(torch.allclose(other, read[0], atol=1e-6) for other in read[1:])
    half = noise_features(*Cosine().coeffs(torch.tensor([0.5])))[0]
    angle = math.pi / 4
    expected = [math.sin(angle * 2**k) for k in range(4)] + [math.cos(angle * 2**k) for k in range(4)]
    assert half.tolist() == pytest.approx(expected, abs=1e-6)
