"""Soft mixtures: slots of the experts hold weighed means of all tokens, and tokens take weighed means of all slots. Nothing is selected.

d = softmax over tokens, c = softmax over slots, of one tensor of logits: y[t] = Σ_s c[t,s] · expert(s)(Σ_t' d[t',s] x[t']).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx as fx

from ...ir import Rejection
from ..aten import names
from ..aten.names import op_name
from ..aten.node import example_value

SOFT = "experts work on slots, each a weighed mean of all tokens (soft MoE), and no token selects any: there is nothing to dispatch"
_SOFTMAX = frozenset(("softmax", "_softmax"))


def soft_mixtures(graph: fx.Graph) -> Iterator[Rejection]:
    return (Rejection(SOFT, found[-1], "lower", code="soft") for found in soft(graph))


def soft(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The softmaxes of each tensor of logits in either graph that is normalised over two of its dims, both of which go into products."""
    over: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
    for n in graph.nodes:
        if op_name(n) in _SOFTMAX and isinstance(n.args[0], fx.Node) and (dim := _dim(n)) is not None:
            over.setdefault(_logits(n.args[0]), []).append((n, dim))
    for found in over.values():
        if len({d for _, d in found}) > 1 and all(_multiplied(n) for n, _ in found):
            yield [n for n, _ in found]


def _dim(n: fx.Node) -> int | None:
    dim, v = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else None), example_value(n)
    return dim % max(v.ndim, 1) - v.ndim if isinstance(dim, int) and v is not None else None


def _logits(n: fx.Node) -> fx.Node:
    """What a tensor is a view or a cast of."""
    while op_name(n) in names.RESHAPE | names.CAST and isinstance(n.args[0], fx.Node):
        n = n.args[0]
    return n


def _multiplied(n: fx.Node) -> bool:
    """Whether a product reads what was normalised, through views."""
    seen = [n]
    for x in seen:
        if x is not n and op_name(x) in names.CONTRACTION or any(op_name(u) in names.CONTRACTION for u in x.users):
            return True
        seen += [u for u in x.users if op_name(u) in names.VIEW | names.CAST and u not in seen and len(seen) < 16]
    return False
