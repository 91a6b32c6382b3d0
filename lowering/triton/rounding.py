"""Rows rounded as a model rounds them before a product (W8A8), for kernels that multiply in the rows' own type: q · s, a launch.

    s = max|x| / largest over each group of a row,   q = to8(x / max(s, floor)),   out = q · (max(s, floor) or s)

The quotients are those of IEEE division, so that the codes are the model's. What is stored is rounded to the rows' type once more.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir import Rows
from .host import cdiv, power_of_2
from .launch.tape import empty, launch

_WIDEST = 8192  # inputs of a group that a program holds
_ELEMENTS = 4096  # of a program


@triton.jit
def _as_e4m3(v):
    """The e4m3 nearest to v, ties to even: four digits, or a multiple of 2^-9. Nothing is above 448 by more than a rounding."""
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (v + 24576.0) - 24576.0
    small = tl.where(small == 0.0, v * 0.0, small)
    return tl.where(v != v, v, tl.where(tl.abs(v) < 0.015625, small, tl.minimum(tl.maximum(normal, -448.0), 448.0)))


@triton.jit(do_not_specialize=["count"])
def _round_rows(
    x, out, count, groups, stride, width, largest, floor,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr, FLOAT: tl.constexpr, FLOORED: tl.constexpr,
):  # fmt: skip
    """`count` groups of GROUP inputs, `groups` a row; MANY a program."""
    g = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    j = tl.arange(0, BLOCK)
    inside = (g < count)[:, None] & (j < GROUP)[None, :]
    row, first = g // groups, g % groups * GROUP
    v = tl.load(x + (row * stride + first)[:, None] + j[None, :], mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(v), 1)
    most = tl.where(tl.max((v != v).to(tl.int32), 1) == 1, float("nan"), most)
    s = tl.div_rn(most, tl.full((MANY,), 1.0, tl.float32) * largest)
    least = tl.where(s < floor, floor, s)
    if FLOAT:
        q = _as_e4m3(tl.div_rn(v, tl.broadcast_to(least[:, None], v.shape)))
    else:
        q = tl.div_rn(v, tl.broadcast_to(tl.where(least == 0.0, 1.0, least)[:, None], v.shape))
        q = (q + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
    q = q * (least if FLOORED else s)[:, None]
    tl.store(out + (row * width + first)[:, None] + j[None, :], q.to(out.dtype.element_ty), mask=inside)


def fits(how: Rows, width: int) -> bool:
    """Whether the kernel rounds rows of `width` so: to int8 or e4m3, in groups, by scales of its own, no powers of two."""
    group = how.group or width
    known = how.dtype is torch.int8 if not how.dtype.is_floating_point else how.dtype is torch.float8_e4m3fn
    return known and how.bits == 8 and not (how.power or how.smooth or how.static) and width % group == 0 and group <= _WIDEST


def rounded(x: Tensor, how: Rows) -> Tensor:
    """x [N, K], K contiguous -> the rows as the product reads them, in their own type. Needs `fits`."""
    out = empty(x, *x.shape)
    group = how.group or x.shape[1]
    groups, block = x.shape[1] // group, power_of_2(group)
    many = max(1, _ELEMENTS // block)
    count = x.shape[0] * groups
    launch(
        _round_rows, (cdiv(count, many),),
        x, out, count, groups, x.stride(0), x.shape[1], how.largest, how.floor,
        GROUP=group, BLOCK=block, MANY=many, FLOAT=how.dtype.is_floating_point, FLOORED=how.floored, num_warps=4,
    )  # fmt: skip
    return out
