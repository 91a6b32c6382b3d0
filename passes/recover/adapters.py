"""Adapters on an expert's projections: W x + s B (A x), a base weight plus a low-rank pair."""

from __future__ import annotations

from collections.abc import Iterable

from ..terms import Term, uses
from .rows import factors

LORA = "the expert's projection is a base weight plus a low-rank pair (LoRA), which no op takes: merge the adapter into the weight"


def has_pair(terms: Iterable[Term], expert: Term) -> bool:
    """Whether of several projections that are added one is a pair: Σ_r B[e, ·, r] Σ_m A[e, r, m] x[m]."""
    sums = [f for t in terms for f in factors(t) if f.op == "sum"]
    return len(sums) > 1 and any(_is_pair(s, expert) for s in sums)


def _is_pair(s: Term, expert: Term) -> bool:
    r, inner = s.args
    matrix = [f for f in factors(inner) if f.op == "a" and uses(f, expert) and uses(f, r)]
    below = [f for f in factors(inner) if f.op == "sum" and uses(f, r)]
    return len(matrix) == len(below) == 1 and any(f.op == "a" and uses(f, expert) and uses(f, r) for f in factors(below[0].args[1]))
