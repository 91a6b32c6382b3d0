"""Ways to read one expert's function, in order: the first that reads all of it wins; of their refusals the one that says most is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir import Experts
from ...ir.operands import Join, Operands
from ..terms import Term
from .match import Param
from .rows import Cause, No


@dataclass(frozen=True)
class Function:
    """One expert's function as it was read: its fields of `Experts`, the atoms x[t, m] that it reads, the weight that it is added with."""

    fields: dict[str, Any]
    tokens: list[Term]
    weight: Term
    operands: Callable[[Experts], Operands[Param]]
    join: Join | None = None


@dataclass(frozen=True)
class Way:
    """`reads(body, t, h, expert)` raises `No` where it does not read the whole function. `outranks`: for the cause of its refusal, the
    causes of refusals before it in place of which it is told.
    """

    name: str
    reads: Callable[[Term, Term, Term, Term], Function]
    outranks: Mapping[Cause, frozenset[Cause]]


def read(ways: Sequence[Way], body: Term, t: Term, h: Term, expert: Term) -> Function:
    """The function, by the first way that reads it. Raises the refusal that says most."""
    told: No | None = None
    for way in ways:
        try:
            return way.reads(body, t, h, expert)
        except No as e:
            told = e if told is None or told.cause in way.outranks.get(e.cause, ()) else told
    raise told or No("there is no way to read it")
