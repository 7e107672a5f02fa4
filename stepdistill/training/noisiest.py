"""Whether x0 can be computed at a teacher's noisiest time, where students begin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepdistill.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from stepdistill.denoiser.load import Teacher

LEAST_ALPHA = 0.02  # at which bf16's rounding of eps, 2e-3 of it, is a tenth of x0


def check_noisiest(teacher: Teacher, t: float | Tensor, precision: str) -> None:
    """Checks that x0 can be computed at a teacher's noisiest time, t. From eps it is (x_t - sigma eps) / alpha, and the
    rounding of eps is divided by alpha too: on PixArt's schedule, bf16's becomes noise of a standard deviation of 0.26.

    Raises:
        InputError: the teacher predicts eps, and alpha is 0 there, or too small for `mixed_precision`.
    """
    if teacher.denoiser.kind != "eps":
        return
    alpha = teacher.denoiser.schedule.coeffs(t)[0].item()
    if 0 < alpha < LEAST_ALPHA and precision == "bf16":
        raise InputError(
            f"mixed_precision: got bf16 for {teacher.path}, which predicts eps where alpha is {alpha:.2g}: its "
            "rounding is noise in x0; allowed: fp16, no"
        )
    if alpha == 0:
        raise InputError(
            f"teacher: got {teacher.path}, which predicts eps on a schedule that ends in pure noise, where eps says "
            "nothing of x0; allowed: v, x0 or flow there; take a teacher of another prediction_type"
        )
