"""The networks of a run by role, and whom gradients reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from stepdistill.training.averages import Averages


class Networks:
    """A student and what learns, or judges, beside it.

    Args:
        student: the network that is trained.
        others: further networks by role, trained where they ask for gradients; each is an attribute of that name.

    Attributes:
        trained: the trainable parameters by role, and by name.
        wrapped: what the trainer made of `others` for several processes; called in the phase of that role alone, as
            the wrapper waits for gradients of every parameter.
        averages, exported: moving averages of the student's weights, for those who keep any.
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
        """Within, gradients reach the parameters of one role and of no other."""
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
        """What follows an optimizer step."""
        for averages in (self.averages, self.exported):
            if averages:
                averages.update()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ask for gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
