"""Whether the shared expert goes into the experts' op, which runs it beside the routed experts: conditions and plan."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from ...calls import is_write
from ...ir import Experts, Overlap, Rejection
from ...ir.families import EXPERTS, EXPERTS_STORED, family_of
from ..aten import names
from ..aten.conditions import may_train, under_autocast
from ..aten.effects import mutated_args
from ..aten.element import call_args, dtype_of, shape_of
from ..aten.names import op_name
from ..aten.node import example_value
from ..recover.fused import is_fused
from ..recover.region import Block, inside
from ..recover.shared import SharedMatch, SharedOperands
from .layout import dims_by_stride
from .plan import Operand, SharedPlan
from .planner import Planner
from .target import Target


def mode(graph: fx.Graph, options: Any, target: Target) -> int | None:
    """The op's `overlap` where the shared expert may go into it: where the target has an op for both, when no gradient may be wanted.

    "auto" leaves it to the op, which knows the number of tokens, when to use a side stream.
    """
    if not target.shares or options.overlap_shared is False or may_train(graph):
        return None
    return int(Overlap.SIDE if options.overlap_shared is True else Overlap.BY_TOKENS)


def takes(experts: Experts, target: Target) -> bool:
    """Whether the op of such routed experts takes a shared one: none does beside low-rank pairs, and not every target's in few bits."""
    return {EXPERTS: target.shares, EXPERTS_STORED: target.shares_coded}.get(family_of(experts), False)


def plan_shared(b: Block, planner: Planner, overlap: int) -> SharedPlan | None:
    """How the shared expert goes into the op of a block; None where the graph goes on computing it."""
    s = b.shared
    if s is None or s.operands is None or under_autocast(planner.shadow.dynamo.graph, b.match.out.meta["val"].device.type):
        return None
    region = inside([s.node], filter(None, (b.match.tokens, *s.operands.params(), s.operands.gate)))
    if isinstance(region, Rejection) or not _private(region, s.node) or not _one_dtype(b, s, s.operands, region):
        return None
    try:
        join = _as_base(b, s) or _as_sum(b, s, planner)
        return None if join is None else _plan(b, s.operands, planner, overlap, *join)
    except Rejection:  # a value that the Dynamo graph does not hold
        return None


def _private(region: list[fx.Node], out: fx.Node) -> bool:
    """Nobody else reads what is computed inside; the tokens in another shape may be read by all."""
    members, computed = set(region), set()
    for n in region:
        if op_name(n) in names.CONTRACTION or any(x in computed for x in n.all_input_nodes):
            computed.add(n)
    return all(u in members or op_name(u) in names.SIZE for n in computed if n is not out for u in n.users)


def _one_dtype(b: Block, s: SharedMatch, o: SharedOperands, region: list[fx.Node]) -> bool:
    """Products in the dtype of the routed experts', and so all that goes in and comes out."""
    products = [n for n in region if op_name(n) in names.CONTRACTION]
    nodes = [b.match.tokens, s.node, *o.params(), *products, *(x for n in products for x in n.all_input_nodes)]
    return {dtype_of(n) for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)} == {b.match.experts.dtype}


# ---- where routed and shared result come together ------------------------------------------------------------------


def _as_base(b: Block, s: SharedMatch) -> tuple[str | None, str | None] | None:
    """The experts add it themselves: nothing else reads it."""
    m, node = b.match, s.node
    if m.base is None or m.base is not node:
        return None
    readers = [m.out] if is_fused(m.out) else inside([m.out], b.expert_inputs())
    return None if isinstance(readers, Rejection) or not set(node.users) <= set(readers) else (None, None)


def _as_sum(b: Block, s: SharedMatch, planner: Planner) -> tuple[str, str] | None:
    """(the sum, its routed part) in the Dynamo graph: the only reader of both results, or None."""
    out: fx.Node = b.match.out if b.fold.last is None else b.fold.last
    routed, shared = _chain(out), _chain(s.node)
    users, dtype = list(routed[-1].users), b.match.experts.dtype
    if len(users) != 1 or list(shared[-1].users) != users or not _plain_sum(users[0], routed[-1], shared[-1], dtype):
        return None
    if any(dtype_of(n) not in (dtype, torch.float32, torch.float64) for n in (*routed, *shared)):
        return None  # rounded on the way
    found = planner.shadow.origin.get(users[0], [])
    if len(found) != 1 or is_write(found[0]):
        return None
    (total,) = found
    image = planner.shadow.image
    parts = {id(c): [x for x in total.all_input_nodes if image.get(x) in c] for c in (routed, shared)}
    rest, other = parts[id(routed)], parts[id(shared)]
    if len(rest) != 1 or len(other) != 1:
        return None
    now, then = example_value(rest[0]), example_value(total)
    if now.shape != then.shape or now.dtype != then.dtype or now.device != then.device or dims_by_stride(now) != dims_by_stride(then):
        return None
    return total.name, rest[0].name


def _chain(n: fx.Node) -> list[fx.Node]:
    """n and what only shows its rows in another shape or dtype, as long as that is its only reader."""
    out = [n]
    while len(n.users) == 1:
        (n,) = n.users
        if op_name(n) not in names.RESHAPE | names.SAME | names.CAST or mutated_args(n):
            break
        out.append(n)
    return out


def _plain_sum(u: fx.Node, a: fx.Node, b: fx.Node, dtype: torch.dtype) -> bool:
    if op_name(u) != "add" or mutated_args(u) or set(u.all_input_nodes) != {a, b} or call_args(u).alpha != 1:
        return False
    return shape_of(a) == shape_of(b) == shape_of(u) and dtype_of(a) == dtype_of(b) == dtype_of(u) == dtype


# ---- the plan ------------------------------------------------------------------------------------------------------


def _plan(b: Block, o: SharedOperands, planner: Planner, overlap: int, total: str | None, rest: str | None) -> SharedPlan | None:
    m, fused = b.match, is_fused(b.match.out)
    op = planner.locate(m.out, m.out)
    if fused and (op.kwargs or len(op.args) != len(op.target._schema.arguments)):  # type: ignore[union-attr]
        return None
    params = {n: planner.locate(n, m.out) for n in o.params()}
    if any(n.op not in ("placeholder", "get_attr") or any(map(is_write, n.users)) for n in (params[q.node] for q in o.operands.up)):
        return None  # kernels ask for these weights before what stands before the op has ended
    if any(planner.position[n] > planner.position[op] for n in params.values()):
        return None
    gate: fx.Node | None = None
    moved: list[fx.Node] = []
    if o.gate is not None:
        gate = planner.locate(o.gate, o.gate)
        before = None if planner.overwritten(o.gate) else _before(gate, op, planner)
        if before is None:
            return None
        moved = before
    devices = {example_value(n).device for n in (op, *params.values(), *([] if gate is None else [gate]))}
    if len(devices) != 1:
        return None

    return SharedPlan(
        op=op.name if fused else None,
        experts=o.experts,
        operands=o.operands.map(lambda q: Operand(params[q.node].name, q.view)),
        gate=None if gate is None else gate.name,
        moved=tuple(n.name for n in moved),
        total=total,
        rest=rest,
        overlap=overlap,
    )


def _before(gate: fx.Node, op: fx.Node, planner: Planner) -> list[fx.Node] | None:
    """What has to move in front of the op for the gate to be there, in order; None when it cannot."""
    at = planner.position
    if at[gate] < at[op]:
        return []
    between = [n for n in planner.shadow.dynamo.graph.nodes if at[op] <= at[n] <= at[gate]]
    if any(is_write(n) or n.op not in ("call_function", "call_method") or "enabled" in str(n.target) for n in between):
        return None
    needed = {gate}
    for n in reversed(between):
        if n in needed:
            needed.update(x for x in n.all_input_nodes if at[x] >= at[op])
    return None if op in needed else [n for n in between if n in needed]
