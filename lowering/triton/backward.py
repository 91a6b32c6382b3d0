"""The gradient of the routed experts: four grouped GEMMs over the rows of the dispatch, and what is summed beside them.

Only the pre-activations were saved. Everything else the forward pass made (the sorted rows, the hidden layer) is recomputed in an epilogue
or read through the dispatch. Nothing reads the device on the host, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...ir import Form
from .. import generic
from ..generic import Layout
from . import activation
from . import backward_kernels as kernels
from .combine import combine
from .dispatch import Dispatch, dispatch
from .experts import Call, precision, read
from .tune import Tile
from .weights import _table, descriptor, tma_fits

UP, DOWN, UP_BIAS, DOWN_BIAS = range(4)
_PART = 16  # elements a thread that an epilogue holds at once: activation and slopes need several registers for each


@dataclass(frozen=True)
class Tiles:
    """Tiles of the four products: `bm` rows of the left operand, `bn` columns, `bk` of what is summed over."""

    hidden: Tile
    input: Tile
    up: Tile
    down: Tile


def choose(slots: int, num_experts: int, dtype: torch.dtype, cuda: bool) -> Tiles:
    """By rows an expert sees on average."""
    rows = slots / max(num_experts, 1)
    if not cuda:
        tile = Tile(16, 16, 16, 4, 1)
        return Tiles(tile, tile, tile, tile)
    if dtype == torch.float32:
        by_row, by_weight = Tile(16 if rows <= 16 else 64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)
        return Tiles(by_row, by_row, by_weight, by_weight)
    bm = 16 if rows <= 16 else 32 if rows <= 40 else 64 if rows <= 96 else 128
    hidden = Tile(bm, 128, 64, 8 if bm >= 64 else 4, 3, tma=True)
    to_input = Tile(bm, 256, 64, 8, 3, tma=True) if bm >= 64 else hidden
    by_weight = Tile(128, 256, 64 if rows > 32 else 32, 8, 3)
    return Tiles(hidden, to_input, by_weight, by_weight)


class _Gradients:
    """The tensors asked for, in the order x, weights, *up, *down, *up_bias, *down_bias."""

    def __init__(self, tensors: Sequence[Tensor], sizes: Sequence[int], needs: Sequence[bool], layout: Layout) -> None:
        self.tensors, self.needs, self.layout = tensors, needs, layout
        self.first = [2 + sum(sizes[:i]) for i in range(len(sizes))]
        self.sizes = sizes
        self.found: dict[int, Tensor] = {}

    def _range(self, which: int, part: int) -> range:
        each = 1 if self.layout.stacked else self.layout.num_experts
        first = self.first[which] + part * each
        return range(first, first + each) if self.sizes[which] else range(0)

    def parts(self, which: int) -> int:
        return self.layout.halves() if which in (UP, UP_BIAS) else 1

    def wants(self, which: int, part: int | None = None) -> bool:
        parts = range(self.parts(which)) if part is None else [part]
        return any(self.needs[i] for p in parts for i in self._range(which, p))

    def empty(self, which: int, part: int) -> list[Tensor]:
        """Contiguous targets of one part: one tensor [E, ., .], or one per expert. What no kernel writes is zero."""
        out = [torch.empty_like(self.tensors[i], memory_format=torch.contiguous_format) for i in self._range(which, part)]
        if self.layout.stacked and out[0].shape[0] > self.layout.num_experts:
            out[0][self.layout.num_experts :].zero_()
        self.found.update(zip(self._range(which, part), out))
        return out

    def asked(self) -> list[Tensor]:
        return [self.found[i] for i, need in enumerate(self.needs) if need]


@dataclass(frozen=True)
class _Pass:
    """One backward pass: operands, the dispatch, and the tiles."""

    call: Call
    grad: Tensor
    pre: Tensor
    rows: Dispatch
    tiles: Tiles
    out: _Gradients

    @property
    def layout(self) -> Layout:
        return self.call.layout

    @property
    def k(self) -> int:
        return self.call.ids.shape[1]

    @property
    def precision(self) -> str:
        return precision(self.call.x.dtype)


def backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    layout: Layout,
    needs: Sequence[bool],
    tiles: Tiles | None = None,
) -> list[Tensor]:
    """Gradients of what `needs` flags among x, weights, *up, *down, *up_bias, *down_bias, in that order.

    grad [T, H_out], pre [T·k, (g | u)] in the dispatch's row order. What the kernels do not cover comes from `generic.backward`.
    """
    lists = (up, down, up_bias, down_bias)
    call = read(x, ids, weights, *lists, None, layout)
    if call is None:
        return generic.backward(grad, pre, x, ids, weights, *lists, layout, needs)
    tensors = [x, weights, *(t for ts in lists for t in ts)]
    if ids.numel() == 0:
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t, need in zip(tensors, needs, strict=True) if need]
    grad = grad.to(x.dtype)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    tiles = choose(ids.numel(), layout.num_experts, x.dtype, x.is_cuda) if tiles is None else tiles
    rows = dispatch(call.ids, layout.num_experts, tuple(dict.fromkeys((tiles.hidden.bm, tiles.input.bm))))
    out = _Gradients(tensors, [len(ts) for ts in lists], needs, layout)
    _run(_Pass(call, grad, pre.contiguous(), rows, tiles, out))
    return out.asked()


def _run(p: _Pass) -> None:
    """All gradients that are asked for, into p.out."""
    out, on_input = p.out, p.layout.weight_on_input
    need_x, need_w = p.out.needs[0], p.out.needs[1]
    d_pre = need_x or out.wants(UP) or out.wants(UP_BIAS) or (need_w and on_input)
    sums = None
    if d_pre or out.wants(DOWN) or need_w:
        hidden = _grad_hidden(p, d_pre, scaled_pre=on_input and out.wants(UP), hidden=out.wants(DOWN), sums=need_w and not on_input)
        sums = hidden.sums
        if out.wants(DOWN):
            _down_grads(p, hidden.hidden)
        if out.wants(UP):
            _up_grads(p, hidden.scaled_pre if on_input else hidden.d_pre)
        _bias_grads(p, hidden.d_pre)
        if need_x or (need_w and on_input):
            partial = _grad_input(p, hidden.d_pre, need_x, need_w and on_input)
            sums = partial if on_input else sums
    else:
        _bias_grads(p, None)
    if need_w:
        _grad_weights(p, sums)


@dataclass(frozen=True)
class _Hidden:
    """What `grad_hidden` gives; None is what nobody asked for."""

    d_pre: Tensor | None
    scaled_pre: Tensor | None
    hidden: Tensor | None
    sums: Tensor | None


def _grad_hidden(p: _Pass, d_pre: bool, scaled_pre: bool, hidden: bool, sums: bool) -> _Hidden:
    c, tile, layout = p.call, p.tiles.hidden, p.layout
    w, n = c.down, c.down.k
    blocks = triton.cdiv(n, tile.bn)
    out = _Hidden(
        torch.empty_like(p.pre) if d_pre else None,
        torch.empty_like(p.pre) if scaled_pre else None,
        p.pre.new_empty(c.slots, n) if hidden else None,
        p.pre.new_empty(c.slots, blocks, dtype=torch.float32) if sums else None,
    )
    kind, (operand,) = _operands([p.out.tensors[p.out.first[DOWN]]], list(w.parts), w.out_in, w.table, tile)
    tiles = p.rows.tiles[tile.bm]
    kernels.grad_hidden[(tiles.shape[1] * blocks,)](
        p.grad, p.pre, c.weights, operand, out.d_pre, out.scaled_pre, out.hidden, out.sums, p.rows.order, p.rows.offsets, tiles,
        tiles.shape[1], blocks, n, w.n, p.grad.stride(0), p.pre.stride(0), w.stride_e, w.stride_n, w.stride_k,
        DUAL=activation.functions(layout.act_ops, layout.act_consts).dual, GATED=layout.gated, INTERLEAVED=layout.form == Form.INTERLEAVED,
        WEIGHTED=not layout.weight_on_input, SLOTS=p.k, D_PRE=d_pre, SCALED_PRE=scaled_pre, HIDDEN=hidden, SUMS=sums,
        KIND=kind, N_FAST=w.out_in, EVEN=n % tile.bn == 0 and w.n % tile.bk == 0, PRECISION=p.precision,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, PARTS=max(1, min(tile.bm * tile.bn // (32 * tile.warps * _PART), tile.bn // 16)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _operands(stacked: list[Tensor], parts: list[Tensor], n_fast: bool, table: bool, tile: Tile) -> tuple[Any, list[Any]]:
    """How the kernels reach matrices, and the arguments for it. n_fast: blocks are stored [bk, bn]."""
    if table:
        return kernels.TABLE, parts
    if tile.tma and parts[0].is_cuda and all(tma_fits(t) for t in stacked):
        block = (tile.bk, tile.bn) if n_fast else (tile.bn, tile.bk)
        return kernels.TMA, [descriptor(t, block) for t in stacked]
    return kernels.POINTER, parts


def _grad_input(p: _Pass, d_pre: Tensor | None, need_x: bool, sums: bool) -> Tensor | None:
    """The tokens' gradient into p.out; with `sums` the partial sums of the routing weights' [N, blocks]."""
    assert d_pre is not None
    c, tile, layout = p.call, p.tiles.input, p.layout
    w, separate = c.up, layout.form == Form.SEPARATE
    n, blocks = w.k, triton.cdiv(w.k, tile.bn)
    k = w.n if separate or not layout.gated else 2 * w.n
    stride_k = w.stride_n // 2 if layout.form == Form.INTERLEAVED else w.stride_n  # the parts are every other row
    first = p.out.first[UP]
    stacked = list(p.out.tensors[first : first + layout.halves()])
    kind, operands = _operands(stacked, list(w.parts if separate else w.parts[:1]), w.out_in, w.table, tile)
    by_slot = c.x.new_empty(c.slots, n) if need_x else None
    partial = c.x.new_empty(c.slots, blocks, dtype=torch.float32) if sums else None
    tiles = p.rows.tiles[tile.bm]
    kernels.grad_input[(tiles.shape[1] * blocks,)](
        d_pre, c.x, c.weights, operands[0], operands[-1], by_slot, partial, p.rows.order, p.rows.offsets, tiles,
        tiles.shape[1], blocks, n, k, d_pre.stride(0), c.x.stride(0), w.stride_e, stride_k, w.stride_k,
        HALVES=2 if separate else 1, WEIGHTED=layout.weight_on_input, SLOTS=p.k, OUT=need_x, SUMS=sums,
        KIND=kind, N_FAST=w.out_in, EVEN=n % tile.bn == 0 and k % tile.bk == 0, PRECISION=p.precision,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if by_slot is not None:
        grad_x = torch.empty_like(c.x, memory_format=torch.contiguous_format)
        p.out.found[0] = combine(by_slot, c.ids, c.weights, p.grad, None, grad_x, layout.num_experts, layout.num_identity, False)
    return partial


def _up_grads(p: _Pass, d_pre: Tensor | None) -> None:
    assert d_pre is not None
    for part, columns in enumerate(d_pre.chunk(p.layout.halves(), -1)):
        if p.out.wants(UP, part):
            targets = p.out.empty(UP, part)
            if p.layout.up_transposed:
                _weight_grad(p, targets, p.call.x, columns, True, False, p.tiles.up)
            else:
                _weight_grad(p, targets, columns, p.call.x, False, True, p.tiles.up)


def _down_grads(p: _Pass, hidden: Tensor | None) -> None:
    assert hidden is not None
    targets = p.out.empty(DOWN, 0)
    if p.layout.down_transposed:
        _weight_grad(p, targets, hidden, p.grad, False, True, p.tiles.down)
    else:
        _weight_grad(p, targets, p.grad, hidden, True, False, p.tiles.down)


def _weight_grad(p: _Pass, targets: list[Tensor], left: Tensor, right: Tensor, gather_left: bool, gather_right: bool, tile: Tile) -> None:
    """targets[e] = Σ over e's rows of left[row]ᵀ right[row]; a gathered operand is by token."""
    m, n = left.shape[1], right.shape[1]
    blocks_m, blocks_n = triton.cdiv(m, tile.bm), triton.cdiv(n, tile.bn)
    kernels.weight_grad[(p.layout.num_experts * blocks_m * blocks_n,)](
        left, right, targets[0] if p.layout.stacked else _table(targets), p.rows.order, p.rows.offsets,
        m, n, blocks_m, blocks_n, left.stride(0), right.stride(0), m * n, n,
        GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right, SLOTS=p.k, TABLED=not p.layout.stacked,
        EVEN=m % tile.bm == 0 and n % tile.bn == 0, PRECISION=p.precision,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _bias_grads(p: _Pass, d_pre: Tensor | None) -> None:
    if d_pre is not None:
        for part, columns in enumerate(d_pre.chunk(p.layout.halves(), -1)):
            if p.out.wants(UP_BIAS, part):
                _row_sum(p, UP_BIAS, part, columns, gather=False)
    if p.out.wants(DOWN_BIAS):
        _row_sum(p, DOWN_BIAS, 0, p.grad, gather=True)


def _row_sum(p: _Pass, which: int, part: int, source: Tensor, gather: bool) -> None:
    targets = p.out.empty(which, part)
    n = source.shape[1]
    whole = targets[0] if p.layout.stacked else source.new_empty(p.layout.num_experts, n)
    block = min(128, triton.next_power_of_2(n))
    kernels.row_sum[(p.layout.num_experts, triton.cdiv(n, block))](
        source, p.call.weights, whole, p.rows.order, p.rows.offsets, n, source.stride(0),
        GATHER=gather, WEIGHTED=gather and not p.layout.weight_on_input, SLOTS=p.k, BK=32, BN=block, num_warps=4,
    )  # fmt: skip
    if not p.layout.stacked:
        torch._foreach_copy_(targets, list(whole.unbind(0)))


def _grad_weights(p: _Pass, sums: Tensor | None) -> None:
    c, layout = p.call, p.layout
    out = torch.empty_like(c.weights)
    bias = c.down_bias if not layout.weight_on_input else None
    blocks = sums.shape[1] if sums is not None else 0
    kernels.slot_weight[(triton.cdiv(c.slots, 8),)](
        sums, c.ids, p.grad, c.x, bias.parts[0] if bias is not None else None, out,
        c.slots, blocks, p.grad.shape[1], layout.num_experts, layout.num_identity, p.grad.stride(0), c.x.stride(0),
        *((bias.stride_e, bias.stride_n) if bias is not None else (0, 0)),
        SLOTS=p.k, SUMS=sums is not None, BIAS=bias is not None, IDENTITY=layout.num_identity > 0,
        BS=8, BB=triton.next_power_of_2(max(blocks, 1)), BN=min(512, triton.next_power_of_2(p.grad.shape[1])), num_warps=4,
    )  # fmt: skip
    p.out.found[1] = out
