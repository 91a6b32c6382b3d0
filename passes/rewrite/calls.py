"""Calls that are put into a Dynamo graph: each told with the source of the one it stands for, expressions as plain tensor ops."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from ...ir import MaxK, MinK, Rejection, SumK, W
from ...ir import scalar as act
from ...ir.operands import Join, Operands
from ..aten.node import example_value


def normalised(g: fx.Graph, expr: sp.Expr, w: fx.Node) -> fx.Node:
    """A recovered normaliser expression as plain tensor ops on w [T, k]. Raises Rejection when no op is known for a part."""
    reductions: dict[Any, Any] = {SumK: torch.sum, MaxK: torch.amax, MinK: torch.amin}

    def known(e: Any, go: Any) -> Any:
        if e.func in reductions:
            inner = go(e.args[0])
            inner = inner if isinstance(inner, fx.Node) else call(g, torch.full_like, (w, inner), w)
            return call(g, reductions[e.func], (inner, -1, True), w)
        return w if e == W else None

    out = act.fold(expr, _Nodes(g, w), known)
    return out if isinstance(out, fx.Node) else call(g, torch.full_like, (w, out), w)


def joined(g: fx.Graph, join: Join, p: Operands[fx.Node], like: fx.Node) -> Operands[fx.Node]:
    """Several low-rank pairs of a projection as one: their matrices are small, and gradients go through what joins them."""

    def columns(nodes: list[fx.Node], numbers: Sequence[float]) -> fx.Node:
        times = [n if c == 1 else call(g, operator.mul, (n, c), like) for n, c in zip(nodes, numbers, strict=True)]
        return call(g, torch.cat, (times, -1), like)

    return join.of(p, lambda nodes: call(g, torch.cat, (nodes, -2), like), columns)


@dataclass(frozen=True)
class _Nodes:
    """Expressions as calls of a graph; what holds no node is a number."""

    graph: fx.Graph
    like: fx.Node
    number = float

    def call(self, f: Any, *args: Any) -> Any:
        return call(self.graph, f, args, self.like) if any(isinstance(a, fx.Node) for a in args) else f(*args)

    def add(self, a: Any, b: Any) -> Any:
        return self.call(operator.add, a, b)

    def mul(self, a: Any, b: Any) -> Any:
        return self.call(operator.mul, a, b)

    def div(self, a: Any, b: Any) -> Any:
        return self.call(operator.truediv, a, b)

    def power(self, a: Any, p: float) -> Any:
        return self.call(operator.pow, a, p)

    def clamp(self, a: Any, lo: float, hi: float) -> Any:
        return call(self.graph, torch.clamp, (a, *(None if abs(p) == float("inf") else p for p in (lo, hi))), self.like)

    def apply(self, f: act.Scalar, a: Any) -> Any:
        return call(self.graph, f.torch, (a,), self.like)


def can_emit(expr: sp.Expr) -> Rejection | None:
    """Whether `normalised` knows every function of an expression."""
    other = next((f for f in expr.atoms(sp.Function) if f.func not in (SumK, MaxK, MinK, *act.HEADS)), None)
    return None if other is None else Rejection(f"no tensor op is known for {other}", None, "rewrite")


def rows(g: fx.Graph, n: fx.Node, width: int) -> fx.Node:
    """[.., width] as [T, width]."""
    value = example_value(n)
    return method(g, "reshape", (n, -1, width), n) if isinstance(value, torch.Tensor) and value.ndim != 2 else n


def method(g: fx.Graph, name: str, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    return _dressed(g.call_method(name, args), like)


def call(g: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    return _dressed(g.call_function(target, args), like)


def _dressed(n: fx.Node, like: fx.Node) -> fx.Node:
    """Give a new node the source location of the one it stands for."""
    n.meta.update({k: like.meta[k] for k in ("stack_trace", "nn_module_stack", "source_fn_stack") if k in like.meta})
    return n


def after(n: fx.Node) -> fx.Node:
    """The first place after n where a call may stand (placeholders stay together)."""
    out = n.next
    while out.op == "placeholder":
        out = out.next
    return out
