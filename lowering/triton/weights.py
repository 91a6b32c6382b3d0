"""Where the matrices of a projection lie: one strided view for all experts, or a table of pointers. Nothing is copied."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import Form
from ..reference.generic import Layout
from .launch.later import Later, NotRecorded


@dataclass(frozen=True)
class Matrices:
    """W[e] as [n, k] with strides in elements; `parts` are the first (gate) and second (up) projection, or one.

    A part is a tensor whose data pointer is the first element of expert 0 (`table` False), or an int64 table of E pointers.
    `aligned`: bytes that every pointer of a table is a multiple of, at most 16.
    `whole`: both parts with their columns alternating, [E, 2n, k], when the model stores them so.
    """

    parts: tuple[Tensor, ...]
    whole: Tensor | None
    n: int
    k: int
    stride_e: int
    stride_n: int
    stride_k: int
    table: bool
    aligned: int

    @property
    def out_in(self) -> bool:
        """Whether a row over k is contiguous, else a column over n is."""
        return self.stride_k == 1


@dataclass(frozen=True)
class Biases:
    """Per part a tensor [E, n], all with the same strides."""

    parts: tuple[Tensor, ...]
    stride_e: int
    stride_n: int


def up_matrices(layout: Layout, up: Sequence[Tensor]) -> Matrices | None:
    """The up projection; None when its strides are beyond the kernels."""
    as_nk = [_as_out_in(t, layout.up_transposed) for t in up]
    if not _uniform(as_nk):
        return None
    first, form = as_nk[0], layout.form
    k = first.shape[-1]
    if form == Form.SINGLE:
        return _matrices(layout, [as_nk], first.shape[-2], k, None)
    if form == Form.SEPARATE:
        half = len(up) // 2
        return _matrices(layout, [as_nk[:half], as_nk[half:]], first.shape[-2], k, None)
    n = first.shape[-2] // 2
    if form == Form.CONCAT:
        return _matrices(layout, [[t[..., :n, :] for t in as_nk], [t[..., n:, :] for t in as_nk]], n, k, None)
    whole = as_nk[0] if layout.stacked else None
    return _matrices(layout, [[t[..., 0::2, :] for t in as_nk], [t[..., 1::2, :] for t in as_nk]], n, k, whole)


def down_matrices(layout: Layout, down: Sequence[Tensor]) -> Matrices | None:
    return plain_matrices(layout, down, layout.down_transposed)


def plain_matrices(layout: Layout, tensors: Sequence[Tensor], transposed: bool) -> Matrices | None:
    """One matrix for each expert, as it is stored; None when the strides are beyond the kernels."""
    as_nk = [_as_out_in(t, transposed) for t in tensors]
    return _matrices(layout, [as_nk], *as_nk[0].shape[-2:], None) if _uniform(as_nk) else None


def up_biases(layout: Layout, bias: Sequence[Tensor]) -> Biases | None:
    """None when there are none."""
    if not bias:
        return None
    stacked = _stacked(layout, bias)
    n = stacked[0].shape[-1]
    if layout.form == Form.CONCAT:
        stacked = [stacked[0][:, : n // 2], stacked[0][:, n // 2 :]]
    elif layout.form == Form.INTERLEAVED:
        stacked = [stacked[0][:, 0::2], stacked[0][:, 1::2]]
    if any(t.stride() != stacked[0].stride() for t in stacked):
        stacked = [t.contiguous() for t in stacked]
    return Biases(tuple(stacked), *stacked[0].stride())


def down_biases(layout: Layout, bias: Sequence[Tensor]) -> Biases | None:
    if not bias:
        return None
    (stacked,) = _stacked(layout, bias)
    return Biases((stacked,), *stacked.stride())


def descriptor(t: Tensor, block: tuple[int, int]) -> Any:
    """A TMA descriptor over [E, rows, columns] for blocks [1, *block], in storage order. Needs `tma_fits`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    t = t if t.stride(-1) == 1 else t.transpose(-1, -2)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, *block])


def flat_descriptor(t: Tensor, block: tuple[int, int]) -> Any:
    """A Gluon TMA descriptor over the matrices of t [E, ., .] one below the other (storage order), boxes of `block`. Needs `flat_fits`."""
    t = t if t.stride(-1) == 1 else t.transpose(-1, -2)
    per_expert = t.stride(0) // t.stride(1)
    return _boxes(t, [(t.shape[0] - 1) * per_expert + t.shape[1], t.shape[2]], [t.stride(1), 1], block)


def rows_descriptor(a: Tensor, block: tuple[int, int]) -> Any:
    """A Gluon TMA descriptor over the rows of a [rows, k]."""
    return _boxes(a, list(a.shape), list(a.stride()), block)


def _boxes(t: Tensor, shape: list[int], strides: list[int], block: tuple[int, int]) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(t, shape, strides, list(block), _in_shared(block, t.dtype))


@functools.cache
def _in_shared(block: tuple[int, int], dtype: torch.dtype) -> Any:
    """How a box lies in shared memory, as the products take it."""
    from triton.experimental.gluon import language as gl

    kinds = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.uint8: gl.uint8}
    return gl.NVMMASharedLayout.get_default_for(list(block), kinds[dtype])


def flat_fits(t: Tensor) -> bool:
    """`tma_fits`, and experts a whole number of rows apart."""
    inner = min(t.stride(1), t.stride(2))
    row = max(t.stride(1), t.stride(2))
    return tma_fits(t) and inner == 1 and t.stride(0) % row == 0 and t.shape[0] * t.stride(0) // row < 2**31


def tma_fits(t: Tensor) -> bool:
    """Whether the copy engine can address t [E, ., .]: 16-byte aligned start and strides, one contiguous dimension, 32-bit sizes."""
    size = t.element_size()
    outer = sorted(t.stride())[1:]
    aligned = t.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in outer)
    return min(t.stride()) == 1 and aligned and max(t.shape) < 2**31 and all(s > 0 for s in t.stride())


def _as_out_in(t: Tensor, transposed: bool) -> Tensor:
    return t.transpose(-1, -2) if transposed else t


def _uniform(tensors: Sequence[Tensor]) -> bool:
    """All alike, one dimension contiguous, and a matrix addressable in 32 bits."""
    first = tensors[0]
    alike = all(t.stride() == first.stride() and t.shape == first.shape and t.dtype == first.dtype for t in tensors)
    strides = first.stride()[-2:]
    reach = sum(s * (d - 1) for s, d in zip(strides, first.shape[-2:]))
    return alike and 1 in strides and 0 not in strides and reach < 2**31 and math.prod(first.shape) > 0


def _matrices(layout: Layout, parts: list[list[Tensor]], n: int, k: int, whole: Tensor | None) -> Matrices:
    first = parts[0][0]
    strides = (first.stride(-2), first.stride(-1))
    if layout.stacked:
        return Matrices(tuple(p[0] for p in parts), whole, n, k, first.stride(0), *strides, table=False, aligned=16)
    return Matrices(tuple(_table(p) for p in parts), None, n, k, 0, *strides, table=True, aligned=_alignment(parts))


def _alignment(parts: list[list[Tensor]]) -> int:
    return math.gcd(16, *(t.data_ptr() for p in parts for t in p))


_tables: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()
_MOST_TABLES = 1024


def _table(tensors: list[Tensor]) -> Tensor:
    """int64 [E] of data pointers on the device, kept by value; the host copy is pinned and kept, so that a graph capture may copy it."""
    if isinstance(tensors[0], Later):
        raise NotRecorded("a table of pointers")
    device = tensors[0].device
    pointers = tuple(t.data_ptr() for t in tensors)
    key = (device, *pointers)
    if key not in _tables:
        host = torch.tensor(pointers, dtype=torch.int64, device="cpu")
        host = host.pin_memory() if device.type == "cuda" else host
        _tables[key] = (host, host.to(device, non_blocking=True))
        if len(_tables) > _MOST_TABLES:
            _tables.popitem(last=False)
    return _tables[key][1]


def _stacked(layout: Layout, bias: Sequence[Tensor]) -> list[Tensor]:
    """Biases as [E, n] tensors, one a part."""
    if layout.stacked:
        return list(bias)
    e = layout.num_experts
    return [torch.stack(list(bias[i : i + e])) for i in range(0, len(bias), e)]
