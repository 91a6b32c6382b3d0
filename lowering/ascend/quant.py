"""Experts in int8, as calls: weights by output channel, rows by token, both symmetric (`int8` says which chain a block takes).

Dispatch with dynamic quantisation -> first product and activation, quantised again -> int8 product, scaled back.
Weights that a model stores in int8 are used as they are, with its own scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import generic
from . import calls, int8
from .calls import call, groups, list_type, tuning

_ENUM = {torch.int8: 1, torch.int32: 3, torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}  # torch's own numbers of dtypes


@dataclass(frozen=True)
class Quantised:
    """Weights [E, in, out] in int8 and scales [E, out], in the dtypes that the chain `row` asks for; `up` holds one, or gate and up apart.

    alpha: rows are clipped to alpha times their largest value, where the chain clips. up_smooth, down_smooth [E, in], one or none: what
    rows are multiplied by before they are rounded, in fp32, and in the dtype of the rows for the chain "step by step".
    """

    up: Sequence[Tensor]
    up_scale: Sequence[Tensor]
    down: Tensor
    down_scale: Tensor
    row: int8.Row
    alpha: float = 1.0
    up_smooth: Sequence[Tensor] = ()
    down_smooth: Tensor | None = None


Rows = tuple[Tensor, Tensor]  # rows in int8 and their scales


def _product(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ rows · weight · scale · row_scale in `dtype`."""
    (out,) = call(
        "npu_grouped_matmul", [rows], [weight], scale=[scale], per_token_scale=[row_scale], **groups(counts), **tuning(rows, counts),
        output_dtype=_ENUM[dtype],
    )  # fmt: skip
    return out  # type: ignore[no-any-return]


def _sums(rows: Tensor, row_scale: Tensor, q: Quantised, counts: Tensor, _: torch.dtype, __: generic.Layout) -> Rows:
    """Raw sums, then everything else in one op."""
    (sums,) = call("npu_grouped_matmul", [rows], [q.up[0]], **groups(counts), **tuning(rows, counts), output_dtype=_ENUM[torch.int32])
    out: Rows = call(
        "npu_dequant_swiglu_quant", sums, weight_scale=q.up_scale[0], activation_scale=row_scale, group_index=counts, activate_left=True,
        quant_mode=1, **({} if q.down_smooth is None else {"quant_scale": q.down_smooth}),
    )  # fmt: skip
    return out


def _fused(rows: Tensor, row_scale: Tensor, q: Quantised, counts: Tensor, _: torch.dtype, __: generic.Layout) -> Rows:
    """Product, SwiGLU and quantisation in one launch. The dtypes are told: the schema's defaults are not those of the documents."""
    out: Rows = call(
        "npu_grouped_matmul_swiglu_quant_v2", rows, [q.up[0]], [q.up_scale[0]], row_scale, counts, dequant_mode=0,
        dequant_dtype=_ENUM[torch.float32], quant_mode=0, quant_dtype=_ENUM[torch.int8], group_list_type=list_type(counts),
        **tuning(rows, counts),
    )  # fmt: skip
    return out


def _steps(rows: Tensor, row_scale: Tensor, q: Quantised, counts: Tensor, dtype: torch.dtype, layout: generic.Layout) -> Rows:
    """Scaled products, the activation as it is without quantisation, rows quantised again."""
    products = [_product(rows, row_scale, w, s, counts, dtype) for w, s in zip(q.up, q.up_scale)]
    groups = {} if q.down_smooth is None else {"smooth_scales": q.down_smooth, "group_index": calls.cast(counts.cumsum(0), torch.int32)}
    out: Rows = call("npu_dynamic_quant", calls.activate(products, layout), **groups)
    return out


def _clipped(rows: Tensor, row_scale: Tensor, q: Quantised, counts: Tensor, dtype: torch.dtype, _: generic.Layout) -> Rows:
    """A scaled product; rows are clipped before they are quantised."""
    h = _product(rows, row_scale, q.up[0], q.up_scale[0], counts, dtype)
    alpha = torch.full((q.up[0].shape[0],), q.alpha, dtype=torch.float32, device=rows.device)
    out: Rows = call(int8.CLIP, h, counts, alpha, activate_left=True, quant_mode=1, clamp_mode=1)
    return out


_FIRST = {int8.CLIPPED: _clipped, int8.FUSED: _fused, int8.SUMS: _sums, int8.STEPS: _steps}


def experts_rows(x: Tensor, ids: Tensor, weights: Tensor, q: Quantised, layout: generic.Layout) -> tuple[Tensor, Tensor, Tensor]:
    """As `calls.experts_rows`, in int8."""
    rows, index, counts, row_scale = calls.init_routing(x, ids, layout.num_experts, 1, next(iter(q.up_smooth), None))
    inner, inner_scale = _FIRST[q.row](rows, row_scale, q, counts, x.dtype, layout)
    return _product(inner, inner_scale, q.down, q.down_scale, counts, x.dtype), index, weights


def start(
    x: Tensor, ids: Tensor, weights: Tensor, q: Quantised, layout: generic.Layout, all_known: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """As `calls.start`, in int8."""
    return calls.start(x, ids, weights, q, layout, all_known, experts_rows)
