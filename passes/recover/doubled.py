"""Scales of a weight that are codes with scales of their own (double quantisation): floats, which the graph makes on each call."""

from __future__ import annotations

import torch.fx as fx

from ..aten import names
from ..aten.names import op_name
from .codes import made_of
from .linear import Linear
from .rows import WORDS


def scales_of_codes(graph: fx.Graph, codes: set[fx.Node]) -> set[fx.Node]:
    """What scales are made of that multiply packed codes and are made of packed codes and floats."""
    found: set[fx.Node] = set()
    for n in graph.nodes:
        if op_name(n) != "mul" or n not in codes or len(n.all_input_nodes) != 2:
            continue
        bare = [_bare(x) for x in n.all_input_nodes]
        for scale, values in (bare, bare[::-1]):
            if WORDS in values.meta and WORDS not in scale.meta and any(WORDS in x.meta for x in made_of(scale)):
                found |= set(made_of(scale)) & codes
    return found


def _bare(n: fx.Node) -> fx.Node:
    """What a node is a view of, the views of unpacked codes among them."""
    while WORDS not in n.meta and op_name(n) in names.VIEW and isinstance(n.args[0], fx.Node):
        n = n.args[0]
    return n


def as_list(x: Linear) -> None:
    """Words of a stack, where each expert's scales are a tensor of their own: a list of the matrices that were taken from the stack."""
    scaled = any(s is not None and isinstance(s.node, tuple) for s in (x.grid, x.channel, x.zero))
    if not scaled or x.words is None or isinstance(x.weight, tuple):
        return
    taken = [[y for y in made_of(n) if op_name(y) == "select" and y.args[:2] == (x.weight, 0)][:1] for n in x.codes]
    if len(taken) > 1 and all(taken):
        x.weight = tuple(y for (y,) in taken)
