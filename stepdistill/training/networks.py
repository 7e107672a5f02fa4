"""The networks of a run by role, and which of them gradients reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from stepdistill.training.averages import Averages


class Networks:
    """A student and the networks trained, or used, beside it.

    Args:
        student: the network that is trained.
        others: further networks by role, trained if they require gradients; each is an attribute of that name.

    Attributes:
        trained: the trainable parameters by role, and by name.
        wrapped: `others` as wrapped by the trainer for several processes; called only in the phase of their role, since
            the wrapper waits for gradients of every parameter.
        averages, exported: moving averages of the student's weights, if any.
    """

    averages: Averages | None = None
    exported: Averages | None = None

    def __init__(self, student: nn.Module, others: dict[str, nn.Module] | None = None) -> None:
        self.others, self.wrapped, self._phase = others or {}, {}, "student"
        self.trained = {"student": trainable(student)}
        self.trained |= {role: own for role, module in self.others.items() if (own := trainable(module))}

    def __getattr__(self, role: str) -> nn.Module:
        others = self.__dict__.get("others", {})
        if role not in others:
            known = "".join(f", {name}" for name in others)
            raise AttributeError(f"models: got role {role!r}; allowed: teacher, student, target{known}")
        return self.wrapped.get(role, others[role]) if role == self._phase else others[role]

    @contextmanager
    def only(self, role: str) -> Iterator[None]:
        """Context in which gradients reach the parameters of one role only."""
        rest = [p for name, group in self.trained.items() if name != role for p in group.values()]
        self._phase = role
        for p in rest:
            p.requires_grad_(False)
        try:
            yield
        finally:
            self._phase = "student"
            for p in rest:
                p.requires_grad_(True)

    def after_update(self) -> None:
        """Updates the moving averages."""
        for averages in (self.averages, self.exported):
            if averages:
                averages.update()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
