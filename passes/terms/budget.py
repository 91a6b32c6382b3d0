"""How much work a piece of rewriting may take. It is counted in steps (terms made, visited and rewritten), not in seconds, so that what
is given up does not depend on the machine; a step is a few microseconds.

Beside them the processor seconds of all passes over one graph are limited (`limited`), generously: for work that no step counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT = 10_000_000
SECONDS = 30.0  # of this thread's processor time, for one graph: the slowest that is known takes 7, in a loop that is read by example
EACH = 1.0  # more for each place where experts may be chosen: an equal block takes a tenth of that, and a graph may hold a hundred of them
BUDGET = "budget"  # code of what is given up for the work that it takes
TOO_MANY = "the values around the selection depend on each other in too many ways"
_DEEP = 12_000  # calls in each other
_LOOK = 50_000  # steps from one look at the clock to the next


class TooLarge(Exception):
    """The budget is spent; the message says it in the user's words."""


class Budget:
    """Steps that are left, and the reason that is given when there are none."""

    __slots__ = ("left", "reason")

    def __init__(self, steps: int = DEFAULT, reason: str = TOO_MANY) -> None:
        self.left, self.reason = steps, reason

    def spend(self, steps: int = 1) -> None:
        """Raises TooLarge when fewer steps are left."""
        self.left -= steps
        if self.left < 0:
            raise TooLarge(self.reason)
        if _limit is not None:
            _limit.spend(steps)

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


class Limit:
    """Processor seconds of this thread from now on; `over`: whether they were spent."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end, self.unseen, self.over = seconds, time.thread_time() + seconds, _LOOK, False

    def spend(self, steps: int) -> None:
        self.unseen -= steps
        if self.unseen < 0:
            self.unseen = _LOOK
            self.look()

    def look(self) -> None:
        """Raises TooLarge when the seconds are spent, then and ever after."""
        if self.over or time.thread_time() > self.end:
            self.over, self.unseen = True, 0
            raise TooLarge(f"reading this graph takes more than {self.seconds:g} s of processor time, which is given up")


_root = _current = Budget()
_limit: Limit | None = None


@contextmanager
def limited(places: int = 0) -> Iterator[Limit]:
    """A limit in seconds for the work inside, on a graph in which experts may be chosen at so many places; one that holds already stays."""
    global _limit
    outer = _limit
    _limit = outer or Limit(SECONDS + EACH * places)
    try:
        yield _limit
    finally:
        _limit = outer


def look() -> None:
    """A look at the clock, for work that no step counts. Raises TooLarge when the limit is passed."""
    if _limit is not None:
        _limit.look()


def step(n: int = 1) -> None:
    """Pay for n steps from the budget at hand."""
    _current.spend(n)


def reset() -> None:
    """A new compilation begins: where nobody gave a budget, the default one is full again."""
    _root.left = DEFAULT


@contextmanager
def deep_recursion() -> Iterator[None]:
    """Room for recursion while the passes run: a loop over hundreds of experts is a chain of hundreds of nodes. (Python 3.11 and later keep
    Python calls off the C stack.)"""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(_DEEP, before))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
