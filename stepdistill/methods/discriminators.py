"""Light heads on frozen features, and the losses they are trained by (Sauer et al. 2023a, b, 2024).

A head judges every token of a feature map. Its weights are spectrally normalised (Miyato et al. 2018), and it is told
about the picture by projection (Miyato and Koyama 2018): what the tokens say times what the condition says. The papers
normalise activations over small groups of the batch; here it is over each sample's own tokens, so that no logit depends
on how a batch is split.
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
Logits = list[Tensor]


class Block(nn.Module):
    """Circular 1-D convolution over the tokens, normalisation, leaky ReLU: (B, C, N) to (B, C, N)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv = spectral_norm(nn.Conv1d(channels, channels, kernel))
        self.norm = nn.GroupNorm(math.gcd(channels, 32), channels)

    def forward(self, x: Tensor) -> Tensor:
        half = self.kernel // 2
        around = torch.arange(-half, x.shape[-1] + half, device=x.device) % x.shape[-1]  # however few the tokens
        return F.leaky_relu(self.norm(self.conv(x[..., around])), 0.2)


class Head(nn.Module):
    """Tokens (B, N, C) and a condition (B, D) to logits (B, N).

    Args:
        channels: C. condition: D; 0 is none.
    """

    def __init__(self, channels: int, condition: int = 0) -> None:
        super().__init__()
        self.first, self.second = Block(channels, 1), Block(channels, 9)
        self.out = spectral_norm(nn.Conv1d(channels, WIDTH if condition else 1, 1))
        told = (nn.Linear(condition, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)) if condition else None
        self.tell = nn.Sequential(*told) if told else None

    def forward(self, tokens: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.first(tokens.transpose(1, 2))
        logits = self.out((h + self.second(h)) / math.sqrt(2))
        if self.tell is not None:
            logits = (logits * self.tell(condition)[..., None]).sum(1, keepdim=True) / math.sqrt(WIDTH)
        return logits[:, 0]


class Heads(nn.Module):
    """A head for each of several feature maps.

    Args:
        channels: of each map. condition: width of what they are told.
    """

    def __init__(self, channels: Sequence[int], condition: int = 0) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(c, condition) for c in channels)

    def forward(self, maps: Sequence[Tensor], condition: Tensor | None = None) -> Logits:
        """Maps (B, N, C) and a condition (B, D) to logits (B, N), map by map."""
        return [head(tokens, condition) for head, tokens in zip(self.heads, maps, strict=True)]


def pooled_text(cond: Cond, batch: int) -> Tensor:
    """One vector (B, P) for a condition: the pipeline's pooled text, else the mean of its text's tokens (of those that
    count, where a mask says), else nothing (B, 0)."""
    if "pooled" in cond:
        return cond["pooled"].float()
    if "text" not in cond:
        device = next((value.device for value in cond.values()), None)
        return torch.zeros(batch, 0, device=device)
    text = cond["text"].float()
    mask = cond.get("text_mask", text.new_ones(text.shape[:2]))[..., None].to(text.dtype)
    return (text * mask).sum(1) / mask.sum(1).clamp(min=1)


def time_features(share: Tensor) -> Tensor:
    """A time as a share of the schedule's range, (B,) in [0, 1], to (B, 8) float32: sines and cosines."""
    angle = share.float()[:, None] * (math.pi / 2) * 2.0 ** torch.arange(4, device=share.device)
    return torch.cat([angle.sin(), angle.cos()], 1)


def _mean(values: Logits) -> Tensor:
    """The mean over maps of the mean over samples and tokens: every head has the same say."""
    return torch.stack([value.float().mean() for value in values]).mean()


def _hinge(real: Logits, fake: Logits) -> Tensor:
    return _mean([F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)])


def _softplus(real: Logits, fake: Logits) -> Tensor:
    return _mean([F.softplus(-r).mean() + F.softplus(f).mean() for r, f in zip(real, fake, strict=True)])


# by name: the discriminator's loss of (real, fake), and the student's of fake
LOSSES: dict[str, tuple[Callable[[Logits, Logits], Tensor], Callable[[Logits], Tensor]]] = {
    "hinge": (_hinge, lambda fake: -_mean(fake)),  # Lim and Ye 2017; the student's is linear
    "softplus": (_softplus, lambda fake: _mean([F.softplus(-f) for f in fake])),  # Goodfellow et al. 2014, on logits
}


def check_loss(name: str) -> None:
    """Raises InputError where there is no adversarial loss of this name."""
    if name not in LOSSES:
        raise InputError(f"adversarial_loss: got {name!r}; allowed: {', '.join(LOSSES)}")


def r1(judge: Callable[[Sequence[Tensor]], Logits], maps: Sequence[Tensor]) -> Tensor:
    """R1 (Mescheder et al. 2018) on a head's input: the mean over samples and maps of ||d D / d features||², D the mean
    logit of a sample.

    Args:
        judge: maps to logits. maps: features of real pictures (B, N, C).
    """
    maps = [tokens.detach().requires_grad_(True) for tokens in maps]
    total = sum(logits.float().mean(1).sum() for logits in judge(maps))
    slopes = torch.autograd.grad(total, maps, create_graph=True)
    return torch.stack([slope.square().sum((1, 2)).mean() for slope in slopes]).mean()


def approximate_r1(clean: Logits, shaken: Logits, size: float) -> Tensor:
    """R1 by a finite difference: the mean of (D(x + size n) - D(x))² / size², D the mean logit of a sample and n unit
    noise on the very input the clean logits were computed from. Its expectation is ||dD/dx||² for small sizes (Lin et
    al. 2025, equation 3)."""
    gaps = [(s.float().mean(1) - c.float().mean(1)).square().mean() for s, c in zip(shaken, clean, strict=True)]
    return torch.stack(gaps).mean() / size**2
