"""Sorted orders: a permutation, its inverse, the sorted values. A sort key is a term in the variable Q, the unsorted position."""

from __future__ import annotations

from typing import Any

from .facts import Facts
from .rules import Rules, rule
from .term import Term, let

Q = "Q"  # the variable name that sort keys are written in


def size_of(key: Term) -> Any:
    """How many positions are sorted; None of a key that is the same for all."""
    return next((v.args[1] for v in key.atoms if v.args[0] == Q), None)


def at_key(key: Term, q: Term) -> Term:
    """The key of position q."""
    bound = next((v for v in key.atoms if v.args[0] == Q), None)
    return key if bound is None else let(key, {bound: q})


@rule("perm[inv[q]] = q,  inv[perm[p]] = p   of one sort", "perm", "inv")
def _there_and_back(t: Term, facts: Facts) -> Term | None:
    sort, _, p = t.args
    other = "inv" if t.op == "perm" else "perm"
    return p.args[2] if p.op == other and p.args[0] is sort else None


@rule("sorted(key)[inv[q]] = key[q]", "sv")
def _sorted_at_its_place(t: Term, facts: Facts) -> Term | None:
    key, p = t.args
    return at_key(key, p.args[2]) if p.op == "inv" and p.args[1] is key else None


ORDERS = Rules.of(vars())
