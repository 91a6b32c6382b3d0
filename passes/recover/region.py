"""A recovered block as a region of the shadow: its boundary, the nodes inside, the nodes that hold ids and weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx

from ...ir import MoeBlock, Rejection
from .. import terms as T
from ..aten import names
from ..aten.element import Puller, call_args, fixed_number, shape_of, size_of
from ..aten.names import op_name
from ..terms.text import said
from .fused import is_fused
from .given_ids import ends_of
from .identity import among
from .match import ExpertsMatch
from .output_scale import Fold
from .placed import Placed
from .routing import GatingMatch
from .rows import row_index, rows
from .shared import SharedMatch


@dataclass
class Block:
    """A match with all that validation and rewrite need.

    `ids`, `weights`: the shadow's own [.., k] tensors; `raw_ids`: the top-k's, before any table or mask (the same as `ids`
    when there is none). None where no node of the graph holds that value. `fold`: a scale of the result that is in the gating.
    `masked`: the weights are those of the gating only where the ids are experts. `wraps`: ids below zero count from the last expert.
    `placed`: how the ids come out of a table, where one maps a selection's.
    """

    match: ExpertsMatch
    gating: GatingMatch | None
    ir: MoeBlock
    ids: fx.Node | None
    weights: fx.Node | None
    raw_ids: fx.Node | None
    shared: SharedMatch | None = None
    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)  # other nodes that hold ids or weights -> the one above
    fold: Fold = field(default_factory=Fold)
    masked: bool = False
    wraps: bool = False
    placed: Placed | None = None

    @property
    def constant(self) -> float | None:
        """The weight of every row, where it is a number that no tensor of the graph is looked for to hold."""
        return constant_weight(self.match)

    @property
    def ends(self) -> fx.Node | None:
        """The group ends [E] that say the experts of rows which came in order; then nothing else holds their ids."""
        return ends_of(self.match.ids)

    def params(self) -> list[fx.Node]:
        return [q.node for q in self.match.operands]

    def routing_inputs(self) -> list[fx.Node]:
        g = self.gating
        return [] if g is None else [n for n in (g.logits, g.bias, g.expert_scale) if n is not None]

    def expert_inputs(self) -> list[fx.Node]:
        """Boundary of the experts' own region, given ids and weights."""
        m = self.match
        given = [n for n in (m.tokens, self.ids if self.ends is None else self.ends, self.weights, m.base) if n is not None]
        return list(dict.fromkeys([*given, *self.params(), *self.twins]))

    def fixed_numbers(self) -> list[fx.Node]:
        """Variable floats of the user's that the recovered numbers were read from."""
        routing = [self.ids, self.weights, *self.twins] if self.gating is None else self.routing_inputs()
        given = [n for n in (self.match.tokens, self.match.base, *self.params(), *routing) if n is not None]
        nodes = inside([self.match.out if self.fold.last is None else self.fold.last], given)
        return [] if isinstance(nodes, Rejection) else [n for n in nodes if fixed_number(n)]


@dataclass
class RoutingNodes:
    """The graph's own [.., k] tensors, found by comparing terms. `raw`: ids before any mapping. `twins`, `wraps`: see Block.

    `partly`: the weights are what is wanted where an id is an expert's, and something else where it is none.
    """

    ids: fx.Node | None
    weights: fx.Node | None
    raw: fx.Node | None
    twins: dict[fx.Node, fx.Node]
    wraps: bool = False
    partly: bool = False


def constant_weight(m: ExpertsMatch) -> float | None:
    """The number that weighs every row of experts whose ids are given: any tensor full of it could be any other one's rows."""
    given = m.weight.op == "c" and not any(x.op == "topk" for x in T.walk(m.ids))
    return float(m.weight.args[0]) if given and not is_fused(m.out) else None


def routing_nodes(m: ExpertsMatch, p: Puller, recorded: bool = False) -> RoutingNodes:
    """The tensors that hold ids and weights. `recorded`: those of a top-k are wanted with a slot, [T, k], and can be put so."""
    slot = m.j if m.j.op == "v" else T.const(0)
    raw = next((x for x in T.walk(m.ids) if x.op == "topk"), m.ids)
    want = {"ids": T.canonical(m.ids), "weights": T.canonical(m.weight), "raw": T.canonical(raw)}
    if not p.given and constant_weight(m) is not None:
        del want["weights"]
    found: dict[str, fx.Node] = {}
    holders: dict[str, list[fx.Node]] = {"ids": [], "weights": []}
    order = {n: i for i, n in enumerate(m.out.graph.nodes)}
    for name, term in (("ids", m.ids), ("weights", m.weight)):
        at: tuple[T.Term, ...] | None = (m.t,) if ends_of(term) is not None else None
        if term.op == "a" and isinstance(term.args[0], fx.Node):
            found |= {name: term.args[0]} if term.args[1] == (at or (*row_index(m.t, shape_of(term.args[0])[:-1]), slot)) else {}
    if is_fused(m.out):
        found.update(ids=call_args(m.out).ids, weights=call_args(m.out).weights)
        p.at(found["ids"], (*row_index(m.t, shape_of(found["ids"])[:-1]), slot))
    reached = {n for n, _ in p.memo} | {u for n, _ in p.memo for u in n.all_input_nodes}
    reached |= {x.args[0] for x in T.walk(m.ids) if x.op == "a" and isinstance(x.args[0], fx.Node)}
    looked = sorted((n for n in reached - _in_other_rows(m) - set(p.walls) if order[n] < order[m.out]), key=order.__getitem__)
    for n in looked:
        v = n.meta.get("val")
        if not isinstance(v, torch.Tensor) or (at := _slot_of_row(n, m, slot)) is None:
            continue
        term = T.canonical(p.at(n, at))
        for name, value in want.items():
            if term is value and name in holders and v.dtype.is_floating_point == (name == "weights"):
                holders[name].append(n)
            if term is value and v.dtype.is_floating_point == (name == "weights") and len(at) > 1 and at[-1] is slot:
                if not (name == "weights" and is_fused(m.out)):
                    found[name] = n  # the last one: weights may be cast after they are computed
    found = _without_slots(m, {name: ns for name, ns in holders.items() if name in want}, recorded) | found
    if "ids" not in found and m.ids.op == "mod" and T.is_c(m.ids.args[1], m.experts.num_experts):
        inner = next((x for n in sorted(reached, key=order.__getitem__) if (x := _before_mod(n, m, slot, p)) is not None), None)
        if inner is not None:
            return replace(routing_nodes(replace(m, ids=inner), p, recorded), wraps=True)
    twins = {n: found[name] for name, ns in holders.items() for n in ns if name in found and n is not found[name]}
    partly = None if "weights" in found or "weights" not in want else _weights_of_experts(m, p, slot, looked)
    return RoutingNodes(found.get("ids"), found.get("weights", partly), found.get("raw"), twins, partly=partly is not None)


def _weights_of_experts(m: ExpertsMatch, p: Puller, slot: T.Term, nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The last tensor [.., k] that holds the weights where an id is an expert's; where it is none, no one reads them."""
    real = range(m.experts.first, m.experts.first + m.experts.num_experts + m.experts.num_identity)
    weight, found = T.canonical(among(m.weight, m.ids, real)), None
    for n in nodes:
        v = n.meta.get("val")
        if not isinstance(v, torch.Tensor) or not v.dtype.is_floating_point or (at := _slot_of_row(n, m, slot)) is None:
            continue
        if len(at) > 1 and at[-1] is slot and T.canonical(among(p.at(n, at), m.ids, real)) is weight:
            found = n
    return found


def _without_slots(m: ExpertsMatch, holders: dict[str, list[fx.Node]], recorded: bool) -> dict[str, fx.Node]:
    """Tensors [T] that hold the one id of a token, or its weight; those with a slot, [T, 1], are preferred."""
    if m.k > 1 or recorded and any(x.op == "topk" for x in T.walk(m.ids)):
        return {}
    flat = {name: [n for n in ns if len(shape_of(n)) == 1] for name, ns in holders.items()}
    return {name: ns[-1] for name, ns in flat.items() if ns}


def _in_other_rows(m: ExpertsMatch) -> set[fx.Node]:
    """Where all weights are one number, of which no term tells the order: floats that rows were looked up of, and views of them."""
    found: set[fx.Node] = set()
    for n in m.out.graph.nodes if m.weight.op == "c" else ():
        v, name = n.meta.get("val"), op_name(n)
        if isinstance(v, torch.Tensor) and v.dtype.is_floating_point:
            moved = name in names.LOOKUP | names.MOVE | {"index_select"}
            found |= {n} if moved or name in names.VIEW | names.CAST and any(x in found for x in n.all_input_nodes) else set()
    return found


def _before_mod(n: fx.Node, m: ExpertsMatch, slot: T.Term, p: Puller) -> T.Term | None:
    """i where n[t, slot] = i and ids = i mod E; normal form may have moved a whole E into i."""
    v = n.meta.get("val")
    if not isinstance(v, torch.Tensor) or v.dtype.is_floating_point or (at := _slot_of_row(n, m, slot)) is None:
        return None
    i = p.at(n, at)
    return i if T.canonical(T.mod(i, m.experts.num_experts)) is T.canonical(m.ids) else None


def _slot_of_row(n: fx.Node, m: ExpertsMatch, slot: T.Term) -> tuple[T.Term, ...] | None:
    """Where a tensor that may be [.., k] has a token's slot; a single slot may have no dim of its own: [..]."""
    shape = shape_of(n)
    if len(shape) > 1 and shape[-1] == m.k and T.same_size(rows(n), rows(m.tokens)):
        return (*row_index(m.t, shape[:-1]), slot)
    if m.k == 1 and shape and T.same_size(rows(n) * shape[-1], rows(m.tokens)):
        return row_index(m.t, shape)
    return None


def inside(outs: Iterable[fx.Node], boundary: Iterable[fx.Node]) -> list[fx.Node] | Rejection:
    """Nodes between the boundary and `outs`, in graph order; a rejection when another tensor comes in."""
    edge, seen = set(boundary), set()
    sizes = {s for b in edge for s in shape_of(b) if not isinstance(s, int)}
    outs = list(outs)
    stack = [n for n in outs if n not in edge]
    while stack:
        n = stack.pop()
        if n in seen or n in edge:
            continue
        seen.add(n)
        if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor):
            return Rejection(f"{said(n)} is read inside the block in a way that was not recovered", n, "region")
        if not _is_size(n, sizes):
            stack.extend(data_inputs(n))
    order = {n: i for i, n in enumerate(outs[0].graph.nodes)}
    return sorted(seen, key=order.__getitem__)


def _is_size(n: fx.Node, sizes: set[Any]) -> bool:
    """Whether a number that the host has read, or made of such, is a size of what comes in, or so many times one."""
    if not isinstance(n.meta.get("val"), torch.SymInt) or op_name(n) in names.SIZE:
        return False
    e = size_of(n)
    return any((e / s).simplify().is_number for s in sizes)


def data_inputs(n: fx.Node) -> list[fx.Node]:
    """Inputs whose values matter; type_as reads no more than a dtype off its second one, zeros_like and size() no more than a shape, which
    is a value where it is that of rows which a mask picked."""
    if op_name(n) in names.LIKE | names.SIZE or fixed_number(n):
        return [x for x in n.args[:1] if op_name(n) in names.LIKE and isinstance(x, fx.Node) and _is_picked(x)]
    return [x for x in n.args[:1] if isinstance(x, fx.Node)] if op_name(n) == "type_as" else n.all_input_nodes


def _is_picked(x: fx.Node) -> bool:
    """Whether x is rows that were looked up at the places where a mask holds."""
    if op_name(x) not in names.LOOKUP | {"index_select"}:
        return False
    places = (names.through(y, names.VIEW | names.CAST | {"getitem", "select"}) for y in x.all_input_nodes[1:])
    return any(y is not None and op_name(y) in ("nonzero", "nonzero_numpy", "argwhere", "where") for y in places)
