"""Ids and weights of a recorded function as tensors [.., k] of its own, where it holds them in another form.

i [T] of a single slot:      i = squeeze(unsqueeze(i))                        and unsqueeze(i) is [T, 1]
d [T, E], read at the ids:   d = scatter(0, ids, gather(d, ids)) at the ids   and gather(d, ids) is [T, k]
c w of weights w [T, k]:     w = (c w) / ([ids = ids] c)                      and c w is [T, k]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from .. import terms as T
from ..aten.effects import Memory, mutated_args
from ..aten.element import Puller, shape_of
from ..terms import Term
from ..terms.numbers import is_plain
from .match import ExpertsMatch
from .region import RoutingNodes, routing_nodes
from .rows import row_index, rows
from .writes import made_of

_aten = torch.ops.aten


def hold(m: ExpertsMatch, p: Puller, nodes: RoutingNodes) -> bool:
    """Rewrite the recording of m so that it holds ids and weights; whether there was anything to do. Terms of it are to be made anew."""
    changed = _hold(m, p, nodes)
    for n in m.out.graph.nodes if changed else ():
        n.meta.pop("moe_args", None)
    return changed


def _hold(m: ExpertsMatch, p: Puller, nodes: RoutingNodes) -> bool:
    if m.k == 1 and (nodes.ids is None or nodes.weights is None):
        single = [n for n in (_holder(m, p, m.ids), _holder(m, p, m.weight)) if n is not None]
        for n in single:
            _with_slot(n)
        if single:
            return True
    if nodes.ids is None or nodes.weights is not None:
        return False
    if _scale(m, p, nodes.ids):
        return True
    raw = next((x for x in T.walk(m.ids) if x.op == "topk"), None)
    dense = None if raw is None else _holder(m, p, m.weight, (*shape_of(nodes.ids)[:-1], T.extent(raw)), m.ids)
    return dense is not None and _read_at_ids(dense, nodes.ids, m.out)


def _holder(m: ExpertsMatch, p: Puller, term: Term, full: tuple[Any, ...] | None = None, last: Term | None = None) -> fx.Node | None:
    """The latest tensor that is `term` at a token's row, or a tensor of shape `full` that is at the row's element `last`."""
    want, floats, order = T.canonical(term), term is m.weight, {n: i for i, n in enumerate(m.out.graph.nodes)}
    found = None
    for n in sorted({x for x, _ in p.memo} | {u for x, _ in p.memo for u in x.all_input_nodes}, key=order.__getitem__):
        v = n.meta.get("val")
        if not isinstance(v, torch.Tensor) or v.is_floating_point() != floats or order[n] >= order[m.out] or n in p.walls:
            continue
        shape = shape_of(n)
        if full is None and (not shape or not T.same_size(rows(n) * shape[-1], rows(m.tokens))) or full is not None and shape != full:
            continue
        if any(n in mutated_args(u) for u in n.users):
            continue
        at = row_index(m.t, shape) if last is None else (*row_index(m.t, shape[:-1]), last)
        if T.canonical(p.at(n, at)) is want:
            found = n
    return found


def _scale(m: ExpertsMatch, p: Puller, ids: fx.Node) -> bool:
    """Weights times a number other than 0, where the weights alone are a tensor: the experts read them off their product.

    [ids = ids] is 1, and has the quotient made of ids: what is not is no part of the experts, and is not looked into.
    """
    number, rest = T.coefficient(m.weight)
    w = (
        None
        if T.is_c(rest) or not is_plain(number) or number in (0, 1)
        else routing_nodes(replace(m, weight=rest), p, recorded=True).weights
    )
    if w is None:
        return False
    memory, region = Memory(m.out.graph), _between(w, m.out)
    order = {n: i for i, n in enumerate(m.out.graph.nodes)}
    last = max(w, ids, key=order.__getitem__)
    readers = [u for u in w.users if u in region]
    if memory.writers.get(memory.root[w]) or any(order[u] < order[last] for u in readers):
        return False
    scaled = _after(last, _aten.mul.Tensor, w, float(number))
    same = _after(scaled, _aten.eq.Tensor, ids, ids)
    one = _after(same, _aten.to.dtype, same, w.meta["val"].dtype)
    numbers = _after(one, _aten.mul.Tensor, one, float(number))
    back = _after(numbers, _aten.div.Tensor, scaled, numbers)
    for u in readers:
        u.replace_input_with(w, back)
    return True


def _with_slot(n: fx.Node) -> None:
    """Everyone who reads n reads it through [.., 1]."""
    column = _after(n, _aten.unsqueeze.default, n, -1)
    back = _after(column, _aten.squeeze.dim, column, -1)
    n.replace_all_uses_with(back, delete_user_cb=lambda u: u is not column)


def _read_at_ids(dense: fx.Node, ids: fx.Node, out: fx.Node) -> bool:
    """The experts read the weights of the chosen ones off a tensor that is 0 elsewhere; False if anyone else reads those values."""
    order = {n: i for i, n in enumerate(out.graph.nodes)}
    region = _between(dense, out) - made_of(ids)
    region.add(dense)
    readers = [u for u in dense.users if u in region or u is out]
    last = max(dense, ids, key=order.__getitem__)
    if any(u not in region and u is not out for x in region - {dense} for u in x.users) or any(order[u] < order[last] for u in readers):
        return False
    memory = Memory(out.graph)
    if memory.writers.get(memory.root[dense]):
        return False
    chosen = _after(last, _aten.gather.default, dense, -1, ids)
    zeros = _after(chosen, _aten.zeros_like.default, dense)
    again = _after(zeros, _aten.scatter.src, zeros, -1, ids, chosen)
    for u in readers:
        u.replace_input_with(dense, again)
    return True


def _between(start: fx.Node, out: fx.Node) -> set[fx.Node]:
    """`start`, and what `out` is made of that is made of it."""
    needed, found = made_of(out) - {out}, {start}
    for n in out.graph.nodes:
        if n in needed and any(x in found for x in n.all_input_nodes):
            found.add(n)
    return found


def _after(n: fx.Node, target: Any, *args: Any) -> fx.Node:
    with n.graph.inserting_after(n):
        new = n.graph.call_function(target, args)
    new.meta = {"val": target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args)), "grad": n.meta.get("grad", True)}
    return new
