"""One to a few tokens on codes with a shared expert of floats: the kernels of `codes_kernels` with one more expert, as `decode_shared` has
them for floats, so that it costs its bytes and no launch.

    up    a[s] = act(W_g[e] x[t], W_u[e] x[t]),  b[t] = act(S_g x[t], S_u x[t])    programs of the shared expert come first
    down  out[t] = add[t] + Σ_j w[t, j] W_d[e_j] a[t·k + j] + gate[t] · S_d b[t]
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from .codes_kernels import coded_mixture, coded_pair
from .decode import _product, _tile
from .gemm import DUAL


@triton.jit
def up_coded_together(
    x, ids, weights, codes0, codes1, scales0, scales1, zeros0, zeros1, table, out, shared0, shared1, shared_out,
    tokens, n: tl.constexpr, k: tl.constexpr, slots_per_token, num_experts, offset, stride_x: tl.constexpr,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr,
    scale_e: tl.constexpr, scale_n: tl.constexpr, scale_k: tl.constexpr,
    shared_n: tl.constexpr, shared_stride_n: tl.constexpr, shared_stride_k: tl.constexpr,
    FIRST0: tl.constexpr, FIRST1: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr,
    KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr, ZERO: tl.constexpr, ZDTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    SHARED_BN: tl.constexpr, SHARED_BK: tl.constexpr, SHARED_EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per pair and block of columns, before them one per token and block of the shared expert's."""
    own = tokens * tl.cdiv(shared_n, SHARED_BN)
    p = tl.program_id(0)
    if p < own:
        t = p % tokens
        n0 = p // tokens * SHARED_BN
        first0 = _tile(shared0, n0, 0, shared_n, k, shared_stride_n, shared_stride_k, True, SHARED_BN, SHARED_BK, SHARED_EVEN)
        first1 = first0
        if MODE == DUAL:
            first1 = _tile(shared1, n0, 0, shared_n, k, shared_stride_n, shared_stride_k, True, SHARED_BN, SHARED_BK, SHARED_EVEN)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        vector = x + t.to(tl.int64) * stride_x
        g = _product(first0, shared0, vector, n0, shared_n, k, shared_stride_n, shared_stride_k, True, SHARED_EVEN)
        u = g
        if MODE == DUAL:
            u = _product(first1, shared1, vector, n0, shared_n, k, shared_stride_n, shared_stride_k, True, SHARED_EVEN)
        columns = n0 + tl.arange(0, SHARED_BN)
        tl.store(shared_out + t.to(tl.int64) * shared_n + columns, ACT(g, u).to(out.dtype.element_ty), mask=columns < shared_n)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        slots = tokens * slots_per_token
        slot = (p - own) % slots
        n0 = (p - own) // slots * BN
        known = tl.load(ids + slot)
        if (known >= 0) & (known < num_experts):
            g, u = coded_pair(x, (slot // slots_per_token).to(tl.int64) * stride_x, known, codes0, codes1, scales0, scales1, zeros0, zeros1,
                              table, n0, n, k, offset, stride_e, stride_n, stride_k, scale_e, scale_n, scale_k, FIRST0, FIRST1, STEP, MODE,
                              WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY, SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS,
                              BN, BB, GROUP, EVEN)  # fmt: skip
            if WEIGHTED:
                scale = tl.load(weights + slot).to(tl.float32)
                g, u = g * scale, u * scale
            columns = n0 + tl.arange(0, BN)
            tl.store(out + slot.to(tl.int64) * n + columns, ACT(g, u).to(out.dtype.element_ty), mask=columns < n)


@triton.jit
def down_coded_together(
    a, ids, weights, codes, scales, zeros, table, add, out, shared_a, shared, shared_bias, gate,
    n: tl.constexpr, k: tl.constexpr, slots_per_token: tl.constexpr, num_experts, offset,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr,
    scale_e: tl.constexpr, scale_n: tl.constexpr, scale_k: tl.constexpr, stride_add,
    shared_k: tl.constexpr, shared_stride_n: tl.constexpr, shared_stride_k: tl.constexpr, shared_stride_bn,
    WEIGHTS: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr, PACKED: tl.constexpr, HIGH: tl.constexpr, ASSEMBLY: tl.constexpr,
    SCALE: tl.constexpr, SDTYPE: tl.constexpr, ZERO: tl.constexpr, ZDTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr, AT_ONCE: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    SHARED_BIAS: tl.constexpr, GATED: tl.constexpr, SHARED_BK: tl.constexpr, SHARED_EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program per token and block of columns: the routed experts in slot order, then the shared one, then what is added."""
    t = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    columns = n0 + tl.arange(0, BN)
    first = _tile(shared, n0, 0, n, shared_k, shared_stride_n, shared_stride_k, True, BN, SHARED_BK, SHARED_EVEN)
    total = coded_mixture(a, ids, weights, codes, scales, zeros, table, t, n0, n, k, slots_per_token, num_experts, offset,
                          stride_e, stride_n, stride_k, scale_e, scale_n, scale_k, WEIGHTS, KIND, NATIVE, PACKED, HIGH, ASSEMBLY,
                          SCALE, SDTYPE, ZERO, ZDTYPE, ROWS, COLUMNS, WEIGHTED, AT_ONCE, BN, BB, GROUP, EVEN, PDL)  # fmt: skip
    b = shared_a + t.to(tl.int64) * shared_k
    y = _product(first, shared, b, n0, n, shared_k, shared_stride_n, shared_stride_k, True, SHARED_EVEN)
    if SHARED_BIAS:
        y += tl.load(shared_bias + columns * shared_stride_bn, mask=columns < n, other=0.0).to(tl.float32)
    if GATED:
        y *= tl.load(gate + t).to(tl.float32)
    total += y
    if ADD:
        total += tl.load(add + t.to(tl.int64) * stride_add + columns, mask=columns < n, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * n + columns, total.to(out.dtype.element_ty), mask=columns < n)
