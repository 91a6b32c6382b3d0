"""Experts with low-rank pairs: W x + s b (a x), each product a grouped GEMM over the rows of one dispatch; W + s b a is never made.

    forward   h = x W_upᵀ + s (x aᵀ) bᵀ -> act -> y = h W_downᵀ + s (h aᵀ) bᵀ -> combine
    backward  the same products with the matrices turned round, and a gradient of weights only where somebody asks for it

Rows are kept in the dispatch's order throughout. A pair of a wider type than the rows (float32 adapters beside bf16 weights) takes its
products in its own type. Nothing reads the device on the host.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ir import Form
from ...ir.operands import Operands
from ..reference import generic
from ..reference.generic import Layout
from . import activation, tune
from . import adapted_kernels as kernels
from .backward import Operand, weight_grad
from .backward_sums import bias_grads, grad_weights
from .call import DTYPES, Call, read
from .combine import combine
from .dispatch import Dispatch, dispatch
from .experts import grouped_gemm, precision, runnable
from .gradients import Gradients, Pass, choose
from .host import cdiv, power_of_2
from .launch.tape import empty, launch
from .pointwise import activate
from .tune import Tile
from .weights import Biases, Matrices, down_biases, plain_matrices


@dataclass(frozen=True)
class Low:
    """The pair of a projection; `place`: which of its name's pairs it is."""

    scale: float
    a: Matrices
    b: Matrices
    place: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Projection:
    """A projection as it is stored, with its pair."""

    name: str
    part: int
    base: Matrices
    bias: Biases | None
    low: Low | None


@dataclass(frozen=True)
class Rows:
    """The rows of a call and the tiles of their products. `bm`: rows of a tile."""

    dispatch: Dispatch
    k: int
    count: int
    tile: Tile

    def product(self, rows: Tensor, w: Matrices, bias: Biases | None = None, gather: bool = False, out: Tensor | None = None) -> Tensor:
        """rows W[e]ᵀ [+ b]; `gather`: `rows` are tokens."""
        out = empty(rows, self.count, w.n) if out is None else out
        tile = self.tile if min(w.n, w.k) > 64 else _narrow(self.tile, w)
        tile = runnable(rows, w, tile)
        tile = tile if tile.bm == self.tile.bm else replace(_narrow(self.tile, w), bn=64)
        grouped_gemm(rows, w, bias, self.dispatch, out, tile, None, gather=self.k if gather else 0)
        return out

    def add_low(self, y: Tensor, rows: Tensor, first: Matrices, second: Matrices, like: Low, gather: bool) -> Tensor:
        """y += s (rows firstᵀ) secondᵀ, in place."""
        t = self.product(rows.to(like.dtype), first, gather=gather)
        kernels.low_add(y, t, second, like.scale, self.dispatch, self.tile.bm, precision(like.dtype))
        return y

    def projected(self, p: Projection, rows: Tensor, gather: bool, out: Tensor | None = None) -> Tensor:
        y = self.product(rows, p.base, p.bias, gather, out)
        return y if p.low is None else self.add_low(y, rows, p.low.a, p.low.b, p.low, gather)


def _narrow(tile: Tile, w: Matrices) -> Tile:
    """For a product with few columns or little depth."""
    bn, bk = (min(64, max(16, power_of_2(n))) for n in (w.n, w.k))
    return Tile(tile.bm, bn, bk, 4, 1 if tile.stages == 1 else 3)


def turned(w: Matrices) -> Matrices:
    """The transposed matrices: rows W instead of rows Wᵀ."""
    return replace(w, n=w.k, k=w.n, stride_n=w.stride_k, stride_k=w.stride_n)


def _read(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout):
    """(the call, the up projections, the down projection) for the kernels, or None where they do not take them."""
    pairs = (*p.up_a, *p.up_b, *p.down_a, *p.down_b)
    base = Operands(p.up, p.down, p.up_bias, p.down_bias)
    generic.check_sizes(layout, p)
    call = read(x, ids, weights, base, add, layout)
    if call is None or layout.weight_on_input or len({t.dtype for t in pairs}) != 1 or pairs[0].dtype not in DTYPES:
        return None
    ups = [_projection(layout, p, "up", part, layout.up_transposed) for part in range(layout.halves())]
    down = _projection(layout, p, "down", 0, layout.down_transposed)
    return None if down is None or None in ups else (call, ups, down)


def _projection(layout: Layout, p: Operands[Tensor], name: str, part: int, transposed: bool) -> Projection | None:
    scale, place = layout.pair(name, part), sum(bool(layout.pair(name, i)) for i in range(part))
    base = plain_matrices(layout, _part(layout, getattr(p, name), part), transposed)
    bias = down_biases(layout, _part(layout, getattr(p, f"{name}_bias"), part))
    if base is None or not scale:
        return None if base is None else Projection(name, part, base, bias, None)
    stored = [[t.contiguous() for t in _part(layout, getattr(p, f"{name}_{which}"), place)] for which in "ab"]
    low = [plain_matrices(layout, ts, False) for ts in stored]
    if low[0] is None or low[1] is None:
        return None
    return Projection(name, part, base, bias, Low(scale, low[0], low[1], place, stored[0][0].dtype))


def _part(layout: Layout, tensors: Sequence[Tensor], part: int) -> list[Tensor]:
    each = 1 if layout.stacked else layout.num_experts
    return list(tensors[part * each : (part + 1) * each])


def _rows(call: Call, x: Tensor) -> Rows:
    layout = call.layout
    problem = tune.Problem(layout.num_experts, call.up.k, call.up.n, call.ids.shape[1], x.dtype, layout.gated)
    tile = replace(tune.choose(problem, x.shape[0], x.device).down, split=1)
    return Rows(dispatch(call.ids, layout.num_experts, (tile.bm,)), call.ids.shape[1], call.slots, tile)


def forward(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """As `generic.forward`; pre-activations in the dispatch's row order, columns as the up projections are stored."""
    found = _read(x, ids, weights, p, add, layout)
    if found is None or ids.numel() == 0:
        return generic.forward(x, ids, weights, p, add, layout)
    call, ups, down = found
    rows = _rows(call, call.x)
    pre = empty(call.x, call.slots, layout.pre_width(p.down))
    halves = [rows.projected(u, call.x, True, out) for u, out in zip(ups, pre.chunk(len(ups), -1))]
    a = empty(call.x, call.slots, down.base.k)
    activate(layout, halves, None, a)
    y = rows.projected(down, a, False)
    out = empty(call.x, x.shape[0], down.base.n)
    identity = (layout.num_experts, layout.num_identity)
    combine(y, call.ids, call.weights, call.x, call.add, out, *identity, weighted=True, early=False, rank=rows.dispatch.rank)
    return out, pre


def backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    layout: Layout,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As `generic.backward`, for what `forward` kept."""
    found = _read(x, ids, weights, p, None, layout)
    if found is None or ids.numel() == 0:
        return generic.backward(grad, pre, x, ids, weights, p, layout, needs)
    call, ups, down = found
    grad = grad.to(x.dtype).contiguous()
    rows = _rows(call, call.x)
    tiles = replace(choose(call.slots, layout.num_experts, x.dtype, x.is_cuda), padded=False, hopper=False)
    run = Pass(call, grad, pre.contiguous(), rows.dispatch, tiles, Gradients(p, needs, layout))
    d_pre, hidden, sums = _through_activation(run, rows, down)
    _weights_of(run, rows, down, Operand(grad, 0, grad.shape[1], True), Operand(hidden, 0, hidden.shape[1], False))
    tokens = Operand(call.x, 0, call.x.shape[1], True)
    width = d_pre.shape[1] // len(ups)
    for u in ups:
        _weights_of(run, rows, u, Operand(d_pre, u.part * width, width, False), tokens)
    bias_grads(run, d_pre)
    if run.out.x:
        run.out.of_x = _tokens_of(run, rows, ups, d_pre)
    if run.out.weights:
        grad_weights(run, sums)
    return run.out.asked()


def _turned_product(rows: Rows, p: Projection, grad: Tensor, gather: bool) -> Tensor:
    """g W + s (g b) a."""
    d = rows.product(grad, turned(p.base), gather=gather)
    if p.low is None:
        return d
    return rows.add_low(d, grad, turned(p.low.b), turned(p.low.a), p.low, gather)


def _through_activation(run: Pass, rows: Rows, down: Projection) -> tuple[Tensor, Tensor, Tensor]:
    """(gradients of the pre-activations as they are stored, w · activations, partial sums of the routing weights' by slot)."""
    layout, c = run.layout, run.call
    d = _turned_product(rows, down, run.grad, True)
    width = d.shape[1]
    columns = min(1024, power_of_2(width))
    blocks = cdiv(width, columns)
    d_pre, hidden = empty(run.pre, *run.pre.shape), empty(run.pre, c.slots, width)
    sums = empty(run.pre, c.slots, blocks, dtype=torch.float32)
    form = Form(layout.form)
    first = 0 if form is Form.SINGLE else 1 if form is Form.INTERLEAVED else width
    launch(
        _slopes, (c.slots, blocks),
        d, run.pre, run.pre[:, first:], c.weights, rows.dispatch.order, rows.dispatch.offsets, d_pre, d_pre[:, first:], hidden, sums,
        layout.num_experts, width, run.pre.shape[1], blocks,
        STEP=2 if form is Form.INTERLEAVED else 1, DUAL=activation.functions(layout.act_ops, layout.act_consts).dual,
        GATED=layout.gated, BN=columns, num_warps=4,
    )  # fmt: skip
    return d_pre, hidden, sums


def _weights_of(run: Pass, rows: Rows, p: Projection, grad: Operand, inputs: Operand) -> None:
    """Where somebody asks: gradᵀ inputs of the weight, s (grad b)ᵀ inputs of a, s gradᵀ (inputs aᵀ) of b."""
    out = run.out
    if out.wants(p.name, p.part):
        transposed = run.layout.up_transposed if p.name == "up" else run.layout.down_transposed
        weight_grad(run, out.empty(p.name, p.part), grad, inputs, transposed, run.tiles.up)
    low = p.low
    if low is None:
        return
    left, right = (replace(o, rows=o.rows.to(low.dtype)) for o in (grad, inputs))
    for name, first, second in ((f"{p.name}_b", low.a, right), (f"{p.name}_a", turned(low.b), left)):
        if not out.wants(name, low.place):
            continue
        t = rows.product(second.columns, first, gather=second.gather)
        thin = Operand(t, 0, t.shape[1], False)
        targets = out.empty(name, low.place)
        pair = (left, thin) if name.endswith("b") else (thin, right)
        weight_grad(run, targets, *pair, False, _thin(run.tiles.up, pair[0].width, pair[1].width))
        if run.layout.stacked:
            kernels.times(targets[0], low.scale)
        else:
            torch._foreach_mul_(targets, low.scale)


def _thin(tile: Tile, m: int, n: int) -> Tile:
    """For a gradient with few rows or columns."""
    bm, bn = (min(size, max(16, power_of_2(width))) for size, width in ((tile.bm, m), (tile.bn, n)))
    return replace(tile, bm=bm, bn=bn, warps=4)


def _tokens_of(run: Pass, rows: Rows, ups: Sequence[Projection], d_pre: Tensor) -> Tensor:
    c, layout = run.call, run.layout
    parts = [_turned_product(rows, u, d, False) for u, d in zip(ups, d_pre.chunk(len(ups), -1))]
    total = parts[0] if len(parts) == 1 else kernels.plus(*parts)
    identity = (layout.num_experts, layout.num_identity)
    grad_x, rank = empty(c.x, *c.x.shape), rows.dispatch.rank
    return combine(total, c.ids, c.weights, run.grad, None, grad_x, *identity, weighted=False, early=False, rank=rank)


@triton.jit
def _slopes(
    grad, g, u, weights, order, offsets, d_g, d_u, hidden, sums, num_experts, width: tl.constexpr, stride: tl.constexpr, blocks,
    STEP: tl.constexpr, DUAL: tl.constexpr, GATED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """For row r with a, ∂a/∂g, ∂a/∂u of its pre-activations and w of its slot: hidden = w a, d_g = grad w ∂a/∂g, sums = Σ grad a."""
    r = tl.program_id(0)
    if r < tl.load(offsets + num_experts):
        at = r.to(tl.int64)
        columns = tl.program_id(1) * BN + tl.arange(0, BN)
        inside = columns < width
        slot = tl.load(order + r).to(tl.int64)
        w = tl.load(weights + slot).to(tl.float32)
        d = tl.load(grad + at * width + columns, mask=inside, other=0.0).to(tl.float32)
        first = tl.load(g + at * stride + columns * STEP, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(u + at * stride + columns * STEP, mask=inside, other=0.0).to(tl.float32)
        value, by_g, by_u = DUAL(first, second)
        tl.store(hidden + at * width + columns, (value * w).to(hidden.dtype.element_ty), mask=inside)
        tl.store(d_g + at * stride + columns * STEP, (d * w * by_g).to(d_g.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(d_u + at * stride + columns * STEP, (d * w * by_u).to(d_u.dtype.element_ty), mask=inside)
        tl.store(sums + slot * blocks + tl.program_id(1), tl.sum(tl.where(inside, d * value, 0.0), 0))
