"""The one mean that all losses use: over the values that the mask counts, in float32."""

from __future__ import annotations

from torch import Tensor

from stepdistill.schedules import working_dtype


def wide(x: Tensor) -> Tensor:
    """Casts to float32, in which losses are computed; float64 stays."""
    return x.to(working_dtype(x))


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum(values mask) / sum(mask), a scalar in float32 or float64.

    Sums over a vocabulary or channels are taken before the call: `kl_div(reduction="batchmean")` on (B, S, V) divides
    by B alone and is S times too large; a plain mean, over V as well, is V times too small.

    Args:
        values: any shape. mask: the same shape, bool or 0/1; None counts all. If nothing counts, the mean is 0.
    """
    values = wide(values)
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    if mask.shape != values.shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}; allowed: {tuple(values.shape)}, that of the values")
    mask = mask.bool()
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
