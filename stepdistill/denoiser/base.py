"""One call signature for every network: denoiser(x_t, t, cond, kind=...) -> float32 of that kind.

A subclass defines how its backbone is called (`evaluate`) and its timestep input at t (`network_time`); the base class
handles times, precision and conversion. A LoRA student and its teacher are one Denoiser with the adapter on or off.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.conditioning.base import Cond
from stepdistill.errors import InputError
from stepdistill.prediction import Kind, check_kind, convert
from stepdistill.schedules import Schedule, Time, working_dtype
from stepdistill.timegrid import Grid


def batch_times(t: Time, x: Tensor) -> Tensor:
    """Expands t, a float, () or (B,), to (B,) float64 on the device of x."""
    if isinstance(t, Tensor):
        return t.to(device=x.device, dtype=torch.float64, non_blocking=True).expand(len(x))
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)


class Denoiser(nn.Module):
    """A backbone with the schedule and the prediction type it was trained for.

    Args:
        backbone: the network; None for a closed form.
        schedule: defines the meaning of t.
        kind: what the backbone predicts.

    Attributes:
        sample_shape: (C, H, W) of one sample; set by the subclass.
        needs: the names of the required conditions.
        takes_guidance: whether it is guidance-conditioned: it takes the condition `guidance` (B,), scale - 1, and one
            call returns the guided prediction.
        classes: number of classes of the condition `labels` (B,); 0 if it takes none.
        patch: patch size; the sides of a sample are multiples of it.
        grid: the times its pipeline visits.
    """

    sample_shape: tuple[int, ...]
    needs: frozenset[str] = frozenset()
    takes_guidance: bool = False
    classes: int = 0
    patch: int = 1
    grid: Grid = Grid()

    def __init__(self, backbone: nn.Module | None, schedule: Schedule, kind: Kind) -> None:
        super().__init__()
        check_kind(kind)
        self.backbone = backbone
        self.schedule = schedule
        self.kind = kind

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None if there are none."""
        weight = next((p for p in self.parameters() if p.is_floating_point()), None)
        return None if weight is None else weight.dtype

    def network_time(self, t: Tensor) -> Tensor:
        """Returns the backbone's timestep input at t (B,): the index itself on AlphaBar. Subclasses override."""
        return t

    def check(self, cond: Cond | None) -> Cond:
        """Returns the conditions if all that the network needs are present.

        Raises:
            InputError: some are missing.
        """
        if cond is None or not self.needs <= cond.keys():
            got = ", ".join(sorted(cond or ())) or "none"
            hint = "; add guidance = scale - 1" if self.takes_guidance else ""
            raise InputError(
                f"condition: got {got}; allowed: {', '.join(sorted(self.needs))} for this network; encode the prompts "
                f"with its conditioner{hint}"
            )
        return cond

    def evaluate(self, x_t: Tensor, clock: Tensor, cond: Cond | None) -> Tensor:
        """Calls the backbone: x_t (B, ...) in the dtype of the weights, clock (B,) float32. Subclasses implement."""
        raise NotImplementedError

    def raw(self, x_t: Tensor, t: Time, cond: Cond | None = None, *, t_end: Time | None = None) -> Tensor:
        """Returns the network's own output, of kind `self.kind`.

        Args:
            x_t: (B, ...). t: a float, () or (B,). cond: tensors of batch size B.
            t_end: end time of the step, for a two-time network. Networks of one time raise InputError.

        Returns:
            (B, ...), float32 regardless of autocast (float64 if x_t is).
        """
        if t_end is not None:
            raise InputError(f"t_end: got {t_end}; {type(self).__name__} takes one time; leave t_end out")
        clock = self.network_time(batch_times(t, x_t)).to(torch.float32)
        y = self.evaluate(x_t.to(self.dtype or x_t.dtype), clock, cond)
        return y.to(working_dtype(x_t))

    def forward(
        self, x_t: Tensor, t: Time, cond: Cond | None = None, *, kind: Kind = "x0", t_end: Time | None = None
    ) -> Tensor:
        """Returns the prediction at (x_t, t) as type `kind`: shapes and dtype as `raw`, converted in float32 with
        float64 coefficients.

        Raises:
            InputError: the output does not determine `kind` at t (see `prediction.convert`).
        """
        y = self.raw(x_t, t, cond, t_end=t_end)
        return convert(y, x_t, t, self.schedule, src=self.kind, dst=kind)
