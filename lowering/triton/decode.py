"""One to a few tokens: every (token, slot) pair streams its expert's matrices, no dispatch, two launches.

    up    a[s] = act(W_g[e] x[t] + b_g, W_u[e] x[t] + b_u)                 a program per pair and block of columns
    down  out[t] = add[t] + Σ_j w[t, j] (W_d[e_j] a[t·k + j] + b_d)          a program per token and block of columns: the combine is inside

At this size all that counts is how many bytes of weights are under way: programs are small and many, each load is a wide one, products
are plain fp32 multiply-adds (tensor cores would wait for the weights just the same). Tokens that share an expert read it from L2.
Both on matrices [E, out, in]; those stored [E, in, out] are `decode_columns`'.
Sizes and strides are compiled in: only so does the compiler see that rows of 8 but not 16 elements, masked or not, load in whole 16 bytes.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import DUAL, TABLE

UNROLLED = tl.constexpr(8)  # loads of a row, one behind the other


@triton.jit
def _base(w, e, stride_e, WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    if WEIGHTS == TABLE:
        return tl.multiple_of(tl.load(w + e).to(tl.pointer_type(DTYPE), bitcast=False), ALIGNED)
    else:
        return w + e.to(tl.int64) * stride_e


@triton.jit
def _within(n0, k0, n, k, stride_n, stride_k, OUT_IN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """(offsets of W[n0:n0+BN, k0:k0+BK], which are inside), in storage order, so that loads are wide: [BN, BK] or [BK, BN]."""
    at_n = n0 + tl.arange(0, BN)
    at_k = k0 + tl.arange(0, BK)
    if OUT_IN:
        return at_n[:, None] * stride_n + at_k[None, :], (at_n < n)[:, None] & (at_k < k)[None, :]
    else:
        return at_k[:, None] * stride_k + at_n[None, :] * stride_n, (at_k < k)[:, None] & (at_n < n)[None, :]


@triton.jit
def _tile(base, n0, k0, n, k, stride_n, stride_k, OUT_IN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """W[n0:n0+BN, k0:k0+BK], zero beyond its end."""
    at, inside = _within(n0, k0, n, k, stride_n, stride_k, OUT_IN, BN, BK)
    if EVEN:
        return tl.load(base + at)
    else:
        return tl.load(base + at, mask=inside, other=0.0)


@triton.jit
def _times(tile, vector, k0, k, OUT_IN: tl.constexpr, EVEN: tl.constexpr):
    """Elementwise: a tile times the elements of the vector it meets."""
    BK: tl.constexpr = tile.shape[1] if OUT_IN else tile.shape[0]
    at_k = k0 + tl.arange(0, BK)
    if EVEN:
        v = tl.load(vector + at_k).to(tl.float32)
    else:
        v = tl.load(vector + at_k, mask=at_k < k, other=0.0).to(tl.float32)
    if OUT_IN:
        return tile.to(tl.float32) * v[None, :]
    else:
        return tile.to(tl.float32) * v[:, None]


@triton.jit
def _product(first, base, vector, n0, n, k, stride_n, stride_k, OUT_IN: tl.constexpr, EVEN: tl.constexpr):
    """W[n0:n0+BN, :k] · vector[:k] in fp32, [BN]; `first` is the tile at k0 = 0, which could be asked for before the vector was there."""
    BN: tl.constexpr = first.shape[0] if OUT_IN else first.shape[1]
    BK: tl.constexpr = first.shape[1] if OUT_IN else first.shape[0]
    acc = _times(first, vector, 0, k, OUT_IN, EVEN)
    if OUT_IN and k <= UNROLLED * BK:  # all loads of a row are under way together
        for k0 in tl.static_range(BK, k, BK):
            acc += _times(_tile(base, n0, k0, n, k, stride_n, stride_k, OUT_IN, BN, BK, EVEN), vector, k0, k, OUT_IN, EVEN)
    else:
        for k0 in range(BK, k, BK):
            acc += _times(_tile(base, n0, k0, n, k, stride_n, stride_k, OUT_IN, BN, BK, EVEN), vector, k0, k, OUT_IN, EVEN)
    return tl.sum(acc, axis=1 if OUT_IN else 0)


@triton.jit
def _pieces(
    ids, w, t, n0, at, n, k: tl.constexpr, SLOTS: tl.constexpr, num_experts, stride_e, stride_n, stride_k,
    WEIGHTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, VEC: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """W[e_j][n0:n0+BN, q] at the places `at`.. of a token's slots laid one behind the other, place = j·k + q: [BN, BK / VEC, VEC].

    VEC divides k: neighbours of a load are of one slot, and lie side by side in memory.
    """
    place = at + tl.arange(0, BK // VEC) * VEC
    inside = place < SLOTS * k
    e = tl.load(ids + t * SLOTS + tl.minimum(place // k, SLOTS - 1))
    known = inside & (e >= 0) & (e < num_experts)
    base = _base(w, tl.where(known, e, 0), stride_e, WEIGHTS, DTYPE, ALIGNED)
    rows = base + (place % k) * stride_k
    columns = n0 + tl.arange(0, BN)
    pointers = rows[None, :, None] + (columns * stride_n)[:, None, None] + tl.arange(0, VEC)[None, None, :] * stride_k
    return tl.load(pointers, mask=(columns < n)[:, None, None] & known[None, :, None], other=0.0)


@triton.jit
def _mixed(pieces, a, ids, weights, t, at, k: tl.constexpr, SLOTS: tl.constexpr, num_experts, WEIGHTED: tl.constexpr):
    """Σ over the places of `_pieces` times the elements of a [T·SLOTS, k] they meet and their slots' weights, [BN]."""
    GROUPS: tl.constexpr = pieces.shape[1]
    VEC: tl.constexpr = pieces.shape[2]
    place = at + tl.arange(0, GROUPS) * VEC
    inside = place < SLOTS * k
    pointers = a + (t * SLOTS).to(tl.int64) * k + place[:, None] + tl.arange(0, VEC)[None, :]
    slot = t * SLOTS + tl.minimum(place // k, SLOTS - 1)
    e = tl.load(ids + slot)
    known = inside & (e >= 0) & (e < num_experts)  # rows of a slot of no expert were never written
    v = tl.load(pointers, mask=known[:, None], other=0.0).to(tl.float32)
    if WEIGHTED:
        v *= tl.load(weights + slot, mask=known, other=0.0).to(tl.float32)[:, None]
    return tl.sum(tl.sum(pieces.to(tl.float32) * v[None, :, :], 2), 1)


@triton.jit
def _mixture(
    a, ids, weights, w, t, n0, n, k: tl.constexpr, SLOTS: tl.constexpr, num_experts, stride_e, stride_n, stride_k,
    WEIGHTS: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, REST: tl.constexpr, VEC: tl.constexpr,
    PDL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Σ_j w[t, j] W[e_j][n0:n0+BN, :k] · a[t·SLOTS + j] in fp32, [BN]: one sum over the depths of all slots, laid one behind the other.

    BK of it are under way at first, then REST at a time. Launched early, the first weights before the kernel before has ended: that one
    is the up projection, which writes no weights and had waited for ids.
    """
    DTYPE: tl.constexpr = a.dtype.element_ty
    first = _pieces(ids, w, t, n0, 0, n, k, SLOTS, num_experts, stride_e, stride_n, stride_k, WEIGHTS, BN, BK, VEC, DTYPE, ALIGNED)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = _mixed(first, a, ids, weights, t, 0, k, SLOTS, num_experts, WEIGHTED)
    for at in tl.static_range(BK, SLOTS * k, REST):
        more = _pieces(ids, w, t, n0, at, n, k, SLOTS, num_experts, stride_e, stride_n, stride_k, WEIGHTS, BN, REST, VEC, DTYPE, ALIGNED)
        total += _mixed(more, a, ids, weights, t, at, k, SLOTS, num_experts, WEIGHTED)
    return total


@triton.jit
def _by_slot(
    total, ids, weights, bias, x, t, columns, n, slots_per_token, num_experts, num_identity, stride_be, stride_bn, stride_x,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, IDENTITY: tl.constexpr,
):  # fmt: skip
    """total + Σ_j w[t, j] b[e_j], and w[t, j] x[t] for identity experts."""
    for j in range(slots_per_token):
        e = tl.load(ids + t * slots_per_token + j)
        scale = tl.load(weights + t * slots_per_token + j).to(tl.float32)
        if BIAS:
            if (e >= 0) & (e < num_experts):
                b = tl.load(bias + e.to(tl.int64) * stride_be + columns * stride_bn, mask=columns < n, other=0.0).to(tl.float32)
                total += b * scale if WEIGHTED else b
        if IDENTITY:
            if (e >= num_experts) & (e < num_experts + num_identity):
                total += scale * tl.load(x + t.to(tl.int64) * stride_x + columns, mask=columns < n, other=0.0).to(tl.float32)
    return total


@triton.jit
def up_decode(
    x, ids, weights, w0, w1, bias0, bias1, out,
    n: tl.constexpr, k: tl.constexpr, slots_per_token, num_experts, stride_x: tl.constexpr,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr, stride_be, stride_bn,
    MODE: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """INTERLEAVED comes as DUAL here: two views with twice the stride."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    slot = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.load(ids + slot)
    if (e >= 0) & (e < num_experts):
        vector = x + (slot // slots_per_token).to(tl.int64) * stride_x
        columns = n0 + tl.arange(0, BN)
        base0 = _base(w0, e, stride_e, WEIGHTS, DTYPE, ALIGNED)
        base1 = _base(w1, e, stride_e, WEIGHTS, DTYPE, ALIGNED)
        first0 = _tile(base0, n0, 0, n, k, stride_n, stride_k, True, BN, BK, EVEN)
        # asked for before the first sum, which all warps wait for
        first1 = _tile(base1, n0, 0, n, k, stride_n, stride_k, True, BN, BK, EVEN) if MODE == DUAL else first0
        g = _product(first0, base0, vector, n0, n, k, stride_n, stride_k, True, EVEN)
        if MODE == DUAL:
            u = _product(first1, base1, vector, n0, n, k, stride_n, stride_k, True, EVEN)
        else:
            u = g
        if WEIGHTED:
            scale = tl.load(weights + slot).to(tl.float32)
            g, u = g * scale, u * scale
        if BIAS:
            g += tl.load(bias0 + e.to(tl.int64) * stride_be + columns * stride_bn, mask=columns < n, other=0.0).to(tl.float32)
            if MODE == DUAL:
                u += tl.load(bias1 + e.to(tl.int64) * stride_be + columns * stride_bn, mask=columns < n, other=0.0).to(tl.float32)
        tl.store(out + slot.to(tl.int64) * n + columns, ACT(g, u).to(DTYPE), mask=columns < n)


@triton.jit
def down_decode(
    a, ids, weights, w, bias, x, add, out,
    n: tl.constexpr, k: tl.constexpr, slots_per_token: tl.constexpr, num_experts, num_identity,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr, stride_be, stride_bn, stride_x, stride_add,
    WEIGHTS: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr, IDENTITY: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, REST: tl.constexpr, VEC: tl.constexpr, PDL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    columns = n0 + tl.arange(0, BN)
    total = _mixture(a, ids, weights, w, t, n0, n, k, slots_per_token, num_experts, stride_e, stride_n, stride_k,
                     WEIGHTS, WEIGHTED, BN, BK, REST, VEC, PDL, ALIGNED)  # fmt: skip
    if BIAS or IDENTITY:
        total = _by_slot(total, ids, weights, bias, x, t, columns, n, slots_per_token, num_experts, num_identity,
                         stride_be, stride_bn, stride_x, BIAS, WEIGHTED, IDENTITY)  # fmt: skip
    if ADD:
        total += tl.load(add + t.to(tl.int64) * stride_add + columns, mask=columns < n, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * n + columns, total.to(out.dtype.element_ty), mask=columns < n)
