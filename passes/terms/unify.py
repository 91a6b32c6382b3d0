"""E unrolled copies of one expert, made one: every copy must be the same function of expert e's own weights.

Copies are compared atom by atom. Where they differ they may differ only in which parameter is read (a list of E
parameters) or in a number that grows linearly with e (row e of a stacked parameter).
"""

from __future__ import annotations

from typing import Any

import sympy as sp

from .. import terms as T
from . import Term

_skeleton: dict[Term, int] = {}


def reset() -> None:
    _skeleton.clear()


def skeleton(t: Term) -> int:
    """A hash of a term's form that ignores which tensors and which numbers it holds."""
    for x in T.walk(t):
        if x in _skeleton:
            continue
        if x.op == "c":
            key: Any = ("c",)
        elif x.op == "v":
            key = ("v", x.args[0])
        else:
            if x.op == "a":
                _skeleton[x] = hash(("a", *(T.show(constant_part(i)[1]) for i in x.args[1])))
                continue
            extra = x.args[0] if x.op == "fn" else len(x.args[1]) if x.op == "topk" else ()
            parts = [_skeleton[c] for c in T.children(x)]
            key = (x.op, extra, *(sorted(parts) if x.op in ("add", "mul", "eq") else parts))
        _skeleton[x] = hash(key)
    return _skeleton[t]


def ordered(t: Term) -> list[Term]:
    """Children; those of commutative ops in an order that does not depend on names."""
    parts = list(T.children(t))
    if t.op in ("add", "mul", "eq"):
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
        if x is y:
            if not any(c.op == "a" for c in T.walk(x)):
                continue
        elif x.op in ("c", "v", "topk", "nz", "perm", "inv", "sv"):
            return False
        if x.op == "fn" and (x.args[0], x.args[2]) != (y.args[0], y.args[2]):
            return False
        if x.op == "pow" and x.args[1] != y.args[1]:
            return False
        if x.op in T.BINDERS and x.args[0] is not y.args[0]:
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
        if ri is not rk:
            return False
        offsets.append(ck - ci)
    here = (y.args[0], tuple(offsets))
    return found.setdefault(x, here) == here


def constant_part(t: Term) -> tuple[Any, Term]:
    """t = number + rest."""
    if t.op == "c":
        return t.args[0], T.const(0)
    if t.op == "add":
        numbers = [a for a in t.args if a.op == "c"]
        if numbers:
            return numbers[0].args[0], T.add(*(a for a in t.args if a.op != "c"))
    return 0, t


def unify(copies: dict[int, Term], expert: Term) -> Term | str:
    """One term in the variable `expert`, from the E copies {e: term}; or the reason why they are not one function.

    An atom that reads another parameter in every copy becomes an atom of the tuple of those parameters.
    """
    ids = sorted(copies)
    first = copies[ids[0]]
    if len(ids) == 1:
        return "only one expert is present"
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
            offset = T.mul(T.const(int(slope)), T.add(expert, T.const(-ids[0])))
            idx.append(T.add(i, offset))
        if all(n is nodes[0] for n in nodes):
            mapping[x] = T.atom(x.args[0], tuple(idx))
        elif any(s != steps[0] for s in steps):
            return "experts read different parameters at different places"
        else:
            mapping[x] = T.atom(nodes, (expert, *x.args[1]))
    return T.subst(first, mapping)
