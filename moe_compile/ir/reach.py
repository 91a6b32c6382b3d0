"""How far a result may be off where rows are rounded to few bits and what is rounded was computed in another order, or type.

A number that lies at the edge between two codes may come to stand on either side. What that changes is known: a step of its own grid in the
row, and that times the column of the weights in the product. Everything else moves a code nowhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import scalar as act
from .experts import Experts
from .operands import Operands
from .rows import Rows
from .stored import Scale


def steps(how: Rows, rows: Tensor, near: Tensor, scales: Tensor | None = None) -> Tensor:
    """How far what `how.rounded(rows, scales)` gives may move, [N, K], where a row's numbers are off by up to `near` [N, K]; 0 where their
    codes are the same all over that range."""
    if how.static:
        low, mid, high = (how.rounded(r, scales) for r in (rows - near, rows, rows + near))
        return torch.maximum((high - mid).abs(), (mid - low).abs())
    x = how.smoothed(rows, scales)
    if how.smooth and scales is not None:
        near = near / scales.abs() if how.smooth == Scale.DIVIDES else near * scales.abs()
    group = (-1, how.group or rows.shape[-1])
    near = near.unflatten(-1, group)
    _, least = how.codes(x)
    size = x.unflatten(-1, group).abs()
    ends = [how.scales(t.amax(-1, keepdim=True)) for t in ((size - near).clamp(min=0), size + near)]
    x = x.unflatten(-1, group)
    corners = torch.stack([_codes(how, v / s) for v in (x - near, x + near) for s, _ in ends])
    first, last = corners.amin(0), corners.amax(0)
    moved = torch.stack([c * s for c in (first, last) for _, s in ends])
    far = (moved - _codes(how, x / how.scales(size.amax(-1, keepdim=True))[0]) * least).abs().amax(0)
    return torch.where(first == last, 0.0, far).flatten(-2)


def _codes(how: Rows, q: Tensor) -> Tensor:
    """Quotients as codes. None is beyond the largest, since a scale is no less than its group's largest number makes it."""
    q = q.nan_to_num(0.0, how.largest, -how.largest).clamp(-how.largest, how.largest)
    return q.to(how.dtype).to(q.dtype) if how.dtype.is_floating_point else q.round()


def reach(e: Experts, x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], near: float) -> Tensor:
    """How far each number of `Experts.run` [T, out] may be off by codes of rows that came to stand on the other side of an edge.

    near: of what a row holds, and of the largest number that a product gives for a row, how much what was computed may be off.
    """
    x, weights, ids = x.double(), weights.double(), ids - e.first
    out = x.new_zeros(x.shape[0], e.out_features)
    for i in range(e.num_experts):
        t, j = torch.where(ids == i)
        if not len(t):
            continue
        w = weights[t, j, None]
        rows = x[t] * w if e.weight_on_input else x[t]
        off = _of_expert(e, rows, e.expert(i, p, torch.float64), near)
        out = out.index_add(0, t, off if e.weight_on_input else w.abs() * off)
    return out


def _of_expert(e: Experts, rows: Tensor, m: dict[str, Any], near: float) -> Tensor:
    """rows [N, H] of one expert, with the matrices that `Experts.expert` gave -> [N, out]."""
    moved = torch.zeros_like(rows) if e.up_rows is None else steps(e.up_rows, rows, near * rows.abs(), m["us"])
    values: list[Tensor] = []
    offs: list[Tensor] = []
    for name in ("g", "u") if m["u"] is not None else ("g",):
        values.append(e.project(rows, m, name))
        offs.append(moved @ _columns(m, name))
    h, off = _acted(e, values, offs)
    if e.down_rows is not None:
        computed = [o + near * v.abs().amax(-1, keepdim=True) for v, o in zip(values, offs, strict=True)]
        around = _acted(e, values, computed)[1] + near * h.abs()
        # A step that the rows' own codes make moves numbers between two edges too: by as much as it is.
        off = steps(e.down_rows, h, around, m["ds"]) + off
    return off @ _columns(m, "d")


def _columns(m: dict[str, Any], name: str) -> Tensor:
    """|W|ᵀ of a projection [in, out]."""
    w, pair = m[name].double(), m[name + "l"]
    return (w if pair is None else w + pair[1].double() @ pair[0].double()).abs().t()


def _acted(e: Experts, values: list[Tensor], offs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The activation of an expert's one or two products, and how far it moves where these are off: the most of all corners."""
    corners = [[v + s * o for s in (-1.0, 1.0)] for v, o in zip(values, offs, strict=True)]
    h = act.evaluate(e.activation, *values)
    ends = [(g, *u) for g in corners[0] for u in ([(b,) for b in corners[1]] if len(corners) > 1 else [()])]
    return h, torch.stack([(act.evaluate(e.activation, *at) - h).abs() for at in ends]).amax(0)
