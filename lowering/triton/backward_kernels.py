"""The kernels of the experts' gradient. Rows r are the dispatch's: expert e has rows offsets[e] .. offsets[e + 1].

    grad_hidden   dA[r] = dY[token(r)] W_d[e];  dP[r] = w dA[r] · (∂a/∂g, ∂a/∂u);  wA[r] = w a;  dw[r] = Σ dA[r] a     recomputed from P
    grad_input    dX[slot(r)] = dP[r] W_u[e]

Sums over rows: `backward_row_kernels`.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

# how a matrix is reached: strides, a table of pointers (each at whole 16 bytes, or anywhere), the copy engine
POINTER, TABLE, TMA, LOOSE_TABLE = (tl.constexpr(i) for i in range(4))


@triton.jit
def matrix_of(w, e, stride_e, KIND: tl.constexpr, DTYPE: tl.constexpr):
    if KIND == TABLE:
        return tl.multiple_of(tl.load(w + e).to(tl.pointer_type(DTYPE), bitcast=False), 16)
    elif KIND == LOOSE_TABLE:
        return tl.load(w + e).to(tl.pointer_type(DTYPE), bitcast=False)
    elif KIND == POINTER:
        return w + e.to(tl.int64) * stride_e
    else:
        return w


@triton.jit
def _block(
    w, e, k0, n0, k, n, stride_k, stride_n,
    KIND: tl.constexpr, N_FAST: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """W[e][k0 : k0 + BK, n0 : n0 + BN], zero outside."""
    if KIND == TMA:
        if N_FAST:
            return w.load([e, k0, n0]).reshape(BK, BN)
        else:
            return w.load([e, n0, k0]).reshape(BN, BK).trans(1, 0)
    else:
        at_k = k0 + tl.arange(0, BK)
        at_n = n0 + tl.arange(0, BN)
        pointers = w + at_k[:, None] * stride_k + at_n[None, :] * stride_n
        if EVEN:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(at_k < k)[:, None] & (at_n < n)[None, :], other=0.0)


@triton.jit
def _product(
    acc, a, source, row0, column0, stride_a, w, e, n0, k, n, stride_e, stride_k, stride_n,
    A_TMA: tl.constexpr, KIND: tl.constexpr, N_FAST: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + A[rows, column0 : column0 + k] W[e][:k, n0 : n0 + BN]; the rows are `source`, or those from row0 on (A_TMA)."""
    BN: tl.constexpr = acc.shape[1]
    base = matrix_of(w, e, stride_e, KIND, DTYPE)
    at_k = tl.arange(0, BK)
    if not A_TMA:
        pointers = a + source[:, None] * stride_a + (column0 + at_k)[None, :]
    for k0 in tl.range(0, k, BK, num_stages=STAGES):
        if A_TMA:
            rows = a.load([row0, column0 + k0])
        elif EVEN:
            rows = tl.load(pointers + k0)
        else:
            rows = tl.load(pointers + k0, mask=(k0 + at_k < k)[None, :], other=0.0)
        acc = tl.dot(rows, _block(base, e, k0, n0, k, n, stride_k, stride_n, KIND, N_FAST, EVEN, BK, BN), acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_of(at, tiles, offsets, max_tiles, BM: tl.constexpr):
    """Expert, first row, rows [BM], which of them are the expert's."""
    e = tl.load(tiles + at)
    first = tl.load(tiles + max_tiles + at)
    rows = first + tl.arange(0, BM)
    return e, first, rows, rows < tl.load(offsets + e + 1)


@triton.jit
def _moved(e, offsets, starts, PAD: tl.constexpr):
    """How far expert e's rows lie behind their place when each expert's fill whole groups of PAD rows (PAD 0: they do not), and the end."""
    if PAD == 0:
        return 0, tl.load(offsets + e + 1)
    else:
        return tl.load(starts + e) * PAD - tl.load(offsets + e), tl.load(starts + e + 1) * PAD


@triton.jit
def _finish_hidden(
    acc, rows, to, live, keep, scale, pre, d_pre, scaled_pre, hidden, n0, n, stride_pre,
    DUAL: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHTED: tl.constexpr,
    D_PRE: tl.constexpr, SCALED_PRE: tl.constexpr, HIDDEN: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Stores what `grad_hidden` gives for the columns from n0 on, in PARTS, one after the other; Σ dA a over them, [BM]."""
    if PARTS == 1:
        return finish_part(acc, rows, to, live, keep, scale, pre, d_pre, scaled_pre, hidden, n0, n, stride_pre,
                            DUAL, GATED, INTERLEAVED, WEIGHTED, D_PRE, SCALED_PRE, HIDDEN, PAD)  # fmt: skip
    else:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(acc.reshape(acc.shape[0], 2, HALF).permute(0, 2, 1))
        total = _finish_hidden(left, rows, to, live, keep, scale, pre, d_pre, scaled_pre, hidden, n0, n, stride_pre,
                               DUAL, GATED, INTERLEAVED, WEIGHTED, D_PRE, SCALED_PRE, HIDDEN, PAD, PARTS // 2)  # fmt: skip
        total += _finish_hidden(right, rows, to, live, keep, scale, pre, d_pre, scaled_pre, hidden, n0 + HALF, n, stride_pre,
                                DUAL, GATED, INTERLEAVED, WEIGHTED, D_PRE, SCALED_PRE, HIDDEN, PAD, PARTS // 2)  # fmt: skip
        return total


@triton.jit
def finish_part(
    acc, rows, to, live, keep, scale, pre, d_pre, scaled_pre, hidden, n0, n, stride_pre,
    DUAL: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHTED: tl.constexpr,
    D_PRE: tl.constexpr, SCALED_PRE: tl.constexpr, HIDDEN: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = pre.dtype.element_ty
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    columns = n0 + tl.arange(0, BN)
    mask = live[:, None] & (columns < n)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_pre + columns[None, :]
    g = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(pre + at + n, mask=mask, other=0.0).to(tl.float32)
    else:
        u = g
    value, slope_g, slope_u = DUAL(g, u)
    total = tl.sum(tl.where(mask, acc * value, 0.0), 1)
    to = to.to(tl.int64)[:, None]
    stored = keep[:, None] & (columns < n)[None, :]
    at = to * stride_pre + columns[None, :]
    if HIDDEN:
        kept = value * scale[:, None] if WEIGHTED else value
        if PAD > 0:
            kept = tl.where(mask, kept, 0.0)
        tl.store(hidden + to * n + columns[None, :], kept.to(DTYPE), mask=stored)
    if D_PRE:
        d_a = acc * scale[:, None] if WEIGHTED else acc
        first = d_a * slope_g
        second = d_a * slope_u
        if PAD > 0:
            first = tl.where(mask, first, 0.0)
            second = tl.where(mask, second, 0.0)
        if INTERLEAVED:
            wide = 2 * n0 + tl.arange(0, 2 * BN)
            at = to * stride_pre + wide[None, :]
            stored = keep[:, None] & (wide < 2 * n)[None, :]
            both = tl.join(first, second).reshape(BM, 2 * BN)
            tl.store(d_pre + at, both.to(DTYPE), mask=stored)
            if SCALED_PRE:
                tl.store(scaled_pre + at, (both * scale[:, None]).to(DTYPE), mask=stored)
        else:
            tl.store(d_pre + at, first.to(DTYPE), mask=stored)
            if SCALED_PRE:
                tl.store(scaled_pre + at, (first * scale[:, None]).to(DTYPE), mask=stored)
            if GATED:
                tl.store(d_pre + at + n, second.to(DTYPE), mask=stored)
                if SCALED_PRE:
                    tl.store(scaled_pre + at + n, (second * scale[:, None]).to(DTYPE), mask=stored)
    return total


@triton.jit(do_not_specialize=["max_tiles"])
def grad_hidden(
    grad, pre, weights, w, d_pre, scaled_pre, hidden, sums, order, offsets, starts, tiles, num_tiles,
    max_tiles, blocks, n, k, stride_grad, stride_pre, stride_e, stride_k, stride_n,
    DUAL: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, WEIGHTED: tl.constexpr, SLOTS: tl.constexpr,
    D_PRE: tl.constexpr, SCALED_PRE: tl.constexpr, HIDDEN: tl.constexpr, SUMS: tl.constexpr,
    A_TMA: tl.constexpr, PAD: tl.constexpr, KIND: tl.constexpr, N_FAST: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """n columns of the hidden layer, k outputs. d_pre has the up projection's column order, pre is (g | u).

    sums [N, blocks] by slot. WEIGHTED: the routing weight multiplies the expert's output; else scaled_pre = w d_pre can be kept.
    PARTS: the epilogue takes the tile in so many column parts, one after the other. PAD: what is stored has padded rows, zero where no
    row is; A_TMA: grad is a descriptor of rows sorted and padded likewise.
    """
    for tile in tl.range(tl.program_id(0), tl.load(num_tiles) * blocks, tl.num_programs(0)):
        e, first, rows, live = tile_of(tile // blocks, tiles, offsets, max_tiles, BM)
        block = tile % blocks
        n0 = block * BN
        slots = tl.load(order + rows, mask=live, other=0)
        shift, end = _moved(e, offsets, starts, PAD)
        to = rows + shift
        source = (slots // SLOTS).to(tl.int64)
        acc = tl.zeros((BM, BN), tl.float32)
        acc = _product(acc, grad, source, first + shift, 0, stride_grad, w, e, n0, k, n, stride_e, stride_k, stride_n,
                       A_TMA, KIND, N_FAST, EVEN, BK, PRECISION, STAGES, pre.dtype.element_ty)  # fmt: skip
        scale = tl.load(weights + slots, mask=live, other=0.0).to(tl.float32)
        total = _finish_hidden(acc, rows, to, live, to < end, scale, pre, d_pre, scaled_pre, hidden, n0, n, stride_pre,
                               DUAL, GATED, INTERLEAVED, WEIGHTED, D_PRE, SCALED_PRE, HIDDEN, PAD, PARTS)  # fmt: skip
        if SUMS:
            tl.store(sums + slots.to(tl.int64) * blocks + block, total, mask=live)


@triton.jit(do_not_specialize=["max_tiles"])
def grad_input(
    d_pre, x, weights, w0, w1, out, sums, order, offsets, starts, tiles, num_tiles,
    max_tiles, blocks, n, k, stride_pre, stride_x, stride_e, stride_k, stride_n,
    HALVES: tl.constexpr, WEIGHTED: tl.constexpr, SLOTS: tl.constexpr, OUT: tl.constexpr, SUMS: tl.constexpr,
    A_TMA: tl.constexpr, PAD: tl.constexpr, KIND: tl.constexpr, N_FAST: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [N, n] by slot = d_pre[row] W; k columns of each of the HALVES. WEIGHTED: times w, and sums = Σ product · x by column block."""
    for tile in tl.range(tl.program_id(0), tl.load(num_tiles) * blocks, tl.num_programs(0)):
        e, first, rows, live = tile_of(tile // blocks, tiles, offsets, max_tiles, BM)
        block = tile % blocks
        n0 = block * BN
        slots = tl.load(order + rows, mask=live, other=0)
        shift, _ = _moved(e, offsets, starts, PAD)
        source = tl.where(live, rows + shift, 0).to(tl.int64)
        DTYPE: tl.constexpr = x.dtype.element_ty
        acc = tl.zeros((BM, BN), tl.float32)
        acc = _product(acc, d_pre, source, first + shift, 0, stride_pre, w0, e, n0, k, n, stride_e, stride_k, stride_n,
                       A_TMA, KIND, N_FAST, EVEN, BK, PRECISION, STAGES, DTYPE)  # fmt: skip
        if HALVES == 2:
            acc = _product(acc, d_pre, source, first + shift, k, stride_pre, w1, e, n0, k, n, stride_e, stride_k, stride_n,
                           A_TMA, KIND, N_FAST, EVEN, BK, PRECISION, STAGES, DTYPE)  # fmt: skip
        columns = n0 + tl.arange(0, BN)
        mask = live[:, None] & (columns < n)[None, :]
        if SUMS:
            at_x = (slots // SLOTS).to(tl.int64)[:, None] * stride_x + columns[None, :]
            total = tl.sum(tl.where(mask, acc * tl.load(x + at_x, mask=mask, other=0.0).to(tl.float32), 0.0), 1)
            tl.store(sums + slots.to(tl.int64) * blocks + block, total, mask=live)
        if WEIGHTED:
            acc *= tl.load(weights + slots, mask=live, other=0.0).to(tl.float32)[:, None]
        if OUT:
            tl.store(out + slots.to(tl.int64)[:, None] * n + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)
