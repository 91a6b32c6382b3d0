"""Gradients: a block may stop some of them on the way (detach, no_grad), which its formula does not say; such a block is left alone.

A formula has the gradients of everything in it. A region without a stop has them too. Where one lies between a tensor that wants a
gradient and the result, both gradients are computed on a probe: a stop may be without effect, as that of a maximum that softmax cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Rejection
from ..aten import names
from ..aten.conditions import may_train
from ..aten.names import op_name
from ..aten.shadow import Shadow, example_value
from ..recover.region import Block, data_inputs, inside
from .probe import TOLERANCE, TROUBLE, Sizes, one_thread, probe_values, run, size_choices
from .validate import Part, parts

_SMALL = 1 << 20  # elements of a parameter up to which its gradient is computed


def check(block: Block, shadow: Shadow) -> Rejection | None:
    """None when the block's IR has the gradients of its subgraph, or nobody wants any."""
    if not may_train(shadow.dynamo.graph):
        return None
    for part in parts(block):
        wanted = {n for n in part.boundary if _wants(n, shadow)}
        problem = _problem(block, part, shadow, wanted) if wanted else None
        if problem is not None:
            return Rejection(f"{part.what} and the recovered formula have other gradients: {problem}", block.match.out, "validate")
    return None


def _wants(n: fx.Node, shadow: Shadow) -> bool:
    values = [example_value(d) for d in shadow.origin.get(n, ())]
    return n.meta["val"].dtype.is_floating_point and any(v.requires_grad for v in values)


def _problem(block: Block, part: Part, shadow: Shadow, wanted: set[fx.Node]) -> str | None:
    nodes = inside(part.outs, part.boundary)
    if isinstance(nodes, Rejection):
        return nodes.reason
    if _turned_constant(block, part, nodes, wanted, shadow):
        return "those of weights that come out constant are zeros, and would be none"
    if part.routing and any(n in shadow.no_grad for n in block.routing_inputs()):
        return "an input of it is computed under no_grad"  # where the op would stand
    if all(n in shadow.no_grad for n in part.outs):
        return None if not part.routing else "it runs under no_grad"
    stops = [n for n in nodes if op_name(n) in names.STOP_GRADIENT or n in shadow.no_grad]
    stopped = {n for n in wanted if _meets(n, set(nodes), stops, part.outs)}
    if not stopped:
        return None
    large = [n for n in stopped if n in block.params() and n.meta["val"].numel() > _SMALL]
    if large:
        return f"{stops[0].name} stops that of {large[0].name}"
    small = sorted(n for n in wanted if n not in block.params() or n.meta["val"].numel() <= _SMALL)
    return _compare_at_any_size(block, part, nodes, small, shadow)


def _turned_constant(block: Block, part: Part, nodes: list[fx.Node], wanted: set[fx.Node], shadow: Shadow) -> bool:
    """Whether weights such as w / Σw of one expert are made of what wants a gradient: its gradient is there, and all zeros."""
    norm = None if block.gating is None else block.gating.gating.norm
    if norm is None or norm.expr is None or norm.expr.free_symbols:
        return False
    without = {n for n in nodes if op_name(n) in names.CREATION or op_name(n) in names.STOP_GRADIENT or n in shadow.no_grad}
    made_of = [n for n in block.routing_inputs() if n in wanted]
    return not _reached(made_of, set(nodes) - without, lambda n: n.users).isdisjoint(part.outs)


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


def _compare_at_any_size(block: Block, part: Part, nodes: list[fx.Node], leaves: list[fx.Node], shadow: Shadow) -> str | None:
    problem = None
    for sizes in size_choices(block):
        try:
            with one_thread():
                return _compare(block, part, nodes, leaves, shadow, sizes)
        except TROUBLE as e:
            problem = f"they could not be computed on probing inputs ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"
    return problem


def _compare(block: Block, part: Part, nodes: list[fx.Node], leaves: list[fx.Node], shadow: Shadow, sizes: Sizes) -> str | None:
    env = probe_values(block, part.boundary, sizes, 0)
    inputs = {n: env[n].clone().requires_grad_() for n in leaves if n not in block.twins}
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        env.update({n: v.clone() for n, v in inputs.items()})
        env.update({n: env[o].reshape(sizes.shape(n)) for n, o in block.twins.items() if n in part.boundary})
        computed = dict(env)
        for n in nodes:
            with torch.set_grad_enabled(n not in shadow.no_grad):
                run([n], computed, sizes)
        got, want = part.values({**computed, **{n: v for n, v in env.items() if n not in part.outs}}, part.outs)
        along = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
        both = [_gradients((r.reshape(want.shape) * along).sum(), list(inputs.values())) for r in (got, want)]
    for n, mine, theirs in zip(inputs, *both, strict=True):
        size = max(float(g.abs().max()) for g in (mine, theirs)) if theirs.numel() else 0.0
        if not torch.allclose(mine, theirs, rtol=0.0, atol=10 * TOLERANCE * size, equal_nan=True):
            return f"that of {n.name}"
    return None


def _gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(y, leaves, allow_unused=True) if y.requires_grad else [None] * len(leaves)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
