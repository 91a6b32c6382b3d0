"""Rows that a model rounds to 8 bits before a product, each by its own scale: q = round(y / s), s = max|y| / 127, and s times the product.

With y in the place of q · s the rest is read as if nothing were rounded; that it is, stands in the IR (`Experts.row_bits`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from .. import terms as T
from ..aten import names
from ..aten.names import op_name
from ..terms import Term
from .rows import No, factors

ROUNDED = "rows are rounded to fewer bits in a way that is not recovered: to 8 bits, before both products, by max / 127 of each row"
_STEPS = 127


@dataclass(frozen=True)
class Rounding:
    """`floor`: the least scale of a row."""

    bits: int
    floor: float


def unrounded(body: Term) -> tuple[Term, Rounding | None]:
    """An expert's body without rounding, and how rows were rounded. Raises No for any rounding but that of both products' rows."""
    levels = 0
    floors: set[float] = set()
    while _innermost(body):
        if torch.is_grad_enabled():
            raise No("rows are rounded to fewer bits where a gradient may be wanted")
        levels += 1
        found = {base: (k, floor) for base, k, floor in map(_scale, _innermost(body))}
        floors |= {floor for _, floor in found.values()}
        steps = {base: T.var(1, "s") for base in found}  # base = k · s: numbers go out where they came in
        body = T.subst(body, {base: T.mul(T.const(k), steps[base]) for base, (k, _) in found.items()})
        mapping = {r: r.args[1][0] for r in _innermost(body)}
        for x in T.walk(body):
            if x.op == "fn" and x.args[0] == "clamp" and x.args[1][0] in mapping:
                if x.args[2][0] > -_STEPS or x.args[2][1] < _STEPS:
                    raise No(ROUNDED)
                mapping[x] = mapping[x.args[1][0]]
        body = T.canonical(_snapped(T.subst(body, mapping)))
        if any(s in body.atoms for s in steps.values()):
            raise No(ROUNDED)  # what was divided by is not what the product is multiplied by
    if not levels:
        return body, None
    if levels != 2 or len(floors) != 1:
        raise No(ROUNDED)
    return body, Rounding(8, floors.pop())


def _innermost(body: Term) -> list[Term]:
    rounds = [x for x in T.walk(body) if _is_round(x)]
    return [r for r in rounds if not any(_is_round(x) for x in T.walk(r.args[1][0]))]


def _is_round(x: Term) -> bool:
    return x.op == "fn" and x.args[0] == "round"


def _snapped(t: Term) -> Term:
    """Numbers that are 1 but for the rounding of 1/127 are 1."""
    near = {x: T.const(1) for x in T.walk(t) if x.op == "c" and isinstance(x.args[0], float) and 0 < abs(x.args[0] - 1) < 1e-12}
    return T.subst(t, near) if near else t


def _scale(r: Term) -> tuple[Term, float, float]:
    """(b, k, floor) of a rounding of y · k / b, where b / k is s = max|y| / 127, or that with a floor."""
    (arg,) = r.args[1]
    k, _ = T.coefficient(arg)
    for f in factors(arg):
        if f.op != "pow" or f.args[1] != -1:
            continue
        base = scale = f.args[0]
        y = T.mul(*(g for g in factors(arg) if g is not f and g.op != "c"))
        bound = -math.inf
        if scale.op == "fn" and scale.args[0] == "clamp" and scale.args[2][1] == math.inf:
            bound, scale = scale.args[2][0], scale.args[1][0]
        c, most = T.coefficient(scale)
        times = _largest(most, y)
        if times is not None and math.isclose(float(k) / (float(c) * times), _STEPS, rel_tol=1e-6):
            return base, k, max(0.0, float(bound) / float(k))
    raise No(ROUNDED)


def _largest(most: Term, y: Term) -> float | None:
    """c of max_v |c y[v]|, over the variable that runs along y's row; None where a term is something else."""
    if most.op != "max" or most.args[1].op != "fn" or most.args[1].args[0] != "abs":
        return None
    v, body = most.args
    c, own = T.coefficient(body.args[1][0])
    rows = [u for u in y.atoms if T.same_size(u.args[1], v.args[1])]
    return abs(float(c)) if any(T.canonical(own) is T.canonical(T.subst(y, {u: v})) for u in rows) else None


# ---- rows that are rounded before they are sent to experts ---------------------------------------------------------------

_SHOWN = names.CAST | names.RESHAPE | names.SAME
_SCALES = _SHOWN | names.CLAMP | {"maximum", "div", "mul", "reciprocal", "amax", "max", "getitem"}


def rounded_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes between rows x and what is multiplied in place of them: |x|, its largest value, s, x / s, the rounded rows and their casts."""
    found: set[fx.Node] = set()
    for n in graph.nodes:
        if op_name(n) == "round" and isinstance(n.args[0], fx.Node):
            found |= {n, *_between(n.args[0])}
        elif op_name(n) in _SHOWN | names.CLAMP and n.args and n.args[0] in found:
            found.add(n)
    return found


def _between(quotient: fx.Node) -> set[fx.Node]:
    """From x / s back to x."""
    if op_name(quotient) not in ("div", "mul") or len(quotient.all_input_nodes) != 2:
        return set()
    rows, scale = quotient.all_input_nodes
    path = {quotient}
    while op_name(scale) in _SCALES and isinstance(scale.args[0], fx.Node):
        path.add(scale)
        scale = scale.args[0]
    if op_name(scale) != "abs" or _uncast(scale.args[0]) is not _uncast(rows):
        return set()
    path.add(scale)
    for n in (rows, scale.args[0]):
        while isinstance(n, fx.Node) and n is not _uncast(n):
            path.add(n)
            n = n.args[0]
    return path


def _uncast(n: Any) -> Any:
    while isinstance(n, fx.Node) and op_name(n) in names.CAST:
        n = n.args[0]
    return n
