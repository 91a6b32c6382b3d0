"""Rewrite: the fused ops go into the *Dynamo* graph at the region's boundary, and what only the old region needed goes out."""

from __future__ import annotations

import operator
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from .. import activation as act
from ..ir import MaxK, MinK, Norm, Rejection, SumK, W
from ..ops import experts_args, route_args
from .experts import rows
from .fused import is_fused
from .liveness import live_nodes, remove_dead
from .match import ExpertsMatch
from .pull import shape_of
from .region import Block
from .shadow import Shadow, example_value, mutated_args
from .terms import same_size

ops = torch.ops.moe_compile


class Rewriter:
    """One Dynamo graph being rewritten. `apply` refuses (raises Rejection) before it changes anything; `finish` cleans up."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.graph = shadow.dynamo.graph
        self.position = {n: i for i, n in enumerate(self.graph.nodes)}
        self.alive = live_nodes(self.graph)
        self.overwritten: dict[fx.Node, int] = {}  # shadow node -> when its tensor gets a newer value
        for n, i in shadow.order.items():
            for m in mutated_args(n):
                self.overwritten.setdefault(m, i)

    def finish(self) -> None:
        """Erase what was alive before the rewrite and is not any more."""
        remove_dead(self.graph, self.alive)

    def locate(self, s: fx.Node, until: fx.Node) -> fx.Node:
        """The Dynamo node that holds shadow node `s` and still does where shadow node `until` is computed."""
        found = self.shadow.origin.get(s)
        if not found:
            raise Rejection(f"{s.name} has no counterpart in the captured graph", s, "rewrite")
        if self.overwritten.get(s, 1 << 60) < self.shadow.order[until]:
            raise Rejection(f"{s.name} is overwritten before the block's result", s, "rewrite")
        return found[0]

    def apply(self, b: Block) -> None:
        if is_fused(b.match.out):
            if b.gating is not None:
                self._route(b, [self.locate(n, n) for n in b.routing_inputs()])
            return
        m, fused = b.match, b.gating is not None
        out = self.locate(m.out, m.out)
        tokens = self.locate(m.tokens, m.out)
        params = {n: self.locate(n, m.out) for n in b.params()}
        base = None if m.base is None else self.locate(m.base, m.out)
        routing = [self.locate(n, n) for n in b.routing_inputs()]
        own_ids = not fused or b.ids is not b.raw_ids
        ids = self._required(b.ids, m.out, "expert ids") if own_ids else None
        weights = None if fused else self._required(b.weights, m.out, "routing weights")
        inputs = [tokens, *params.values(), *routing, *(n for n in (base, ids, weights) if n is not None)]
        devices = {example_value(n).device for n in (*inputs, out)}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise Rejection(f"the block's tensors are on different devices: {names}", m.out, "rewrite")
        if any(self.position[n] > self.position[out] for n in inputs):
            raise Rejection("an input of the block is computed after its result", m.out, "rewrite")
        if fused:
            route_weights, route_ids = self._route(b, routing)
            ids, weights = ids or route_ids, weights or route_weights
        assert ids is not None and weights is not None
        self._experts(b, out, tokens, ids, weights, params, base)

    def _required(self, s: fx.Node | None, until: fx.Node, what: str) -> fx.Node:
        if s is None:
            raise Rejection(f"no tensor of the graph holds the {what}", until, "rewrite")
        return self.locate(s, until)

    # ---- gating: weights, ids = route(logits, ...) ---------------------------------------------------------------------

    def _route(self, b: Block, inputs: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The op stands right after its inputs; readers of the graph's own ids and weights read it instead."""
        g = b.gating
        assert g is not None
        logits, *rest = inputs
        bias = rest.pop(0) if g.bias is not None else None
        table = rest.pop(0) if g.expert_scale is not None else None
        plain = route_args(g.gating)
        norm = g.gating.norm
        with self.graph.inserting_before(_after(max(inputs, key=self.position.__getitem__))):
            if norm is not None and norm.kind is Norm.EXPR:
                plain[9:13] = [0, 0.0, 0.0, 1.0]  # raw scores: the normaliser follows as plain tensor ops
            pair = self._call(ops.route.default, (self._rows(logits, g.gating.num_experts), bias, table, *plain), logits)
            weights = self._call(operator.getitem, (pair, 0), logits)
            ids = self._call(operator.getitem, (pair, 1), logits)
            if norm is not None and norm.kind is Norm.EXPR:
                weights = self._normalised(norm.expr, weights, logits)
        self._redirect(b.raw_ids, ids, torch.int64)
        self._redirect(b.weights, weights, g.gating.weight_dtype)
        return weights, ids

    def _redirect(self, s: fx.Node | None, new: fx.Node, dtype: torch.dtype) -> None:
        if s is None or s in self.overwritten:
            return
        for d in self.shadow.origin.get(s, ()):
            value = example_value(d)
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.dtype == dtype and d.op != "placeholder":
                new.meta.setdefault("example_value", value)
                d.replace_all_uses_with(new)

    def _normalised(self, expr: sp.Expr, w: fx.Node, like: fx.Node) -> fx.Node:
        """A recovered normaliser expression as plain tensor ops on w [T, k]."""
        reductions = {SumK: torch.sum, MaxK: torch.amax, MinK: torch.amin}
        functions = {"sigmoid": torch.sigmoid, "relu": torch.relu, "exp": torch.exp, "log": torch.log, "tanh": torch.tanh, "Abs": torch.abs}

        def fold(f: Any, parts: list[Any]) -> Any:
            out = parts[0]
            for p in parts[1:]:
                out = self._call(f, (out, p), like) if isinstance(out, fx.Node) or isinstance(p, fx.Node) else f(out, p)
            return out

        def emit(e: Any) -> Any:
            if e == W:
                return w
            if e.is_number:
                return float(e)
            if isinstance(e, tuple(reductions)):
                return self._call(reductions[type(e)], (emit(e.args[0]), -1, True), like)
            parts = [emit(a) for a in e.args]
            if isinstance(e, (sp.Add, sp.Mul, sp.Pow)):
                return fold({sp.Add: operator.add, sp.Mul: operator.mul, sp.Pow: operator.pow}[type(e)], parts)
            if isinstance(e, act.clamp):
                return self._call(torch.clamp, (parts[0], *(None if abs(p) == float("inf") else p for p in parts[1:])), like)
            if type(e).__name__ in functions:
                return self._call(functions[type(e).__name__], (parts[0],), like)
            raise Rejection(f"no tensor op is known for {e}", None, "rewrite")

        out = emit(expr)
        return out if isinstance(out, fx.Node) else self._call(torch.full_like, (w, out), like)

    # ---- experts -------------------------------------------------------------------------------------------------------

    def _experts(
        self, b: Block, out: fx.Node, tokens: fx.Node, ids: fx.Node, weights: fx.Node, params: dict[fx.Node, fx.Node], base: fx.Node | None
    ) -> None:
        """The op stands where the result was computed; everyone who reads the result from there on reads the op."""
        m, value = b.match, example_value(out)
        same_tensor = self._aliases(m.out)
        readers = [u for d in same_tensor for u in d.users if self.position.get(u, -1) > self.position[out]]
        with self.graph.inserting_before(out):
            lists = [[self._param(q, params[q.node]) for q in group] for group in (m.up, m.down, m.up_bias, m.down_bias)]
            routed = (self._rows(tokens, m.experts.hidden), self._rows(ids, m.k), self._rows(weights, m.k))
            add = None if base is None else self._rows(base, m.experts.out_features)
            new = self._call(ops.experts.default, (*routed, *lists, add, *experts_args(m.experts)), out)
            new.meta["moe_block"] = True
            if value.dtype != example_value(tokens).dtype:
                new = self._method("to", (new, value.dtype), out)
            if value.ndim != 2:
                new = self._method("reshape", (new, *self._sizes(m, tokens, new, out), m.experts.out_features), out)
        new.meta["example_value"] = value
        for u in readers:
            for d in same_tensor:
                u.replace_input_with(d, new)

    def _sizes(self, m: ExpertsMatch, tokens: fx.Node, flat: fx.Node, like: fx.Node) -> list[Any]:
        """The result's leading sizes: numbers, or read off the tokens."""
        lead = shape_of(m.tokens)[:-1]
        out: list[Any] = []
        for s in shape_of(m.out)[:-1]:
            if isinstance(s, int):
                out.append(s)
            elif any(same_size(s, x) for x in lead):
                out.append(self._method("size", (tokens, next(d for d, x in enumerate(lead) if same_size(s, x))), like))
            elif same_size(s, rows(m.tokens)):
                out.append(self._method("size", (flat, 0), like))
            else:
                raise Rejection(f"the result's shape {shape_of(m.out)} is not that of the tokens", m.out, "rewrite")
        return out

    def _aliases(self, s: fx.Node) -> list[fx.Node]:
        """Dynamo nodes that are the result's tensor object: the result, and what it was accumulated into in place."""
        out = list(self.shadow.origin.get(s, ()))
        while written := mutated_args(s):
            s = written[0]
            out.extend(self.shadow.origin.get(s, ()))
        return list(dict.fromkeys(out))

    def _param(self, q: Any, n: fx.Node) -> fx.Node:
        return n if q.view is None else self._method("view", (n, *q.view), n)

    def _rows(self, n: fx.Node, width: int) -> fx.Node:
        """[.., width] as [T, width]."""
        value = example_value(n)
        return self._method("reshape", (n, -1, width), n) if isinstance(value, torch.Tensor) and value.ndim != 2 else n

    def _method(self, name: str, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        return _dressed(self.graph.call_method(name, args), like)

    def _call(self, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        return _dressed(self.graph.call_function(target, args), like)


def _dressed(n: fx.Node, like: fx.Node) -> fx.Node:
    """Give a new node the source location of the one it stands for."""
    n.meta.update({k: like.meta[k] for k in ("stack_trace", "nn_module_stack", "source_fn_stack") if k in like.meta})
    return n


def _after(n: fx.Node) -> fx.Node:
    """The first place after n where a call may stand (placeholders stay together)."""
    out = n.next
    while out.op == "placeholder":
        out = out.next
    return out
