"""How much work a piece of rewriting may take. It is counted in steps (terms made, visited and rewritten), not in seconds, so that what
is given up does not depend on the machine; a step is a few microseconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT = 10_000_000


class TooLarge(Exception):
    """The budget is spent; the message says it in the user's words."""


class Budget:
    """Steps that are left, and the reason that is given when there are none."""

    __slots__ = ("left", "reason")

    def __init__(self, steps: int = DEFAULT, reason: str = "the values around the selection depend on each other in too many ways") -> None:
        self.left, self.reason = steps, reason

    def spend(self, steps: int = 1) -> None:
        """Raises TooLarge when fewer steps are left."""
        self.left -= steps
        if self.left < 0:
            raise TooLarge(self.reason)

    @contextmanager
    def within(self) -> Iterator[Budget]:
        """Work inside the `with` is paid from this budget, and from those around it."""
        global _current
        outer, own, reason = _current, self.left, self.reason
        if outer.left < own:
            self.left, self.reason = outer.left, outer.reason
        given = self.left
        _current = self
        try:
            yield self
        finally:
            spent = given - self.left
            self.left, self.reason = own - spent, reason
            outer.left -= spent
            _current = outer


_root = _current = Budget()


def step(n: int = 1) -> None:
    """Pay for n steps from the budget at hand."""
    _current.spend(n)


def reset() -> None:
    """A new compilation begins: where nobody gave a budget, the default one is full again."""
    _root.left = DEFAULT
