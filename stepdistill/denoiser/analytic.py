"""A closed-form teacher: data are a mixture of Gaussians, so the optimal denoiser and its ODE are known exactly.

With component k of mean mu_k and standard deviation S_k, x_t given k is Normal(alpha mu_k, V_k), V_k = alpha² S_k² +
sigma², and by Bayes' rule

    r_k = P(k | x_t) ~ w_k Normal(x_t; alpha mu_k, V_k)
    x0  = sum_k r_k [mu_k + alpha S_k² (x_t - alpha mu_k) / V_k]
    eps = sum_k r_k [sigma (x_t - alpha mu_k) / V_k],    score = -eps / sigma.

It implements the Denoiser interface. All arithmetic is in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.denoiser.base import Cond, Denoiser, batch_times
from stepdistill.errors import InputError
from stepdistill.prediction import Kind, check_kind, row
from stepdistill.schedules import Schedule, Time, match, working_dtype

# Dormand & Prince 1980, RK5(4)7M: the nodes, the stage weights (the last row is the fifth-order step), and the
# difference between the fifth- and the fourth-order step
_NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def solve_ode(slope, x: Tensor, tolerance: float) -> Tensor:
    """x(1) of dx/du = slope(u, x), x(0) = x, by adaptive fifth-order Runge-Kutta; error per step below `tolerance`."""
    u, h = 0.0, 0.01
    first = slope(u, x)
    while u < 1:
        h = min(h, 1 - u)
        k = [first]
        for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
            x_new = x + h * sum(w * k_i for w, k_i in zip(weights, k, strict=True) if w)
            k.append(slope(u + node * h, x_new))
        error = (h * sum(w * k_i for w, k_i in zip(_ERROR, k, strict=True) if w)).abs().max().item() / tolerance
        if not error < float("inf"):
            raise InputError("flow: got values that are not finite; allowed: finite x_t; check what made x_t")
        if error <= 1:
            u, x, first = (1.0 if h == 1 - u else u + h), x_new, k[-1]
        h *= min(5.0, max(0.2, 0.9 * (error + 1e-30) ** -0.2))
    return x


class GaussianMixtureDenoiser(Denoiser):
    """The exact denoiser of a Gaussian mixture; predicts x0.

    Args:
        means: (K, *sample_shape).
        std: a float, (K,), or (K, *sample_shape): axis-aligned standard deviations.
        weights: (K,) positive, normalised here; None means equal.
        schedule: the process.

    A condition {"labels": (B,)} selects one component per sample; -1, like no condition, means the whole mixture.

    Raises:
        InputError: inconsistent shapes, or a standard deviation or weight that is not positive.
    """

    def __init__(self, means: Tensor, std: Tensor | float, weights: Tensor | None, schedule: Schedule) -> None:
        super().__init__(None, schedule, "x0")
        means = torch.as_tensor(means, dtype=torch.float64)
        if means.ndim < 2:
            raise InputError(f"means: got shape {tuple(means.shape)}; allowed: (K, *sample_shape); add a dimension")
        count = len(means)
        self.sample_shape = tuple(means.shape[1:])
        std = torch.as_tensor(std, dtype=torch.float64)
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights)
        if std.shape not in ((), (count,), means.shape) or weights.shape != (count,):
            raise InputError(
                f"mixture: got std {tuple(std.shape)}, weights {tuple(weights.shape)} for {count} means; allowed: std "
                f"(), ({count},) or {tuple(means.shape)}, weights ({count},)"
            )
        if not (std > 0).all() or not (weights > 0).all():
            raise InputError("mixture: got a std or weight of 0 or less; allowed: above 0; drop empty components")
        std = std.reshape(std.shape + (1,) * (means.ndim - std.ndim)).expand_as(means)
        weights = weights.to(torch.float64)
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("std", std.flatten(1).clone())
        self.register_buffer("weights", weights / weights.sum())

    def _apply(self, fn, recurse: bool = True) -> Denoiser:
        """Moves devices only: casting the whole model leaves these buffers in float64."""
        buffers = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def _log_posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond | None) -> tuple[Tensor, ...]:
        """log r (B, K), x - alpha mu_k and V_k (B, K, D), for flat x (B, D) and alpha, sigma (B,)."""
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        offset = x[:, None] - alpha * self.means
        variance = (alpha * self.std) ** 2 + sigma**2
        log_r = self.weights.log() - 0.5 * (offset**2 / variance + variance.log()).sum(-1)
        if cond is not None and "labels" in cond:
            labels = cond["labels"].to(x.device)[:, None]
            other = (labels >= 0) & (labels != torch.arange(len(self.means), device=x.device))
            log_r = log_r.masked_fill(other, -torch.inf)
        return log_r.log_softmax(-1), offset, variance

    def _x0_eps(self, x: Tensor, alpha: Tensor, sigma: Tensor, cond: Cond | None) -> tuple[Tensor, Tensor]:
        """The posterior means of x0 and eps, (B, D) each."""
        log_r, offset, variance = self._log_posterior(x, alpha, sigma, cond)
        r, pull = log_r.exp()[..., None], offset / variance
        x0 = (r * (self.means + alpha[:, None, None] * self.std**2 * pull)).sum(1)
        return x0, sigma[:, None] * (r * pull).sum(1)

    def _flat(self, x_t: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule.coeffs(batch_times(t, x_t))
        return x_t.to(torch.float64).flatten(1), alpha, sigma

    def raw(self, x_t: Tensor, t: Time, cond: Cond | None = None, *, t_end: Time | None = None) -> Tensor:
        """E[x0 | x_t], (B, *sample_shape); see Denoiser.raw."""
        if t_end is not None:
            raise InputError(f"t_end: got {t_end}; {type(self).__name__} takes one time; use flow(x_t, t, s)")
        return self._x0_eps(*self._flat(x_t, t), cond)[0].reshape(x_t.shape).to(working_dtype(x_t))

    def forward(
        self, x_t: Tensor, t: Time, cond: Cond | None = None, *, kind: Kind = "x0", t_end: Time | None = None
    ) -> Tensor:
        """Computes the requested prediction, p x0 + q eps, without a division: it is exact at the ends too."""
        if t_end is not None:
            return self.raw(x_t, t, cond, t_end=t_end)
        check_kind(kind)
        x0, eps = self._x0_eps(*self._flat(x_t, t), cond)
        p, q = row(kind, batch_times(t, x_t), self.schedule)
        return (p[:, None] * x0 + q[:, None] * eps).reshape(x_t.shape).to(working_dtype(x_t))

    def score(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """grad log p_t(x_t) = -E[eps | x_t] / sigma, (B, *sample_shape); finite at the clean end too."""
        x, alpha, sigma = self._flat(x_t, t)
        log_r, offset, variance = self._log_posterior(x, alpha, sigma, cond)
        return -(log_r.exp()[..., None] * offset / variance).sum(1).reshape(x_t.shape).to(working_dtype(x_t))

    def responsibilities(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        """P(component | x_t), (B, K) float64. At t_min they tell which mode a sample belongs to."""
        return self._log_posterior(*self._flat(x_t, t), cond)[0].exp()

    def flow(self, x_t: Tensor, t: Time, s: Time, cond: Cond | None = None, *, tolerance: float = 1e-10) -> Tensor:
        """The probability-flow ODE's map from t to s, in either direction; (B, *sample_shape), dtype as `raw`.

        One component: x_s = alpha_s mu + sqrt(V(s)/V(t)) (x_t - alpha_t mu), exactly. Several: with rho = sqrt(alpha²
        + sigma²) and phi = atan(sigma/alpha) every schedule is dx/dphi = v in x/rho (v at alpha = cos phi, sigma = sin
        phi), singular at neither end; solved adaptively with an error per step below `tolerance`.
        """
        x, alpha_t, sigma_t = self._flat(x_t, t)
        alpha_s, sigma_s = self.schedule.coeffs(batch_times(s, x_t))
        if len(self.means) == 1:
            std_t, std_s = (
                ((a[:, None] * self.std) ** 2 + b[:, None] ** 2).sqrt()
                for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s))
            )
            x_s = alpha_s[:, None] * self.means + std_s / std_t * (x - alpha_t[:, None] * self.means)
        else:
            phi_t, phi_s = torch.atan2(sigma_t, alpha_t), torch.atan2(sigma_s, alpha_s)

            def slope(u: float, z: Tensor) -> Tensor:
                phi = torch.lerp(phi_t, phi_s, u)
                alpha, sigma = phi.cos(), phi.sin()
                x0, eps = self._x0_eps(z, alpha, sigma, cond)
                return (phi_s - phi_t)[:, None] * (alpha[:, None] * eps - sigma[:, None] * x0)

            with torch.no_grad():
                z = solve_ode(slope, x / match(torch.hypot(alpha_t, sigma_t), x), tolerance)
            x_s = z * match(torch.hypot(alpha_s, sigma_s), x)
        return x_s.reshape(x_t.shape).to(working_dtype(x_t))

    def consistency(self, x_t: Tensor, t: Time, cond: Cond | None = None, *, tolerance: float = 1e-10) -> Tensor:
        """f(x_t, t), the end at t_min of the ODE path through x_t (Song et al. 2023, definition 1)."""
        return self.flow(x_t, t, self.schedule.t_min, cond, tolerance=tolerance)

    def sample(self, n: int, generator: torch.Generator | None = None, labels: Tensor | None = None) -> Tensor:
        """Exact samples of the data, (n, *sample_shape) float32; `labels` (n,) selects components, -1 draws one."""
        device = self.means.device
        index = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator).to(device)
        if labels is not None:
            index = torch.where(labels.to(device) >= 0, labels.to(device), index)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator).to(device)
        return (self.means[index] + self.std[index] * noise).reshape(n, *self.sample_shape).to(torch.float32)
