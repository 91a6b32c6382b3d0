"""Weights that the model makes of others on every call: W + s b a, as an adapter is added to the weight before the product.

Reading them for what they are made of spares the sum, which is as large as the weights: the pair stands beside the product instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from .. import terms as T
from ..aten import names
from ..aten.names import op_name
from ..aten.node import schema_of
from ..terms import Term
from ..terms.ops import OPS
from .rows import factors
from .scales import is_coded

_PRODUCT = names.CONTRACTION & {"mm", "bmm", "matmul", "einsum"}
_WITH_PRODUCT = frozenset({"addmm", "baddbmm"})


def merged_pairs(graph: fx.Graph) -> set[fx.Node]:
    """Nodes from such sums down to what is given: the sum, the product and its factor, views in between."""
    found: set[fx.Node] = set()
    known: dict[fx.Node, set[fx.Node] | None] = {}
    for n in graph.nodes:
        if not _matrix(n):
            continue
        name = op_name(n)
        if name in _WITH_PRODUCT:
            parts = [_base(n.args[0], found), *(_down(x) for x in n.args[1:3])]
            if all(p is not None for p in parts):
                found.update([n], *(p for p in parts if p is not None))
        elif name == "add" and len(n.args) > 1:
            for base, low in (n.args[:2], n.args[1::-1]):
                plain, made = _base(base, found), _low(low, known)
                if plain is not None and made is not None:
                    found.update([n], plain, made)
    return found


def _base(n: Any, found: set[fx.Node]) -> list[fx.Node] | None:
    """What stands between n and something given, or a sum that was found already; None where it is computed in another way."""
    seen, source = _through(n)
    return seen if source in found else _down(n)


def _low(n: Any, known: dict[fx.Node, set[fx.Node] | None]) -> set[fx.Node] | None:
    """The nodes of s · b a, or of a sum of such; None where n is something else. `known`: of products and sums met already."""
    seen, product = _through(n)
    if not isinstance(product, fx.Node):
        return None
    if product not in known:
        known[product] = _pair(product, known)
    below = known[product]
    return None if below is None else {*seen, *below}


def _pair(product: fx.Node, known: dict[fx.Node, set[fx.Node] | None]) -> set[fx.Node] | None:
    name = op_name(product)
    if name == "add" and len(product.args) > 1:
        parts = [_low(x, known) for x in product.args[:2]]
    elif name in _PRODUCT and len(product.all_input_nodes) == 2:
        parts = [None if (p := _down(x)) is None else set(p) for x in product.all_input_nodes]
    else:
        return None
    return None if None in parts else {product}.union(*(p for p in parts if p is not None))


def _down(n: Any) -> list[fx.Node] | None:
    """What stands between n and something given; None where it is computed."""
    seen, source = _through(n)
    return seen if isinstance(source, fx.Node) and source.op in ("placeholder", "get_attr") else None


def _through(n: Any) -> tuple[list[fx.Node], Any]:
    """Views, casts and factors from n down, and where they start."""
    seen: list[fx.Node] = []
    while isinstance(n, fx.Node) and schema_of(n) is not None:
        if op_name(n) in ("mul", "div"):
            tensors = [x for x in n.all_input_nodes if _tensor(x) and x.meta["val"].ndim > 0]
            if len(tensors) != 1 or op_name(n) == "div" and n.args[0] is not tensors[0]:
                break
            below = tensors[0]
        elif op_name(n) in names.VIEW | names.CAST:
            below = n.args[0]
        else:
            break
        seen.append(n)
        n = below
    return seen, n


def _tensor(n: fx.Node) -> bool:
    return isinstance(n.meta.get("val"), torch.Tensor)


def _matrix(n: fx.Node) -> bool:
    return _tensor(n) and n.meta["val"].ndim > 1 and n.meta["val"].is_floating_point()


def apart(t: Term, expert: Term) -> Term:
    """Σ_m x (W + s Σ_r b a) = Σ_m x W + s Σ_m x Σ_r b a wherever a matrix of an expert stands in a sum with others."""
    memo: dict[Term, Term] = {}
    for x in T.walk(t):
        y = x if OPS[x.op].leaf else T.rebuild(x, lambda c: memo.get(c, c))
        memo[x] = _distributed(y, expert) if y.op == "sum" else y
    return memo[t]


def _distributed(t: Term, expert: Term) -> Term:
    v, body = t.args
    for f in factors(body):
        if f.op == "add" and any(x.op == "a" and is_coded(x) for x in T.walk(f)):
            continue  # codes less their zero points are one matrix
        if f.op == "add" and any(_is_matrix(T.coefficient(a)[1], v, expert) for a in f.args):
            rest = [g for g in factors(body) if g is not f]
            return T.add(*(T.reduce_("sum", v, T.mul(*rest, a)) for a in f.args))
    return t


def _is_matrix(a: Term, v: Term, expert: Term) -> bool:
    """Whether an atom is read at an expert, at v and at something else: no bias, which is read at two."""
    return a.op == "a" and T.uses(a, v) and T.uses(a, expert) and len(a.atoms - {v, expert}) > 0
