"""A number that multiplies the combined result, c · Σ_j w y = Σ_j (c w) y: it becomes a part of the routing weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from ...ir import Gating, Norm
from ..aten import names
from ..aten.element import call_args, dtype_of, size_of
from ..aten.names import op_name
from ..aten.node import example_value
from ..aten.shadow import Shadow
from .match import ExpertsMatch


@dataclass(frozen=True)
class Fold:
    """`factor`: the number. `products`: (node to leave out, what takes its place) in the Dynamo graph. `last`: the scaled shadow node."""

    factor: float = 1.0
    products: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    last: fx.Node | None = None


def fold_of(m: ExpertsMatch, shadow: Shadow) -> Fold:
    """The products that the result goes into and nowhere else; nothing when the weights do not multiply the result."""
    found = Fold()
    if m.base is not None or m.experts.weight_on_input:
        return found
    n = m.out
    passed = {n}
    while len(n.users) == 1:
        (u,) = n.users
        c = _factor(u, n)
        if c is not None:
            pair = _in_dynamo(u, passed, shadow)
            if pair is None:
                break
            found = Fold(found.factor * c, [*found.products, pair], u)
        elif op_name(u) not in names.RESHAPE and not (op_name(u) == "to" and dtype_of(u) == dtype_of(n)):
            break
        passed.add(u)
        n = u
    return found if found.factor != 1.0 else Fold()


def _factor(u: fx.Node, n: fx.Node) -> float | None:
    """c of u = c · n or n / (1/c)."""
    if op_name(u) not in ("mul", "div") or u.args[0] is not n:
        return None
    c: Any = size_of(u.args[1])  # type: ignore[misc]
    if not isinstance(c, (int, float)):
        return None
    if getattr(call_args(u), "rounding_mode", None) is not None or dtype_of(u) != dtype_of(n):
        return None
    return c if op_name(u) == "mul" else 1 / c if c else None


def _in_dynamo(u: fx.Node, passed: set[fx.Node], shadow: Shadow) -> tuple[fx.Node, fx.Node] | None:
    """The Dynamo node that is this product and nothing else, and the tensor it multiplies."""
    found = shadow.origin.get(u, [])
    inputs = [x for x in found[0].all_input_nodes if isinstance(example_value(x), torch.Tensor)] if found else []
    return (found[0], inputs[0]) if len(inputs) == 1 and shadow.image.get(inputs[0]) in passed else None


def scaled(g: Gating, factor: float) -> Gating:
    """The gating whose weights are `factor` times those of g."""
    if g.norm is not None and g.norm.kind is Norm.EXPR and g.norm.expr is not None:
        return replace(g, norm=replace(g.norm, expr=g.norm.expr * factor))
    return replace(g, scale=g.scale * factor)
