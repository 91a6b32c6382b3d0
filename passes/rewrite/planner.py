"""From a validated block to a rewrite plan: every shadow node at the boundary is located in the Dynamo graph, or the block stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...ir import Norm, Rejection
from ...ir.families import EXPERTS, family_of
from ...ir.operands import Operands
from ...ops import route_args
from ..aten.effects import mutated_args
from ..aten.element import shape_of
from ..aten.names import op_name
from ..aten.node import example_value
from ..aten.shadow import Shadow
from ..aten.sources import code_of, input_name
from ..aten.wrapped import WHY, why_not
from ..recover.fused import is_fused
from ..recover.match import ExpertsMatch
from ..recover.region import Block
from ..recover.rows import rows
from ..recover.writes import reads
from ..terms import same_size
from ..terms.text import SAID
from .calls import can_emit
from .layout import dims_by_stride
from .onto import check_writes, writes_onto_base
from .plan import BlockPlan, ExpertsPlan, Operand, PlacedPlan, RoutePlan


class Planner:
    """Plans blocks of one shadow; raises Rejection where a boundary value cannot be had in the Dynamo graph."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self.position = {n: i for i, n in enumerate(shadow.dynamo.graph.nodes)}

    def locate(self, s: fx.Node, until: fx.Node) -> fx.Node:
        """The Dynamo node that holds shadow node `s` and still does where shadow node `until` is computed."""
        found = self.shadow.origin.get(s)
        if not found:
            raise Rejection(self._nameless(s), s, "rewrite")
        self._unwritten(s, [until], self.shadow.order[until])
        return found[0]

    def _now(self, s: fx.Node, until: fx.Node) -> fx.Node:
        """`locate`, for an op that stands where `until` is: after `x[i] = y` the tensor x is the one that holds the value."""
        holder = s
        while holder in self.shadow.statement and (written := mutated_args(holder)):
            holder = written[0]
        if holder is s or holder not in self.shadow.origin:
            return self.locate(s, until)
        self._unwritten(s, [until], self.shadow.order[until])
        return self.shadow.origin[holder][0]

    def _nameless(self, s: fx.Node) -> str:
        """Why no Dynamo node holds a shadow node: a statement that writes gives no tensor, others are steps of one of Dynamo's."""
        if s in self.shadow.statement:
            code = code_of(s) or "x[i] = y"
            return f"`{code}` writes a tensor of the block in place: masked_fill, torch.where and index_put give a new one"
        code = code_of(s) or op_name(s)
        return f"the block needs a number from inside of `{code}`, of which the graph holds the result alone: write its steps out"

    def _unwritten(self, s: fx.Node, results: list[fx.Node], at: int) -> None:
        """What an op that stands at `at` is to read is not written between there and where it is read on the way to the results."""
        order, memory = self.shadow.order, self.shadow.memory
        when = [at, *reads(memory, s, results)]
        writer = memory.written(s, max(min(when) - 1, order[s]), max(when))
        if writer is not None:
            name = code_of(s) or s.meta.get(SAID) or (input_name(s) if s.op == "placeholder" else "")
            what = f"`{name}`" if name else "a tensor that the block reads"
            raise Rejection(f"{what} is overwritten before the block's result", writer, "rewrite")

    def overwritten(self, s: fx.Node) -> bool:
        """Whether the memory of a shadow node is written after it was made."""
        return self.shadow.memory.written(s, self.shadow.order[s], 1 << 60) is not None

    def plan(self, b: Block) -> BlockPlan:
        route = None if b.gating is None else self._route(b)
        fused = is_fused(b.match.out)
        folded = tuple((d.name, source.name) for d, source in b.fold.products)
        reader = self.locate(b.match.out, b.match.out).name if fused and (folded or b.masked) else None
        return BlockPlan(route, None if fused else self._experts(b), folded, self._fixed(b), reader)

    def _fixed(self, b: Block) -> tuple[str, ...]:
        """Dynamo nodes that hold the variable floats of the block: all those that say the same."""
        exprs = {str(n.meta["val"].node.expr) for n in b.fixed_numbers()}
        values = ((d, example_value(d)) for d in self.shadow.dynamo.graph.nodes) if exprs else ()
        return tuple(d.name for d, v in values if isinstance(v, torch.SymFloat) and str(v.node.expr) in exprs)

    def _route(self, b: Block) -> RoutePlan:
        g = b.gating
        assert g is not None
        norm, plain = g.gating.norm, route_args(g.gating)
        expr = norm.expr if norm is not None and norm.kind is Norm.EXPR else None
        if expr is not None:  # it follows as plain tensor ops
            refusal = can_emit(expr)
            if refusal is not None:
                raise refusal
        at = max(self.shadow.order[n] for n in b.routing_inputs())  # the op stands right after its inputs
        for n in b.routing_inputs():
            self._unwritten(n, [x for x in (g.choice, b.weights, b.match.out) if x is not None], at)
        given = (g.bias, g.expert_scale)
        tables = [None if n is None else Operand(self.locate(n, n).name, None if len(shape_of(n)) == 1 else (-1,)) for n in given]
        weights = () if b.fold.products or b.masked else self._readable(b.weights, g.gating.weight_dtype)
        redirected = (self._readable(b.raw_ids, torch.int64), weights)
        return RoutePlan(self.locate(g.logits, g.logits).name, tables[0], tables[1], g.gating.num_experts, tuple(plain), expr, *redirected)

    def _readable(self, s: fx.Node | None, dtype: torch.dtype) -> tuple[str, ...]:
        """Dynamo nodes of the graph's own ids or weights that the fused op's can stand in for."""
        if s is None or self.overwritten(s):
            return ()
        out = []
        for d in self.shadow.origin.get(s, ()):
            v = example_value(d)
            if isinstance(v, torch.Tensor) and v.ndim == 2 and v.dtype == dtype and d.op != "placeholder" and v.is_contiguous():
                out.append(d.name)
        return tuple(out)

    def _experts(self, b: Block) -> ExpertsPlan:
        m, routed = b.match, b.gating is not None
        out, tokens = self._result(m.out), self._now(m.tokens, m.out)
        params = {n: self.locate(n, m.out) for n in b.params()}
        names = self.aliases(m.out)
        written = writes_onto_base(m, self.shadow, out, names)
        base = None if m.base is None else self.shadow.origin[m.base][0] if written else self.locate(m.base, m.out)
        check_writes(m, self.shadow, out, names)
        ends = None if b.ends is None else self._ends(b.ends, m)
        ids = self._required(b.ids, m.out, "expert ids") if ends is None and (not routed or b.ids is not b.raw_ids) else None
        weights = None if routed or b.constant is not None else self._required(b.weights, m.out, "routing weights")
        inputs = [tokens, *params.values(), *(n for n in (base, ids, ends, weights) if n is not None)]
        inputs += [self.locate(n, n) for n in b.routing_inputs()]
        self._check(m, inputs, out)
        for d in names:
            dims_by_stride(example_value(d), m.out)

        return ExpertsPlan(
            out=out.name,
            same_tensor=tuple(d.name for d in names),
            written=tuple(d.name for d in written),
            tokens=tokens.name,
            ids=None if ids is None else ids.name,
            weights=None if weights is None else weights.name,
            constant=None if routed else b.constant,
            ends=None if ends is None else ends.name,
            k=m.k,
            operands=m.operands.map(lambda q: Operand(params[q.node].name, q.view, q.order)),
            base=None if base is None else base.name,
            experts=m.experts,
            wraps=b.wraps,
            join=m.join,
            lead=self.lead(m),
        )

    def alone(self, m: ExpertsMatch, gate: fx.Node | None) -> tuple[fx.Node, Operands[Operand], fx.Node | None]:
        """Of an expert that all rows go to: the Dynamo nodes of its result, its operands, its gate. Raises Rejection."""
        out, names = self._result(m.out), self.aliases(m.out)
        check_writes(m, self.shadow, out, names)
        params = {q.node: self.locate(q.node, m.out) for q in m.operands}
        weights = None if gate is None else self.locate(gate, m.out)
        self._check(m, [self.locate(m.tokens, m.out), *params.values(), *([] if weights is None else [weights])], out)
        for d in names:
            dims_by_stride(example_value(d), m.out)
        return out, m.operands.map(lambda q: Operand(params[q.node].name, q.view, q.order)), weights

    def placed(self, b: Block, plan: BlockPlan) -> BlockPlan:
        """The plan in which the ids come out of the table of replicas by the function that says so. Raises Rejection."""
        e, found = plan.experts, b.placed
        if e is None or e.ids is None or found is None or found.how is None:
            return plan
        logical, table = self.locate(found.raw, b.match.out), self.locate(found.table, b.match.out)
        placed = PlacedPlan(logical.name, table.name, found.how.world, found.how.rank)
        return replace(plan, experts=replace(e, placed=placed))

    def _ends(self, ends: fx.Node, m: ExpertsMatch) -> fx.Node:
        if family_of(m.experts) is not EXPERTS:
            raise Rejection("rows in the order of their experts, with weights that are no plain floats", m.out, "rewrite")
        return self.locate(ends, m.out)

    def _check(self, m: ExpertsMatch, inputs: list[fx.Node], out: fx.Node) -> None:
        wrapped = [v for v in map(example_value, inputs) if is_traceable_wrapper_subclass(v)]
        whole = next((n.meta[WHY] for n in inputs if WHY in n.meta), None) or next(
            (why_not(v) for v in wrapped if not type(v).__module__.startswith("torch.")), None
        )  # torch's own (DTensor) know the ops
        if whole is not None:
            raise Rejection(whole, m.out, "rewrite", code="subclass")
        devices = {m.out.meta["val"].device, *(example_value(n).device for n in inputs)}
        if len(devices) > 1:
            raise Rejection(f"the block's tensors are on different devices: {', '.join(sorted(map(str, devices)))}", m.out, "rewrite")
        if any(self.position[n] > self.position[out] for n in inputs):
            raise Rejection("an input of the block is computed after its result", m.out, "rewrite")

    def _required(self, s: fx.Node | None, until: fx.Node, what: str) -> fx.Node:
        if s is None:
            raise Rejection(f"no tensor of the graph holds the {what}", until, "rewrite")
        return self._now(s, until)

    def _result(self, s: fx.Node) -> fx.Node:
        """The Dynamo node after which the result is there: the one that holds it, or `result[...] = y`."""
        return self.shadow.statement[s] if s in self.shadow.statement else self.locate(s, s)

    def lead(self, m: ExpertsMatch) -> tuple[Any, ...] | None:
        """The result's leading sizes, numbers, or where to read them; None where it is [T, H]."""
        if m.out.meta["val"].ndim == 2:
            return None
        lead = shape_of(m.tokens)[:-1]
        out: list[Any] = []
        for s in shape_of(m.out)[:-1]:
            same = [d for d, x in enumerate(lead) if same_size(s, x)]
            if isinstance(s, int):
                out.append(s)
            elif same:
                out.append(("tokens", same[0]))
            elif same_size(s, rows(m.tokens)):
                out.append(("rows",))
            else:
                raise Rejection(f"the result's shape {shape_of(m.out)} is not that of the tokens", m.out, "rewrite")
        return tuple(out)

    def aliases(self, s: fx.Node) -> list[fx.Node]:
        """Dynamo nodes that are the result's tensor object: the result, and what it was accumulated into in place."""
        out = [self.shadow.statement[s]] if s in self.shadow.statement else []
        out.extend(self.shadow.origin.get(s, ()))
        while written := mutated_args(s):
            s = written[0]
            out.extend(self.shadow.origin.get(s, ()))
        return list(dict.fromkeys(out))
