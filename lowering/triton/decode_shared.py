"""One to a few tokens with the shared expert: the kernels of `decode` with one more expert, so that it costs its bytes and no launch.

    up    a[s] = act(W_g[e] x[t], W_u[e] x[t]),  b[t] = act'(S_g x[t], S_u x[t])    programs of the shared expert come first
    down  out[t] = add[t] + Σ_j w[t, j] W_d[e_j] a[t·k + j] + gate[t] · S_d b[t]

Launched early, a program asks for its first weights before it waits for the kernel before: the shared expert's, and in the second kernel
those of the experts chosen, whose ids are complete once the first one runs. No kernel that may still run then writes weights: each of
these lets the next one start only after its own wait. (The routing kernel does so before, when the router's product has waited for it.)
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import activation
from .call import Call
from .combine import early_launch
from .decode import _base, _by_slot, _mixture, _product, _tile
from .experts import _bias_args, _bias_strides, _extents, _kind, _mode, depths
from .gemm import DUAL
from .host import cdiv, power_of_2
from .launch.tape import empty, launch
from .tune import Vector


@triton.jit
def up_together(
    x, ids, weights, w0, w1, out, shared0, shared1, shared_out,
    tokens, n: tl.constexpr, k: tl.constexpr, slots_per_token, num_experts, stride_x: tl.constexpr,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr,
    shared_n: tl.constexpr, shared_stride_n: tl.constexpr, shared_stride_k: tl.constexpr,
    MODE: tl.constexpr, ACT: tl.constexpr, WEIGHTS: tl.constexpr, WEIGHTED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A program per pair and block of columns, before them one per token and block of the shared expert's. INTERLEAVED comes as DUAL."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    own = tokens * tl.cdiv(shared_n, BN)
    p = tl.program_id(0)
    scale = 1.0
    if p < own:
        t = p % tokens
        row, n0, width, stride_row, stride_column = t.to(tl.int64), p // tokens * BN, shared_n, shared_stride_n, shared_stride_k
        base0, base1, to, known = shared0, shared1, shared_out, True
        first0 = _tile(base0, n0, 0, width, k, stride_row, stride_column, True, BN, BK, EVEN)
        first1 = _tile(base1, n0, 0, width, k, stride_row, stride_column, True, BN, BK, EVEN) if MODE == DUAL else first0
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        slots = tokens * slots_per_token
        slot = (p - own) % slots
        t = slot // slots_per_token
        row, n0, width, stride_row, stride_column = slot.to(tl.int64), (p - own) // slots * BN, n, stride_n, stride_k
        e = tl.load(ids + slot)
        known = (e >= 0) & (e < num_experts)
        e = tl.where(known, e, 0)
        base0, base1, to = _base(w0, e, stride_e, WEIGHTS, DTYPE, ALIGNED), _base(w1, e, stride_e, WEIGHTS, DTYPE, ALIGNED), out
        if WEIGHTED:
            scale = tl.load(weights + slot).to(tl.float32)
        first0 = _tile(base0, n0, 0, width, k, stride_row, stride_column, True, BN, BK, EVEN)
        first1 = _tile(base1, n0, 0, width, k, stride_row, stride_column, True, BN, BK, EVEN) if MODE == DUAL else first0
    if known:
        vector = x + t.to(tl.int64) * stride_x
        g = _product(first0, base0, vector, n0, width, k, stride_row, stride_column, True, EVEN)
        if MODE == DUAL:
            u = _product(first1, base1, vector, n0, width, k, stride_row, stride_column, True, EVEN)
        else:
            u = g
        if WEIGHTED:
            g, u = g * scale, u * scale
        columns = n0 + tl.arange(0, BN)
        tl.store(to + row * width + columns, ACT(g, u).to(DTYPE), mask=columns < width)


@triton.jit
def down_together(
    a, ids, weights, w, bias, x, add, out, shared_a, shared, shared_bias, gate,
    n: tl.constexpr, k: tl.constexpr, slots_per_token: tl.constexpr, num_experts, num_identity,
    stride_e: tl.constexpr, stride_n: tl.constexpr, stride_k: tl.constexpr, stride_be, stride_bn, stride_x, stride_add,
    shared_k: tl.constexpr, shared_stride_n: tl.constexpr, shared_stride_k: tl.constexpr, shared_stride_bn,
    WEIGHTS: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr, IDENTITY: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, REST: tl.constexpr, VEC: tl.constexpr,
    SHARED_BIAS: tl.constexpr, GATED: tl.constexpr, SHARED_BK: tl.constexpr, SHARED_EVEN: tl.constexpr,
    PDL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A program per token and block of columns: the routed experts in slot order, then the shared one, then what is added."""
    t = tl.program_id(0)
    n0 = tl.program_id(1) * BN
    columns = n0 + tl.arange(0, BN)
    first = _tile(shared, n0, 0, n, shared_k, shared_stride_n, shared_stride_k, True, BN, SHARED_BK, SHARED_EVEN)
    total = _mixture(a, ids, weights, w, t, n0, n, k, slots_per_token, num_experts, stride_e, stride_n, stride_k,
                     WEIGHTS, WEIGHTED, BN, BK, REST, VEC, PDL, ALIGNED)  # fmt: skip
    if BIAS or IDENTITY:
        total = _by_slot(total, ids, weights, bias, x, t, columns, n, slots_per_token, num_experts, num_identity,
                         stride_be, stride_bn, stride_x, BIAS, WEIGHTED, IDENTITY)  # fmt: skip
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


@dataclass(frozen=True)
class Shared:
    """The shared expert of a call as one expert of its own, and the gate [T, 1] that its result is multiplied by, or None."""

    call: Call
    gate: Tensor | None


def fits(c: Call, s: Shared) -> bool:
    """Whether one kernel can take both: the same activation of as many projections, all stored [out, in], without bias before it."""
    theirs = s.call
    alike = _mode(c.layout) == _mode(theirs.layout) and _act(c) is _act(theirs)
    stored = not theirs.up.table and not theirs.down.table and all(w.out_in for w in (c.up, c.down, theirs.up, theirs.down))
    return alike and stored and c.up_bias is None and theirs.up_bias is None


def _act(c: Call) -> Any:
    return activation.functions(c.layout.act_ops, c.layout.act_consts).act


def few_together(c: Call, s: Shared, up: Vector, down: Vector) -> Tensor:
    """Routed experts, shared expert and c.add -> [T, H], two launches. Raises nothing for operands that `read` and `fits` accept."""
    tokens = c.x.shape[0]
    a, b = empty(c.x, c.slots, c.up.n), empty(c.x, tokens, s.call.up.n)
    out = empty(c.x, tokens, c.down.n)
    _up(c, s.call, a, b, up)
    _down(c, s, a, b, out, down)
    return out


def _early(c: Call) -> dict[str, bool]:
    return {"launch_pdl": True} if early_launch(c.x) else {}


def _up(c: Call, s: Call, a: Tensor, b: Tensor, tile: Vector) -> None:
    pdl, tokens = _early(c), c.x.shape[0]
    bn, bk = _extents(tile, c.up)
    programs = tokens * cdiv(s.up.n, bn) + c.slots * cdiv(c.up.n, bn)
    launch(
        up_together, (programs,),
        c.x, c.ids, c.weights, c.up.parts[0], c.up.parts[-1], a, s.up.parts[0], s.up.parts[-1], b,
        tokens, c.up.n, c.up.k, c.ids.shape[1], c.layout.num_experts, c.x.stride(0), c.up.stride_e, c.up.stride_n, c.up.stride_k,
        s.up.n, s.up.stride_n, s.up.stride_k,
        MODE=_mode(c.layout), ACT=_act(c), WEIGHTS=_kind(c.up), WEIGHTED=c.layout.weight_on_input,
        BN=bn, BK=bk, EVEN=c.up.n % bn == 0 and s.up.n % bn == 0 and c.up.k % bk == 0,
        PDL=bool(pdl), ALIGNED=c.up.aligned, num_warps=tile.warps, **pdl,
    )  # fmt: skip


def _down(c: Call, s: Shared, a: Tensor, b: Tensor, out: Tensor, tile: Vector) -> None:
    pdl, bias, shared = _early(c), c.down_bias, s.call.down
    bn, bk = _extents(tile, c.down)
    shared_bk = min(bk, power_of_2(shared.k))
    depth = depths(c, bn, bk, tile.warps)
    launch(
        down_together, (c.x.shape[0], cdiv(c.down.n, bn)),
        a, c.ids, c.weights, c.down.parts[0], _bias_args(bias, c.x)[0], c.x, c.add, out,
        b, shared.parts[0], _bias_args(s.call.down_bias, c.x)[0], s.gate,
        c.down.n, c.down.k, c.ids.shape[1], c.layout.num_experts, c.layout.num_identity,
        c.down.stride_e, c.down.stride_n, c.down.stride_k, *_bias_strides(bias), c.x.stride(0), 0 if c.add is None else c.add.stride(0),
        shared.k, shared.stride_n, shared.stride_k, _bias_strides(s.call.down_bias)[1],
        WEIGHTS=_kind(c.down), BIAS=bias is not None, WEIGHTED=not c.layout.weight_on_input,
        ADD=c.add is not None, IDENTITY=c.layout.num_identity > 0, BN=bn, **depth,
        SHARED_BIAS=s.call.down_bias is not None, GATED=s.gate is not None,
        SHARED_BK=shared_bk, SHARED_EVEN=shared.n % bn == 0 and shared.k % shared_bk == 0,
        PDL=bool(pdl), ALIGNED=c.down.aligned, num_warps=tile.warps, **pdl,
    )  # fmt: skip
