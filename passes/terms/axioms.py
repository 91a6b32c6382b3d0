"""What follows from axioms. They are no laws of arithmetic: who uses them says so, and for which tensors (`Facts.zero_beyond`)."""

from __future__ import annotations

from typing import Any

from .arithmetic import mul
from .facts import Facts
from .rules import Rules, rule
from .term import Term


@rule("[0 <= a < n] W[a] = W[a]   where W is an expert weight with at most n experts", "mul")
def _beyond_the_experts(t: Term, facts: Facts) -> Term | None:
    for f in t.args:
        limit = _limit(f)
        if limit is not None and any(facts.vanishes(g, *limit) for g in t.args if g is not f):
            return mul(*(g for g in t.args if g is not f))
    return None


def _limit(f: Term) -> tuple[Term, Any] | None:
    """(a, n) of [a < n], (a, None) of [0 <= a]."""
    inner = f.args[0] if f.op == "not" else f
    if inner.op != "lt" or inner.args[1].op != "c":
        return None
    a, n = inner.args[0], inner.args[1].args[0]
    return (a, n) if inner is f else (a, None) if n == 0 else None


EXPERT_WEIGHTS = Rules.of(vars())
