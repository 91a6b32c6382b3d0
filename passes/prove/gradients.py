"""Gradients: a block may stop some of them on the way (detach, no_grad), which its formula does not say; such a block is left alone.

A formula has the gradients of everything in it. A region without a stop has them too. Where one lies between a tensor that wants a
gradient and the result, both gradients are computed on a probe: a stop may be without effect, as that of a maximum that softmax cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch.fx as fx
from torch import Tensor

from ...ir import Rejection
from ..aten import names
from ..aten.conditions import may_train
from ..aten.names import op_name
from ..aten.node import example_value
from ..aten.shadow import Shadow
from ..recover.region import Block, data_inputs
from .engine import Claim


def with_gradients(claim: Claim, block: Block, shadow: Shadow, all_of_them: bool) -> Claim | Rejection:
    """The claim with the gradients that are wanted, to be compared where one may be stopped or `all_of_them`.

    A rejection where it is plain that they are others.
    """
    if not may_train(shadow.dynamo.graph):
        return claim
    wanted = {n for n in claim.region.edge if _wants(n, shadow)}
    if not wanted:
        return claim
    nodes, outs = set(claim.region.nodes), claim.region.outs
    problem = _problem(claim, block, wanted, shadow)
    if problem is not None:
        return Rejection(f"{claim.says}, it has other gradients: {problem}", block.match.out, "validate", code="gradients", part=claim.part)
    stops = [n for n in claim.region.nodes if op_name(n) in names.STOP_GRADIENT or n in shadow.no_grad]
    if all(n in shadow.no_grad for n in outs) or not (all_of_them or any(_meets(n, nodes, stops, list(outs)) for n in wanted)):
        return claim
    leaves = tuple(sorted(wanted, key=claim.region.number.__getitem__))
    return replace(claim, leaves=leaves, no_grad=frozenset(shadow.no_grad.intersection(nodes)))


def _wants(n: fx.Node, shadow: Shadow) -> bool:
    values = [example_value(d) for d in shadow.origin.get(n, ())]
    return n.meta["val"].dtype.is_floating_point and any(v.requires_grad for v in values)


def _problem(claim: Claim, block: Block, wanted: set[fx.Node], shadow: Shadow) -> str | None:
    routing = claim.part == "routing"
    if _turned_constant(claim, block, wanted, shadow):
        return "those of weights that come out constant are zeros, and would be none"
    if routing and any(n in shadow.no_grad for n in block.routing_inputs()):
        return "an input of it is computed under no_grad"  # where the op would stand
    if routing and all(n in shadow.no_grad for n in claim.region.outs):
        return "it runs under no_grad"
    return None


def _turned_constant(claim: Claim, block: Block, wanted: set[fx.Node], shadow: Shadow) -> bool:
    """Whether weights such as w / Σw of one expert are made of what wants a gradient: its gradient is there, and all zeros."""
    norm = None if block.gating is None else block.gating.gating.norm
    if norm is None or norm.expr is None or norm.expr.free_symbols:
        return False
    nodes = claim.region.nodes
    without = {n for n in nodes if op_name(n) in names.CREATION or op_name(n) in names.STOP_GRADIENT or n in shadow.no_grad}
    made_of = [n for n in block.routing_inputs() if n in wanted]
    return not _reached(made_of, set(nodes) - without, lambda n: n.users).isdisjoint(claim.region.outs)


def _meets(leaf: fx.Node, nodes: set[fx.Node], stops: list[fx.Node], outs: list[fx.Node]) -> bool:
    """Whether a stop lies on a way of floats from a leaf to a result."""
    after = _reached([leaf], nodes, lambda n: n.users)
    before = _reached(outs, nodes, data_inputs)
    return any(s in after and s in before for s in stops)


def _reached(start: list[fx.Node], nodes: set[fx.Node], steps: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Float nodes among `nodes` that `start` leads to, itself included."""
    seen: set[fx.Node] = set()
    stack = list(start)
    while stack:
        n = stack.pop()
        for x in (n, *steps(n)):
            if x in nodes and x not in seen and _float(x):
                seen.add(x)
                stack.append(x)
    return seen


def _float(n: fx.Node) -> bool:
    values = n.meta.get("val")
    tensors = [v for v in (values if isinstance(values, (list, tuple)) else [values]) if isinstance(v, Tensor)]
    return any(v.dtype.is_floating_point for v in tensors)
