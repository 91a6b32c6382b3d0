"""One to a few tokens: every (token, slot) pair streams its expert's matrices, no dispatch, two launches.

    up    a[s] = act(W_g[e] x[t] + b_g, W_u[e] x[t] + b_u)                 a program per pair and block of columns
    down  out[t] = add[t] + Σ_j w[t, j] (W_d[e_j] a[t·k + j] + b_d)          a program per token and block of columns: the combine is inside

At this size all that counts is how many bytes of weights are under way: programs are small and many, each load is a wide one, products
are plain fp32 multiply-adds (tensor cores would wait for the weights just the same). Tokens that share an expert read it from L2.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import DUAL, TABLE


@triton.jit
def _base(w, e, stride_e, WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    if WEIGHTS == TABLE:
        return tl.multiple_of(tl.load(w + e).to(tl.pointer_type(DTYPE), bitcast=False), ALIGNED)
    else:
        return w + e.to(tl.int64) * stride_e


@triton.jit
def _product(base, vector, n0, n, k, stride_n, stride_k, OUT_IN: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr):
    """W[n0:n0+BN, :k] · vector[:k] in fp32, [BN]. The tile keeps the storage order, so that loads are wide."""
    at_n = n0 + tl.arange(0, BN)
    if OUT_IN:
        acc = tl.zeros((BN, BK), tl.float32)
    else:
        acc = tl.zeros((BK, BN), tl.float32)
    for k0 in range(0, k, BK):
        at_k = k0 + tl.arange(0, BK)
        if OUT_IN:
            pointers = base + at_n[:, None] * stride_n + at_k[None, :]
            inside = (at_n < n)[:, None] & (at_k < k)[None, :]
        else:
            pointers = base + at_k[:, None] * stride_k + at_n[None, :] * stride_n
            inside = (at_k < k)[:, None] & (at_n < n)[None, :]
        if EVEN:
            w = tl.load(pointers).to(tl.float32)
            v = tl.load(vector + at_k).to(tl.float32)
        else:
            w = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(vector + at_k, mask=at_k < k, other=0.0).to(tl.float32)
        if OUT_IN:
            acc += w * v[None, :]
        else:
            acc += w * v[:, None]
    return tl.sum(acc, axis=1 if OUT_IN else 0)


@triton.jit
def up_decode(
    x, ids, weights, w0, w1, bias0, bias1, out,
    n, k, slots_per_token, num_experts, stride_x, stride_e, stride_n, stride_k, stride_be, stride_bn,
    MODE: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr, OUT_IN: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
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
        g = _product(_base(w0, e, stride_e, WEIGHTS, DTYPE, ALIGNED), vector, n0, n, k, stride_n, stride_k, OUT_IN, BN, BK, EVEN)
        if MODE == DUAL:
            u = _product(_base(w1, e, stride_e, WEIGHTS, DTYPE, ALIGNED), vector, n0, n, k, stride_n, stride_k, OUT_IN, BN, BK, EVEN)
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
    n, k, slots_per_token, num_experts, num_identity, stride_e, stride_n, stride_k, stride_be, stride_bn, stride_x, stride_add,
    WEIGHTS: tl.constexpr, OUT_IN: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr, IDENTITY: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = a.dtype.element_ty
    t = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    columns = n0 + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for j in range(slots_per_token):
        slot = t * slots_per_token + j
        e = tl.load(ids + slot)
        scale = tl.load(weights + slot).to(tl.float32)
        if (e >= 0) & (e < num_experts):
            y = _product(
                _base(w, e, stride_e, WEIGHTS, DTYPE, ALIGNED),
                a + slot.to(tl.int64) * k, n0, n, k, stride_n, stride_k, OUT_IN, BN, BK, EVEN
            )
            if BIAS:
                y += tl.load(bias + e.to(tl.int64) * stride_be + columns * stride_bn, mask=columns < n, other=0.0).to(tl.float32)
            total += y * scale if WEIGHTED else y
        if IDENTITY:
            if (e >= num_experts) & (e < num_experts + num_identity):
                total += scale * tl.load(x + t.to(tl.int64) * stride_x + columns, mask=columns < n, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(add + t.to(tl.int64) * stride_add + columns, mask=columns < n, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * n + columns, total.to(out.dtype.element_ty), mask=columns < n)
