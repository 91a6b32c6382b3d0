"""The kernels of the experts' gradient that add up an expert's rows, or bring rows in order. Rows r are the dispatch's.

    weight_grad   dW[e] = Σ_r L[r]ᵀ R[r]      (dP, x[token]) for the up projection, (dY[token], wA) for the down projection
    sort_rows     x and dY in row order, every expert filled up with zeros to whole groups
    row_sum       db[e] = Σ_r dP[r]   or   Σ_r w dY[token(r)]
    slot_weight   dw[slot] from the partial sums, the down bias and identity experts

Rows beyond an expert's end are masked where they are summed over, so whatever a neighbour holds stays with it.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .backward_kernels import POINTER, TABLE, matrix_of, tile_of


@triton.jit
def _store_block(out, e, acc, at_m, at_n, m, n, stride_e, stride_m, TABLED: tl.constexpr, EVEN: tl.constexpr, DTYPE: tl.constexpr):
    """out[e][at_m, at_n] = acc."""
    base = matrix_of(out, e, stride_e, TABLE if TABLED else POINTER, DTYPE)  # new tensors are aligned
    target = base + at_m.to(tl.int64)[:, None] * stride_m + at_n[None, :]
    if EVEN:
        tl.store(target, acc.to(DTYPE))
    else:
        tl.store(target, acc.to(DTYPE), mask=(at_m < m)[:, None] & (at_n < n)[None, :])


@triton.jit
def weight_grad(
    left, right, out, order, offsets, m, n, blocks_m, blocks_n, stride_left, stride_right, stride_e, stride_m,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, SLOTS: tl.constexpr, TABLED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[e][m, n] = Σ over the expert's rows of left[row, m] right[row, n]; zero for an expert without rows."""
    DTYPE: tl.constexpr = left.dtype.element_ty
    e = tl.program_id(0) // (blocks_m * blocks_n)
    block = tl.program_id(0) % (blocks_m * blocks_n)
    at_m = (block // blocks_n) * BM + tl.arange(0, BM)
    at_n = (block % blocks_n) * BN + tl.arange(0, BN)
    first = tl.load(offsets + e)
    end = tl.load(offsets + e + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for r in tl.range(first, end, BK, num_stages=STAGES):
        rows = r + tl.arange(0, BK)
        live = rows < end
        own = rows.to(tl.int64)
        token = own
        if GATHER_LEFT or GATHER_RIGHT:
            token = (tl.load(order + rows, mask=live, other=0) // SLOTS).to(tl.int64)
        from_left = left + (token if GATHER_LEFT else own)[:, None] * stride_left + at_m[None, :]
        from_right = right + (token if GATHER_RIGHT else own)[:, None] * stride_right + at_n[None, :]
        if EVEN:
            a = tl.load(from_left, mask=live[:, None], other=0.0)
            b = tl.load(from_right, mask=live[:, None], other=0.0)
        else:
            a = tl.load(from_left, mask=live[:, None] & (at_m < m)[None, :], other=0.0)
            b = tl.load(from_right, mask=live[:, None] & (at_n < n)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    _store_block(out, e, acc, at_m, at_n, m, n, stride_e, stride_m, TABLED, EVEN, DTYPE)


@triton.jit
def weight_grad_padded(
    left, right, out, starts, m, n, left0, right0, blocks_m, blocks_n, stride_e, stride_m,
    TABLED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`weight_grad` of sorted rows padded with zeros to groups of PAD: descriptors, columns from left0 and right0 on, nothing to mask."""
    e = tl.program_id(0) // (blocks_m * blocks_n)
    block = tl.program_id(0) % (blocks_m * blocks_n)
    m0 = (block // blocks_n) * BM
    n0 = (block % blocks_n) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for group in tl.range(tl.load(starts + e), tl.load(starts + e + 1), num_stages=STAGES):
        a = left.load([group * PAD, left0 + m0])
        b = right.load([group * PAD, right0 + n0])
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    _store_block(out, e, acc, m0 + tl.arange(0, BM), n0 + tl.arange(0, BN), m, n, stride_e, stride_m, TABLED, EVEN, DTYPE)


@triton.jit
def _sort_block(source, out, token, to, live, column, n, stride, BN: tl.constexpr):
    columns = column + tl.arange(0, BN)
    inside = (columns < n)[None, :]
    values = tl.load(source + token[:, None] * stride + columns[None, :], mask=live[:, None] & inside, other=0.0)
    tl.store(out + to[:, None] * n + columns[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["max_tiles"])
def sort_rows(
    source0, source1, out0, out1, order, offsets, tiles, max_tiles, blocks0, n0, n1, stride0, stride1,
    SLOTS: tl.constexpr, PAD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[PAD · i + j] = source[token] of row j of tile i (of PAD rows), zero behind the expert's end; source1 beside source0, or None."""
    if tl.load(tiles + tl.program_id(0)) >= 0:
        _, _, rows, live = tile_of(tl.program_id(0), tiles, offsets, max_tiles, PAD)
        token = (tl.load(order + rows, mask=live, other=0) // SLOTS).to(tl.int64)
        to = (tl.program_id(0) * PAD + tl.arange(0, PAD)).to(tl.int64)
        block = tl.program_id(1)
        if block < blocks0:
            _sort_block(source0, out0, token, to, live, block * BN, n0, stride0, BN)
        elif source1 is not None:
            _sort_block(source1, out1, token, to, live, (block - blocks0) * BN, n1, stride1, BN)


@triton.jit
def row_sum(
    source, weights, out, order, offsets, starts, n, stride,
    GATHER: tl.constexpr, PAD: tl.constexpr, WEIGHTED: tl.constexpr, SLOTS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[e, n] = Σ over the expert's rows of source[row] (of [w] source[token(row)] with GATHER)."""
    e = tl.program_id(0)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.load(offsets + e)
    end = tl.load(offsets + e + 1)
    if PAD > 0:  # rows of a padded tensor
        end += tl.load(starts + e) * PAD - first
        first = tl.load(starts + e) * PAD
    total = tl.zeros((BN,), tl.float32)
    for r in range(first, end, BK):
        rows = r + tl.arange(0, BK)
        live = rows < end
        at = rows
        if GATHER:
            slots = tl.load(order + rows, mask=live, other=0)
            at = slots // SLOTS
        mask = live[:, None] & (columns < n)[None, :]
        values = tl.load(source + at.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weights + slots, mask=live, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(values, 0)
    tl.store(out + e.to(tl.int64) * n + columns, total.to(out.dtype.element_ty), mask=columns < n)


@triton.jit(do_not_specialize=["slots"])
def slot_weight(
    sums, ids, grad, x, bias, out, slots, blocks, n, num_experts, num_identity, stride_grad, stride_x, stride_be, stride_bn,
    SLOTS: tl.constexpr, SUMS: tl.constexpr, BIAS: tl.constexpr, IDENTITY: tl.constexpr,
    BS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[slot] = Σ sums[slot] + dY[t] · b_d[e]; for an identity expert dY[t] · x[t]; for no expert 0."""
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    e = tl.load(ids + s, mask=s < slots, other=-1)
    known = (e >= 0) & (e < num_experts)
    same = (e >= num_experts) & (e < num_experts + num_identity)
    total = tl.zeros((BS,), tl.float32)
    if SUMS:
        at = tl.arange(0, BB)
        part = tl.load(sums + s.to(tl.int64)[:, None] * blocks + at[None, :], mask=known[:, None] & (at < blocks)[None, :], other=0.0)
        total = tl.sum(part, 1)
    if BIAS or IDENTITY:
        t = (s // SLOTS).to(tl.int64)[:, None]
        e = tl.where(known, e, 0).to(tl.int64)[:, None]
        for n0 in range(0, n, BN):
            columns = (n0 + tl.arange(0, BN))[None, :]
            g = tl.load(grad + t * stride_grad + columns, mask=(known | same)[:, None] & (columns < n), other=0.0).to(tl.float32)
            if BIAS:
                b = tl.load(bias + e * stride_be + columns * stride_bn, mask=known[:, None] & (columns < n), other=0.0).to(tl.float32)
                total += tl.sum(g * b, 1)
            if IDENTITY:
                total += tl.sum(g * tl.load(x + t * stride_x + columns, mask=same[:, None] & (columns < n), other=0.0).to(tl.float32), 1)
    tl.store(out + s, total.to(out.dtype.element_ty), mask=s < slots)
