"""What is known of the graph around a block: which ids are experts, and which add the result alone goes into."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...calls import is_write
from .streams import is_product

RESHAPES = ("view", "reshape", "view_as", "reshape_as")
_SAME_IDS = ("to", "view", "reshape", "flatten", "int", "long", "contiguous", "detach")


# ---- ids -----------------------------------------------------------------------------------------------------------------


def all_within(ids: fx.Node, num_experts: int, at: fx.Node, distinct: bool = False) -> bool:
    """Whether ids are a top-k's over exactly these experts where node `at` reads them, seen through views and casts.

    Not where anything writes to their memory, by whatever view, before `at`: an id may be anything then. `distinct`: whether those of a
    row are to differ, too: what is modulo the experts is an expert, but may be the same one twice.
    """
    seen = [ids]
    while True:
        n = seen[-1]
        if "places" in n.meta:  # of whatever experts: the user's word
            found = True
            break
        if "experts_of" in n.meta:
            found = bool(n.meta["experts_of"] == num_experts)
            break
        if n.op == "call_method" and n.target in _SAME_IDS and isinstance(n.args[0], fx.Node) and _holds_ids(n, num_experts):
            seen.append(n.args[0])
            continue
        if n.target is torch.remainder and n.args[1] == num_experts and isinstance(n.args[0], fx.Node):
            if not distinct:
                found = True
                break
            seen.append(n.args[0])
            continue
        found = _selected(n) == num_experts
        break
    return found and not _written_before(seen, at)


def _holds_ids(n: fx.Node, num_experts: int) -> bool:
    """Whether a node's dtype has every id: a byte wraps around, half precision rounds."""
    dtype = _dtype(n)
    return dtype is not None and not dtype.is_floating_point and dtype != torch.bool and torch.iinfo(dtype).max >= num_experts - 1


def _selected(n: fx.Node) -> int | None:
    """Among how many a node's ids are the best, where it is the second result of a top-k."""
    top = n.args[0] if n.target in (operator.getitem, getattr) and n.args[1] in (1, "indices") else None
    if not isinstance(top, fx.Node) or not (top.target is torch.topk or (top.op == "call_method" and top.target == "topk")):
        return None
    scores = top.args[0] if top.args else top.kwargs.get("input")
    of = scores.meta.get("example_value") if isinstance(scores, fx.Node) else None
    dim = top.kwargs.get("dim", top.args[2] if len(top.args) > 2 else -1)
    return int(of.shape[dim]) if isinstance(of, Tensor) and isinstance(dim, int) and type(of.shape[dim]) is int else None


def _written_before(values: Sequence[fx.Node], at: fx.Node) -> bool:
    """Whether memory of one of these values is written before `at`."""
    memory = {_storage(v) for v in values} - {None}
    return any(w < at and any(_storage(t) in memory or t in values for t in _written(w)) for w in at.graph.nodes if is_write(w))


def _written(w: fx.Node) -> list[fx.Node]:
    """What a write may change: its first argument and its `out=`; of an op, all that its schema marks."""
    out = w.kwargs.get("out")
    schema = getattr(w.target, "_schema", None)
    marked = [] if schema is None else [
        w.args[i] if i < len(w.args) else w.kwargs.get(a.name)
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]  # fmt: skip
    every = [*w.args[:1], *(out if isinstance(out, (list, tuple)) else [out]), *marked]
    return [n for x in every for n in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(n, fx.Node)]


def _storage(n: fx.Node) -> int | None:
    v = n.meta.get("example_value")
    return v.untyped_storage()._cdata if isinstance(v, Tensor) else None


# ---- the add behind ------------------------------------------------------------------------------------------------------


def addend(n: fx.Node, taken: int) -> tuple[fx.Node, fx.Node | None, list[fx.Node]]:
    """(the add that the result alone goes into, the other operand, the views between), or (n, None, []).

    The op adds in fp32 and rounds once. The combine moves to the add, so nothing in between may write anywhere.
    """
    end, between = n, []
    while len(end.users) == 1 and taken < 2:
        (u,) = end.users
        if u.op == "call_method" and u.args[0] is end and (u.target in RESHAPES or (u.target == "to" and _keeps_value(n, u))):
            end = u
            between.append(u)
            continue
        other = _other_operand(u, end)
        if other is None or not _same_kind(end, other) or _dtype(end) != _dtype(n) or _written_between(n, u):
            break
        return u, other, between
    return n, None, []


def _other_operand(u: fx.Node, mine: fx.Node) -> fx.Node | None:
    in_place = u.target is operator.iadd or (u.op == "call_method" and u.target == "add_")
    if in_place and not u.kwargs and len(u.args) == 2 and u.args[1] is mine and _only_written(u.args[0], u):
        return u.args[0]  # type: ignore[return-value]
    plain = u.target in (operator.add, torch.add) or (u.op == "call_method" and u.target == "add")
    if u.kwargs or len(u.args) != 2 or not (plain or (in_place and u.args[0] is mine)):
        return None
    other = u.args[1] if u.args[0] is mine else u.args[0]
    return other if isinstance(other, fx.Node) and other is not mine else None


def _only_written(other: Any, u: fx.Node) -> bool:
    """Whether nobody but `u` and what follows it sees this value's memory: a fresh product, not read before."""
    return isinstance(other, fx.Node) and is_product(other) and all(x is u or _follows(u, x) for x in other.users)


def _follows(first: fx.Node, n: fx.Node) -> bool:
    return bool(first < n)


def _dtype(n: fx.Node) -> torch.dtype | None:
    return getattr(n.meta.get("example_value"), "dtype", None)


def _keeps_value(n: fx.Node, cast: fx.Node) -> bool:
    """Whether a cast on the way from `n` loses nothing: to a wider dtype, or back to `n`'s own."""
    own, to = _dtype(n), _dtype(cast)
    return own is not None and to is not None and (to == own or torch.promote_types(own, to) == to)


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("example_value"), b.meta.get("example_value")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return x.dtype == y.dtype and x.shape == y.shape and x.ndim >= 1


def _written_between(first: fx.Node, last: fx.Node) -> bool:
    n = first.next
    while n is not last:
        if is_write(n):
            return True
        n = n.next
    return False
