"""Products of a few tokens and a small matrix, which a library takes five microseconds and more for.

The router's goes into the routing op; operands that are made float32 for it are read as they are, their products are exact in float32.
The shared expert's gate becomes a sum that the inner compiler fuses with what follows.

route(x Wᵀ + b, ...) = route_linear(x, W, b, ...)
x wᵀ + b = Σ_h x[h] w[h] + b
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ... import ops  # noqa: F401 (defines them)
from ..aten import names
from ..aten.conditions import may_train, under_autocast
from ..aten.effects import written_between
from ..aten.node import example_value
from .target import Target

_SAME_VALUES = names.RESHAPE | names.SAME | names.CAST
_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)  # type: ignore[attr-defined]
_route = torch.ops.moe_compile.route.default
_route_linear = torch.ops.moe_compile.route_linear.default
_GATE = {
    op: next(i for i, a in enumerate(op._schema.arguments) if a.name == "shared_gate")
    for op in (torch.ops.moe_compile.experts_shared.default, torch.ops.moe_compile.experts_stored_shared.default)
}
_NARROW = (torch.bfloat16, torch.float16)


def take_products(gm: fx.GraphModule, target: Target) -> int:
    """Rewrite the routings whose logits are a product that nobody else reads, and the gates of shared experts; how many routings.

    Only for a target that wants them, for as many tokens as it says, known when compiling, when no gradient may be wanted.
    """
    graph, most = gm.graph, target.router_tokens
    if not most or may_train(graph):
        return 0
    found = [(n, chain) for n in graph.nodes if n.target is _route and (chain := _chain(n, most)) is not None]
    for n, chain in found:
        _rewrite(graph, n, chain)
    gates = [g for n in graph.nodes if n.target in _GATE and (g := _gate(n, most)) is not None]
    for n in gates:
        _as_sum(graph, n)
    if found or gates:
        graph.lint()
        gm.recompile()
    return len(found)


def _chain(route: fx.Node, most: int) -> list[fx.Node] | None:
    """The product and what shows its values in another shape or a wider dtype, up to the logits of a routing; None where there is none."""
    chain: list[fx.Node] = []
    n: Any = route.args[0] if route.args else None
    while isinstance(n, fx.Node) and len(n.users) == 1:
        chain.insert(0, n)
        if n.target in _LINEAR:
            return chain if _few(n, most, _operands(n)) and _keeps(chain) and not written_between(n, route) else None
        n = n.args[0] if n.args and names.op_name(n) in _SAME_VALUES else None
    return None


def _gate(shared: fx.Node, most: int) -> fx.Node | None:
    """The product behind a shared expert's gate, of a few tokens and one row; None where there is none."""
    n: Any = shared.args[_GATE[shared.target]]
    while isinstance(n, fx.Node) and len(n.users) == 1:
        if n.target in _LINEAR:
            return n if _few(n, most, _operands(n)) and example_value(_operands(n)[1]).shape[0] == 1 else None
        n = n.args[0] if n.args and names.op_name(n) in _SAME_VALUES | {"sigmoid"} else None
    return None


def _operands(p: fx.Node) -> tuple[Any, Any, Any]:
    """x, W and b, or None."""
    given = dict(zip(("input", "weight", "bias"), p.args, strict=False)) | p.kwargs
    return given["input"], given["weight"], given.get("bias")


def _before_widening(p: fx.Node, route: fx.Node) -> tuple[Any, Any, Any] | None:
    """The operands of a product in float32 as they were before each of them was made float32; None where they are what they were."""
    made = [n for n in _operands(p) if n is not None]
    if not all(isinstance(n, fx.Node) and names.op_name(n) in names.CAST and n.args for n in made):
        return None
    before = [n.args[0] for n in made]
    values: list[Any] = [example_value(n) if isinstance(n, fx.Node) else None for n in before]
    place: Any = example_value(p)
    if not all(isinstance(v, torch.Tensor) and v.device == place.device and v.dtype in _NARROW for v in values):
        return None
    if len({v.dtype for v in values}) != 1 or place.dtype != torch.float32 or any(written_between(n, route) for n in made):
        return None
    return before[0], before[1], before[2] if len(before) > 2 else None


def _few(p: fx.Node, most: int, operands: tuple[Any, Any, Any]) -> bool:
    """Whether at most so many tokens meet a matrix, all of one dtype on one device, all sizes known."""
    nodes = [n for n in operands if n is not None]
    if not all(isinstance(n, fx.Node) and _plain(example_value(n)) for n in nodes):
        return False
    row, matrix, *bias = (example_value(n) for n in nodes)
    alike = {(v.dtype, v.device) for v in (matrix, *bias)} == {(row.dtype, row.device)}
    sizes = matrix.ndim == 2 and row.shape[-1:] == matrix.shape[1:] and all(v.shape == matrix.shape[:1] for v in bias)
    few = 0 < row.numel() <= most * matrix.shape[-1]
    return alike and sizes and few and not under_autocast(p.graph, row.device.type)


def _plain(v: Any) -> bool:
    """A tensor of known sizes that stands for nothing else."""
    return isinstance(v, torch.Tensor) and not is_traceable_wrapper_subclass(v) and all(isinstance(d, int) for d in v.shape)


def _keeps(chain: list[fx.Node]) -> bool:
    """Whether rows stay rows on their way to the logits, and nothing is rounded. (A node without a value is the rewrite's own view.)"""
    first, *values = (v for n in chain if (v := example_value(n)) is not None)
    kept = all(v.shape[-1:] == first.shape[-1:] and v.numel() == first.numel() and v.device == first.device for v in values)
    return kept and all(torch.promote_types(first.dtype, v.dtype) == v.dtype for v in values)


def _rewrite(graph: fx.Graph, route: fx.Node, chain: list[fx.Node]) -> None:
    before = _before_widening(chain[0], route)
    x, w, b = _operands(chain[0]) if before is None else before
    with graph.inserting_before(route):
        if example_value(x).ndim != 2:
            x = graph.call_method("reshape", (x, [-1, example_value(w).shape[1]]))
        new = graph.call_function(_route_linear, (x, w, b, *route.args[1:], before is not None), dict(route.kwargs))
    new.meta.update(route.meta)
    route.replace_all_uses_with(new)
    for n in (route, *reversed(chain)):
        graph.erase_node(n)


def _as_sum(graph: fx.Graph, product: fx.Node) -> None:
    x, w, b = _operands(product)
    with graph.inserting_before(product):
        x, w = (graph.call_method("float", (n,)) for n in (x, w))
        total = graph.call_method("sum", (graph.call_function(operator.mul, (x, w)), -1, True))
        total = total if b is None else graph.call_function(operator.add, (total, graph.call_method("float", (b,))))
        new = graph.call_method("to", (total, example_value(product).dtype))
    new.meta.update(product.meta)
    product.replace_all_uses_with(new)
    graph.erase_node(product)
