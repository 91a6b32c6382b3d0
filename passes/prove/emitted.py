"""What the rewrite emits, run against the subgraph that it replaces, on one probe.

The plan is carried out on a small graph of its own: what it reads are placeholders, what it replaces are stubs. So the very code
that will rewrite the user's graph runs, on the values that the block's own subgraph has on the probe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Rejection
from ...lowering import generic, routing, scaled
from ..aten.shadow import Shadow, example_value
from ..recover.fused import is_fused
from ..recover.region import Block, inside
from ..rewrite.plan import BlockPlan, Executor
from .probe import TROUBLE, Sizes, difference, evaluate, one_thread, probe_values, size_choices
from .validate import signature, valid_slots

ops = torch.ops.moe_compile
_proved: dict[Any, str | None] = {}


def check(b: Block, plan: BlockPlan, shadow: Shadow) -> Rejection | None:
    """None when the emitted nodes compute what the block's subgraph does; equal blocks are run once."""
    if plan.route is None and plan.experts is None:
        return None
    edge, outs = _boundary(b), _replaced(b)
    nodes = inside(outs, edge)
    if isinstance(nodes, Rejection):
        return nodes
    names = {n.name: n for n in shadow.dynamo.graph.nodes}
    number = {n: i for i, n in enumerate([*edge, *nodes])}
    roles = tuple((name, number.get(shadow.image.get(names[name]))) for name in plan.names())  # type: ignore[arg-type]
    r, e = plan.route, plan.experts
    plain = (None if r is None else (r.plain, r.normaliser), None if e is None else (e.experts, e.k, e.lead))
    key = (replace(b.ir, boundary={}), b.fold.factor, b.masked, b.wraps, plain, tuple(i for _, i in roles), signature(nodes, edge, outs))
    if key not in _proved:
        if len(_proved) > 4096:
            _proved.clear()
        with one_thread():
            _proved[key] = _problem(b, plan, shadow, names, nodes, edge)
    problem = _proved[key]
    return None if problem is None else Rejection(f"the emitted operations and the block disagree: {problem}", b.match.out, "validate")


def _replaced(b: Block) -> list[fx.Node]:
    """Shadow nodes whose values the emitted graph must give: the result, or the routing alone where the experts are fused already."""
    if is_fused(b.match.out):
        return [n for n in (b.weights, b.raw_ids, b.ids if b.masked else None) if n is not None]
    return [b.match.out if b.fold.last is None else b.fold.last]


def _boundary(b: Block) -> list[fx.Node]:
    """What the subgraph is computed from."""
    if is_fused(b.match.out):
        return b.routing_inputs()
    routed = b.routing_inputs() if b.gating is not None else [n for n in (b.ids, b.weights, *b.twins) if n is not None]
    if b.gating is not None and b.ids is not b.raw_ids and not b.masked:
        routed = [*routed, b.ids]  # mapped by the user's own nodes, which stay: their result is an input of the experts
    return list(dict.fromkeys(n for n in (b.match.tokens, b.match.base, *b.params(), *routed) if n is not None))


def _problem(b: Block, plan: BlockPlan, shadow: Shadow, names: dict[str, fx.Node], nodes: list[fx.Node], edge: list[fx.Node]) -> str | None:
    problem = None
    for sizes in size_choices(b):
        try:
            return _compare(b, plan, shadow, names, nodes, edge, sizes)
        except (*TROUBLE, KeyError, AttributeError) as e:
            problem = f"they could not be run on probing inputs ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    return problem


def _compare(
    b: Block, plan: BlockPlan, shadow: Shadow, names: dict[str, fx.Node], nodes: list[fx.Node], edge: list[fx.Node], sizes: Sizes
) -> str | None:
    outs = _replaced(b)
    values = probe_values(b, edge, sizes, 0)
    if b.gating is not None and b.gating.bias is not None and b.gating.gating.groups is not None:
        values[b.gating.bias] = values[b.gating.bias].abs()  # or the experts of losing groups may tie: any choice is right then
    env = evaluate(b, nodes, values, sizes, outs)
    graph, results = small_graph(plan, names)
    with torch.no_grad():
        got = interpret(graph, lambda name: env[shadow.image[names[name]]], results)
    if not is_fused(b.match.out):
        return difference(got[0], env[outs[0]])
    g = b.gating
    assert g is not None and b.raw_ids is not None and b.weights is not None
    weights, ids = (t.reshape(-1, g.gating.k) for t in got)
    want_weights, want_ids = (env[n].reshape(-1, g.gating.k) for n in (b.weights, b.raw_ids))
    here, there = ids.sort(-1), want_ids.sort(-1)  # a selection may come in any order
    if not torch.equal(here.values, there.values):
        return "other experts are selected"
    valid = valid_slots(b, env[b.ids].reshape(want_ids.shape)) if b.masked and b.ids is not None else torch.ones_like(want_ids)
    valid = valid.gather(-1, there.indices)
    want = want_weights.gather(-1, there.indices) * b.fold.factor
    return difference(weights.gather(-1, here.indices) * valid, want * valid)


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
    weights, ids = Executor(graph).block(BlockPlan(plan.route, e, plan.folded, (), plan.reader))
    if e is None or output is None:
        assert weights is not None and ids is not None
        return graph, [weights, ids]
    assert isinstance(output.args[0], fx.Node)
    return graph, [output.args[0]]


def interpret(graph: fx.Graph, value: Callable[[str], Any], results: list[fx.Node]) -> list[Tensor]:
    """Run a small graph in float64: the ops' own reference; every float type stands for float64."""
    env: dict[fx.Node, Any] = {}

    def load(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return env[a]
        if isinstance(a, (list, tuple)):
            return type(a)(load(x) for x in a)
        return torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a

    for n in graph.nodes:
        if n.op == "placeholder":
            env[n] = value(n.name)
        elif n.target is view_stub:
            env[n] = load(n.args[0]).reshape(value(n.name).shape)
        elif n.target is ops.route.default:
            logits, bias, table, *plain = load(n.args)
            env[n] = routing.forward(logits, bias, table, routing.Routing(*plain))
        elif n.target is ops.experts.default:
            act_ops, act_consts, *rest = n.args[8:]
            env[n] = generic.forward(*load(n.args[:8]), generic.Layout(tuple(act_ops), tuple(act_consts), *rest))[0]  # type: ignore
        elif n.target is ops.experts_scaled.default:
            act_ops, act_consts, *rest, bits, floor = n.args[10:]
            layout = generic.Layout(tuple(act_ops), tuple(act_consts), *rest)  # type: ignore
            env[n] = scaled.forward(*load(n.args[:10]), layout, bits, floor)  # type: ignore
        elif n.op == "call_method":
            x, *rest = load(n.args)
            env[n] = getattr(x, str(n.target))(*rest)
        elif n.op == "call_function" and n.target is not stub and "autocast" not in str(n.target):
            env[n] = n.target(*load(n.args))  # type: ignore[operator]
    return [env[r] for r in results]
