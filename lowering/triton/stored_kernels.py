"""Codes and scales to floats, for the matrices of some experts: one launch, tiles of the matrices of those that are wanted."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir import Stored
from ...ir.stored import ALL

KINDS = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.float8_e5m2: 2}  # codes that `value_of` knows
_BYTES = {torch.int8: torch.int8, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
_NO_SCALE, _NUMBER, _EXPONENT = 0, 1, 2
_TILE_ROWS, _TILE_COLUMNS = 32, 128


@triton.jit
def value_of(code, KIND: tl.constexpr):
    """What a byte stands for, in fp32. Shifts in place of casts: float8 of every kind on every card.

    e4m3: the same digits are an fp32 of 2^-120 times the value. e5m2: the upper half of an fp16. NaN stays NaN.
    """
    if KIND == 0:
        return code.to(tl.float32)
    b = code.to(tl.int32)
    if KIND == 1:
        small = (((b & 0x80) << 24) | ((b & 0x7F) << 20)).to(tl.float32, bitcast=True)
        return tl.where((b & 0x7F) == 0x7F, float("nan"), small * 1.329227995784916e36)
    return (b << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _dequantise(
    codes, scales, experts, out, R, C, code_e, code_r, code_c, scale_e, scale_r, scale_c,
    KIND: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[n, i, j] = value(codes[experts[n], i, j]) · scales[experts[n], i // ROWS, j // COLUMNS]; ROWS or COLUMNS of 0: one for all."""
    n = tl.program_id(0).to(tl.int64)
    e = tl.load(experts + n).to(tl.int64)
    if e >= 0:
        i = (tl.program_id(1) * BR + tl.arange(0, BR)).to(tl.int64)
        j = (tl.program_id(2) * BC + tl.arange(0, BC)).to(tl.int64)
        inside = (i < R)[:, None] & (j < C)[None, :]
        code = tl.load(codes + e * code_e + i[:, None] * code_r + j[None, :] * code_c, mask=inside, other=0)
        w = value_of(code, KIND)
        if SCALE != 0:
            row = i // ROWS if ROWS != 0 else i * 0
            column = j // COLUMNS if COLUMNS != 0 else j * 0
            s = tl.load(scales + e * scale_e + row[:, None] * scale_r + column[None, :] * scale_c, mask=inside, other=0)
            if SCALE == 2:
                b = s.to(tl.int32)
                two = (b << 23).to(tl.float32, bitcast=True)
                s = tl.where(b == 0, 5.877471754111438e-39, tl.where(b == 255, float("nan"), two))
            w = w * s.to(tl.float32)
        tl.store(out + n * R * C + i[:, None] * C + j[None, :], w.to(out.dtype.element_ty), mask=inside)


def dequantise(codes: Tensor, scales: Tensor | None, how: Stored, experts: Tensor, out: Tensor) -> None:
    """codes [.., R, C], scales as `Stored` says, experts [n] (-1: none) -> out [n, R, C], in place."""
    rows, columns = out.shape[-2:]
    kind = _NO_SCALE if scales is None else _EXPONENT if scales.dtype is torch.float8_e8m0fnu else _NUMBER
    held = codes.view(_BYTES[codes.dtype])
    s = out if scales is None else scales.view(torch.uint8) if kind == _EXPONENT else scales
    grid = (out.shape[0], triton.cdiv(rows, _TILE_ROWS), triton.cdiv(columns, _TILE_COLUMNS))
    _dequantise[grid](
        held, s, experts, out, rows, columns,
        codes.stride(0) if codes.ndim == 3 else 0, *codes.stride()[-2:], *_strides(scales, how, codes),
        KIND=KINDS[codes.dtype], SCALE=kind, ROWS=how.rows, COLUMNS=how.columns, BR=_TILE_ROWS, BC=_TILE_COLUMNS,
    )  # fmt: skip


def _strides(scales: Tensor | None, how: Stored, codes: Tensor) -> tuple[int, int, int]:
    """Of scales: between experts, along rows, along columns; 0 along a dim that they do not have."""
    if scales is None:
        return 0, 0, 0
    lead = scales.stride(0) if codes.ndim == 3 else 0
    own = scales.stride()[codes.ndim - 2 :]
    if how.grid:
        return lead, own[0], own[1]
    return lead, own[0] if how.rows != ALL else 0, own[0] if how.columns != ALL else 0
