"""Row counts and row positions in a recording: the probes have few rows, so nothing may hang on how many there are, but for none and one.

What a recording of few rows shows of ``counts > 2500`` or ``arange(len(x)) < 2500`` is one answer of two. A number of rows that
becomes a Python number is followed in `rows`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch.fx as fx

from ..ir import Rejection
from .cleaning import behind, schema_name

_COUNT = {"bincount", "histc", "sum", "cumsum", "count_nonzero", "scatter_add", "scatter_add_", "index_add", "index_add_", "scatter_reduce"}
_KEEP = {"add", "sub", "rsub", "add_", "sub_", "cat", "stack", "concat", "neg", "clone", "copy_", "max", "min", "amax", "amin", "diff"}
_KEEP |= {"_to_copy", "floor_divide", "div", "mul"}
_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge", "greater", "greater_equal", "less", "less_equal", "not_equal"}
_BEND = {"clamp", "clamp_max", "minimum", "clamp_", "clamp_max_", "floor_divide", "div", "remainder", "fmod"}
_BEND |= {"bitwise_right_shift", "__rshift__"}
_PICK = {"index", "gather", "index_select", "embedding", "take", "masked_select"}  # values come from the first argument


Rows = Callable[[int], bool]  # whether a dim of this size counts rows


def check(gm: fx.GraphModule, reads: Iterable[fx.Node], rows: Rows) -> None:
    """Raise `Rejection` where a count or a position meets a number but 0 and 1, or where what the host reads bounds or divides one."""
    counted = _counted(gm, rows)
    for n in gm.graph.nodes:
        if _name(n) in _COMPARE and n.args[0] in counted and isinstance(n.args[1], (int, float)) and n.args[1] not in (0, 1):
            raise Rejection(f"it compares a number of rows, or a row's place, with {n.args[1]}, which few rows do not tell", stage="rows")
    for n in behind(reads):
        if _name(n) in _BEND and n.args[0] in counted:
            raise Rejection("its control flow depends on a count that it bounds or divides", stage="rows")


def numbers(read: fx.Node, rows: Rows) -> bool:
    """Whether what the host reads are the places of single rows: ``(ids == e).nonzero().tolist()``."""
    source: Any = read
    while isinstance(source, fx.Node) and source.args and (_is_view(source) or source.target is operator.getitem):
        source = source.args[0]
    return isinstance(source, fx.Node) and any(map(rows, _places(source) or ()))


def _counted(gm: fx.GraphModule, rows: Rows) -> set[fx.Node]:
    """Tensors that count rows, or number them. What numbers experts, or slots of a token, does neither."""
    found: set[fx.Node] = set()
    for n in gm.graph.nodes:
        if n.op != "call_function":
            continue
        places = _places(n)
        if places is not None:
            counts = any(rows(d) for d in places)
        else:
            counts = _makes(n, rows) or any(i in found for i in _kept(n))
        if counts:
            found.add(n)
    return found


def _makes(n: fx.Node, rows: Rows) -> bool:
    """Whether rows are counted or numbered here."""
    name, source = _name(n), n.args[0] if n.args else None
    if n.target is operator.getitem:
        return n.args[1] == 2 and "unique" in _name(source) and rows(source.args[0].meta["val"].numel())  # type: ignore[union-attr]
    if name == "arange":
        return rows(n.meta["val"].numel())
    if name not in _COUNT or not isinstance(source, fx.Node):
        return False
    if name in ("histc", "bincount"):
        return rows(source.meta["val"].numel())
    before, after = list(source.meta["val"].shape), list(n.meta["val"].shape)
    summed = [d for d in before if before.count(d) > after.count(d)] if before != after else before
    return not source.meta["val"].is_floating_point() and any(map(rows, summed))


def _places(n: fx.Node) -> list[int] | None:
    """The sizes of the dims in which the integers of a result are places; None if they are none."""
    name, source = _name(n), n.args[0] if n.args else None
    if n.target is operator.getitem and isinstance(source, fx.Node):
        dim = n.args[1]
        if _name(source) == "sort":
            return list(source.args[0].meta["val"].shape[-1:]) if dim == 1 else None  # type: ignore[union-attr]
        if _picks(source):
            return [source.args[0].meta["val"].shape[dim]]  # type: ignore[union-attr]
        along = [*source.args[1:], 0][0] if isinstance(source, fx.Node) and _name(source) == "unbind" else None
        return None if along is None else _column(source.args[0], along, dim)  # type: ignore[union-attr]
    if name == "select":
        return _column(source, n.args[1], n.args[2])
    if name == "argsort":
        return list(source.meta["val"].shape[-1:])  # type: ignore[union-attr]
    return list(source.meta["val"].shape) if _picks(n) else None  # type: ignore[union-attr]


def _column(n: Any, dim: Any, i: Any) -> list[int] | None:
    """The dims that the element `i` along `dim` of a `nonzero` numbers, whichever way round that lies: one in a column, all in a row."""
    turned = _name(n) in ("t", "transpose")
    n = n.args[0] if turned else n
    if _name(n) != "nonzero":
        return None
    shape = list(n.args[0].meta["val"].shape)
    if (dim % 2 == 0) is not turned:
        return shape
    return shape[i : i + 1] if len(shape) > 1 else None


def _picks(n: object) -> bool:
    """Rows where something holds: `nonzero`, and `where` of one argument."""
    return _name(n) in ("nonzero", "nonzero_numpy") or _name(n) == "where" and len(n.args) == 1  # type: ignore[attr-defined]


def _kept(n: fx.Node) -> list[fx.Node]:
    """The arguments that a result's numbers are those of, or are made of."""
    name = _name(n)
    if name in _KEEP:
        return n.all_input_nodes
    return n.all_input_nodes[:1] if name in _PICK or _is_view(n) or n.target is operator.getitem else []


def _is_view(n: fx.Node) -> bool:
    schema = getattr(n.target, "_schema", None)
    return schema is not None and any(r.alias_info and not r.alias_info.is_write for r in schema.returns)


def _name(n: object) -> str:
    return schema_name(n).removeprefix("aten::") if isinstance(n, fx.Node) else ""
