"""Nodes that choose experts: top-k and its kin, tables of ids, ids joined from several selections."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

from ..aten import names
from ..aten.element import call_args, shape_of
from ..aten.names import op_name, through


def is_zero(n: fx.Node) -> bool:
    """Whether a tensor was made of zeros."""
    return op_name(unviewed(n)) in names.ZEROS


def unviewed(n: fx.Node) -> fx.Node:
    """The tensor that n is a view of."""
    return through(n, names.VIEW)  # type: ignore[no-any-return]


def users_through_views(n: fx.Node) -> Iterator[fx.Node]:
    """Users of n, seen through views and casts."""
    for u in n.users:
        if op_name(u) in names.VIEW | names.CAST:
            yield from users_through_views(u)
        else:
            yield u


def is_table(n: fx.Node) -> bool:
    """Ids read from a table of integers, as hash routing does."""
    v = n.meta.get("val")
    if op_name(n) not in names.LOOKUP or not isinstance(v, torch.Tensor) or v.dtype not in (torch.int64, torch.int32):
        return False
    src = n.args[0]
    return v.ndim >= 2 and isinstance(src, fx.Node) and src.op in ("placeholder", "get_attr") and len(src.meta["val"].shape) == 2


def is_joined(n: fx.Node) -> bool:
    """Ids [T, k] put together from several selections of one expert each."""
    v = n.meta.get("val")
    if op_name(n) not in names.JOIN or not isinstance(v, torch.Tensor) or v.dtype != torch.int64 or v.ndim < 2:
        return False
    parts = n.args[0]
    return isinstance(parts, (list, tuple)) and len(parts) > 1 and all(isinstance(x, fx.Node) and _selected(x) for x in parts)


def _selected(n: fx.Node) -> bool:
    """Whether a tensor is the indices of a selection, in another shape perhaps."""
    return is_selection(_selection(n))


def _selection(n: fx.Node) -> fx.Node:
    n = unviewed(n)
    return n.args[0] if op_name(n) == "getitem" and isinstance(n.args[0], fx.Node) else n


def choices(n: fx.Node) -> int | None:
    """How many indices the selection had to choose from whose indices these are: each of them is less. None where that is not known."""
    chosen = _selection(n)
    if is_joined(chosen):
        parts = [choices(x) for x in chosen.args[0]]  # type: ignore[union-attr]
        return None if None in parts else max(p for p in parts if p is not None)
    dim = None if is_table(chosen) else call_args(chosen).dim
    size = None if dim is None else shape_of(chosen.args[0])[dim]  # type: ignore[arg-type]
    return size if isinstance(size, int) else None


def is_selection(n: fx.Node) -> bool:
    """A node that chooses indices by a floating-point score: top-k, sort, argmax."""
    if n.op != "call_function":
        return False
    name = op_name(n)
    if is_table(n) or is_joined(n):
        return True
    if name not in names.SELECTION:
        return False
    if name == "max" and not hasattr(call_args(n), "dim"):
        return False
    x = n.args[0]
    v = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not (isinstance(v, torch.Tensor) and v.dtype.is_floating_point and v.ndim >= 2):
        return False
    return name in ("argsort", "argmax") or any(u.args[1] == 1 and u.users for u in n.users)  # its indices are read


def is_id_input(n: fx.Node) -> bool:
    v = n.meta.get("val")
    return n.op == "placeholder" and isinstance(v, torch.Tensor) and v.ndim in (1, 2) and v.dtype in (torch.int64, torch.int32)
