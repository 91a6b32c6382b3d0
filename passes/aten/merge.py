"""Casts of one tensor to one type, made several times: one of them in the shadow, so that what reads them reads the same tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from . import names
from .effects import Memory
from .names import op_name


def merge_casts(graph: fx.Graph, memory: Memory, walls: set[fx.Node]) -> None:
    """Everyone who reads a later cast reads the first equal one. Casts of what anyone writes stay apart."""
    first: dict[Any, fx.Node] = {}
    for n in graph.nodes:
        source, v = next(iter(n.args), None), n.meta.get("val")
        if op_name(n) not in names.CAST or n in walls or not isinstance(source, fx.Node) or not isinstance(v, torch.Tensor):
            continue
        before = source.meta.get("val")
        if not isinstance(before, torch.Tensor) or not v.dtype.is_floating_point or v.dtype == before.dtype:
            continue
        if any(memory.writers.get(memory.root[x]) for x in (source, n)):
            continue
        strides = tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in v.stride())
        one = first.setdefault((source, v.dtype, v.device, strides), n)
        if one is not n:
            n.replace_all_uses_with(one)
