"""Row counts and row positions in a recording: the probes have few rows, so nothing may hang on how many there are, but for none and one.

What a recording of few rows shows of ``counts > 2500`` or ``arange(len(x)) < 2500`` is one answer of two. A number of rows that
becomes a Python number is followed in `rows`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch.fx as fx

from ..ir import Rejection
from .cleaning import behind, schema_name

_COUNT = {"bincount", "histc", "sum", "cumsum", "count_nonzero", "scatter_add", "scatter_add_", "index_add", "index_add_", "scatter_reduce"}
_KEEP = {"add", "sub", "rsub", "add_", "sub_", "cat", "stack", "concat", "neg", "clone", "copy_", "max", "min", "amax", "amin", "diff"}
_KEEP |= {"_to_copy", "floor_divide", "div", "mul"}
_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge", "greater", "greater_equal", "less", "less_equal", "not_equal"}
_BEND = {"clamp", "clamp_max", "minimum", "clamp_", "clamp_max_", "floor_divide", "div", "remainder", "fmod", "bitwise_right_shift", "__rshift__"}
_PICK = {"index", "gather", "index_select", "embedding", "take", "masked_select"}  # values come from the first argument


def check(gm: fx.GraphModule, reads: Iterable[fx.Node], tokens: Sequence[int] = ()) -> None:
    """Raise `Rejection` where a count or a position meets a number but 0 and 1, and where what is read by the host bounds or divides one.

    tokens: the token counts of the probes, which are primes and divide nothing but numbers of rows.
    """
    counted = _counted(gm, tokens)
    for n in gm.graph.nodes:
        if _name(n) in _COMPARE and n.args[0] in counted and isinstance(n.args[1], (int, float)) and n.args[1] not in (0, 1):
            raise Rejection(f"it compares a number of rows, or a row's place, with {n.args[1]}, which few rows do not tell", stage="rows")
    for n in behind(reads):
        if _name(n) in _BEND and n.args[0] in counted:
            raise Rejection("its control flow depends on a count that it bounds or divides", stage="rows")


def _counted(gm: fx.GraphModule, tokens: Sequence[int]) -> set[fx.Node]:
    """Tensors that count rows, or number them."""
    found: set[fx.Node] = set()
    for n in gm.graph.nodes:
        if n.op == "call_function" and (_makes(n, tokens) or any(i in found for i in _kept(n))):
            found.add(n)
    return found


def _makes(n: fx.Node, tokens: Sequence[int]) -> bool:
    """Whether numbers of rows begin here."""
    name, source = _name(n), n.args[0] if n.args else None
    if n.target is operator.getitem:
        from_sort = _name(source) == "sort" and n.args[1] == 1
        return from_sort or _picks(source) or n.args[1] == 2 and "unique" in _name(source)
    if name == "arange":
        return any(n.meta["val"].numel() % p == 0 for p in tokens if n.meta["val"].numel())
    if name in _COUNT and isinstance(source, fx.Node):
        return name in ("histc", "bincount") or not source.meta["val"].is_floating_point()
    return name == "argsort" or _picks(n)


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
