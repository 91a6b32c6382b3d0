"""One to a few tokens on matrices [E, in, out], whose columns are contiguous: a program per (token, slot) pair and block of columns.

    up    a[s] = act(x[t] W_g[e] + b_g, x[t] W_u[e] + b_u)
    down  y[s] = a[s] W_d[e] + b_d, in fp32; then the combine: out[t] = add[t] + Σ_j w[t, j] y[t·k + j]

A row's piece is as wide as a program's block, so the depth is walked in long steps, many rows under way at once; and there is a program
for each pair in both products, where `decode.down_decode` has one for each token: few columns a token are too few programs for a card.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir import Form
from . import activation, gemm
from .call import Call
from .combine import combine, early_launch
from .decode import _base, _product, _tile
from .gemm import DUAL, INTERLEAVED, PLAIN, SINGLE
from .host import cdiv, power_of_2
from .launch.tape import empty, launch
from .weights import Biases, Matrices

_COLUMNS, _WARPS = 32, 8
_HELD = 16384  # elements of weights that a program has under way: 64 a thread, so that two programs fit a processor's registers


@triton.jit
def product_by_pair(
    x, ids, weights, w0, w1, bias0, bias1, out,
    n: tl.constexpr, k: tl.constexpr, slots_per_row, num_experts, stride_x: tl.constexpr,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr, stride_be, stride_bn,
    MODE: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr, DTYPE: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out[s] of pair s from row s // slots_per_row of x. INTERLEAVED: w0 has both projections, their columns alternating."""
    slot = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.load(ids + slot)
    if (e >= 0) & (e < num_experts):
        vector = x + (slot // slots_per_row).to(tl.int64) * stride_x
        columns = n0 + tl.arange(0, BN)
        base0 = _base(w0, e, stride_e, WEIGHTS, DTYPE, ALIGNED)
        if MODE == INTERLEAVED:
            first = _tile(base0, 2 * n0, 0, 2 * n, k, stride_n, stride_k, False, 2 * BN, BK, EVEN)
            both = _product(first, base0, vector, 2 * n0, 2 * n, k, stride_n, stride_k, False, EVEN)
            g, u = tl.split(tl.reshape(both, (BN, 2)))
        else:
            first0 = _tile(base0, n0, 0, n, k, stride_n, stride_k, False, BN, BK, EVEN)
            g = _product(first0, base0, vector, n0, n, k, stride_n, stride_k, False, EVEN)
            u = g
            if MODE == DUAL:
                base1 = _base(w1, e, stride_e, WEIGHTS, DTYPE, ALIGNED)
                first1 = _tile(base1, n0, 0, n, k, stride_n, stride_k, False, BN, BK, EVEN)
                u = _product(first1, base1, vector, n0, n, k, stride_n, stride_k, False, EVEN)
        if WEIGHTED:
            scale = tl.load(weights + slot).to(tl.float32)
            g, u = g * scale, u * scale
        if BIAS:
            at = e.to(tl.int64) * stride_be + columns * stride_bn
            g += tl.load(bias0 + at, mask=columns < n, other=0.0).to(tl.float32)
            if MODE != PLAIN and MODE != SINGLE:
                u += tl.load(bias1 + at, mask=columns < n, other=0.0).to(tl.float32)
        if MODE == PLAIN:
            y = g
        else:
            y = ACT(g, u)
        tl.store(out + slot.to(tl.int64) * n + columns, y.to(out.dtype.element_ty), mask=columns < n)


def up(c: Call, a: Tensor) -> None:
    """a [T·k, I] = act(up x)."""
    layout = c.layout
    gated = Form(layout.form) is not Form.SINGLE
    mode = (gemm.INTERLEAVED if c.up.whole is not None else gemm.DUAL) if gated else gemm.SINGLE
    act = activation.functions(layout.act_ops, layout.act_consts).act
    _by_pair(c, c.x, c.ids.shape[1], c.up, c.up_bias, a, mode, act, layout.weight_on_input, early=True)


def down(c: Call, a: Tensor, add: Tensor | None, out: Tensor, early: bool) -> None:
    """out [T, H] = add + Σ_j w down a, in the dtype of `out`. `early`: may start while the kernel before it still runs."""
    layout = c.layout
    y = empty(c.x, c.slots, c.down.n, dtype=torch.float32)
    _by_pair(c, a, 1, c.down, c.down_bias, y, gemm.PLAIN, None, False, early)
    combine(y, c.ids, c.weights, c.x, add, out, layout.num_experts, layout.num_identity, weighted=not layout.weight_on_input)


def _by_pair(
    c: Call, x: Tensor, slots_per_row: int, w: Matrices, bias: Biases | None, out: Tensor, mode: Any, act: Any, weighted: bool, early: bool
) -> None:
    whole = w.whole if mode == gemm.INTERLEAVED else None
    parts = w.parts if whole is None else (whole,)
    bn = min(_COLUMNS, power_of_2(w.n))
    held = _HELD * 2 // c.x.element_size() // (2 if mode in (gemm.DUAL, gemm.INTERLEAVED) else 1)
    bk = max(16, min(power_of_2(w.k), held // bn))
    even = w.n % bn == 0 and w.k % bk == 0
    pdl = {"launch_pdl": True} if early and early_launch(c.x) else {}
    biases = (None, None) if bias is None else (bias.parts[0], bias.parts[-1])
    columns = w.stride_n if whole is None else w.stride_n // 2
    launch(
        product_by_pair, (c.slots, cdiv(w.n, bn)),
        x, c.ids, c.weights, parts[0], parts[-1], *biases, out,
        w.n, w.k, slots_per_row, c.layout.num_experts, x.stride(0),
        w.stride_e, columns, w.stride_k, *((0, 0) if bias is None else (bias.stride_e, bias.stride_n)),
        MODE=mode, ACT=act, WEIGHTS=gemm.TABLE if w.table else gemm.POINTER, DTYPE=_TYPES[c.x.dtype], BIAS=bias is not None,
        WEIGHTED=weighted, BN=bn, BK=bk, EVEN=even, PDL=bool(pdl), ALIGNED=w.aligned, num_warps=_WARPS, **pdl,
    )  # fmt: skip


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
