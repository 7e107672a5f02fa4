"""Light heads on frozen features, and their losses (Sauer et al. 2023a, b, 2024).

A head judges every position of a feature map. Its weights are spectrally normalised (Miyato et al. 2018), and it is
conditioned by projection (Miyato and Koyama 2018): the inner product of each token's and the condition's embedding. The
papers normalise activations over small groups of the batch; here they are normalised over each sample's own tokens, so
that no logit depends on how a batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from stepdistill.denoiser.base import Cond
from stepdistill.errors import InputError

WIDTH = 64  # of the projection
MOST = 512  # channels within a head, which convolutions of a large transformer's width would make larger than a student
NOISE_FEATURES = 8
Logits = list[Tensor]


def groups_of(channels: int) -> int:
    """Number of groups for group normalisation: up to 32, of at least 16 channels each, since removing mean and spread
    leaves a smaller group little information."""
    return max((g for g in range(1, 33) if channels % g == 0 and channels >= 16 * g), default=1)


class Block(nn.Module):
    """Convolution, normalisation over the sample, leaky ReLU: (B, C, N) to (B, D, N), or (B, C, h, w) to (B, D, h, w).

    Args:
        channels, inside: C and D.
        kernel: odd size. planar: two-dimensional with zero padding; otherwise one-dimensional and circular.
    """

    def __init__(self, channels: int, inside: int, kernel: int, planar: bool) -> None:
        super().__init__()
        self.half = 0 if planar else kernel // 2
        conv = (
            nn.Conv2d(channels, inside, kernel, padding=kernel // 2) if planar else nn.Conv1d(channels, inside, kernel)
        )
        self.conv = spectral_norm(conv)
        self.norm = nn.GroupNorm(groups_of(inside), inside)

    def forward(self, x: Tensor) -> Tensor:
        if self.half:
            around = torch.arange(-self.half, x.shape[-1] + self.half, device=x.device) % x.shape[-1]  # if few tokens
            x = x[..., around]
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class Head(nn.Module):
    """Maps features (B, C, N) or (B, C, h, w) and a condition (B, D) to logits (B, N) or (B, h w).

    Args:
        channels: C. condition: D; 0 for none. planar: features are (B, C, h, w); a logit sees nine places either way.
    """

    def __init__(self, channels: int, condition: int = 0, planar: bool = False) -> None:
        super().__init__()
        inside = min(channels, MOST)
        self.first, self.second = Block(channels, inside, 1, planar), Block(inside, inside, 3 if planar else 9, planar)
        self.out = spectral_norm((nn.Conv2d if planar else nn.Conv1d)(inside, WIDTH if condition else 1, 1))
        layers = (nn.Linear(condition, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)) if condition else None
        self.projection = nn.Sequential(*layers) if layers else None

    def forward(self, features: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.first(features)
        logits = self.out((h + self.second(h)) / math.sqrt(2)).flatten(2)
        if self.projection is not None:
            logits = (logits * self.projection(condition)[..., None]).sum(1, keepdim=True) / math.sqrt(WIDTH)
        return logits[:, 0]


class Heads(nn.Module):
    """One head per feature map.

    Args:
        channels: of each map. condition: width of the condition.
        planar: tokens are laid out as an image again and heads are two-dimensional, so that they judge images of any
            shape alike (Sauer et al. 2024); otherwise heads are one-dimensional, for one input size (2023b).
    """

    def __init__(self, channels: Sequence[int], condition: int = 0, planar: bool = False) -> None:
        super().__init__()
        self.planar = planar
        self.heads = nn.ModuleList(Head(c, condition, planar) for c in channels)

    def forward(
        self, maps: Sequence[Tensor], condition: Tensor | None = None, size: Sequence[int] | None = None
    ) -> Logits:
        """Maps features (B, N, C) and a condition (B, D) to logits (B, N), map by map; planar heads need the sample's
        `size`, see `laid_out`."""
        shaped = [laid_out(tokens, size) if self.planar else tokens.transpose(1, 2) for tokens in maps]
        return [head(features, condition) for head, features in zip(self.heads, shaped, strict=True)]


def laid_out(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Lays out tokens (B, N, C) as (B, C, h, w), h : w as in `size` (H, W); as one row if the sample has no sides.

    Raises:
        InputError: N tokens do not form such a rectangle.
    """
    count = tokens.shape[1]
    height = max(1, round(math.sqrt(count * size[0] / size[1]))) if len(size) == 2 else 1
    if count % height:
        raise InputError(
            f"blocks: got one of {count} tokens for a sample of {' x '.join(map(str, size))}; allowed: as many as make "
            "a rectangle of its shape; choose another"
        )
    return tokens.transpose(1, 2).unflatten(2, (height, count // height))


def pooled_text(cond: Cond, batch: int, classes: int = 0) -> Tensor:
    """One vector (B, P) for a condition: the pipeline's pooled text, else its one-hot label if there are `classes`,
    else the mean of its text tokens (of the unmasked ones, if there is a mask), else nothing (B, 0)."""
    if "pooled" in cond:
        return cond["pooled"].float()
    if classes:
        return F.one_hot(cond["labels"], classes).float()
    if "text" not in cond:
        device = next((value.device for value in cond.values()), None)
        return torch.zeros(batch, 0, device=device)
    text = cond["text"].float()
    mask = cond.get("text_mask", text.new_ones(text.shape[:2]))[..., None].to(text.dtype)
    return (text * mask).sum(1) / mask.sum(1).clamp(min=1)


def noise_features(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Encodes noise levels, (B,) each, as (B, NOISE_FEATURES) float32: sines and cosines of multiples of
    atan(sigma/alpha), which ranges from 0 to pi/2 on every schedule."""
    angle = torch.atan2(sigma, alpha).float()[:, None] * 2.0 ** torch.arange(NOISE_FEATURES // 2, device=alpha.device)
    return torch.cat([angle.sin(), angle.cos()], 1)


def _mean(values: Logits) -> Tensor:
    """The mean over maps of the mean over samples and tokens: every head has equal weight."""
    return torch.stack([value.float().mean() for value in values]).mean()


def _hinge(real: Logits, fake: Logits) -> Tensor:
    return _mean([F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake, strict=True)])


def _softplus(real: Logits, fake: Logits) -> Tensor:
    return _mean(
        [F.softplus(-r.float()).mean() + F.softplus(f.float()).mean() for r, f in zip(real, fake, strict=True)]
    )


# by name: the discriminator's loss of (real, fake), and the student's of fake
LOSSES: dict[str, tuple[Callable[[Logits, Logits], Tensor], Callable[[Logits], Tensor]]] = {
    "hinge": (_hinge, lambda fake: -_mean(fake)),  # Lim and Ye 2017; the student's is linear
    "softplus": (_softplus, lambda fake: _mean([F.softplus(-f.float()) for f in fake])),  # Goodfellow et al. 2014
}
LOSSES["bce"] = LOSSES["softplus"]  # the same: binary cross-entropy on logits, non-saturating for the student


def check_loss(name: str) -> None:
    """Raises InputError if there is no adversarial loss of this name."""
    if name not in LOSSES:
        raise InputError(f"adversarial_loss: got {name!r}; allowed: {', '.join(LOSSES)}; try hinge")


def mean_logits(real: Logits, fake: Logits) -> dict[str, Tensor]:
    """The mean logits of real and generated samples, for the log: far apart if the discriminator wins."""
    return {"real_logits": _mean(real).detach(), "fake_logits": _mean(fake).detach()}


def r1(judge: Callable[[Sequence[Tensor]], Logits], maps: Sequence[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018) on a head's input: the mean over samples and maps of ||d D / d features||², where D is
    the sum of a sample's logits, so that each logit counts for the same on a map of any size.

    Args:
        judge: returns logits for maps. maps: features of real images (B, N, C).
    """
    maps = [tokens.detach().requires_grad_(True) for tokens in maps]
    total = sum(logits.float().sum() for logits in judge(maps))
    slopes = torch.autograd.grad(total, maps, create_graph=True)
    return torch.stack([slope.square().sum((1, 2)).mean() for slope in slopes]).mean()


def approximate_r1(clean: Logits, shaken: Logits, size: float) -> Tensor:
    """R1 by a finite difference: the mean of (D(x + size n) - D(x))² / size², where D is the mean logit of a sample
    and n unit noise on the same input that the clean logits were computed from. Its expectation is ||dD/dx||² for small
    sizes (Lin et al. 2025, equation 3)."""
    gaps = [(s.float().mean(1) - c.float().mean(1)).square().mean() for s, c in zip(shaken, clean, strict=True)]
    return torch.stack(gaps).mean() / size**2
