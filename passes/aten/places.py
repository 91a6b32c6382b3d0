"""Facts about indices read from data: whether no two rows are one place, and whether an index may be negative.

A write that does not add (`scatter`, `out[i] = y`, `out[i] = out[i] + y`) leaves the last of several values; as a sum it may be read only
where rows are different places. A selection's own indices are; indices mapped by a clamp, a remainder or a table may not be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import sympy as sp
import torch
import torch.fx as fx

from .. import terms as T
from ..terms import Term
from ..terms.term import reached
from .element import Mask, call_args, normal_dim, shape_of
from .names import op_name

_PAIRS = 4_000  # of terms and conditions around them
REPEATED = "rows that may be put in one place are written, not added: the last of them counts"


def apart(coordinates: Sequence[Term], rows: Iterable[Term], given: Iterable[fx.Node] = ()) -> bool:
    """Whether different values of the variables `rows` are different places. `given`: ids whose rows are known to repeat none."""
    left = {v for v in rows if v.args[1] != 1}
    known = True
    while left and known:
        known = False
        for v in list(left):
            others = left - {v}
            told = _quotient_and_rest(coordinates, v) or _key_and_rank(coordinates, v)
            if told or any(_tells(c, v, others, given) for c in _parts(coordinates)):
                left.discard(v)
                known = True
        for masked in list(left):
            if _true_elements(coordinates, masked, given):
                left.discard(masked)
                known = True
    return not left


def _parts(coordinates: Sequence[Term]) -> Iterable[Term]:
    """Coordinates without numbers: the one addend (up to a factor) that is left of each."""
    for c in coordinates:
        own = [x for x in (c.args if c.op == "add" else (c,)) if x.op != "c"]
        if len(own) == 1:
            yield T.coefficient(own[0])[1]


def _tells(c: Term, v: Term, unknown: set[Term], given: Iterable[fx.Node]) -> bool:
    """Whether v can be told from the coordinate, all but the unknown variables being known."""
    if c is v:
        return True
    if c.op in ("perm", "inv"):
        return c.args[2] is v
    return _slot_of(c, given) is v and not any(u in c.atoms for u in unknown)


def _slot_of(c: Term, given: Iterable[fx.Node]) -> Term | None:
    """The variable along which a selection's indices (or given ids) repeat none."""
    if c.op not in ("topk", "a") or not c.args[1]:
        return None
    if c.op == "a":
        return c.args[1][-1] if c.args[0] in set(given) else None
    return c.args[1][-1] if _along_last(c.args[0]) else None


def _along_last(choice: fx.Node) -> bool:
    """Whether a selection runs along the last dim."""
    rank = len(shape_of(choice.args[0]))  # type: ignore[arg-type]
    return op_name(choice) in ("topk", "sort", "argsort") and normal_dim(call_args(choice).dim, rank) == rank - 1


def _quotient_and_rest(coordinates: Sequence[Term], v: Term) -> bool:
    """v // n and v % n together."""
    whole = {c.args[1] for c in coordinates if c.op == "fdiv" and c.args[0] is v}
    return any(c.op == "mod" and c.args[0] is v and c.args[1] in whole for c in coordinates)


def _key_and_rank(coordinates: Sequence[Term], v: Term) -> bool:
    """The key of v and how many have that key up to v: `sums._same_place`."""
    ranks = [c for c in _parts(coordinates) if c.op == "rank" and c.args[1] is v]
    return any(r.args[2] is T.at_key(*r.args[:2]) and r.args[2] in coordinates for r in ranks)


def _true_elements(coordinates: Sequence[Term], row: Term, given: Iterable[fx.Node]) -> bool:
    """Coordinates of the row-th true element of a mask: all of them, or all but one along which at most one element is true."""
    found: dict[Mask, set[int]] = {}
    for c in coordinates:
        if c.op == "nz" and c.args[1] is row:
            found.setdefault(c.args[0], set()).add(c.args[2])
    return any(one_place(mask, dims, given) for mask, dims in found.items())


def one_place(mask: Mask, dims: set[int], given: Iterable[fx.Node]) -> bool:
    """Whether coordinates along `dims` tell the true elements of a mask apart."""
    missing = [d for d, s in enumerate(mask.shape) if d not in dims and s != 1]
    if len(missing) > 1:
        return False
    if not missing:
        return True
    at = tuple(T.const(0) if s == 1 else T.named(f"place{d}", s) for d, s in enumerate(mask.shape))
    v, truth = at[missing[0]], mask.at(at)
    for f in truth.args if truth.op == "mul" else (truth,):
        if f.op == "eq" and any(_slot_of(a, given) is v and not T.uses(b, v) for a, b in (f.args, f.args[::-1])):
            return True
    return False


def never_negative(t: Term) -> bool:
    """Whether an index is at least 0 for certain."""
    lowest = least(t)
    return T.never_negative(t) or lowest is not None and lowest >= 0


def least(t: Term, given: int | None = None) -> int | None:
    """A number that an index is not below for certain. `given`: what is taken to be the least of a tensor of the user's own."""
    return _Least(given).of(t, frozenset())


class _Least:
    """`found`: by term, and what terms in it are not below because of conditions around it. Each pair is looked at once, of _PAIRS."""

    def __init__(self, given: int | None) -> None:
        self.given = given
        self.found: dict[tuple[Term, frozenset[tuple[Term, int]]], int | None] = {}

    def of(self, t: Term, known: frozenset[tuple[Term, int]]) -> int | None:
        below = set(T.walk(t)) if known else ()
        key = t, frozenset(k for k in known if k[0] in below)
        if key not in self.found:
            self.found[key] = self._of(*key) if len(self.found) < _PAIRS else None
        return self.found[key]

    def _of(self, t: Term, known: frozenset[tuple[Term, int]]) -> int | None:
        bounds = [n for x, n in known if x is t]
        if bounds:
            return max(bounds)
        if t.op == "ite":
            cases = [self.of(c, known.union(_bounds(t.args[0], i == 0).items())) for i, c in enumerate(t.args[1:])]
            return None if None in cases else min(cases)  # type: ignore[type-var]
        if t.op == "fn":
            limit = t.args[2][0] if t.args[0] in ("clamp", "hardtanh", "maximum") else 0 if t.args[0] in ("relu", "abs") else -math.inf
            return math.floor(limit) if limit > -math.inf else self.of(t.args[1][0], known) if t.args[0] == "round" else None
        if t.op not in ("add", "mul", "sum", "max", "min", "fdiv", "sv"):
            return _least_of_leaf(t, self.given)
        if t.op == "mul" and any(map(T.is_truth, t.args)):
            return self._where(t, known)
        parts = [self.of(c, known) for c in T.children(t)]
        if None in parts:
            return None
        if t.op == "add":
            return sum(parts)  # type: ignore[arg-type]
        lowest: int = min(parts)  # type: ignore[type-var,assignment]
        return lowest if t.op in ("max", "min", "sv") else 0 if lowest >= 0 else None

    def _where(self, product: Term, known: frozenset[tuple[Term, int]]) -> int | None:
        """Of [c] · x, which is 0 or x where c holds: ids of experts elsewhere are put to 0 like this."""
        truths = [f for f in product.args if T.is_truth(f)]
        if len(truths) == len(product.args):
            return 0
        rest = T.mul(*(f for f in product.args if f not in truths))
        lowest = self.of(rest, known.union(*(_bounds(f, True).items() for f in truths)))
        return None if lowest is None else min(0, lowest)


def _least_of_leaf(t: Term, given: int | None) -> int | None:
    if t.op == "c":
        finite = isinstance(t.args[0], (int, float)) and math.isfinite(t.args[0])
        return math.floor(t.args[0]) if finite else 0 if isinstance(t.args[0], sp.Expr) else None
    if t.op == "rank":
        return int(t.args[2] is T.at_key(*t.args[:2]))  # an element is among those of its own key
    if T.is_truth(t) or t.op in ("v", "nz", "topk", "perm", "inv", "mod"):
        return 0
    if t.op == "a":
        value = t.args[0].meta.get("val") if isinstance(t.args[0], fx.Node) else None
        return 0 if T.never_negative(t) or isinstance(value, torch.Tensor) and value.dtype in _UNSIGNED else given
    return None


def _bounds(condition: Term, true: bool) -> dict[Term, int]:
    """What terms are not below where a condition holds, or does not: x >= n of [x < n] that does not, and of [x // d = q] that does."""
    if condition.op == "not":
        return _bounds(condition.args[0], not true)
    if condition.op == "mul" and true:
        return {x: n for f in condition.args for x, n in _bounds(f, True).items()}
    if condition.op not in ("lt", "eq") or condition.op == "eq" and not true:
        return {}
    a, b = condition.args
    if condition.op == "lt":
        x, n, more = (b, a, int(_is_whole(b))) if true else (a, b, 0)
        return {x: n.args[0] + more} if n.op == "c" and isinstance(n.args[0], int) else {}
    x, n = (a, b) if b.op == "c" else (b, a)
    if n.op != "c" or not isinstance(n.args[0], int):
        return {}
    if x.op == "fdiv" and isinstance(d := x.args[1].args[0], int) and d > 0:
        return {x.args[0]: n.args[0] * d}
    return {x: n.args[0]}


def _is_whole(t: Term) -> bool:
    """Whether a term is a whole number by construction: -0.7 is above -1, and is rounded to it."""
    for x in reached(t, lambda x: x.parts if x.op in ("add", "mul", "mod", "ite") else ()):
        value = x.args[0].meta.get("val") if x.op == "a" and isinstance(x.args[0], fx.Node) else None
        numbers = isinstance(value, torch.Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex
        made = x.op in ("add", "mul", "mod", "ite", "v", "nz", "topk", "perm", "inv", "rank", "fdiv") or T.is_truth(x)
        if not (made or numbers or x.op == "c" and isinstance(x.args[0], (int, sp.Expr))):
            return False
    return True


_UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def wrapped(t: Term, size: object) -> Term:
    """An index as indexing has it: below zero it counts from the end."""
    return t if never_negative(t) else T.mod(t, size)
