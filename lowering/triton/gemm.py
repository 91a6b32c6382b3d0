"""The grouped GEMM: rows of one expert times that expert's matrix, for all experts in one launch.

    up    C[r] = act(x[token(r)] W_g[e]ᵀ + b_g, x[token(r)] W_u[e]ᵀ + b_u)     rows gathered, activation in the epilogue
    down  Y[slot(r)] = A[r] W_d[e]ᵀ + b_d                                        rows scattered back to their slot

One kernel is both. A program walks (row tile, column block) pairs from the dispatch's tile list, in an order in which programs running at
the same time share an expert's matrix and a tile's rows in L2. Weights stay where the model has them:
[E, out, in] or [E, in, out], or one matrix per expert through a table of pointers. Sizes and strides are compiled in, as in `decode`.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

# MODE: what the epilogue does with the accumulators
PLAIN, SINGLE, DUAL, INTERLEAVED = (tl.constexpr(i) for i in range(4))
# WEIGHTS: how a matrix is reached
POINTER, TABLE, TMA = (tl.constexpr(i) for i in range(3))


@triton.jit
def _weight(
    w, e, n0, k0, n, k, stride_e, stride_n, stride_k, WEIGHTS: tl.constexpr, OUT_IN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """W[e][n0:n0+BN, k0:k0+BK] as [BK, BN]; columns beyond n are anything, rows beyond k are zero."""
    if WEIGHTS == TMA:
        if OUT_IN:
            b = w.load([e, n0, k0]).reshape(BN, BK).trans(1, 0)
        else:
            b = w.load([e, k0, n0]).reshape(BK, BN)
    else:
        if WEIGHTS == TABLE:
            base = tl.multiple_of(tl.load(w + e).to(tl.pointer_type(DTYPE), bitcast=False), ALIGNED)
        else:
            base = w + e.to(tl.int64) * stride_e
        at_n = n0 + tl.arange(0, BN)
        if not EVEN_N and OUT_IN:
            at_n = tl.where(at_n < n, at_n, 0)
        at_k = k0 + tl.arange(0, BK)
        pointers = base + at_k[:, None] * stride_k + at_n[None, :] * stride_n
        if OUT_IN or EVEN_N:
            if EVEN_K:
                b = tl.load(pointers)
            else:
                b = tl.load(pointers, mask=(at_k < k)[:, None], other=0.0)
        else:  # neighbours in memory are columns: they stay neighbours under a mask
            b = tl.load(pointers, mask=(at_k < k)[:, None] & (at_n < n)[None, :], other=0.0)
    return b


@triton.jit
def _place(tile, row_tiles, blocks, GROUP: tl.constexpr):
    """Row tile and column block of a tile: in groups of GROUP row tiles, rows fastest, so that what runs together shares both operands."""
    if GROUP == 1:
        return tile // blocks, tile % blocks
    group = tile // (GROUP * blocks)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    rest = tile - group * GROUP * blocks
    return group * GROUP + rest % size, rest // size


@triton.jit
def rows_of(
    at, tiles, max_tiles, offsets, order, slots_per_token, GATHER: tl.constexpr, SLOTS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """Of a row tile: (expert, rows [BM], which of them are the expert's, their slots where SLOTS, the rows of `a` that they multiply)."""
    e = tl.load(tiles + at)
    first = tl.load(tiles + max_tiles + at)
    rows = first + tl.arange(0, BM)
    live = rows < tl.load(offsets + e + 1)
    slots = rows
    if SLOTS:
        slots = tl.load(order + rows, mask=live, other=0)
    if GATHER:
        source = (slots // slots_per_token).to(tl.int64)
    else:
        source = tl.where(live, rows, first).to(tl.int64)
    return e, rows, live, slots, source


@triton.jit
def _bias(bias, e, columns, n, stride_e, stride_n):
    return tl.load(bias + e.to(tl.int64) * stride_e + columns * stride_n, mask=columns < n, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["max_tiles"])
def grouped_gemm(
    a,  # [rows, K]
    w0, w1,  # the matrices of the first and the second projection
    bias0, bias1,
    row_weights,  # [N] by slot, multiplies the input rows; None
    out, pre,
    order, offsets, tiles, num_tiles,
    max_tiles, n: tl.constexpr, k: tl.constexpr, slots_per_token,
    stride_a: tl.constexpr, stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr, stride_be, stride_bn,
    stride_out: tl.constexpr, stride_pre: tl.constexpr,
    MODE: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr, OUT_IN: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, SAVE: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    GROUP: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """n output columns, k columns of `a`. `pre` [rows, 2n] (or n) keeps the pre-activations when SAVE."""
    WIDTH: tl.constexpr = 2 * BN if MODE == INTERLEAVED else BN
    DTYPE: tl.constexpr = out.dtype.element_ty
    GATED: tl.constexpr = (MODE == DUAL) | (MODE == INTERLEAVED)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n_wide = 2 * n if MODE == INTERLEAVED else n
    blocks = tl.cdiv(n, BN)
    row_tiles = tl.load(num_tiles)
    total = row_tiles * blocks
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        SLOTS: tl.constexpr = GATHER or SCATTER or WEIGHTED
        at, block = _place(tile, row_tiles, blocks, GROUP)
        n0 = block * BN
        wide0 = block * WIDTH
        e, rows, live, slots, source = rows_of(at, tiles, max_tiles, offsets, order, slots_per_token, GATHER, SLOTS, BM)
        acc0 = tl.zeros((BM, WIDTH), tl.float32)
        acc1 = tl.zeros((BM, BN if MODE == DUAL else 16), tl.float32)
        for k0 in tl.range(0, k, BK, num_stages=STAGES):
            at_k = k0 + tl.arange(0, BK)
            pointers = a + source[:, None] * stride_a + at_k[None, :]
            if EVEN_K:
                tile_a = tl.load(pointers)
            else:
                tile_a = tl.load(pointers, mask=(at_k < k)[None, :], other=0.0)
            b0 = _weight(
                w0, e, wide0, k0, n_wide, k, stride_e, stride_n, stride_k, WEIGHTS, OUT_IN, WIDTH, BK, EVEN_N, EVEN_K, DTYPE, ALIGNED
            )
            acc0 = tl.dot(tile_a, b0, acc0, input_precision=PRECISION)
            if MODE == DUAL:
                b1 = _weight(w1, e, n0, k0, n, k, stride_e, stride_n, stride_k, WEIGHTS, OUT_IN, BN, BK, EVEN_N, EVEN_K, DTYPE, ALIGNED)
                acc1 = tl.dot(tile_a, b1, acc1, input_precision=PRECISION)

        columns = n0 + tl.arange(0, BN)
        if MODE == INTERLEAVED:
            g, u = tl.split(acc0.reshape(BM, BN, 2))
        else:
            g, u = acc0, acc1
        if WEIGHTED:  # (w x) Wᵀ = w (x Wᵀ)
            scale = tl.load(row_weights + slots, mask=live, other=0.0).to(tl.float32)[:, None]
            g = g * scale
            if GATED:
                u = u * scale
        if BIAS:
            g = g + _bias(bias0, e, columns, n, stride_be, stride_bn)
            if GATED:
                u = u + _bias(bias1, e, columns, n, stride_be, stride_bn)
        mask = live[:, None] & (columns < n)[None, :]
        if SAVE:
            saved = pre + rows.to(tl.int64)[:, None] * stride_pre + columns[None, :]
            g = g.to(DTYPE)
            tl.store(saved, g, mask=mask)
            g = g.to(tl.float32)  # the backward pass sees these values: so does the activation
            if GATED:
                u = u.to(DTYPE)
                tl.store(saved + n, u, mask=mask)
                u = u.to(tl.float32)
        if MODE == PLAIN:
            result = g
        elif MODE == SINGLE:
            result = ACT(g, g)
        else:
            result = ACT(g, u)
        if SCATTER:
            target = slots.to(tl.int64)
        else:
            target = rows.to(tl.int64)
        tl.store(out + target[:, None] * stride_out + columns[None, :], result.to(DTYPE), mask=mask)
