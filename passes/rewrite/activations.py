"""Rows in few bits because the user asked for it (`options={"activations": ...}`): W8A16 becomes W8A8, which is another function.

W x  ->  W (q · s),   q = round(x / s),   s = max|x| / largest over each group of a row
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.fx as fx

from ...ir import Experts, MoeBlock, Rows, Stored
from ...ir.codec import record_of
from ...ir.records import Layout, Storage
from ...ir.storage import encode
from ...ir.stored import ALL
from ...ir.text import rows_text
from .target import Target

MODEL = "model"  # rows as the model has them
KINDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_FLOOR = 1e-12  # of a scale
_ROWS, _WIDEST = 32, 1024  # of the rows that the error is measured on


def requested(ir: MoeBlock, kind: str, target: Target) -> tuple[MoeBlock, str]:
    """The block with rows as asked for, and what is told of it; the block itself where they stay as they are."""
    e = ir.experts
    if kind == MODEL:
        return ir, ""
    if (stays := _stay(e)) is not None:
        return ir, f"activations={kind!r}: rows stay as they are, {stays}"
    asked = rounded(e, kind)
    found = replace(ir, experts=asked)
    if (why := target.reason(found)) is not None:
        return ir, f"activations={kind!r}: rows stay as they are, {why}"
    told = rows_text(asked.up_rows or asked.down_rows)
    return found, f"{told} because activations={kind!r}: {error(asked):.1e} of the result's norm on random rows"


def _stay(e: Experts) -> str | None:
    """Why rows stay as the model has them whatever is asked for, None where they need not."""
    if not e.coded:
        return "the weights are floats"
    if e.rounded:
        return "the model rounds them itself"
    if e.adapted:
        return "low-rank pairs read them too"
    return "gradients are on" if torch.is_grad_enabled() else None


def rounded(e: Experts, kind: str) -> Experts:
    """The same experts with rows rounded before the products whose weights are in few bits."""
    return replace(e, up_rows=_rows(e.up_stored, e.up_transposed, kind), down_rows=_rows(e.down_stored, e.down_transposed, kind))


def _rows(how: Stored | None, transposed: bool, kind: str) -> Rows | None:
    """Groups of inputs as the weights' scales have them, where rows are floats and the scales have groups."""
    if how is None:
        return None
    along = how.rows if transposed else how.columns
    return Rows(8, KINDS[kind], along if kind == "fp8" and along > 1 else ALL, _FLOOR)


def error(e: Experts) -> float:
    """What rounding the rows changes: |y' - y| / |y| of one expert with random weights and rows from a normal distribution, in float64."""
    gen = torch.Generator().manual_seed(0)

    def matrix(out: int, inner: int) -> torch.Tensor:
        return torch.randn(out, inner, generator=gen, dtype=torch.float64) * inner**-0.5

    hidden, inner = (_size(n, r) for n, r in ((e.hidden, e.up_rows), (e.intermediate, e.down_rows)))
    parts = {"g": matrix(inner, hidden), "u": matrix(inner, hidden), "d": matrix(hidden, inner)}
    m = parts | dict.fromkeys(("gb", "ub", "db", "gl", "ul", "dl"))
    x = torch.randn(_ROWS, hidden, generator=gen, dtype=torch.float64)
    want = replace(e, up_rows=None, down_rows=None).apply(x, m)
    return float((e.apply(x, m) - want).norm() / want.norm())


def _size(n: int, rows: Rows | None) -> int:
    """No more than is needed to measure, whole groups."""
    group = max(1, 0 if rows is None else rows.group)
    return max(group, min(n, _WIDEST) // group * group)


_CODED = (torch.ops.moe_compile.experts_stored.default, torch.ops.moe_compile.experts_stored_shared.default)


def apply(graph: fx.Graph, kind: str) -> None:
    """Every op on weights in few bits rounds its rows, as `requested` said."""
    if kind == MODEL or torch.is_grad_enabled():
        return
    for n in graph.nodes:
        if n.op == "call_function" and n.target in _CODED:
            _ask(n, kind)


def _ask(n: fx.Node, kind: str) -> None:
    names = [a.name for a in n.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, n.args, strict=True))
    storage = record_of(Storage, [given[f.name] for f in fields(Storage)])
    if any(storage.rows()):
        return
    (up, down), layout = storage.stored(), {f.name: given[f.name] for f in fields(Layout)}
    rows = _rows(up, bool(layout["up_transposed"]), kind), _rows(down, bool(layout["down_transposed"]), kind)
    ints, consts = encode(replace(storage.storing, up_rows=rows[0], down_rows=rows[1]))
    given |= {"storage_ints": ints, "storage_consts": consts}
    n.args = tuple(given[name] for name in names)
