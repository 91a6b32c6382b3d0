"""Rows picked by numbers from the host, named by what they are.

A function that sorts its tokens by expert, reads the counts back and slices leaves baked numbers in a recording:
``sorted[5:12]``. If rows 5 to 11 are exactly those whose sorted id is 3, that slice *is* ``sorted[nonzero(sorted_ids == 3)]``,
which says it for every routing. Here such slices, narrows and splits are replaced so; all others stay, and a second
recording on another routing tells whether one of them mattered.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

_aten = torch.ops.aten


@dataclass
class _Order:
    """One sort of the expert ids: where it is in the graph, and which rows each id got."""

    argsort: fx.Node
    keys: fx.Node
    rows: dict[tuple[int, int], int]  # [start, end) -> id
    total: int
    selections: dict[int, fx.Node] = field(default_factory=dict)
    sorted_ids: fx.Node | None = None
    last: fx.Node | None = None  # the latest node made for this order


def name_selections(gm: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Replace slices of rows sorted by expert id by selections on the sorted ids, in place.

    values: what each node was on the probe; new nodes are added. The number of selections made is ``gm.meta["selections"]``.
    """
    made = 0
    orders: list[_Order] = []
    for n in list(gm.graph.nodes):
        order = _order(n, values)
        if order is not None:
            orders.append(order)
        for piece, source, bounds in _slices(n, values):
            for o in orders:
                e = o.rows.get(bounds)
                if e is not None and values[source].shape[0] == o.total:
                    _replace(gm.graph, piece, source, _selection(gm.graph, o, e, values), values)
                    made += 1
                    break
    gm.meta["selections"] = made


def _order(n: fx.Node, values: Mapping[fx.Node, Any]) -> _Order | None:
    """The order that `n` holds, if `n` is the argsort of a list of integers."""
    source = n.args[0] if n.target is operator.getitem and n.args[1] == 1 else n
    if not isinstance(source, fx.Node) or source.target not in (
        (_aten.sort.default, _aten.sort.stable) if source is not n else (_aten.argsort.default, _aten.argsort.stable)
    ):
        return None
    keys, perm = source.args[0], values[n]
    ids = values[keys]  # type: ignore[index]
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point() or ids.dtype is torch.bool:
        return None
    in_order = ids[perm]
    if in_order.numel() and bool((in_order.diff() < 0).any()):
        return None
    unique, counts = in_order.unique_consecutive(return_counts=True)
    rows, start = {}, 0
    for e, c in zip(unique.tolist(), counts.tolist(), strict=True):
        rows[start, start + c] = e
        start += c
    return _Order(n, keys, rows, start)  # type: ignore[arg-type]


def _slices(n: fx.Node, values: Mapping[fx.Node, Any]) -> list[tuple[fx.Node, fx.Node, tuple[int, int]]]:
    """(node, source, [start, end)) for every run of leading rows that `n` hands out."""
    if n.op != "call_function" or not n.args or not isinstance(n.args[0], fx.Node):
        return []
    source, value = n.args[0], values.get(n.args[0])
    if n.target is _aten.slice.Tensor and isinstance(value, Tensor):
        given: tuple[Any, ...] = tuple(n.args[1:])
        dim, start, end, step = given + (0, None, None, 1)[len(given) :]
        if dim != 0 or step != 1:
            return []
        start, end, _ = slice(start, end).indices(value.shape[0])  # type: ignore[arg-type]
        return [(n, source, (start, end))]
    if n.target is _aten.narrow.default and n.args[1] == 0 and isinstance(n.args[2], int):
        return [(n, source, (n.args[2], n.args[2] + n.args[3]))]  # type: ignore[operator]
    if n.target is operator.getitem and source.target in (_aten.split_with_sizes.default, _aten.split.sizes, _aten.tensor_split.indices):
        if (source.args[2] if len(source.args) > 2 else 0) != 0:
            return []
        pieces = values[source]
        start = sum(p.shape[0] for p in pieces[: n.args[1]])  # type: ignore[misc]
        return [(n, source.args[0], (start, start + pieces[n.args[1]].shape[0]))]  # type: ignore[list-item, index]
    return []


def _selection(graph: fx.Graph, o: _Order, e: int, values: Mapping[fx.Node, Any]) -> fx.Node:
    """The rows whose sorted id is e: ``where(keys[argsort] == e)[0]``, made once and right after the sort."""
    in_order = values[o.keys][values[o.argsort]]
    if o.sorted_ids is None:
        o.sorted_ids = o.last = _after(graph, o.argsort, _aten.index.Tensor, (o.keys, [o.argsort]), in_order)
    if e not in o.selections:
        mask = _after(graph, o.last, _aten.eq.Scalar, (o.sorted_ids, e), in_order == e)
        found = _after(graph, mask, _aten.where.default, (mask,), list(torch.where(in_order == e)))
        o.last = o.selections[e] = _after(graph, found, operator.getitem, (found, 0), torch.where(in_order == e)[0])
    return o.selections[e]


def _replace(graph: fx.Graph, piece: fx.Node, source: fx.Node, rows: fx.Node, values: dict[fx.Node, Any]) -> None:
    """Reads of the piece become reads of the rows; a copy into the piece becomes a write to the rows of its source."""
    for user in list(piece.users):
        if user.target is _aten.copy_.default and user.args[0] is piece:
            with graph.inserting_before(user):
                put = _call(graph, user, _aten.index_put_.default, (source, [rows], user.args[1]), values[source])
            values[put] = values[source]
            source.replace_all_uses_with(put, delete_user_cb=_later_than(put))
            user.replace_all_uses_with(piece)
            graph.erase_node(user)
    if piece.users:
        with graph.inserting_before(piece):
            new = _call(graph, piece, _aten.index.Tensor, (source, [rows]), values[piece])
        piece.replace_all_uses_with(new)


def _later_than(put: fx.Node) -> Any:
    """Uses that come after `put`: the ones that see what it wrote."""
    later = set()
    n = put.next
    while n.op != "root":
        later.add(n)
        n = n.next
    return lambda user: user in later


def _after(graph: fx.Graph, node: fx.Node | None, target: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
    assert node is not None
    with graph.inserting_after(node):
        return _call(graph, node, target, args, val)


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
    new = graph.call_function(target, args)
    new.meta = {"val": val, "grad": like.meta.get("grad", True)}
    return new
