"""Rows rounded as a model rounds them before a product (W8A8), a launch: q · s for kernels that multiply in the rows' own type, or q and s.

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
_SPLIT = 128  # inputs of a block of rows in two parts


@triton.jit
def _as_e4m3(v):
    """The e4m3 nearest to v, ties to even: four digits, or a multiple of 2^-9. Nothing is above 448 by more than a rounding."""
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (v + 24576.0) - 24576.0
    small = tl.where(small == 0.0, v * 0.0, small)
    return tl.where(v != v, v, tl.where(tl.abs(v) < 0.015625, small, tl.minimum(tl.maximum(normal, -448.0), 448.0)))


@triton.jit
def _code(v, NATIVE: tl.constexpr):
    """The byte of the e4m3 nearest to v. NATIVE: by the card's own conversion, which does the same."""
    if NATIVE:
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    q = _as_e4m3(v)
    bits, size = q.to(tl.int32, bitcast=True), tl.abs(q)
    code = tl.where(size < 0.015625, (size * 512.0).to(tl.int32), ((bits >> 20) & 0x7FF) - 960)
    return (tl.where(q != q, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _divided(v, s, FUSED: tl.constexpr):
    """v / s for rows of v, rounded as IEEE division is: a quotient by the nearest reciprocal and one correction (Markstein), where numbers
    are far from the ends of fp32's range and a product and a sum are one instruction."""
    s = s[:, None]
    if FUSED:
        if (tl.min(s) > 1e-18) & (tl.max(s) < 1e18):
            r = tl.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
            q = v * r
            out = tl.fma(tl.fma(-q, tl.broadcast_to(s, v.shape), v), tl.broadcast_to(r, v.shape), q)
        else:
            out = tl.div_rn(v, tl.broadcast_to(s, v.shape))
    else:
        out = tl.div_rn(v, tl.broadcast_to(s, v.shape))
    return out


@triton.jit(do_not_specialize=["count"])
def _round_rows(
    x, out, scales, count, groups, stride, width, largest, floor,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr, FLOAT: tl.constexpr, FLOORED: tl.constexpr, CODES: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """`count` groups of GROUP inputs, `groups` a row; MANY a program. CODES: the e4m3 codes by themselves, beside their scales."""
    g = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    j = tl.arange(0, BLOCK)
    inside = (g < count)[:, None] & (j < GROUP)[None, :]
    row, first = g // groups, g % groups * GROUP
    v = tl.load(x + (row * stride + first)[:, None] + j[None, :], mask=inside, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(v), 1)
    most = tl.where(tl.max((v != v).to(tl.int32), 1) == 1, float("nan"), most)
    s = tl.div_rn(most, tl.full((MANY,), 1.0, tl.float32) * largest)
    least = tl.where(s < floor, floor, s)
    if CODES:
        q = _divided(v, least, FUSED)
    elif FLOAT:
        q = _as_e4m3(_divided(v, least, FUSED))
    else:
        q = tl.div_rn(v, tl.broadcast_to(tl.where(least == 0.0, 1.0, least)[:, None], v.shape))
        q = (q + 12582912.0) - 12582912.0  # to the nearest whole number, ties to even
    used = least if FLOORED else s
    if CODES:
        tl.store(scales + g, used, mask=g < count)
        q = _code(q, FUSED)
    else:
        q = (q * used[:, None]).to(out.dtype.element_ty)
    tl.store(out + (row * width + first)[:, None] + j[None, :], q, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _split_rows(x, out, scales, count, groups, stride, GROUP: tl.constexpr, MANY: tl.constexpr, NATIVE: tl.constexpr):
    """`count` groups of GROUP inputs, `groups` a row, x = (q + q') s: q, then q', of a group after the other; MANY a program."""
    g = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    j = tl.arange(0, GROUP)
    inside = (g < count)[:, None] & (j < GROUP)[None, :]
    row, first = g // groups, g % groups * GROUP
    v = tl.load(x + (row * stride + first)[:, None] + j[None, :], mask=inside, other=0.0).to(tl.float32)
    # s: the power of two that brings the largest number of a group to 128 .. 256; of a group of zeros any; of one with an infinity none
    exponent = tl.maximum(tl.max(tl.abs(v), 1).to(tl.int32, bitcast=True) >> 23, 27)
    s = tl.where(exponent == 255, float("nan"), ((exponent - 7) << 23).to(tl.float32, bitcast=True))
    v = v * ((261 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(scales + g, s, mask=g < count)
    at = out + (g * (2 * GROUP))[:, None] + j[None, :]
    if NATIVE:
        q = v.to(tl.float8e4nv).to(tl.float32)
    else:
        q = _as_e4m3(v)
    tl.store(at, _code(q, NATIVE), mask=inside)
    tl.store(at + GROUP, _code(v - q, NATIVE), mask=inside)


def fits(how: Rows, width: int) -> bool:
    """Whether the kernel rounds rows of `width` so: to int8 or e4m3, in groups, by scales of its own, no powers of two."""
    group = how.group or width
    known = how.dtype is torch.int8 if not how.dtype.is_floating_point else how.dtype is torch.float8_e4m3fn
    return known and how.bits == 8 and not (how.power or how.smooth or how.static) and width % group == 0 and group <= _WIDEST


def rounded(x: Tensor, how: Rows) -> Tensor:
    """x [N, K], K contiguous -> the rows as the product reads them, in their own type. Needs `fits`."""
    out = empty(x, *x.shape)
    _round(x, how, out, None)
    return out


def coded(x: Tensor, how: Rows) -> tuple[Tensor, Tensor]:
    """x [N, K], K contiguous -> (e4m3 codes as bytes [N, K], fp32 scales [N, groups]). Needs `fits`, and e4m3."""
    codes, scales = empty(x, *x.shape, dtype=torch.uint8), empty(x, x.shape[0], _groups(x, how), dtype=torch.float32)
    _round(x, how, codes, scales)
    return codes, scales


def in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] bf16, K contiguous and whole blocks of 128 -> (e4m3 codes as bytes [N, 2 K]: of each block q and then q', fp32 scales
    [N, blocks]), x = (q + q') s.

    The eight digits of a bf16 are four of q and four of q': exact, but for numbers below 2^-9 of their block's largest, whose error is at
    most 2^-17 of it. A block with an infinity is no number.
    """
    groups = x.shape[1] // _SPLIT
    codes, scales = empty(x, x.shape[0], 2 * x.shape[1], dtype=torch.uint8), empty(x, x.shape[0], groups, dtype=torch.float32)
    count, many = x.shape[0] * groups, _ELEMENTS // _SPLIT
    launch(
        _split_rows, (cdiv(count, many),),
        x, codes, scales, count, groups, x.stride(0), GROUP=_SPLIT, MANY=many, NATIVE=x.is_cuda, num_warps=4,
    )  # fmt: skip
    return codes, scales


def _groups(x: Tensor, how: Rows) -> int:
    return x.shape[1] // (how.group or x.shape[1])


def _round(x: Tensor, how: Rows, out: Tensor, scales: Tensor | None) -> None:
    groups = _groups(x, how)
    group = x.shape[1] // groups
    block = power_of_2(group)
    many = max(1, _ELEMENTS // block)
    count = x.shape[0] * groups
    launch(
        _round_rows, (cdiv(count, many),),
        x, out, scales, count, groups, x.stride(0), x.shape[1], how.largest, how.floor,
        GROUP=group, BLOCK=block, MANY=many, FLOAT=how.dtype.is_floating_point, FLOORED=how.floored, CODES=scales is not None,
        FUSED=x.is_cuda, num_warps=4,
    )  # fmt: skip
