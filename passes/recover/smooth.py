"""Smooth scales: numbers k of a projection's inputs in front of the rounding of its rows, q = round(x k / s), s = max|x k| / largest.

Σ_m (q s)[m] W[m] with x k in the place of q s is also a product of x with k W: so k is only told by where it stands, and what stands
in a rounding must not cancel against what stands behind it, because round(x k / s) s / k is not round(x / s) s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx

from ...ir.stored import Scale
from .. import terms as T
from ..aten.element import shape_of
from ..terms import Term
from . import scales as channels
from .match import Param
from .rows import No, factors, nodes_of


def split(rounded: Term, along: set[Term], expert: Term) -> tuple[Term, Term | None]:
    """(what is rounded without its smooth scales, these); `along`: variables that run along a row. None where there are none, or several.

    One token [1, in] looks like numbers of its places too: then they are those without such a dim.
    """
    found = [f for f in factors(rounded) if _is_smooth(f, along, expert)]
    if len(found) > 1:
        found = [f for f in found if len(channels.bare(f).args[1]) == 1 or T.uses(f, expert)]
    if len(found) != 1:
        return rounded, None
    return T.mul(*(f for f in factors(rounded) if f is not found[0])), found[0]


def without(rounded: Term, along: set[Term], expert: Term, found: set[Term | None] | None) -> Term:
    """What is rounded without its smooth scales, which go into `found`; as it is where that is None."""
    if found is None:
        return rounded
    rest, k = split(rounded, along, expert)
    found.add(k)
    return rest


def cancels(rounded: Iterable[Term], along: set[Term], rest: Term) -> bool:
    """Whether what stands behind a rounding undoes a factor of what is rounded that is not the same along the row."""
    own = {T.power(f, -1) for r in rounded for f in factors(r) if f.op != "c" and any(T.uses(f, v) for v in along)}
    return any(x in own for x in T.walk(rest))


def behind(body: Term, rounded: Iterable[Term], along: set[Term], expert: Term) -> bool:
    """Whether numbers of a row's places stand between its rounding and its product: Σ_m round(y / s)[m] k[m] W[m].

    They would be taken for a part of y, which is rounded as it is. A matrix of one row is no such numbers: nothing else is there then.
    """
    found = set(rounded)
    for s in T.walk(body):
        parts = set(factors(s.args[1])) if s.op == "sum" else set()
        if found.isdisjoint(parts):
            continue
        others = {f for f in parts - found if T.uses(f, s.args[0])}
        k = {f for f in others if _is_smooth(f.args[0] if f.op == "pow" else f, along | {s.args[0]}, expert)}
        if k and k != others:
            return True
    return False


def _is_smooth(f: Term, along: set[Term], expert: Term) -> bool:
    """k[m], k[e, m], or one of them as 1 / k."""
    a = channels.bare(f)
    if a.op != "a" or not a.args[1] or a.args[1][-1] not in along or channels.is_coded(a):
        return False
    *lead, last = a.args[1]
    sizes = shape_of(nodes_of(a)[0])
    sizes = (None, *sizes) if isinstance(a.args[0], tuple) else sizes
    plain = all(x is expert or T.is_c(x, 0) and n == 1 for x, n in zip(lead, sizes[:-1], strict=True))
    return plain and sum(x is expert for x in lead) <= 1 and sizes[-1] == last.args[1] and _is_float(nodes_of(a)[0])


def _is_float(n: fx.Node) -> bool:
    v = n.meta.get("val")
    return isinstance(v, torch.Tensor) and v.dtype.is_floating_point


def kind(k: Term | None) -> Scale:
    """What rows are done to by their smooth scales."""
    if k is None:
        return Scale.NONE
    return Scale.TIMES if channels.bare(k) is k else Scale.DIVIDES


def operands(k: Term | None, stacked: bool, count: int) -> list[Param]:
    """Smooth scales [in] for all experts, [E, in], or a list like the weights'. Raises No where they lie otherwise than the weights."""
    if k is None:
        return []
    a = channels.bare(k)
    nodes: Any = a.args[0]
    if isinstance(nodes, tuple):
        if stacked:
            raise No("smooth scales are a list and the weights are stacked")
        return [Param.shaped(n, (shape_of(n)[-1],)) for n in nodes]
    own = any(x.op == "v" for x in a.args[1][:-1])
    if own and shape_of(nodes)[0] < count:
        raise No(f"smooth scales {nodes} have fewer experts than the weights")
    return [Param.shaped(nodes, (shape_of(nodes)[0], shape_of(nodes)[-1]) if own else (shape_of(nodes)[-1],))]
