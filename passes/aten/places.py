"""Facts about indices read from data: whether no two rows are one place, and whether an index may be negative.

A write that does not add (`scatter`, `out[i] = y`, `out[i] = out[i] + y`) leaves the last of several values; as a sum it may be read only
where rows are different places. A selection's own indices are; indices mapped by a clamp, a remainder or a table may not be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.fx as fx

from .. import terms as T
from ..terms import Term
from .element import Mask, call_args, normal_dim, op_name, shape_of

REPEATED = "rows that may be put in one place are written, not added: the last of them counts"


def apart(coordinates: Sequence[Term], rows: Iterable[Term], given: Iterable[fx.Node] = ()) -> bool:
    """Whether different values of the variables `rows` are different places. `given`: ids whose rows are known to repeat none."""
    left = {v for v in rows if v.args[1] != 1}
    known = True
    while left and known:
        known = False
        for v in list(left):
            others = left - {v}
            if any(_tells(c, v, others, given) for c in _parts(coordinates, others)) or _quotient_and_rest(coordinates, v):
                left.discard(v)
                known = True
        for masked in list(left):
            if _true_elements(coordinates, masked, given):
                left.discard(masked)
                known = True
    return not left


def _parts(coordinates: Sequence[Term], others: set[Term]) -> Iterable[Term]:
    """Coordinates without numbers, and without what is known already: the one addend (up to a factor) that is left of each."""
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


def _true_elements(coordinates: Sequence[Term], row: Term, given: Iterable[fx.Node]) -> bool:
    """Coordinates of the row-th true element of a mask: all of them, or all but one along which at most one element is true."""
    found: dict[Mask, set[int]] = {}
    for c in coordinates:
        if c.op == "nz" and c.args[1] is row:
            found.setdefault(c.args[0], set()).add(c.args[2])
    return any(_one_place(mask, dims, given) for mask, dims in found.items())


def _one_place(mask: Mask, dims: set[int], given: Iterable[fx.Node]) -> bool:
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


def wrapped(t: Term, size: object) -> Term:
    """An index as indexing has it: below zero it counts from the end."""
    return t if T.never_negative(t) else T.mod(t, size)
