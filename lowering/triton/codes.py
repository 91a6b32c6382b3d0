"""Where the codes of a projection lie, with their scales, for kernels that decode in their loops. Nothing is copied.

What `read` refuses runs in a workspace of floats (`stored`): words that are packed along the outputs, in orders that are not those of
memory, tables that are no e2m1, blocks of widths that no tile has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import Form, Stored
from ...ir.operands import Operands
from ...ir.stored import ALL, Exponent, Scale, Zero
from ..reference.generic import Layout
from .weights import Matrices, down_matrices, up_matrices

# KIND: what a code is. The kernels know them by these numbers
INT8, E4M3, E5M2, NUMBER, E2M1, TABLED = range(6)
# SCALE: what scales are
NO_SCALE, PLAIN, EXPONENT, BITS = range(4)

_KINDS = {torch.int8: INT8, torch.uint8: NUMBER, torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_HALF, *(-v for v in _HALF))
_LOAD = 16  # bytes of a row that a thread loads at once


@dataclass(frozen=True)
class Codes:
    """Codes [n, k] of every expert and part, as `at` reaches their bytes, and what they are multiplied by.

    at: bytes, with strides in bytes; two codes a byte where `packed`, the first in the high half where `high`. scales, zeros: of each part
    (table of pointers as the codes), with strides between experts, along blocks of `rows` outputs and of `columns` inputs (0: all).
    step, first: output i of part p is row i · step + first[p] of the matrix as the model stores it, which scales are counted by.
    """

    at: Matrices
    k: int
    kind: int
    packed: bool
    high: bool
    offset: float
    scale: int
    scales: tuple[Tensor, ...]
    zeros: tuple[Tensor, ...]
    table: Tensor | None
    rows: int
    columns: int
    strides: tuple[int, int, int]
    step: int
    first: tuple[int, ...]
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype

    @property
    def per_byte(self) -> int:
        return 2 if self.packed else 1

    @property
    def group(self) -> int:
        """Bytes of a row that surely share a scale, at most what a thread loads at once."""
        size = _LOAD
        while self.columns and self.columns % (size * self.per_byte):
            size //= 2
        return size


def read(p: Operands[Tensor], name: str, how: Stored, layout: Layout) -> Codes | None:
    """The codes of `up` or `down`, None where they are beyond the kernels."""
    transposed = layout.up_transposed if name == "up" else layout.down_transposed
    kind = _kind(how)
    packing = _packing(how, transposed)
    held = [_bytes(t, how) for t in getattr(p, name)]
    if not takes(how, transposed) or kind is None or packing is None or any(t is None for t in held):
        return None
    matrices = (up_matrices if name == "up" else down_matrices)(layout, held)  # type: ignore[arg-type]
    if matrices is None:
        return None
    packed, high = packing
    rows, columns = (how.columns, how.rows) if transposed else (how.rows, how.columns)
    scales, zeros = (_by_part(_as_numbers(getattr(p, f"{name}_{what}")), layout, name) for what in ("scale", "zero"))
    if scales is None or zeros is None:
        return None
    if zeros and (not scales or zeros[0][0].shape != scales[0][0].shape or zeros[0][0].stride() != scales[0][0].stride()):
        return None
    table = getattr(p, f"{name}_table")
    step, first = _rows(layout, name, matrices.n)
    scale = NO_SCALE if not how.scaled else _scale(p, name, how)
    return Codes(
        matrices, matrices.k * (2 if packed else 1), kind, packed, high, how.offset, scale, tuple(t for t, _ in scales),
        tuple(t for t, _ in zeros), table[0] if table else None, rows, columns, _strides(p, name, how, layout.stacked, transposed),
        step, first, scales[0][1] if scales else torch.float32, zeros[0][1] if zeros else torch.float32,
    )  # fmt: skip


def takes(how: Stored, transposed: bool) -> bool:
    """Whether the kernels know such codes, for all that the record says."""
    packing = _packing(how, transposed)
    if packing is None or _kind(how) is None or how.second or how.indexed or how.shifted or how.scaled == Scale.DIVIDES:
        return False
    columns = how.rows if transposed else how.columns
    return columns % (2 if packing[0] else 1) == 0 and (not how.zeroed or how.zeroed == Zero.PLAIN and not how.exponents)


def _kind(how: Stored) -> int | None:
    if how.tabled:
        return TABLED if how.axis else None
    if how.values:
        return E2M1 if how.axis and how.values == _E2M1 and how.bits == 4 else None
    if how.axis:
        return NUMBER if how.bits == 4 else None
    return _KINDS.get(how.dtype)


def _packing(how: Stored, transposed: bool) -> tuple[bool, bool] | None:
    """(whether two codes lie in a byte, whether the first is in its high half), None where words are packed in another way."""
    if not how.axis:
        return False, False
    if how.bits != 4 or how.axis != (1 if transposed else 2) or transposed:
        return None
    natural = tuple(range(len(how.order)))
    if how.order == natural:
        return True, False
    return (True, True) if how.order == tuple(i ^ 1 for i in natural) else None


def _bytes(t: Tensor, how: Stored) -> Tensor | None:
    """The same memory as bytes; words of several bytes lie in a row."""
    if t.dtype.itemsize > 1 and t.stride(-1) != 1:
        return None
    return t.view(torch.uint8)


def _as_numbers(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.view(torch.uint8) if t.dtype is torch.float8_e8m0fnu else t for t in tensors]


def _scale(p: Operands[Tensor], name: str, how: Stored) -> int:
    if how.exponents:
        return BITS if how.exponents == Exponent.BITS else EXPONENT
    return EXPONENT if getattr(p, f"{name}_scale")[0].dtype is torch.float8_e8m0fnu else PLAIN


def _by_part(tensors: list[Tensor], layout: Layout, name: str) -> list[tuple[Tensor, torch.dtype]] | None:
    """Scales (or zero points) of each part, and their dtype; both parts of a matrix that holds two have the same."""
    from .weights import _table

    if not tensors:
        return []
    first = tensors[0]
    if any(t.stride() != first.stride() or t.dtype != first.dtype for t in tensors) or not first.dtype.itemsize:
        return None
    gated = name == "up" and layout.gated
    whole = 1 if not gated or layout.form == Form.SEPARATE else 2
    if layout.stacked:
        return [(t, t.dtype) for t in tensors for _ in range(whole)]
    parts = len(tensors) // layout.num_experts
    each = [list(tensors[i * layout.num_experts : (i + 1) * layout.num_experts]) for i in range(parts)]
    return [(_table(ts), first.dtype) for ts in each for _ in range(whole)]


def _rows(layout: Layout, name: str, n: int) -> tuple[int, tuple[int, ...]]:
    """Which row of the stored matrix output i of each part is: (step, first of each part)."""
    if name == "down" or not layout.gated:
        return 1, (0,)
    return {Form.SEPARATE: (1, (0, 0)), Form.CONCAT: (1, (0, n)), Form.INTERLEAVED: (2, (0, 1))}[Form(layout.form)]


def _strides(p: Operands[Tensor], name: str, how: Stored, stacked: bool, transposed: bool) -> tuple[int, int, int]:
    """Of scales: between experts, along blocks of outputs, along blocks of inputs; 0 along a dim that they do not have."""
    scales = getattr(p, f"{name}_scale")
    if not scales:
        return 0, 0, 0
    own: tuple[Any, ...] = scales[0].stride()
    lead = own[0] if stacked else 0
    own = own[1:] if stacked else own
    along = own if how.grid else (own[0] if how.rows != ALL else 0, own[0] if how.columns != ALL else 0)
    return (lead, along[1], along[0]) if transposed else (lead, *along)
