"""Identity experts written as one weight a token: x[t,h] Σ_j [ids_j ∈ S] w(t,j) as one part w(t,j) x[t,h] for each number in S."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .. import terms as T
from ..terms import Term
from .rows import data_dependent, factors, plain_row

_MOST = 4096  # ids looked at: more experts than any router has


def numbered(body: Term) -> tuple[Term, dict[int, Term]] | None:
    """(ids, {e: w · x} for each e in S) of [ids ∈ S] · w · x, x read at the token's own row; None when body is something else."""
    fs = [f for g in factors(body) for f in factors(_as_product(g))]
    features = [f for f in fs if any(v.args[0] == "h" for v in f.atoms)]
    if len(features) != 1 or features[0].op != "a" or not plain_row(features[0]):
        return None
    compared = {f: set(_compared(f)) for f in fs if T.is_truth(f)}
    conditions = [f for f, ids in compared.items() if len(ids) == 1]
    found = {x for f in conditions for x in compared[f]}
    if len(found) != 1:
        return None
    (ids,) = found
    numbers = _members(T.mul(*conditions), ids)
    rest = T.mul(*(f for f in fs if f not in conditions))
    return (ids, dict.fromkeys(numbers, rest)) if numbers else None


def _as_product(f: Term) -> Term:
    """0 where c, else b: [not c] b."""
    return T.mul(T.not_(f.args[0]), f.args[2]) if f.op == "ite" and T.is_truth(f.args[0]) and T.is_c(f.args[1], 0) else f


def _compared(f: Term) -> Iterator[Term]:
    """What is read from data and compared with a number somewhere in f."""
    for x in T.walk(f):
        if x.op in ("eq", "lt"):
            for ids, c in (x.args, x.args[::-1]):
                if c.op == "c" and isinstance(c.args[0], int) and data_dependent(ids):
                    yield ids


def _members(condition: Term, ids: Term) -> list[int] | None:
    """The ids that a condition holds for, if they are finitely many for certain. Beyond its own numbers it says one thing only."""
    numbers = [c.args[0] for x in T.walk(condition) if x.op in ("eq", "lt") for c in x.args if c.op == "c"]
    top = T.upper(ids)
    first, last = (0, top) if top is not None else (min(numbers) - 1, max(numbers) + 1)
    if last - first > _MOST:
        return None
    holds = {e: T.subst(condition, {ids: T.const(e)}) for e in range(first, last + 1)}
    if any(v.op != "c" for v in holds.values()) or top is None and (T.is_c(holds[first], 1) or T.is_c(holds[last], 1)):
        return None
    return [e for e, v in holds.items() if T.is_c(v, 1)]


def among(t: Term, ids: Term, experts: Iterable[int]) -> Term:
    """t where ids is one of the experts: conditions on ids that say the same for all of them are decided."""
    known: dict[Term, Term] = {}
    for x in T.walk(t):
        if x.op in ("eq", "lt") and ids in x.args:
            says = {T.subst(x, {ids: T.const(e)}) for e in experts}
            if len(says) == 1 and T.is_c(*says):
                known[x] = says.pop()
    return T.subst(t, known) if known else t


def where_experts(ids: Term, experts: Iterable[int]) -> tuple[dict[Term, Term], Term]:
    """What is known where ids = ite(c, outside, i) are experts at all, as conditions with their values, and i there."""
    known: dict[Term, Term] = {}
    while ids.op == "ite":
        cond, *cases = ids.args
        outside = [x.op == "c" and x.args[0] not in experts for x in cases]
        if outside[0] == outside[1]:
            break
        _suppose(cond, outside[1], known)
        ids = cases[outside[0]]
    return known, ids


def _suppose(cond: Term, true: bool, known: dict[Term, Term]) -> None:
    if cond.op == "not":
        _suppose(cond.args[0], not true, known)
    elif true and cond.op == "mul":
        for f in cond.args:
            _suppose(f, True, known)
    else:
        known[cond] = T.const(true)


def supposed(body: Term, ids: Term, experts: Iterable[int]) -> Term:
    """body = w · y with y where ids = ite(c, outside, i) are experts; body itself where it is not 0 for certain for those that are not.

    w(c) y(c) = [not c] w(c) y(0) where w(1) y(1) = 0, and ids that are no experts contribute nothing. w, which has no features, stays:
    it is what a tensor of the graph holds.
    """
    known, _ = where_experts(ids, experts)
    if not known or any(not T.is_c(T.subst(body, {cond: T.not_(value)}), 0) for cond, value in known.items()):
        return body
    return T.mul(*(T.subst(f, known) if any(v.args[0] == "h" for v in f.atoms) else f for f in factors(body)))
