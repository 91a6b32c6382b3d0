"""What the rewrite emits, run against the subgraph that it replaces.

The plan is carried out on a small graph of its own: what it reads are placeholders, what it replaces are stubs. So the very code
that will rewrite the user's graph runs, and the registered ops, on the values that the block's own subgraph has on a probe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ... import ops  # noqa: F401 (defines them)
from ...ir import Rejection
from ..aten.element import shape_of
from ..aten.node import example_value
from ..aten.shadow import Shadow
from ..recover.fused import is_fused
from ..recover.region import Block
from ..rewrite.plan import BlockPlan, Executor
from . import probe
from .claims import graph_choice
from .edge import Small, edge_of
from .engine import Claim, Differs, Env
from .region import Region
from .sizes import regroup


def emitted_claim(b: Block, plan: BlockPlan, shadow: Shadow) -> Claim | Rejection | None:
    """The emitted nodes compute what the block's subgraph does; None where the plan emits nothing."""
    if plan.route is None and plan.experts is None:
        return None
    region = Region.between(_boundary(b), _replaced(b))
    if isinstance(region, Rejection):
        return region
    names = {n.name: n for n in shadow.dynamo.graph.nodes}
    images = {name: shadow.image[names[name]] for name in plan.names() if names[name] in shadow.image}
    r, e = plan.route, plan.experts
    if e is not None:  # a tensor that is written by `x[i] = y` has another value where the op stands than where it was made
        read = ((e.tokens, b.match.tokens), (e.ids, b.ids), (e.weights, b.weights))
        images |= {name: n for name, n in read if name is not None and n in shadow.statement}
    plain = (None if r is None else (r.plain, r.normaliser), None if e is None else (e.experts, e.k, e.lead, e.join))
    roles = tuple(region.number.get(images[name]) if name in images else None for name in plan.names())
    key = (replace(b.ir, boundary={}), b.fold.factor, b.masked, b.wraps, plain, roles)
    edge = edge_of(b, mapped=False)
    meant = partial(_result, b, plan, names, images)
    says = "the emitted operations and the block disagree"
    return Claim("emitted", says, edge, region, partial(_graph_result, b), meant, key, probe.USUAL[:1])


def _replaced(b: Block) -> list[fx.Node]:
    """Shadow nodes whose values the emitted graph must give: the result, or the routing alone where the experts are fused already."""
    if is_fused(b.match.out):
        return [n for n in (b.weights, b.raw_ids, b.ids if b.masked else None) if n is not None]
    return [b.match.out if b.fold.last is None else b.fold.last]


def _boundary(b: Block) -> list[fx.Node]:
    """What the subgraph is computed from."""
    if is_fused(b.match.out):
        return b.routing_inputs()
    given = (b.ids if b.ends is None else b.ends, b.weights, *b.twins)
    routed = b.routing_inputs() if b.gating is not None else [n for n in given if n is not None]
    if b.gating is not None and b.ids is not b.raw_ids and not b.masked:
        routed = [*routed, b.ids]  # mapped by the user's own nodes, which stay: their result is an input of the experts
    return list(dict.fromkeys(n for n in (b.match.tokens, b.match.base, *b.params(), *routed) if n is not None))


def _graph_result(b: Block, env: Env) -> Tensor:
    if not is_fused(b.match.out):
        return env[_replaced(b)[0]]
    _, weights, valid = graph_choice(b, env)
    return weights * valid * b.fold.factor


def _result(b: Block, plan: BlockPlan, names: dict[str, fx.Node], images: dict[str, fx.Node], env: Env) -> Tensor:
    """The result of the emitted nodes; weights in the order in which the graph has its experts."""
    graph, results = small_graph(in_small(b, plan, env.small), names)
    got = interpret(graph, lambda name: env[images[name]], results)
    if not is_fused(b.match.out):
        return got[0]
    ids, _, valid = graph_choice(b, env)
    weights, chosen = (t.reshape(ids.shape) for t in got)
    here, there = chosen.sort(-1), ids.sort(-1)  # a selection may come in any order
    if not torch.equal(here.values, there.values):
        raise Differs("other experts are selected")
    back = there.indices.argsort(-1)
    return weights.gather(-1, here.indices).gather(-1, back) * valid


def in_small(b: Block, plan: BlockPlan, small: Small) -> BlockPlan:
    """The plan in the sizes of a probe: all numbers in it that are sizes."""
    e, m = plan.experts, b.match
    if e is None:
        return plan

    views = iter([small.views[q] for q in m.operands])
    operands = e.operands.map(lambda operand: operand._replace(view=next(views)))
    lead: tuple[Any, ...] | None = e.lead
    if lead is not None:
        rows, new = shape_of(m.tokens)[:-1], small.shapes[m.tokens][:-1]
        sizes = [s for options in regroup(small.sizes, rows, new, shape_of(m.out)[:-1]) for s in options[0]]
        lead = tuple(size if isinstance(s, int) else s for s, size in zip(lead, sizes, strict=True))
    return replace(plan, experts=replace(e, experts=e.experts.resized(dict(small.sizes.atoms)), lead=lead, operands=operands))


# ---- a graph with only what a plan needs -------------------------------------------------------------------------------


def stub(*_: Any) -> None:
    """Stands for an operation of the user's that a plan replaces."""


def view_stub(x: Any) -> Any:
    """Stands for the user's views of the result, between it and a product that the weights carry."""
    return x


def small_graph(plan: BlockPlan, names: dict[str, fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """The plan carried out on placeholders and stubs: (the graph, the nodes that hold the result, or weights and ids)."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def add(op: str, name: str, args: tuple[Any, ...] = (), target: Any = stub) -> fx.Node:
        if name not in made:
            made[name] = graph.create_node(op, name if op == "placeholder" else target, args, name=name)
            made[name].meta["example_value"] = example_value(names[name])
        return made[name]

    e = plan.experts
    gone = [*(() if plan.route is None else (*plan.route.ids, *plan.route.weights)), *(() if e is None else (e.out, *e.same_tensor))]
    gone = [name for name in gone if e is None or name != e.base]
    for name in plan.reads():
        if name not in gone:
            add("placeholder", name)
    for name in gone:
        add("call_function", name)
    if plan.reader is not None:
        add("call_function", plan.reader, (None, None, None))
    last = made[e.out] if e is not None else None
    for product, source in plan.folded:
        seen = add("call_function", source) if last is None else add("call_function", source, (last,), view_stub)
        last = add("call_function", product, (seen,))
    output = graph.output(last) if e is not None else None
    e = None if e is None else replace(e, written=())
    weights, ids = Executor(graph).block(BlockPlan(plan.route, e, plan.folded, (), plan.reader))
    if e is None or output is None:
        assert weights is not None and ids is not None
        return graph, [weights, ids]
    assert isinstance(output.args[0], fx.Node)
    return graph, [output.args[0]]


def interpret(graph: fx.Graph, value: Callable[[str], Any], results: list[fx.Node]) -> list[Tensor]:
    """Run a small graph in float64, its ops as they are registered; every float type of 16 bits and more is float64."""
    env: dict[fx.Node, Any] = {}

    def load(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return env[a]
        wide = isinstance(a, torch.dtype) and a.is_floating_point and a.itemsize > 1  # what codes and rounded rows are stays
        return torch.float64 if wide else a

    for n in graph.nodes:
        if n.op == "placeholder":
            env[n] = value(n.name)
        elif n.target is view_stub:
            env[n] = env[n.args[0]].reshape(value(n.name).shape)
        elif n.op == "call_method":
            x, *rest = fx.node.map_aggregate(n.args, load)
            env[n] = getattr(x, str(n.target))(*rest)
        elif n.op == "call_function" and n.target is not stub and "autocast" not in str(n.target):
            env[n] = n.target(*fx.node.map_aggregate(n.args, load))  # type: ignore[operator]
    return [env[r] for r in results]
