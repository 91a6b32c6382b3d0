"""Experts of a recorded function, for loops that are read by example (`moe_compile/loops`)."""

from __future__ import annotations

import torch.fx as fx

from ..ir import MoeBlock, Rejection
from . import terms as T
from . import trace
from .aten.effects import Memory
from .aten.element import Puller
from .aten.merge import merge_made
from .prove.claims import Claims
from .recover.counted import named
from .recover.match import ExpertsMatch
from .recover.materialise import hold
from .recover.odd import between, mixing
from .recover.region import Block, RoutingNodes, routing_nodes
from .recover.rows import MIXED
from .recover.selections import is_id_input, is_selection
from .steps import proved
from .terms import unify
from .terms.budget import BUDGET, deep_recursion
from .work import Recovered

NO_SUM = "what it did on examples is no sum over chosen experts"


def recover_recorded(gm: fx.GraphModule) -> Recovered | Rejection:
    """Experts of a recorded function: ATen calls with `meta["val"]`. With `gm.meta["roles"]` ids [T, k] are among its placeholders,
    without them the router is in the recording too.

    The result's `ir.boundary` maps tokens, ids, weights, up, down, up_bias, down_bias, base to nodes of `gm`, `views` to the
    shapes in which flattened parameters are read.
    """
    with deep_recursion(), trace.loop(gm), T.limited():
        try:
            with trace.phase("find", "experts at every node that could be their combined result: what is one element of it?"):
                block = _block(*_read(gm))
            with trace.phase("prove", "the formulas hold on probes, run against the loop's own operations"):
                if (refusal := proved(Claims(block, given=True).of_meaning(), block)) is not None:
                    raise refusal
        except Rejection as r:
            return _explained(gm, r)
        except T.TooLarge as e:
            return Rejection(str(e), None, "record", code=BUDGET)
        return Recovered(block.ir, "", True, "")


def _explained(gm: fx.GraphModule, r: Rejection) -> Rejection:
    """What is told of a recording that was not read: that tokens are dropped, or what stands inside its experts."""
    for choice in (n for n in gm.graph.nodes if is_id_input(n) or is_selection(n)):
        if r.stage in ("record", "validate") and (odd := named(choice) or between(choice, set())) is not None:
            return odd
        if r.reason == MIXED and (node := mixing(choice)) is not None:
            return Rejection(r.reason, node, r.stage, code=r.code)
    return r


def _read(gm: fx.GraphModule) -> tuple[ExpertsMatch, RoutingNodes]:
    merge_made(gm.graph, Memory(gm.graph), set())
    for _ in range(3):  # ids and weights may have to be put into tensors of their own
        T.reset()
        unify.reset()
        m, p = _match(gm)
        nodes = routing_nodes(m, p, recorded=True)
        if not hold(m, p, nodes):
            break
    return m, nodes


def _match(gm: fx.GraphModule) -> tuple[ExpertsMatch, Puller]:
    found = trace.finder(gm.graph, set(), Memory(gm.graph), id_inputs="roles" in gm.meta).run()
    if not found.matches:
        raise found.rejected[0] if found.rejected else Rejection(NO_SUM, None, "record")
    match, *more = found.matches
    if more:
        raise Rejection("the recorded function holds more than one block of experts", match[0].out, "record")
    return match


def _chosen(ids: fx.Node) -> set[int]:
    """The numbers among ids on the probes that they were recorded with: one of them that no expert goes with stands for none."""
    run, gm = fx.Interpreter(ids.graph.owning_module), ids.graph.owning_module
    for n in gm.graph.nodes:
        if n.op == "placeholder" and "real" not in n.meta:
            return set()
        run.env[n] = n.meta["real"] if n.op == "placeholder" else run.run_node(n)
        if n is ids:
            break
    return set(run.env[ids].unique().tolist())


def _block(m: ExpertsMatch, nodes: RoutingNodes) -> Block:
    ids, weights = nodes.ids, nodes.weights
    if ids is None or weights is None:
        raise Rejection("no tensor of the recorded function holds its ids or weights", m.out, "record")
    if nodes.wraps:
        raise Rejection("ids that index expert weights may be negative", m.out, "record")
    if m.experts.first:
        raise Rejection(f"experts before number {m.experts.first} were not hit when it was recorded", m.out, "record")
    count, possible = m.experts.num_experts + m.experts.num_identity, T.upper(m.ids) if m.ids.op == "topk" else None
    if possible is not None and possible >= count and len(_chosen(ids)) <= possible:
        why = f"the router chooses among {possible + 1} numbers, and in the example experts were applied for the first {count} only"
        raise Rejection(why, m.out, "record")
    ir = MoeBlock(None, m.experts, None, "")
    ir.boundary.update(tokens=m.tokens, ids=ids, weights=weights, out=m.out, base=m.base)
    ir.boundary.update(m.nodes())
    ir.boundary["views"] = {q.node: q.view for q in m.operands if q.view is not None}
    ir.boundary["orders"] = {q.node: q.order for q in m.operands if q.order is not None}
    ir.boundary["join"] = m.join
    return Block(m, None, ir, ids, weights, ids, None, nodes.twins)
