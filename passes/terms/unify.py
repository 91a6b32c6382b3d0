"""E unrolled copies of one expert, made one: every copy must be the same function of expert e's own weights.

Copies are compared atom by atom, those inside another one's index too. Where they differ they may differ only in which parameter is
read (a list of E parameters) or in a number that grows linearly with e (row e of a stacked parameter).
"""

from __future__ import annotations

from typing import Any

import sympy as sp

from .arithmetic import constant_part
from .ops import OPS
from .session import add, mul, subst
from .term import Term, atom, children, const, show, walk

_skeleton: dict[Term, int] = {}


def reset() -> None:
    _skeleton.clear()


def skeleton(t: Term) -> int:
    """A hash of a term's form that ignores which tensors and which numbers it holds."""
    for x in walk(t):
        if x in _skeleton:
            continue
        if x.op == "a":
            parts: list[Any] = [_skeleton[i] if _holds_atoms(i) else show(constant_part(i)[1]) for i in x.args[1]]
        else:
            parts = [_skeleton[c] for c in children(x)]
        op = OPS[x.op]
        _skeleton[x] = hash((x.op, op.shape(x.args), *(sorted(parts) if op.commutative else parts)))
    return _skeleton[t]


def ordered(t: Term) -> list[Term]:
    """Children; those of commutative ops in an order that does not depend on names."""
    parts = list(children(t))
    if OPS[t.op].commutative:
        parts.sort(key=lambda c: (skeleton(c), c.serial))
    return parts


Pair = dict[Term, tuple[Any, tuple[Any, ...]]]


def align(a: Term, b: Term, found: Pair) -> bool:
    """Whether a and b are the same up to their atoms; `found[atom of a]` = (node of b, offsets of b's index)."""
    seen: set[tuple[Term, Term]] = set()
    stack = [(a, b)]
    while stack:
        x, y = stack.pop()
        if (x, y) in seen:
            continue
        seen.add((x, y))
        if x.op != y.op:
            return False
        if x.op == "a":
            if not _align_atom(x, y, found):
                return False
            continue
        op = OPS[x.op]
        if x is y:
            if not any(c.op == "a" for c in walk(x)):
                continue
        elif op.opaque or op.data(x.args) != op.data(y.args):
            return False
        xs, ys = ordered(x), ordered(y)
        if len(xs) != len(ys):
            return False
        stack.extend(zip(xs, ys, strict=True))
    return True


def _align_atom(x: Term, y: Term, found: Pair) -> bool:
    if len(x.args[1]) != len(y.args[1]):
        return False
    offsets = []
    for i, k in zip(x.args[1], y.args[1], strict=True):
        ci, ri = constant_part(i)
        ck, rk = constant_part(k)
        if not (align(ri, rk, found) if _holds_atoms(ri) else ri is rk):  # atoms inside come before it in `found`
            return False
        offsets.append(ck - ci)
    here = (y.args[0], tuple(offsets))
    return found.setdefault(x, here) == here


def _holds_atoms(t: Term) -> bool:
    return any(x.op == "a" for x in walk(t))


def unify(copies: dict[int, Term], expert: Term) -> Term | str:
    """One term in the variable `expert`, from the E copies {e: term}; or the reason why they are not one function.

    An atom that reads another parameter in every copy becomes an atom of the tuple of those parameters.
    """
    ids = sorted(copies)
    first = copies[ids[0]]
    if len(ids) == 1:
        return "there is one expert only, which every token gets: a plain MLP, in which nothing is chosen"
    aligned: dict[int, Pair] = {}
    for e in ids:
        found: Pair = {}
        if not align(first, copies[e], found):
            return f"expert {e} is not the same function as expert {ids[0]}"
        aligned[e] = found
    mapping: dict[Term, Term] = {}
    for x in aligned[ids[0]]:
        nodes = tuple(aligned[e][x][0] for e in ids)
        steps = [aligned[e][x][1] for e in ids]
        idx = []
        for d, i in enumerate(x.args[1]):
            slope = sp.Rational(steps[1][d], ids[1] - ids[0]) if isinstance(steps[1][d], int) else None
            if slope is None or not slope.is_Integer:
                return "expert indices are not numbers"
            if any(s[d] != int(slope) * (e - ids[0]) for s, e in zip(steps, ids, strict=True)):
                return "an expert reads the weights of another expert"
            offset = mul(const(int(slope)), add(expert, const(-ids[0])))
            idx.append(add(subst(i, mapping), offset))
        if all(n is nodes[0] for n in nodes):
            mapping[x] = atom(x.args[0], tuple(idx))
        elif any(s != steps[0] for s in steps):
            return "experts read different parameters at different places"
        else:
            mapping[x] = atom(nodes, (expert, *(subst(i, mapping) for i in x.args[1])))
    return subst(first, mapping)
