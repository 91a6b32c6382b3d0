"""Tensors that are made several times alike: one of them in the shadow, so that what reads them reads the same tensor.

Casts of one tensor to one type, and sums of two tensors that the graph is given, as a parametrised weight is made once for each access.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from . import names
from .effects import Memory
from .names import op_name


def merge_made(graph: fx.Graph, memory: Memory, walls: set[fx.Node]) -> None:
    """Everyone who reads a later one reads the first equal one. What is made of, or is, a tensor that anyone writes stays apart."""
    first: dict[Any, fx.Node] = {}
    for n in graph.nodes:
        key = None if n in walls or not isinstance(n.meta.get("val"), torch.Tensor) else _cast(n) or _sum(n)
        if key is None or any(memory.writers.get(memory.root[x]) for x in (*n.all_input_nodes, n)):
            continue
        v = n.meta["val"]
        strides = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in v.stride())
        one = first.setdefault((*key, v.dtype, v.device, strides), n)
        if one is not n:
            n.replace_all_uses_with(one)


def _cast(n: fx.Node) -> tuple[Any, ...] | None:
    source, dtype = next(iter(n.args), None), n.meta["val"].dtype
    if op_name(n) not in names.CAST or not isinstance(source, fx.Node):
        return None
    before = source.meta.get("val")
    changed = isinstance(before, torch.Tensor) and dtype.is_floating_point and dtype != before.dtype
    return (source,) if changed else None


def _sum(n: fx.Node) -> tuple[Any, ...] | None:
    given = len(n.all_input_nodes) == 2 and all(x.op in ("placeholder", "get_attr") for x in n.all_input_nodes)
    return (n.target, n.args, tuple(n.kwargs.items())) if op_name(n) == "add" and given and n.meta["val"].ndim > 1 else None
