"""CPU kernels of grouped products, activations and quantisation, from their documented semantics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .antiquant import unpacked
from .emulate_common import per_row, undefined
from .schemas import DTYPES

# ---- experts -----------------------------------------------------------------------------------------------------------


def _counts(group_list: Tensor, kind: int | None) -> list[int]:
    if kind == 0:
        return [int(n) for n in group_list.diff(prepend=group_list.new_zeros(1))]
    if kind == 1:
        return [int(n) for n in group_list]
    raise NotImplementedError("group_list_type 2 is not emitted")


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    antiquant_scale: Sequence[Tensor] | None = None,
    antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **unused: Any,
) -> list[Tensor]:
    """Rows of group e times weight[e] (group_type 0), or columns of group e times rows of group e (group_type 2).

    With antiquant the weight is (weight + offset) · scale, in the dtype of the rows; an int32 holds eight of 4 bits, the first lowest.
    """
    assert group_list is not None and len(x) == len(weight) == 1
    (a,), (w,) = x, weight
    counts = _counts(group_list, group_list_type)
    if group_type == 2:
        parts = zip(a.split(counts + [a.shape[1] - sum(counts)], 1), w.split(counts + [w.shape[0] - sum(counts)]))
        return [torch.stack([_product(left, right) for left, right in list(parts)[: len(counts)]]).to(a.dtype)]
    rows, wide = a.shape[0], a.dtype == torch.int8
    w = unpacked(w) if w.dtype == torch.int32 else w
    out = undefined(torch.empty(rows, w.shape[2], dtype=torch.int32 if wide else torch.promote_types(a.dtype, torch.float32)))
    start = 0
    for e, n in enumerate(counts):
        m = w[e]
        if antiquant_scale:
            m = _dequantised(m, antiquant_scale[0][e], antiquant_offset[0][e] if antiquant_offset else None).to(a.dtype)
        out[start : start + n] = _product(a[start : start + n], m)
        if bias:
            out[start : start + n] += bias[0][e].to(out.dtype)
        start += n
    return [_scaled(out, scale, per_token_scale, counts, a.dtype, output_dtype)]


def _dequantised(m: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """(m + offset) · scale for m [K, N]; scale and offset [N], or [G, N] of K / G rows each."""

    def rows(t: Tensor) -> Tensor:
        return t.float() if t.ndim == 1 else t.float().repeat_interleave(m.shape[0] // t.shape[0], 0)

    return (m.float() + (0 if offset is None else rows(offset))) * rows(scale)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.int8:
        return (a.double() @ b.double()).to(torch.int32)  # sums of products of bytes are exact in a double
    return a.float() @ b.float() if a.dtype != torch.float64 else a @ b


def _scaled(
    out: Tensor, scale: Sequence[Tensor] | None, rows: Sequence[Tensor] | None, counts: list[int], dtype: torch.dtype, wanted: int | None
) -> Tensor:
    target = DTYPES[wanted] if wanted is not None and wanted >= 0 else dtype
    if dtype == torch.int8 and target == torch.int32:
        return out
    result = out.float() if dtype == torch.int8 else out
    done = sum(counts)
    if scale:
        result[:done] = result[:done] * scale[0].float().repeat_interleave(torch.tensor(counts), 0)
    if rows:
        result[:done] = result[:done] * rows[0].float()[:done, None]
    if dtype == torch.int8:
        result[done:] = float("nan")
    return result.to(target)


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    g, u = input.float().chunk(2, dim)
    return (torch.nn.functional.silu(g) * u).to(input.dtype)


def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    g, u = input.float().chunk(2, dim)
    s, d = g.sigmoid(), grad_output.float()
    return torch.cat([d * u * (s + g * s * (1 - s)), d * g * s], dim).to(input.dtype)


def clipped_swiglu(
    x: Tensor,
    *,
    group_index: Tensor | None = None,
    dim: int = -1,
    alpha: float = 1.702,
    limit: float = 7.0,
    bias: float = 1.0,
    interleaved: bool = True,
) -> Tensor:
    y = _clipped(x.float(), alpha, limit, bias, interleaved).to(x.dtype)
    if group_index is not None:
        y[int(group_index.sum()) :] = float("nan")
    return y


# ---- quantisation ------------------------------------------------------------------------------------------------------


def dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    values = input.float()
    if smooth_scales is not None and group_index is not None:  # cumulative row counts, unlike elsewhere
        experts = torch.bucketize(torch.arange(values.shape[0]), group_index.long(), right=True).clamp(max=smooth_scales.shape[0] - 1)
        values = values * smooth_scales.float()[experts]
    elif smooth_scales is not None:
        values = values * smooth_scales.float()
    return per_row(values)


def dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    quant_scale: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """x · weight_scale[g] · activation_scale, SwiGLU, dynamic int8. The right half is activated unless told otherwise."""
    done = x.shape[0] if group_index is None else int(group_index.sum())
    v = x[:done].float()
    if weight_scale is not None:
        v = v * _by_group(weight_scale, group_index)
    if activation_scale is not None:
        v = v * activation_scale.float().reshape(-1, 1)[:done]
    if swiglu_mode == 0:
        y = _swiglu(v, activate_left)
    else:
        y = _clipped(v, glu_alpha, clamp_limit, glu_bias, interleaved=swiglu_mode == 1)
    if quant_scale is not None:
        many = group_index is not None and quant_scale.ndim == 2 and quant_scale.shape[0] > 1
        y = y * _by_group(quant_scale, group_index if many else None)
    return _padded(*per_row(y), x.shape[0])


def _by_group(values: Tensor, counts: Tensor | None) -> Tensor:
    """A row of `values` for each row of its group; as they are where there is one for all."""
    return values.float() if counts is None else values.float().repeat_interleave(counts, 0)


def _swiglu(v: Tensor, activate_left: bool) -> Tensor:
    left, right = v.chunk(2, -1)
    return torch.nn.functional.silu(left) * right if activate_left else left * torch.nn.functional.silu(right)


def _clipped(v: Tensor, alpha: float, limit: float, bias: float, interleaved: bool) -> Tensor:
    """a σ(alpha a) (b + bias) with a <= limit, |b| <= limit."""
    a, b = (v[..., 0::2], v[..., 1::2]) if interleaved else v.chunk(2, -1)
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return a * torch.sigmoid(alpha * a) * (b + bias)


def _padded(q: Tensor, scale: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Rows that no group holds are undefined."""
    out, scales = torch.zeros(rows, q.shape[1], dtype=torch.int8), undefined(torch.empty(rows))
    out[: len(q)], scales[: len(q)] = q, scale
    return out, scales


def grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    *,
    group_list_type: int | None = 0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """The sums of the int8 product, then as `dequant_swiglu_quant` with the left half activated."""
    counts = torch.tensor(_counts(group_list, group_list_type), dtype=torch.int64)
    (sums,) = grouped_matmul([x], weight, group_list=counts, group_type=0, group_list_type=1, output_dtype=3)
    return dequant_swiglu_quant(sums, weight_scale=weight_scale[0], activation_scale=x_scale, group_index=counts, activate_left=True)


def swiglu_clip_quant(
    x: Tensor, group_index: Tensor, group_alpha: Tensor, *, activate_left: bool = False, quant_mode: int = 1, clamp_mode: int = 1
) -> tuple[Tensor, Tensor]:
    """SwiGLU; by row, with m = alpha[g] · max|y|: y clipped to ±m, then int8 in steps of m / 127."""
    done = int(group_index.sum())
    y = _swiglu(x[:done].float(), activate_left)
    limit = y.abs().amax(-1) * _by_group(group_alpha, group_index)
    step = (limit / 127.0).clamp(min=torch.finfo(torch.float32).tiny)
    q = (y.clamp(-limit[:, None], limit[:, None]) / step[:, None]).round().clamp(-128, 127)
    return _padded(q.to(torch.int8), limit / 127.0, x.shape[0])
