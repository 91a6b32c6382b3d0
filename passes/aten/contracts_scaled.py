"""Contracts of torch's scaled products: y = (a · s_a) (b · s_b), each scale for rows, for blocks, or for all, as its shape says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .contracts import Contract, own

_BLOCK = 128


class _Unknown(Exception):
    """A way to scale that no reference is written for: the op stays as it is."""


def _spread(scale: Tensor, size: int, d: int) -> Tensor:
    """A dim of scales as that of what they scale: one for all, one each, or one for every 128."""
    own = scale.shape[d]
    if statically_known_true(own == size) or statically_known_true(own == 1):
        return scale
    if own != -(-size // _BLOCK):
        raise _Unknown
    return scale.repeat_interleave(_BLOCK, d).narrow(d, 0, size)


def _scaled(t: Tensor, scale: Tensor) -> Tensor:
    """t [M, N], scale of one element, or [M | M / 128 | 1, N | N / 128 | 1]."""
    if scale.dtype is not torch.float32 and scale.dtype is not torch.float8_e8m0fnu:
        raise _Unknown
    scale = scale.float()
    if statically_known_true(scale.numel() == 1):
        return t.float() * scale.reshape(())
    if scale.ndim != 2:
        raise _Unknown
    return t.float() * _spread(_spread(scale, t.shape[0], 0), t.shape[1], 1)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, dtype: Any) -> Tensor:
    out = a @ b
    return (out if bias is None else out + bias.float()).to(dtype)


def _scaled_mm(self, mat2, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):  # type: ignore[no-untyped-def]
    if scale_result is not None:
        raise _Unknown
    return _product(_scaled(self, scale_a), _scaled(mat2, scale_b), bias, out_dtype or self.dtype)


def _only(scales: Sequence[Tensor], swizzle: Sequence[int]) -> Tensor:
    if len(scales) != 1 or any(swizzle):
        raise _Unknown
    return scales[0]


def _scaled_mm_v2(  # type: ignore[no-untyped-def]
    self,
    mat2,
    scale_a,
    recipe_a,
    swizzle_a,
    scale_b,
    recipe_b,
    swizzle_b,
    bias,
    out_dtype,
    contraction_dim=(),
    use_fast_accum=False,
):
    if contraction_dim:
        raise _Unknown
    a, b = _scaled(self, _only(scale_a, swizzle_a)), _scaled(mat2, _only(scale_b, swizzle_b))
    return _product(a, b, bias, out_dtype or torch.bfloat16)


def _grouped(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor | None, dtype: Any) -> Tensor:
    """a [S, K] with scales [S], b [E, K, N] with scales [E, N]."""
    if offs is None or a.ndim != 2 or b.ndim != 3 or scale_a.shape != a.shape[:1] or scale_b.shape != (b.shape[0], b.shape[2]):
        raise _Unknown
    rows, w = a.float() * scale_a.unsqueeze(-1), b.float() * scale_b.unsqueeze(1)
    return torch.ops.moe_compile_reference.grouped_mm_fallback(rows, w, offs).to(dtype)  # type: ignore[no-any-return]


def _scaled_grouped_mm(  # type: ignore[no-untyped-def]
    self, mat2, scale_a, scale_b, offs=None, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False
):
    if bias is not None or scale_result is not None:
        raise _Unknown
    return _grouped(self, mat2, scale_a, scale_b, offs, out_dtype or torch.bfloat16)


def _scaled_grouped_mm_v2(  # type: ignore[no-untyped-def]
    self,
    mat2,
    scale_a,
    recipe_a,
    swizzle_a,
    scale_b,
    recipe_b,
    swizzle_b,
    offs=None,
    bias=None,
    out_dtype=None,
    contraction_dim=(),
    use_fast_accum=False,
):
    if bias is not None or contraction_dim:
        raise _Unknown
    return _grouped(self, mat2, _only(scale_a, swizzle_a), _only(scale_b, swizzle_b), offs, out_dtype or torch.bfloat16)


own(
    Contract("aten::_scaled_mm", _scaled_mm, own=True),
    Contract("aten::_scaled_mm_v2", _scaled_mm_v2, own=True),
    Contract("aten::_scaled_grouped_mm", _scaled_grouped_mm, own=True),
    Contract("aten::_scaled_grouped_mm_v2", _scaled_grouped_mm_v2, own=True),
)
