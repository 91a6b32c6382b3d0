"""Gating from terms: the criterion of a top-k and the weights of its choices, read as one `ir.Gating`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from ...ir import Gating, Groups, Rejection
from ...ir.scalar import BY_NAME
from .. import terms as T
from ..aten import names
from ..aten.element import Puller, call_args, dtype_of, shape_of
from ..aten.names import op_name
from ..terms import Term
from .algebra import Translator, Unknown
from .carrier import row_of
from .counted import CAPACITY, over_scores
from .groups import roll_slots, same_at, split_groups, takes_largest
from .identity import among, where_experts
from .match import ExpertsMatch
from .rows import factors, rows
from .scoring import build


@dataclass
class GatingMatch:
    """A recovered gating and the shadow nodes at its edge: logits ([T, E] or [..., E]), bias and table [E], the choice."""

    gating: Gating
    logits: fx.Node
    bias: fx.Node | None
    expert_scale: fx.Node | None
    choice: fx.Node


STEPS = 400_000  # what may be spent on one block's routing, in steps of a few microseconds: routers take some thousands


def match_gating(m: ExpertsMatch, walls: set[fx.Node]) -> GatingMatch | Rejection:
    """The gating that made m.ids and m.weight, or why it stays as written."""
    found = {x for x in T.walk(m.ids) if x.op == "topk"}
    if len(found) != 1:
        apart = "the router's ids come from another device" if _from_another_device(m.ids) else ""
        return Rejection(apart or "the expert ids do not come from one top-k of the graph", m.out, "gating")
    (chosen,) = found
    choice: fx.Node = chosen.args[0]
    if not takes_largest(chosen):
        return Rejection("the selection takes the smallest scores", choice, "gating")
    if m.k > 1 and chosen.args[1][-1] is T.add(T.const(m.k - 1), T.mul(T.const(-1), m.j)):
        return Rejection("the chosen experts stand from the worst to the best, where a fused router gives the best first", choice, "gating")
    if not T.same_size(rows(choice.args[0]), rows(m.tokens)):  # type: ignore[arg-type]
        return Rejection("the router sees another number of tokens than the experts", choice, "gating")
    if chosen.args[1][:-1] != row_of(choice.args[0], m.t):  # type: ignore[arg-type]
        return Rejection("the router sees the tokens in another order than the experts", choice, "gating")
    try:
        with T.Budget(STEPS).within():
            return _at_some_boundary(m, chosen, walls)
    except T.TooLarge as e:
        return Rejection(str(e), choice, "gating")


def _at_some_boundary(m: ExpertsMatch, chosen: Term, walls: set[fx.Node]) -> GatingMatch | Rejection:
    """The gating above the first values that can be its logits."""
    last: Rejection | None = None
    for logits in _boundaries(chosen.args[0], walls):
        out = _try(m, chosen, logits, walls)
        if isinstance(out, GatingMatch):
            return out
        last = last or out
    return last or Rejection("no router logits were found", chosen.args[0], "gating")


def _from_another_device(ids: Term) -> bool:
    copies = [x.args[0] for x in T.walk(ids) if x.op == "a" and isinstance(x.args[0], fx.Node) and op_name(x.args[0]) in names.CAST]
    return any(n.args[0].meta["val"].device != n.meta["val"].device for n in copies)


def where_valid(m: ExpertsMatch) -> ExpertsMatch | None:
    """The weights where the ids are experts at all: [id < E] is 1 there, and [t is foreign] 0 when foreign slots get an id beyond them.

    None when that says nothing about the weights.
    """
    experts = range(m.experts.num_experts + m.experts.num_identity)
    known, ids = where_experts(m.ids, experts)
    weight = among(T.subst(m.weight, known) if known else m.weight, ids, experts)
    return None if weight is m.weight else replace(m, weight=weight)


def _boundaries(choice: fx.Node, walls: set[fx.Node]) -> list[fx.Node]:
    """Where the logits may be cut: the projection that makes them, then each [.., E] node towards the top-k."""
    source: Any = choice.args[0]
    num_experts = shape_of(source)[-1]
    path: list[fx.Node] = []
    seen: set[fx.Node] = set()
    frontier: list[Any] = [source]
    while frontier and len(seen) < 80:
        n = frontier.pop(0)
        if not isinstance(n, fx.Node) or n in seen:
            continue
        seen.add(n)
        v = n.meta.get("val")
        floats = isinstance(v, torch.Tensor) and v.ndim >= 2 and v.dtype.is_floating_point and v.dtype.itemsize > 1
        if floats and shape_of(n)[-1] == num_experts and T.same_size(rows(n), rows(source)):
            path.append(n)
        if n.op == "call_function" and op_name(n) not in names.CONTRACTION and n not in walls:
            frontier.extend(n.all_input_nodes)
    order = {n: i for i, n in enumerate(choice.graph.nodes)} if len(path) > 1 else {}
    path.sort(key=lambda n: order.get(n, 0))
    projected = any(op_name(n) in names.CONTRACTION for n in path)  # beside a projection an input is a bias: for one token too, [1, E]
    kept = [n for n in path if n.op == "call_function" or not projected]
    return [n for n in kept if op_name(n) not in names.CREATION | names.REPEAT | {"scatter"}]


def _try(m: ExpertsMatch, chosen: Term, logits: fx.Node, walls: set[fx.Node]) -> GatingMatch | Rejection:
    try:
        return _read(m, chosen, logits, walls)
    except Unknown as e:
        queued = any(_counts_places(x, chosen.args[0]) for y in (m.weight, m.ids) for x in T.walk(y))
        return Rejection(CAPACITY if queued else str(e), chosen.args[0], "gating", code="capacity" if queued else "")


def _read(m: ExpertsMatch, chosen: Term, logits: fx.Node, walls: set[fx.Node]) -> GatingMatch:
    choice: fx.Node = chosen.args[0]
    source: Any = choice.args[0]
    num_experts = shape_of(source)[-1]
    if not isinstance(num_experts, int):
        raise Unknown("the number of experts is dynamic")
    p = Puller(lambda n: n is logits or op_name(n) in names.CONTRACTION, walls)
    e = T.named("e", num_experts)
    row = chosen.args[1][:-1]
    tr = Translator(logits, m.t, lambda v: T.mk("topk", choice, (*row, v)), m.k, num_experts)
    criterion = T.canonical(p.at(source, (*row, e)))
    weight = roll_slots(at_best(T.canonical(expand(m.weight, p)), criterion, e, chosen), choice, row, m.k)
    plain, groups = split_groups(criterion, e, p)
    if groups is not None and _always_kept(groups, plain, tr, e, num_experts, m.k):
        weight = assume_kept(weight, choice)
    ids_term = T.mk("topk", choice, (*row, m.j if m.k > 1 or m.j.op == "v" else chosen.args[1][-1]))
    if m.ids is not ids_term and chosen is not ids_term:
        ids_term = chosen
    select = tr(plain, e)
    value = tr(weight, ids_term)
    bias, table = _tables(tr, select, value)
    gating = build(select, value, tr, groups, bias, table)
    score_dtype = _score_dtype(p, logits, source)
    full = Gating(
        num_experts=num_experts,
        k=m.k,
        score_dtype=score_dtype,
        weight_dtype=score_dtype,
        groups=groups,
        expert_scale=table is not None,
        **gating,
    )
    return GatingMatch(full, logits, bias, table, choice)


def _always_kept(groups: Groups, plain: Term, tr: Translator, e: Term, num_experts: int, k: int) -> bool:
    """Whether a chosen expert is certain to be in a kept group: the others' fill must lose against any score."""
    enough = k <= groups.kept * (num_experts // groups.count)
    return enough and (groups.fill == -math.inf or groups.fill == 0 and bool(tr(plain, e).is_positive))


def assume_kept(t: Term, choice: fx.Node) -> Term:
    """[the group of a chosen expert is among the kept ones] = 1."""

    def holds(x: Term) -> bool:
        body = x.args[1] if x.op == "any" else x
        if body.op != "eq":
            return False
        return any(
            g.op == "fdiv" and g.args[0].op == "topk" and g.args[0].args[0] is choice and pick.op == "topk" and pick.args[0] is not choice
            for g, pick in (body.args, body.args[::-1])
        )

    found = [x for x in T.walk(t) if x.op in ("any", "eq") and holds(x)]
    return T.canonical(T.subst(t, dict.fromkeys(sorted(found, key=lambda x: x.op), T.const(1)))) if found else t


def at_best(weight: Term, criterion: Term, e: Term, chosen: Term) -> Term:
    """max_v f(v) = f(argmax), where the criterion of the best choice and f are increasing functions of one x(v)."""
    choice: fx.Node = chosen.args[0]
    if not T.is_c(chosen.args[1][-1], 0) or op_name(choice) == "topk" and not call_args(choice).sorted:
        return weight
    best: dict[Term, Term] = {}
    for x in T.walk(weight):
        if x.op == "max" and x.args[0].args[1] == e.args[1] and same_at(risen(*x.args[::-1]), risen(criterion, e), e, x.args[0]):
            best[x] = T.subst(x.args[1], {x.args[0]: chosen})
    return T.canonical(T.subst(weight, best)) if best else weight


def risen(t: Term, v: Term) -> Term:
    """x of t = f(x), f increasing: an increasing function, a positive factor that is the same for every v."""
    while True:
        own = [f for f in factors(t) if T.uses(f, v)]
        if t.op == "fn" and t.args[0] in BY_NAME and BY_NAME[t.args[0]].increasing:
            t = t.args[1][0]
        elif t.op == "mul" and len(own) == 1 and all(_positive(f) for f in t.args if f is not own[0]):
            t = own[0]
        else:
            return t


def _positive(t: Term) -> bool:
    """Whether a term is above 0 for certain."""
    if t.op == "c":
        return isinstance(t.args[0], (int, float)) and t.args[0] > 0
    if t.op == "fn":
        return t.args[0] in BY_NAME and BY_NAME[t.args[0]].positive
    return t.op in ("pow", "sum") and _positive(t.args[0 if t.op == "pow" else 1])


def expand(t: Term, p: Puller) -> Term:
    """Look into the score tensors that the experts' pass left as atoms."""
    mapping = {x: p.at(x.args[0], x.args[1]) for x in T.walk(t) if x.op == "a" and isinstance(x.args[0], fx.Node)}
    return T.subst(t, {k: v for k, v in mapping.items() if k is not v})


def _score_dtype(p: Puller, logits: fx.Node, source: fx.Node) -> torch.dtype:
    for x, d in p.dtypes.items():
        if d.is_floating_point and x.op == "fn" and any(a.op == "a" and a.args[0] is logits for a in x.args[1]):
            return d
    return dtype_of(source)


def _tables(tr: Translator, select: sp.Expr, value: sp.Expr) -> tuple[fx.Node | None, fx.Node | None]:
    """Which [E] tensors are the selection bias and the per-expert scale."""
    bias = table = None
    for node, symbol in tr.tables.items():
        if symbol in select.free_symbols:
            if bias is not None:
                raise Unknown("two tensors enter the selection")
            bias = node
        elif symbol in value.free_symbols:
            if table is not None:
                raise Unknown("two tensors scale the weights")
            table = node
    return bias, table


def _counts_places(x: T.Term, choice: fx.Node) -> bool:
    """Whether a term is a place in a queue: tokens are dropped by it."""
    n = x.args[0] if x.op == "a" else None
    return x.op == "rank" or isinstance(n, fx.Node) and op_name(n) == "cumsum" and not over_scores(n, choice)
