"""Rows that are rounded before they are sent to experts: the nodes between them and what is multiplied in their place."""

from __future__ import annotations

import torch
import torch.fx as fx

from ..aten import names
from ..aten.definitions_views import SMALL
from ..aten.names import op_name, through
from .selections import unviewed

_SHOWN = names.CAST | names.RESHAPE | names.SAME
_SCALES = _SHOWN | names.CLAMP | {"maximum", "div", "mul", "reciprocal", "amax", "max", "getitem", "exp2", "ceil", "log2", "pow"}


def rounded_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes between rows x and what is multiplied in place of them: |x|, its largest value, s, x / s, the rounded rows and their casts."""
    found: set[fx.Node] = set()
    for n in graph.nodes:
        if _rounds(n) and isinstance(n.args[0], fx.Node):
            quotient = n.args[0]
            while op_name(quotient) in names.CLAMP | names.CAST and isinstance(quotient.args[0], fx.Node):
                found.add(quotient)
                quotient = quotient.args[0]
            found |= {n, *_between(quotient)}
        elif op_name(n) in _SHOWN | names.CLAMP and n.args and n.args[0] in found:
            found.add(n)
        elif op_name(n) == "mul" and len(n.all_input_nodes) == 2 and all(x in found for x in n.all_input_nodes):
            found.add(n)  # rounded rows times their scales
    return found


def _rounds(n: fx.Node) -> bool:
    """Whether a node rounds to whole numbers, or to floats of one byte."""
    v = n.meta.get("val")
    return op_name(n) == "round" or op_name(n) in names.CAST and isinstance(v, torch.Tensor) and v.dtype in SMALL


def _between(quotient: fx.Node) -> set[fx.Node]:
    """From x / s back to x; a number that is none of the rows', as static scales are, stays."""
    if op_name(quotient) not in ("div", "mul") or len(quotient.all_input_nodes) > 2:
        return set()
    rows, *scales = quotient.all_input_nodes
    if not scales or unviewed(scales[0]).op in ("placeholder", "get_attr"):
        return {quotient}
    (scale,) = scales
    path = {quotient}
    while op_name(scale) in _SCALES and isinstance(scale.args[0], fx.Node):
        path.add(scale)
        scale = scale.args[0]
    if op_name(scale) != "abs" or through(scale.args[0], names.CAST) is not through(rows, names.CAST):
        return set()
    path.add(scale)
    for n in (rows, scale.args[0]):
        while isinstance(n, fx.Node) and op_name(n) in names.CAST:
            path.add(n)
            n = n.args[0]
    return path
