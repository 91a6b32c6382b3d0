"""What low-rank pairs add to products: y += s t bᵀ in place, a sum of two, a scale. One pass over y; nothing of its size is made."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import gemm
from .dispatch import Dispatch
from .gemm import _weight
from .host import cdiv, power_of_2
from .launch.tape import launch
from .weights import Matrices

_BLOCK = 2048


@triton.jit(do_not_specialize=["max_tiles"])
def _low_add(
    t, w, out, offsets, tiles, num_tiles, max_tiles, n: tl.constexpr, k: tl.constexpr, scale,
    stride_t: tl.constexpr, stride_out: tl.constexpr, stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr,
    WEIGHTS: tl.constexpr, OUT_IN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    if at < tl.load(num_tiles):
        e = tl.load(tiles + at)
        first = tl.load(tiles + max_tiles + at)
        rows = first + tl.arange(0, BM)
        live = rows < tl.load(offsets + e + 1)
        columns = n0 + tl.arange(0, BN)
        mask = live[:, None] & (columns < n)[None, :]
        place = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, k, BK):
            at_k = k0 + tl.arange(0, BK)
            inside = live[:, None] & (at_k < k)[None, :]
            low = tl.load(t + rows.to(tl.int64)[:, None] * stride_t + at_k[None, :], mask=inside, other=0.0)
            b = _weight(w, e, n0, k0, n, k, stride_e, stride_n, stride_k, WEIGHTS, OUT_IN, BN, BK, n % BN == 0, k % BK == 0,
                        t.dtype.element_ty, ALIGNED)  # fmt: skip
            acc = tl.dot(low, b, acc, input_precision=PRECISION)
        y = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, (y + scale * acc).to(out.dtype.element_ty), mask=mask)


def low_add(out: Tensor, t: Tensor, w: Matrices, scale: float, rows: Dispatch, bm: int, precision: str) -> None:
    """out[r] += scale · W[e] t[r], out [N, n] in any strides of rows, t [N, k], by sorted row; `bm`: a height of the dispatch's tiles."""
    bn, bk = min(128, max(16, power_of_2(w.n))), min(64, max(16, power_of_2(w.k)))
    tiles = rows.tiles[bm]
    launch(
        _low_add, (tiles.shape[1], cdiv(w.n, bn)),
        t, w.parts[0], out, rows.offsets, tiles, rows.num_tiles[bm], tiles.shape[1], w.n, w.k, scale,
        t.stride(0), out.stride(0), w.stride_e, w.stride_n, w.stride_k,
        WEIGHTS=gemm.TABLE if w.table else gemm.POINTER, OUT_IN=w.out_in, PRECISION=precision, BM=bm, BN=bn, BK=bk, ALIGNED=w.aligned,
        num_warps=8 if bm >= 128 else 4,
    )  # fmt: skip


@triton.jit
def _plus(out, more, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(out + at, mask=at < size, other=0.0).to(tl.float32) + tl.load(more + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def plus(out: Tensor, more: Tensor) -> Tensor:
    """out += more, both contiguous; the result is out."""
    launch(_plus, (cdiv(out.numel(), _BLOCK),), out, more, out.numel(), BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def _times(out, scale, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, (tl.load(out + at, mask=at < size, other=0.0).to(tl.float32) * scale).to(out.dtype.element_ty), mask=at < size)


def times(out: Tensor, scale: float) -> None:
    """out *= scale, contiguous."""
    launch(_times, (cdiv(out.numel(), _BLOCK),), out, scale, out.numel(), BLOCK=_BLOCK, num_warps=4)
