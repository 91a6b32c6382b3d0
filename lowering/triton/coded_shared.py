"""Few tokens, the routed experts in few bits and the shared one in floats: both in the same two launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import activation, codes_together, gemm
from .coded import Coded, _at, _extents, _first, _how, _twice, at_once
from .coded_tiles import Vector
from .combine import early_launch
from .decode_shared import Shared
from .experts import _bias_args, _bias_strides, _mode
from .experts import _extents as _float_extents
from .host import cdiv, power_of_2
from .launch.tape import empty, launch
from .tune import Vector as FloatVector


def fits(c: Coded, s: Shared) -> bool:
    """Whether one kernel can take both: the same activation of as many projections, no biases but the shared down projection's, no rounded
    rows; the shared expert stored [out, in]."""
    theirs = s.call
    alike = (gemm.DUAL if c.layout.gated else gemm.SINGLE) == _mode(theirs.layout) and _act(c.layout) is _act(theirs.layout)
    plain = not any(c.rows) and c.up_bias is None and c.down_bias is None and theirs.up_bias is None
    return alike and plain and not theirs.up.table and not theirs.down.table and theirs.up.out_in and theirs.down.out_in


def _act(layout: Any) -> Any:
    return activation.functions(layout.act_ops, layout.act_consts).act


def few_together(c: Coded, s: Shared, shared_up: FloatVector, up: Vector, down: Vector) -> Tensor:
    """Routed experts, shared expert and c.add -> [T, H], two launches. Raises nothing for operands that `fits` accepts."""
    tokens = c.x.shape[0]
    a, b = empty(c.x, c.ids.numel(), c.up.at.n), empty(c.x, tokens, s.call.up.n)
    out = empty(c.x, tokens, c.down.at.n)
    _up(c, s, a, b, shared_up, up)
    _down(c, s, a, b, out, down)
    return out


def _early(c: Coded) -> dict[str, bool]:
    return {"launch_pdl": True} if early_launch(c.x) else {}


def _up(c: Coded, s: Shared, a: Tensor, b: Tensor, shared_tile: FloatVector, tile: Vector) -> None:
    pdl, tokens, w, layout = _early(c), c.x.shape[0], s.call.up, c.layout
    bn, bk = _float_extents(shared_tile, w)
    programs = tokens * cdiv(w.n, bn) + c.ids.numel() * cdiv(c.up.at.n, tile.bn)
    launch(
        codes_together.up_coded_together, (programs,),
        c.x, c.ids, c.weights, *_twice(c.up), c.up.table, a, w.parts[0], w.parts[-1], b,
        tokens, c.up.at.n, c.up.k, c.ids.shape[1], layout.num_experts, c.up.offset, c.x.stride(0), *_at(c.up),
        w.n, w.stride_n, w.stride_k,
        FIRST0=c.up.first[0], FIRST1=c.up.first[-1], STEP=c.up.step, MODE=_mode(s.call.layout), ACT=_act(layout), **_how(c.up, c.x),
        WEIGHTED=layout.weight_on_input, **_extents(c.up, tile),
        SHARED_BN=bn, SHARED_BK=bk, SHARED_EVEN=w.n % bn == 0 and w.k % bk == 0, PDL=bool(pdl), num_warps=tile.warps, **pdl,
    )  # fmt: skip


def _down(c: Coded, s: Shared, a: Tensor, b: Tensor, out: Tensor, tile: Vector) -> None:
    pdl, w, layout, slots = _early(c), s.call.down, c.layout, c.ids.shape[1]
    bk = min(power_of_2(w.k), 1024)
    launch(
        codes_together.down_coded_together, (c.x.shape[0], cdiv(c.down.at.n, tile.bn)),
        a, c.ids, c.weights, c.down.at.parts[0], _first(c.down.scales), _first(c.down.zeros), c.down.table, c.add, out,
        b, w.parts[0], _bias_args(s.call.down_bias, c.x)[0], s.gate,
        c.down.at.n, c.down.k, slots, layout.num_experts, c.down.offset, *_at(c.down), 0 if c.add is None else c.add.stride(0),
        w.k, w.stride_n, w.stride_k, _bias_strides(s.call.down_bias)[1],
        **_how(c.down, c.x), WEIGHTED=not layout.weight_on_input, ADD=c.add is not None,
        AT_ONCE=at_once(slots, tile.bn, tile.bb, tile.warps), **_extents(c.down, tile),
        SHARED_BIAS=s.call.down_bias is not None, GATED=s.gate is not None,
        SHARED_BK=bk, SHARED_EVEN=w.n % tile.bn == 0 and w.k % bk == 0, PDL=bool(pdl), num_warps=tile.warps, **pdl,
    )  # fmt: skip
