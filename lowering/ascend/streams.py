"""The shared expert on a side stream: which nodes go there, and how each graph mode is told.

One side stream for all layers, the routed branch issued first, nothing collective on the side. The side's nodes move right before the
combine that joins the streams, while the events they wait for are recorded where the main stream gets there: inputs outlive their use on
the side, and nothing is allocated on the main stream between the side's work and the join, so no buffer is reused early.

Two stages where the routed branch is dispatch, GEMM, activation, GEMM: gate and up run against the dispatch, down against the second GEMM.
One scope holds both, because a wait may stand anywhere in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...calls import is_write
from .side_stream import enter_side, exit_side, record_event, wait_event

LABEL = "moe_shared"  # of the one side stream
_PRODUCT = ("npu_grouped_matmul",)
_PRODUCTS = ("mm", "addmm", "bmm", "linear", "matmul", "baddbmm", "npu_quant_matmul")
_DISPATCH = ("npu_moe_init_routing_v2", "npu_moe_distribute_dispatch_v2")
_AROUND = ("where", "view", "reshape", "_unsafe_view")
_names = itertools.count()  # event names are unique in the process: graphs are captured side by side


@dataclass
class Side:
    """One shared expert: its nodes in order, the node whose value is added, where it joins, the routed value that it is added to there,
    and what it reads from the main stream."""

    nodes: list[fx.Node]
    result: fx.Node
    join: fx.Node
    routed: fx.Node
    inputs: list[fx.Node] = field(default_factory=list)

    def down(self) -> fx.Node | None:
        """The last product made of another one. A gate on the tokens is none, wherever it stands."""
        made: set[fx.Node] = set()  # out of a product
        last = None
        for n in self.nodes:
            later = any(a in made for a in n.all_input_nodes)
            if later and is_product(n):
                last = n
            if later or is_product(n):
                made.add(n)
        return last


@dataclass(frozen=True)
class Stages:
    """`first` (gate or up) not before `ids`, which the dispatch reads; `down` not before `activated`, which the second GEMM reads."""

    first: fx.Node
    ids: fx.Node
    down: fx.Node
    activated: fx.Node


def name_of(n: fx.Node) -> str:
    """The bare name of what a node calls."""
    if n.op == "call_method":
        return str(n.target)
    schema = getattr(n.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(n.target, "__name__", "")


def is_product(n: fx.Node) -> bool:
    return n.op in ("call_function", "call_method") and name_of(n) in _PRODUCTS


def find_sides(graph: fx.Graph) -> list[Side]:
    """Every combine with an addend that is computed for it alone and holds a matrix product."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    found = [_side(n, *joined, order) for n in graph.nodes if (joined := _joined(n)) is not None]
    return [s for s in found if s is not None]


def _joined(n: fx.Node) -> tuple[Any, fx.Node] | None:
    """(what a shared expert would be, the routed value) where the two come together: in the combine, or behind one over ranks."""
    if n.op != "call_function":
        return None
    if name_of(n) == "npu_moe_finalize_routing":
        return n.args[1], n.args[0]  # type: ignore[return-value]
    if name_of(n) not in ("add", "add_") or n.kwargs or len(n.args) != 2:
        return None
    a, b = n.args
    return (b, a) if _over_ranks(a) else (a, b) if _over_ranks(b) else None  # type: ignore[return-value]


def _over_ranks(n: Any) -> bool:
    """Whether a value is a combine over ranks, seen through what leaves tokens out and through views."""
    while isinstance(n, fx.Node) and name_of(n) in _AROUND:
        n = n.args[1 if name_of(n) == "where" else 0]
    return isinstance(n, fx.Node) and name_of(n) == "npu_moe_distribute_combine_v2"


def _side(join: fx.Node, result: Any, routed: fx.Node, order: dict[fx.Node, int]) -> Side | None:
    if not isinstance(result, fx.Node) or not _may_move(result) or set(result.users) != {join}:
        return None
    nodes = {result}
    while more := {a for n in nodes for a in n.all_input_nodes if a not in nodes and _may_move(a) and all(u in nodes for u in a.users)}:
        nodes |= more
    ordered = sorted(nodes, key=order.__getitem__)
    if not any(map(is_product, ordered)):
        return None
    inputs = [a for a in dict.fromkeys(a for n in ordered for a in n.all_input_nodes) if a not in nodes and a.op not in _CONSTANT]
    return Side(ordered, result, join, routed, inputs)


_CONSTANT = ("placeholder", "get_attr")


def _may_move(n: fx.Node) -> bool:
    """Pure, and no collective."""
    if n.op not in ("call_function", "call_method") or is_write(n) or "c10d" in str(n.target) or "npu_moe" in str(n.target):
        return False
    schema = getattr(n.target, "_schema", None)
    return schema is None or not schema.is_mutable


# ---- how a mode is told --------------------------------------------------------------------------------------------------


class Dialect:
    """What a graph mode calls its stream scopes and events. Methods put nodes at the graph's current insertion point."""

    def __init__(self, graph: fx.Graph, core_limit: Sequence[int] | None) -> None:
        self.graph, self.core_limit = graph, core_limit

    def record(self, tag: str) -> None:
        raise NotImplementedError

    def wait(self, tag: str) -> None:
        raise NotImplementedError

    def enter(self) -> None:
        raise NotImplementedError

    def exit(self) -> None:
        raise NotImplementedError

    def second_stage(self, side: Side, stages: Stages, tag: str) -> None:
        """record after the activation ... | wait, down. The first stage begins with the scope, which waits for the ids too."""
        with self.graph.inserting_after(_last_getitem(stages.activated)):
            self.record(tag)
        with self.graph.inserting_before(stages.down):
            self.wait(tag)


class NpugraphEx(Dialect):
    """Tagged events. npugraph_ex.record and .wait, which its documents name for passes, emit no event in the 2.13 wheel: a race."""

    def __init__(self, graph: fx.Graph, core_limit: Sequence[int] | None) -> None:
        super().__init__(graph, core_limit)
        self.ops: Any = torch.ops.npugraph_ex

    def record(self, tag: str) -> None:
        _make_event(tag)
        self.graph.call_function(self.ops.tagged_event_record.default, (tag, True))

    def wait(self, tag: str) -> None:
        self.graph.call_function(self.ops.tagged_event_wait.default, (tag, True))

    def enter(self) -> None:
        self.graph.call_function(self.ops.scope_enter.default, (["_user_stream_label", "_user_stream_priority"], [LABEL, "0"]))
        if self.core_limit is not None:
            cube, vector = map(str, self.core_limit)
            self.graph.call_function(self.ops.scope_enter.default, (["_op_aicore_num", "_op_vectorcore_num"], [cube, vector]))

    def exit(self) -> None:
        for _ in range(1 if self.core_limit is None else 2):
            self.graph.call_function(self.ops.scope_exit.default, ())


class Ge(NpugraphEx):
    """Scopes only: GE orders data edges across streams by itself, and has no tagged events."""

    def __init__(self, graph: fx.Graph, core_limit: Sequence[int] | None) -> None:
        super().__init__(graph, core_limit)
        self.ops = torch.ops.air

    def record(self, tag: str) -> None:
        pass

    def wait(self, tag: str) -> None:
        pass

    def second_stage(self, side: Side, stages: Stages, tag: str) -> None:
        """Control edges for both stages: without an event nothing holds the first back either."""
        first, down = side.nodes.index(stages.first), side.nodes.index(stages.down)
        self._hold(side.nodes[first:down], _rows(stages.first), stages.ids)
        self._hold([stages.down], _rows(stages.down), stages.activated)

    def _hold(self, nodes: Sequence[fx.Node], value: fx.Node, dependency: fx.Node) -> None:
        """The nodes read `value` not before `dependency` is there."""
        with self.graph.inserting_before(nodes[0]):
            late = self.graph.call_function(self.ops.wait_tensor.default, (value, dependency))
        late.meta.update(value.meta)
        for n in nodes:
            n.replace_input_with(value, late)


def _rows(product: fx.Node) -> fx.Node:
    """The operand that is no weight."""
    rows = product.args[1 if name_of(product) in ("addmm", "baddbmm") else 0]
    assert isinstance(rows, fx.Node)
    return rows


class Eager(Dialect):
    """torch.npu streams and events, called as the graph runs."""

    def record(self, tag: str) -> None:
        self.graph.call_function(record_event, (tag,))

    def wait(self, tag: str) -> None:
        self.graph.call_function(wait_event, (tag,))

    def enter(self) -> None:
        self.graph.call_function(enter_side, (tuple(self.core_limit) if self.core_limit else None,))

    def exit(self) -> None:
        self.graph.call_function(exit_side, ())


def _make_event(tag: str) -> None:
    """npugraph_ex wants the event of a tag to exist when the pass runs."""
    try:
        from npugraph_ex._acl_concrete_graph.graph_pass import _create_event_by_name
    except ImportError:  # no wheel: a dry run
        return
    _create_event_by_name(tag)


# ---- the pass ------------------------------------------------------------------------------------------------------------


def overlap(graph: fx.Graph, make: Callable[..., Dialect], core_limit: Sequence[int] | None = None) -> int:
    """Put every shared expert of the graph on the side stream; returns how many there were."""
    sides = find_sides(graph)
    for side in sides:
        _place(graph, side, make(graph, core_limit))
    if sides:
        graph.lint()
    return len(sides)


def _place(graph: fx.Graph, side: Side, d: Dialect) -> None:
    """[record in] ... routed ... [record mid] GEMM | enter, wait in, gate, up, wait mid, down, record out, exit | wait out, combine."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    number = next(_names)
    into, middle, out = (f"{LABEL}_{number}_{where}" for where in ("in", "mid", "out"))
    stages = _two_stages(side)
    if early := [*side.inputs, *([] if stages is None else [stages.ids])]:
        with graph.inserting_after(_last_getitem(max(early, key=order.__getitem__))):
            d.record(into)
    else:
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            d.record(into)
    with graph.inserting_before(side.join):
        d.enter()
        d.wait(into)
    for n in side.nodes:
        side.join.prepend(n)
    if stages is not None:
        d.second_stage(side, stages, middle)
    with graph.inserting_before(side.join):
        d.record(out)
        d.exit()
        d.wait(out)


def _last_getitem(n: fx.Node) -> fx.Node:
    """A multi-output op's results are one with it: nothing stands between."""
    while n.next.op == "call_function" and n.next.args[:1] == (n,) and name_of(n.next) == "getitem":
        n = n.next
    return n


def _two_stages(side: Side) -> Stages | None:
    """Gate and up run against the dispatch (they wait for the ids), down against the second GEMM (it waits for the activation)."""
    second = _nearest(side.routed, _PRODUCT)
    activated = None if second is None else second.args[0][0]  # type: ignore[index]
    dispatch = _nearest(second, _DISPATCH)  # its counts are the GEMM's groups: no other layer's is nearer
    first, down = next(n for n in side.nodes if is_product(n)), side.down()
    if down is None or dispatch is None or _nearest(activated, (*_PRODUCT, "npu_grouped_matmul_swiglu_quant_v2")) is None:
        return None
    ids = dispatch.args[1]
    assert isinstance(ids, fx.Node) and isinstance(activated, fx.Node)
    return Stages(first, ids, down, activated)


def _nearest(n: Any, names: Sequence[str]) -> fx.Node | None:
    """The node of one of these names that is the fewest steps upstream."""
    work = [n] if isinstance(n, fx.Node) else []
    seen = set(work)
    for node in work:
        if name_of(node) in names:
            return node
        work += [a for a in node.all_input_nodes if a not in seen]
        seen.update(node.all_input_nodes)
    return None
