"""A rewrite as data: which Dynamo nodes, by name, become which fused ops. `execute` carries it out.

Plans hold names and plain values only, so that they can be kept on disk and replayed on an equal graph.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy as sp
import torch
import torch.fx as fx

from ...ir import Experts
from ...ir.operands import CODED, PLAIN, Join, Operands
from ...ir.placement import physical
from ...ops import bundled, family_of, shared_args
from ..aten.effects import live_nodes, remove_dead
from ..aten.node import example_value
from .calls import after, call, joined, method, normalised, rows
from .layout import dims_by_stride, of_its_own, restrided

ops = torch.ops.moe_compile


class Operand(NamedTuple):
    """A node by its name, seen as that shape, its dims in that order."""

    name: str
    view: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RoutePlan:
    """weights, ids = route(logits, bias, table, *plain), and the nodes that read it from then on."""

    logits: str
    bias: Operand | None
    table: Operand | None
    num_experts: int
    plain: tuple[Any, ...]
    normaliser: sp.Expr | None
    ids: tuple[str, ...]
    weights: tuple[str, ...]


@dataclass(frozen=True)
class PlacedPlan:
    """ids = physical(logical, table, world, rank): see `ir.placement`."""

    logical: str
    table: str
    world: int
    rank: int


@dataclass(frozen=True)
class ExpertsPlan:
    """out = experts(tokens, ids, weights, ...), or experts_stored(...); ids or weights None: those of the route op.

    `same_tensor`: nodes that are the result's tensor object (what was accumulated into in place). `written`: what writes onto `base`.
    `wraps`: ids below zero count from the last expert. `constant`: every weight, where no node holds them.
    `ends`: group ends, where rows stand in the order of their experts; ids and weights are None then.
    `lead`: the result's leading sizes when it is not [T, H]: numbers, ("tokens", d) or ("rows",). `join`: of several low-rank pairs.
    `placed`: what makes `ids` out of logical ones, where a target has an op for it. `only`: there is one expert, which all rows go to.
    """

    out: str
    same_tensor: tuple[str, ...]
    tokens: str
    ids: str | None
    weights: str | None
    k: int
    operands: Operands[Operand]
    base: str | None
    experts: Experts
    lead: tuple[Any, ...] | None
    wraps: bool = False
    constant: float | None = None
    ends: str | None = None
    join: Join | None = None
    placed: PlacedPlan | None = None
    written: tuple[str, ...] = ()
    only: bool = False


@dataclass(frozen=True)
class SharedPlan:
    """The shared expert goes into the experts' op, as `experts_shared` or `experts_stored_shared`.

    `op`: that op where capture put it in, None for the plan's own. `gate`: the node [.., 1] that multiplies the shared expert.
    `moved`: what computes the gate and stood behind the op. `total`: the sum of routed and shared result, which `rest` (the routed
    part) takes the place of; None when the op itself added the shared result. `overlap`: as the op's.
    """

    op: str | None
    experts: Experts
    operands: Operands[Operand]
    gate: str | None
    moved: tuple[str, ...]
    total: str | None
    rest: str | None
    overlap: int


@dataclass(frozen=True)
class BlockPlan:
    """One block: its routing, its experts, or only the first when capture has put the experts in already.

    `folded`: (product that the weights carry now, the node that takes its place). `reader`: the experts' op that capture put in,
    where it must read weights that nobody else may read. `fixed`: variable floats that the recovered numbers are the values of.
    `alone`: the shared expert, where it is an op of its own, which comes first.
    """

    route: RoutePlan | None
    experts: ExpertsPlan | None
    folded: tuple[tuple[str, str], ...] = ()
    fixed: tuple[str, ...] = ()
    reader: str | None = None
    shared: SharedPlan | None = None
    alone: ExpertsPlan | None = None

    def reads(self) -> list[str]:
        """Names of the nodes that the plan's operations read."""
        r, e = self.route, self.experts
        out: list[str] = []
        if r is not None:
            out += [r.logits, *(q[0] for q in (r.bias, r.table) if q is not None)]
        if e is not None:
            out += [e.tokens, *(n for n in (e.ids, e.weights, e.base, e.ends) if n is not None)]
            out += [q[0] for q in e.operands]
        return out

    def names(self) -> list[str]:
        """Names of all nodes that the plan reads or replaces."""
        r, e = self.route, self.experts
        gone = [*(() if r is None else (*r.ids, *r.weights)), *(() if e is None else (e.out, *e.same_tensor))]
        return [*self.reads(), *gone, *(n for pair in self.folded for n in pair), *(() if self.reader is None else (self.reader,))]


@dataclass
class Executor:
    """Carries plans out on one graph; `now` says what stands for a node that an earlier plan replaced."""

    graph: fx.Graph
    now: dict[fx.Node, fx.Node] = field(default_factory=dict)
    routed: dict[RoutePlan, tuple[fx.Node, fx.Node]] = field(default_factory=dict)  # blocks may share a router

    def __post_init__(self) -> None:
        self.names = {n.name: n for n in self.graph.nodes}
        self.position = {n: i for i, n in enumerate(self.graph.nodes)}

    def node(self, name: str) -> fx.Node:
        n = self.names[name]
        while n in self.now:
            n = self.now[n]
        return n

    def block(self, plan: BlockPlan) -> tuple[fx.Node | None, fx.Node | None]:
        """Emit one block; returns the nodes of the weights and ids in use."""
        weights = ids = op = None
        for name in plan.fixed:
            float(example_value(self.names[name]))  # a guard: another value is another graph
        if plan.route is not None:
            if plan.route not in self.routed:
                self.routed[plan.route] = self.route(plan.route)
            weights, ids = self.routed[plan.route]
        if plan.alone is not None:
            p = plan.alone
            self.experts(p, None, None if p.weights is None else self.node(p.weights))
        if plan.experts is not None:
            p = plan.experts
            ids = self.node(p.ids) if p.ids is not None else ids
            weights = self.node(p.weights) if p.weights is not None else weights
            op = self.experts(p, ids, weights)
        if plan.reader is not None and weights is not None:
            self.names[plan.reader].update_arg(2, weights)
        for product, source in plan.folded:
            self.leave_out(self.names[product], self.node(source))
        if plan.shared is not None:
            named = plan.shared.op
            self.shared(plan.shared, op if named is None else self.node(named))
        return weights, ids

    # ---- gating --------------------------------------------------------------------------------------------------------

    def route(self, p: RoutePlan) -> tuple[fx.Node, fx.Node]:
        """The op stands right after its inputs."""
        inputs = [self.node(p.logits), *(self.node(q[0]) for q in (p.bias, p.table) if q is not None)]
        logits = inputs[0]
        where = after(max(inputs, key=lambda n: self.position.get(n, -1)))
        with self.graph.inserting_before(where):
            bias, table = (None if q is None else self.operand(q) for q in (p.bias, p.table))
            tensors = (rows(self.graph, logits, p.num_experts), bias, None if p.normaliser is not None else table)
            pair = call(self.graph, ops.route.default, (*tensors, *p.plain), logits)
            weights = call(self.graph, operator.getitem, (pair, 0), logits)
            ids = call(self.graph, operator.getitem, (pair, 1), logits)
            if p.normaliser is not None:
                weights = normalised(self.graph, p.normaliser, weights)
                if table is not None:
                    picked = call(self.graph, operator.getitem, (table, ids), logits)
                    weights = call(self.graph, operator.mul, (weights, self.cast_to(picked, p.plain[-1], table)), logits)
        for names, new in ((p.ids, ids), (p.weights, weights)):
            for name in names:
                old = self.names[name]
                new.meta.setdefault("example_value", example_value(old))
                old.replace_all_uses_with(new)
                self.now[old] = new
        return weights, ids

    def leave_out(self, product: fx.Node, source: fx.Node) -> None:
        product.replace_all_uses_with(source)
        self.now[product] = source
        self.graph.erase_node(product)

    # ---- experts -------------------------------------------------------------------------------------------------------

    def experts(self, p: ExpertsPlan, ids: fx.Node | None, weights: fx.Node | None) -> fx.Node:
        """The op stands where the result was computed; everyone who reads the result from there on reads the op."""
        out, tokens = self.names[p.out], self.node(p.tokens)
        aliases = [self.names[n] for n in p.same_tensor]
        value = next(v for d in (out, *aliases) if (v := example_value(d)) is not None)  # `tensor[...] = y` has none
        readers = [u for d in aliases for u in d.users if self.position.get(u, -1) > self.position[out]]
        g, dtype = self.graph, p.experts.dtype
        with g.inserting_before(out), self.no_autocast(value.device.type, out):
            family = family_of(p.experts)
            nodes = self.parameters(p, out)
            x = self.cast(rows(g, tokens, p.experts.hidden), self.names[p.tokens], dtype)
            add = None if p.base is None else rows(g, self.node(p.base), p.experts.out_features)
            rest = (*nodes.lists(family.names), add, *family.plain(p.experts))
            if p.ends is not None:
                new = op = call(g, ops.experts_sorted.default, (x, self.node(p.ends), *rest), out)
            else:
                new = op = call(g, getattr(ops, family.op).default, (x, *self.chosen(p, ids, weights, out), *rest), out)
            if value.dtype != dtype:
                new = method(g, "to", (new, value.dtype), out)
            if p.lead is not None:
                sizes = [
                    s if isinstance(s, int) else method(g, "size", (tokens, s[1]) if s[0] == "tokens" else (new, 0), out) for s in p.lead
                ]
                new = method(g, "reshape", (new, *sizes, p.experts.out_features), out)
            new = restrided(g, new, dims_by_stride(value))
        new.meta["example_value"] = of_its_own(value)
        for u in readers:
            for d in aliases:
                u.replace_input_with(d, new)
        for d in aliases:
            self.now[d] = new
        for write in [self.names[name] for name in reversed(p.written)]:
            write.replace_all_uses_with(write.args[0])  # what still reads it was made for the next write
            g.erase_node(write)
        return op

    def parameters(self, p: ExpertsPlan, out: fx.Node) -> Operands[fx.Node]:
        """As the op takes them."""
        nodes: Operands[fx.Node] = Operands.named(
            **{name: [self.parameter(name, q, p.experts) for q in group] for name, group in p.operands.by_name().items()}
        )
        return nodes if p.join is None else joined(self.graph, p.join, nodes, out)

    def chosen(self, p: ExpertsPlan, ids: fx.Node | None, weights: fx.Node | None, out: fx.Node) -> tuple[fx.Node, fx.Node]:
        """ids and weights [T, k] as the op takes them."""
        g = self.graph
        if p.placed is not None:
            logical = rows(g, self.node(p.placed.logical), p.k)
            ids = call(g, physical, (logical, self.node(p.placed.table), p.placed.world, p.placed.rank), out)
        if p.only:
            x = rows(g, self.node(p.tokens), p.experts.hidden)
            zeros = method(g, "new_zeros", (x, method(g, "size", (x, 0), out), 1), out)
            ids = self.cast_to(zeros, torch.int64, out)
        assert ids is not None
        ids = rows(g, ids, p.k)  # what is made of them here has no example value
        ids = call(g, torch.remainder, (ids, p.experts.num_experts), out) if p.wraps else ids
        ids = call(g, operator.sub, (ids, p.experts.first), out) if p.experts.first else ids
        if weights is None:
            assert p.constant is not None
            weights = call(g, torch.full_like, (self.cast_to(ids, p.experts.dtype, out), p.constant), out)
        return ids, rows(g, weights, p.k)

    def shared(self, p: SharedPlan, op: fx.Node | None) -> None:
        """experts(x, ..., add) + shared(x) = experts_shared(x, ..., add, shared's parameters), and so of `experts_stored`."""
        assert op is not None
        g = self.graph
        coded = op.target is ops.experts_stored.default
        both, names = (ops.experts_stored_shared.default, CODED) if coded else (ops.experts_shared.default, PLAIN)
        for name in p.moved:
            op.prepend(self.names[name])
        with g.inserting_before(op):
            lists = p.operands.map(self.operand).lists()
            gate = None if p.gate is None else rows(g, self.node(p.gate), 1)
            x, ids, weights, routed, (add, *routed_plain) = bundled(op.args, names)
            add = add if p.total is not None else None
            args = (x, ids, weights, *routed.lists(names), add, *routed_plain, *lists, gate, *shared_args(p.experts, p.overlap))
            new = call(g, both, args, op)
        if "example_value" in op.meta:
            new.meta["example_value"] = op.meta["example_value"]
        op.replace_all_uses_with(new)
        self.now.update({old: new for old, by in self.now.items() if by is op} | {op: new})
        g.erase_node(op)
        if p.total is not None and p.rest is not None:
            self.leave_out(self.names[p.total], self.node(p.rest))

    def cast_to(self, n: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
        return method(self.graph, "to", (n, dtype), like)

    def cast(self, n: fx.Node, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        return n if example_value(source).dtype == dtype else method(self.graph, "to", (n, dtype), n)

    def parameter(self, name: str, q: Operand, experts: Experts) -> fx.Node:
        """A weight or bias in the dtype of the products; codes and their scales stay as they are stored."""
        source = self.names[q[0]]
        stays = name not in PLAIN or getattr(experts, f"{name}_stored", None) is not None
        return self.operand(q) if stays else self.cast(self.operand(q), source, experts.dtype)

    @contextlib.contextmanager
    def no_autocast(self, device: str, like: fx.Node) -> Iterator[None]:
        """Under autocast the op still computes in the dtype that was recovered: casts are explicit."""
        known = torch.amp.is_autocast_available(device)  # of no "meta", where a model is only told about
        inside = (known and torch.is_autocast_enabled(device)) or any("_enter_autocast" in str(n.target) for n in self.names.values())
        if not inside:
            yield
            return
        mode = torch.amp.autocast_mode
        entered = call(self.graph, mode._enter_autocast, (device, torch.get_autocast_dtype(device), False, True), like)
        yield
        call(self.graph, mode._exit_autocast, (entered,), like)

    def operand(self, q: Operand) -> fx.Node:
        n = self.node(q.name)
        n = n if q.view is None else method(self.graph, "view", (n, *q.view), n)
        return n if q.order is None else method(self.graph, "permute", (n, *q.order), n)


def execute(gm: fx.GraphModule, plans: list[BlockPlan]) -> None:
    """Rewrite the graph; nodes that only the old regions needed go out."""
    alive = live_nodes(gm.graph)
    run = Executor(gm.graph)
    for p in plans:
        run.block(p)
    remove_dead(gm.graph, alive)
    gm.graph.lint()
    gm.recompile()
