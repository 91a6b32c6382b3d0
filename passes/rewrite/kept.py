"""Tokens that are written after the experts have read them: `x += experts(x)`.

A loop over the experts multiplies rows that it picked, which are copies, and so may the user's own backward pass go on after the write. The
op keeps the tokens themselves: they are copied before it, where a gradient may be wanted.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from ... import ops  # noqa: F401 (defines them)
from ...calls import is_write
from ...ir.families import FAMILIES
from ..aten.conditions import may_train
from ..aten.effects import writers
from .calls import call

_OPS = {f"moe_compile::{name}" for name in ("experts_sorted", *(f.op for f in FAMILIES))}


def keep_tokens(gm: fx.GraphModule) -> None:
    """Give experts' ops copies of tokens that are written later, where a gradient may be wanted."""
    if not any(map(is_write, gm.graph.nodes)) or not may_train(gm.graph):
        return
    experts = [n for n in gm.graph.nodes if getattr(getattr(n.target, "_schema", None), "name", "") in _OPS]
    found = [n for n in experts if any(n < w for w in writers(n.args[0]))]
    for n in found:
        with gm.graph.inserting_before(n):
            n.update_arg(0, call(gm.graph, torch.clone, (n.args[0],), n))
    if found:
        gm.graph.lint()
        gm.recompile()
