"""The grouped GEMM on codes: as `gemm`, with codes made numbers of the rows' type in registers, on the way to the tensor cores.

    C[r] = epilogue(W[e] a[r]),  W[i, j] = (value(code[i, j]) - z[i, j's block]) · s[i's block, j's block]

The product is taken the other way round, Cᵀ = W Aᵀ: the operand that comes from registers is then the one that was decoded, each code is
decoded once a program, and few rows of an expert are few columns of the product. GROUPING says where scales go: behind all (one a
row of W), to the partial sum of each step of depth, or to the numbers before the product.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .codes_kernels import BITS, E4M3, EXPONENT, base_of, block_of, halves, number, scaling
from .gemm import DUAL, PLAIN, _place, rows_of

NONE, BEHIND, STEPS, BEFORE = (tl.constexpr(i) for i in range(4))


@triton.jit
def _numbers(b, offset, KIND: tl.constexpr, NATIVE: tl.constexpr, OFFSET: tl.constexpr, TYPE: tl.constexpr):
    """What bytes stand for."""
    if KIND == E4M3 and NATIVE:
        return b.to(tl.float8e4nv, bitcast=True).to(TYPE)
    v = number(b, KIND, NATIVE)
    if OFFSET:
        v = v + offset
    return v.to(TYPE)


@triton.jit
def _spread(s, BB: tl.constexpr):
    """[BN, G] -> [BN, BB], each as often as there are bytes in a group."""
    wide = tl.broadcast_to(s[:, :, None], (s.shape[0], s.shape[1], BB // s.shape[1]))
    return wide.reshape(s.shape[0], BB)


@triton.jit
def _step(
    acc, tile, codes, scales, zeros, table, e, n0, k0, n, k, offset, stride_e, stride_n, stride_k, scale_e, scale_n, scale_k,
    FIRST: tl.constexpr, STEP: tl.constexpr, WEIGHTS: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr,
    PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr, ZERO: tl.constexpr, ZDTYPE: tl.constexpr,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPING: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] + W[e][n0:n0+BN, k0:k0+BK] times `tile` [BK, BM]; rows of W beyond n are anything."""
    DTYPE: tl.constexpr = tile.dtype
    PER: tl.constexpr = 2 if PACKED else 1
    BB: tl.constexpr = BK // PER
    at_n = n0 + tl.arange(0, BN)
    if not EVEN_N:
        at_n = tl.where(at_n < n, at_n, 0)
    at_b = k0 // PER + tl.arange(0, BB)
    pointers = base_of(codes, e, stride_e, WEIGHTS, tl.uint8) + at_n[:, None] * stride_n + at_b[None, :] * stride_k
    if EVEN_K:
        b = tl.load(pointers)
    else:
        b = tl.load(pointers, mask=(at_b < k // PER)[None, :], other=0)
    LATER: tl.constexpr = (GROUPING == BEFORE) | ZERO
    row = block_of(at_n * STEP + FIRST, ROWS) * scale_n
    MANY: tl.constexpr = (GROUPING == BEFORE) & (COLUMNS < BK)  # blocks in a step
    if MANY:
        SIZE: tl.constexpr = COLUMNS
        column = (k0 // SIZE + tl.arange(0, BK // SIZE)) * scale_k
        place = row[:, None] + column[None, :]
        inside = (k0 + tl.arange(0, BK // SIZE) * SIZE < k)[None, :]
    else:
        place = (row + block_of(k0, COLUMNS) * scale_k)[:, None]
        inside = None
    if ZERO:
        z = tl.load(base_of(zeros, e, scale_e, WEIGHTS, ZDTYPE) + place, mask=inside).to(tl.float32)
        if MANY:
            z = _spread(z, BB)
    if SCALE != 0 and ((GROUPING == BEFORE) | (GROUPING == STEPS)):
        s = scaling(tl.load(base_of(scales, e, scale_e, WEIGHTS, SDTYPE) + place, mask=inside), SCALE)
        if MANY:
            s = _spread(s, BB)
    # bf16 times a power of two is exact
    TYPE: tl.constexpr = tl.float32 if LATER and (ZERO or (SCALE != EXPONENT and SCALE != BITS) or tl.bfloat16 != DTYPE) else DTYPE
    if PACKED:
        w0, w1 = halves(b, table, KIND, HIGH, ASSEMBLY)
        if OFFSET:
            w0, w1 = w0 + offset, w1 + offset
        w0, w1 = w0.to(TYPE), w1.to(TYPE)
        if ZERO:
            w0, w1 = w0 - z, w1 - z
        if SCALE != 0 and GROUPING == BEFORE:
            w0, w1 = w0 * s.to(TYPE), w1 * s.to(TYPE)
        w = tl.join(w0.to(DTYPE), w1.to(DTYPE)).reshape(BN, BK)
    else:
        w = _numbers(b, offset, KIND, NATIVE, OFFSET, TYPE)
        if ZERO:
            w = w - z
        if SCALE != 0 and GROUPING == BEFORE:
            w = w * s.to(TYPE)
        w = w.to(DTYPE)
    if SCALE != 0 and GROUPING == STEPS:
        return acc + tl.dot(w, tile, input_precision=PRECISION) * s
    return tl.dot(w, tile, acc, input_precision=PRECISION)


@triton.jit
def _behind(acc, scales, e, at_n, n, scale_e, scale_n, FIRST: tl.constexpr, STEP: tl.constexpr, WEIGHTS: tl.constexpr, SCALE: tl.constexpr,
            SDTYPE: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """acc [BN, BM] by the scale of each row."""
    at = block_of(at_n * STEP + FIRST, ROWS) * scale_n
    s = tl.load(base_of(scales, e, scale_e, WEIGHTS, SDTYPE) + at, mask=at_n < n, other=0)
    return acc * scaling(s, SCALE)[:, None]


@triton.jit(do_not_specialize=["max_tiles"])
def coded_gemm(
    a, codes0, codes1, scales0, scales1, zeros0, zeros1, table, bias0, bias1, row_weights, out, order, offsets, tiles, num_tiles,
    max_tiles, n: tl.constexpr, k: tl.constexpr, slots_per_token, offset, stride_a: tl.constexpr,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr,
    scale_e: tl.constexpr, scale_n: tl.constexpr, scale_k: tl.constexpr, stride_be, stride_bn, stride_out: tl.constexpr,
    FIRST0: tl.constexpr, FIRST1: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr,
    ZERO: tl.constexpr, ZDTYPE: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPING: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    blocks = tl.cdiv(n, BN)
    row_tiles = tl.load(num_tiles)
    tile = tl.program_id(0)
    if tile < row_tiles * blocks:
        SLOTS: tl.constexpr = GATHER or SCATTER or WEIGHTED
        at, block = _place(tile, row_tiles, blocks, GROUP)
        n0 = block * BN
        e, rows, live, slots, source = rows_of(at, tiles, max_tiles, offsets, order, slots_per_token, GATHER, SLOTS, BM)
        g = tl.zeros((BN, BM), tl.float32)
        u = tl.zeros((BN if MODE == DUAL else 16, BM), tl.float32)
        for k0 in tl.range(0, k, BK, num_stages=STAGES):
            at_k = k0 + tl.arange(0, BK)
            pointers = a + source[None, :] * stride_a + at_k[:, None]
            if EVEN_K:
                tile_a = tl.load(pointers)
            else:
                tile_a = tl.load(pointers, mask=(at_k < k)[:, None], other=0.0)
            g = _step(g, tile_a, codes0, scales0, zeros0, table, e, n0, k0, n, k, offset, stride_e, stride_n, stride_k, scale_e, scale_n,
                      scale_k, FIRST0, STEP, WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY,
                      SCALE, SDTYPE, ZERO, ZDTYPE, OFFSET, ROWS, COLUMNS,
                      GROUPING, EVEN_N, EVEN_K, PRECISION, BN, BK)  # fmt: skip
            if MODE == DUAL:
                u = _step(u, tile_a, codes1, scales1, zeros1, table, e, n0, k0, n, k, offset, stride_e, stride_n, stride_k, scale_e,
                          scale_n, scale_k, FIRST1, STEP, WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY,
                          SCALE, SDTYPE, ZERO, ZDTYPE, OFFSET, ROWS,
                          COLUMNS, GROUPING, EVEN_N, EVEN_K, PRECISION, BN, BK)  # fmt: skip
        columns = n0 + tl.arange(0, BN)
        if GROUPING == BEHIND:
            g = _behind(g, scales0, e, columns, n, scale_e, scale_n, FIRST0, STEP, WEIGHTS, SCALE, SDTYPE, ROWS)
            if MODE == DUAL:
                u = _behind(u, scales1, e, columns, n, scale_e, scale_n, FIRST1, STEP, WEIGHTS, SCALE, SDTYPE, ROWS)
        if WEIGHTED:
            scale = tl.load(row_weights + slots, mask=live, other=0.0).to(tl.float32)[None, :]
            g = g * scale
            if MODE == DUAL:
                u = u * scale
        if BIAS:
            at_bias = e.to(tl.int64) * stride_be + columns * stride_bn
            g = g + tl.load(bias0 + at_bias, mask=columns < n, other=0.0).to(tl.float32)[:, None]
            if MODE == DUAL:
                u = u + tl.load(bias1 + at_bias, mask=columns < n, other=0.0).to(tl.float32)[:, None]
        if MODE == PLAIN:
            result = g
        elif MODE == DUAL:
            result = ACT(g, u)
        else:
            result = ACT(g, g)
        if SCATTER:
            target = slots.to(tl.int64)
        else:
            target = rows.to(tl.int64)
        mask = (columns < n)[:, None] & live[None, :]
        tl.store(out + target[None, :] * stride_out + columns[:, None], result.to(out.dtype.element_ty), mask=mask)
