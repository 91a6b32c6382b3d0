"""The gradient of the routed experts: four grouped GEMMs over the rows of the dispatch, and what is summed beside them.

Only the pre-activations were saved. Everything else the forward pass made (the sorted rows, the hidden layer) is recomputed in an epilogue
or read through the dispatch. Nothing reads the device on the host, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ir import Form
from ...ir.operands import Operands
from ..reference import generic
from ..reference.generic import Layout
from . import activation, hopper_calls, library_backward
from . import backward_kernels as kernels
from . import backward_row_kernels as row_kernels
from .backward_sums import bias_grads, grad_weights
from .call import Call, read
from .combine import combine
from .dispatch import dispatch
from .gradients import PAD, Gradients, Pass, Tiles, choose
from .host import cdiv, power_of_2, processors
from .launch.tape import empty, launch
from .tune import Tile
from .weights import _table, descriptor, tma_fits

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_COPIED_TOGETHER = 2**27  # elements; beyond, a launch less is not worth the memory
_PART = 16  # elements a thread that an epilogue holds at once: activation and slopes need several registers for each


def backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    layout: Layout,
    needs: Sequence[bool],
    tiles: Tiles | None = None,
) -> list[Tensor]:
    """Gradients of what `needs` flags among x, weights and the parameters in their order, in that order.

    grad [T, H_out], pre [T·k, (g | u)] in the dispatch's row order. What the kernels do not cover comes from `generic.backward`.
    """
    call = read(x, ids, weights, p, None, layout)
    if call is None:
        return generic.backward(grad, pre, x, ids, weights, p, layout, needs)
    if ids.numel() == 0:
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t, need in zip((x, weights, *p), needs, strict=True) if need]
    grad = grad.to(x.dtype)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    by_library = tiles is None and library_backward.better(call, p)
    if tiles is None:
        tiles = choose(ids.numel(), layout.num_experts, x.dtype, x.is_cuda, layout.stacked and hopper_calls.capable(x))
    tiles = replace(tiles, padded=not by_library and tiles.padded and _can_pad(call, grad, tiles))
    blocks = () if by_library else (tiles.hidden.bm, tiles.hidden.bm if tiles.padded else tiles.input.bm, *[PAD] * tiles.padded)
    rows = dispatch(call.ids, layout.num_experts, tuple(dict.fromkeys(blocks)))
    out = Gradients(p, needs, layout)
    run = library_backward.run if by_library else _run
    run(Pass(call, grad, pre.contiguous(), rows, tiles, out))
    return out.asked()


def _can_pad(c: Call, grad: Tensor, tiles: Tiles) -> bool:
    """Whether every operand can come through the copy engine: rows of whole 16 bytes, row tiles of whole groups, one row tile for both."""
    widths = (c.x.shape[1], grad.shape[1], c.down.k, c.up.n)
    rows = tiles.hidden.bm % PAD == 0 and tiles.hidden.bm == tiles.input.bm
    return rows and all(w * c.x.element_size() % 16 == 0 for w in widths)


def _run(p: Pass) -> None:
    """All gradients that are asked for, into p.out."""
    out, on_input = p.out, p.layout.weight_on_input
    need_x, need_w = p.out.x, p.out.weights
    d_pre = need_x or out.wants("up") or out.wants("up_bias") or (need_w and on_input)
    sums = None
    if d_pre or out.wants("down") or need_w:
        grad, x = _operand_rows(p)
        hidden = _grad_hidden(
            p, grad, d_pre, scaled_pre=on_input and out.wants("up"), hidden=out.wants("down"), sums=need_w and not on_input
        )
        sums = hidden.sums
        if out.wants("down"):
            _down_grads(p, grad, hidden.hidden)
        del grad
        if out.wants("up"):
            _up_grads(p, hidden.scaled_pre if on_input else hidden.d_pre, x)
        del x
        bias_grads(p, hidden.d_pre)
        if need_x or (need_w and on_input):
            partial = _grad_input(p, hidden.d_pre, need_x, need_w and on_input)
            sums = partial if on_input else sums
    else:
        bias_grads(p, None)
    if need_w:
        grad_weights(p, sums)


@dataclass(frozen=True)
class _Hidden:
    """What `grad_hidden` gives; None is what nobody asked for."""

    d_pre: Tensor | None
    scaled_pre: Tensor | None
    hidden: Tensor | None
    sums: Tensor | None


def _operand_rows(p: Pass) -> tuple[Tensor, Tensor | None]:
    """Incoming gradients and tokens as the products take them. Tokens None: copied when they are needed, to hold less memory at once."""
    if not p.tiles.padded:
        return p.grad, p.call.x
    if p.out.wants("up") and p.length * p.call.x.shape[1] <= _COPIED_TOGETHER:
        grad, x = _sorted(p, p.grad, p.call.x)
        return grad, x
    return _sorted(p, p.grad)[0], None


def _sorted(p: Pass, *sources: Tensor) -> list[Tensor]:
    """Rows of one source or two, [T, n] by token, in the dispatch's order, padded with zeros."""
    tiles = p.rows.tiles[PAD]
    outs = [empty(source, tiles.shape[1] * PAD, source.shape[1]) for source in sources]
    block = min(128, *(power_of_2(source.shape[1]) for source in sources))
    blocks = [cdiv(source.shape[1], block) for source in sources]
    second: tuple[Tensor | None, Tensor | None] = (sources[1], outs[1]) if len(sources) > 1 else (None, None)
    launch(
        row_kernels.sort_rows, (tiles.shape[1], sum(blocks)),
        sources[0], second[0], outs[0], second[1], p.rows.order, p.rows.offsets, tiles, tiles.shape[1], blocks[0],
        sources[0].shape[1], sources[-1].shape[1], sources[0].stride(0), sources[-1].stride(0),
        SLOTS=p.k, PAD=PAD, BN=block, num_warps=4,
    )  # fmt: skip
    return outs


def _rows(t: Tensor, tile: tuple[int, int]) -> Any:
    """A descriptor over the rows of t, for blocks of `tile`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t, list(tile))


def _grad_hidden(p: Pass, grad: Tensor, d_pre: bool, scaled_pre: bool, hidden: bool, sums: bool) -> _Hidden:
    c, tile, layout = p.call, p.tiles.hidden, p.layout
    w, n = c.down, c.down.k
    given = list(p.out.given.down)
    warped = p.hopper and not scaled_pre and hopper_calls.hidden_fits(c, given, p.pre)
    blocks = cdiv(n, hopper_calls.HIDDEN.bn if warped else tile.bn)
    length = p.length
    out = _Hidden(
        empty(p.pre, length, p.pre.shape[1]) if d_pre else None,
        empty(p.pre, length, p.pre.shape[1]) if scaled_pre else None,
        empty(p.pre, length, n) if hidden else None,
        empty(p.pre, c.slots, blocks, dtype=torch.float32) if sums else None,
    )
    if warped:
        hopper_calls.grad_hidden(c, grad, p.pre, given[0], p.rows, out.d_pre, out.hidden, out.sums)
        return out
    kind, (operand,) = _operands(given, w.parts, w.out_in, w.table, tile)
    tiles = p.rows.tiles[tile.bm]
    launch(
        kernels.grad_hidden, _grid(tile, tiles.shape[1] * blocks, c.x.device),
        _rows(grad, (tile.bm, tile.bk)) if p.tiles.padded else grad, p.pre, c.weights, operand,
        out.d_pre, out.scaled_pre, out.hidden, out.sums, p.rows.order, p.rows.offsets, p.starts, tiles, p.rows.num_tiles[tile.bm],
        tiles.shape[1], blocks, n, w.n, grad.stride(0), p.pre.stride(0), w.stride_e, w.stride_n, w.stride_k,
        DUAL=activation.functions(layout.act_ops, layout.act_consts).dual, GATED=layout.gated, INTERLEAVED=layout.form == Form.INTERLEAVED,
        WEIGHTED=not layout.weight_on_input, SLOTS=p.k, D_PRE=d_pre, SCALED_PRE=scaled_pre, HIDDEN=hidden, SUMS=sums,
        A_TMA=p.tiles.padded, PAD=p.pad, KIND=kind, N_FAST=w.out_in, EVEN=n % tile.bn == 0 and w.n % tile.bk == 0, PRECISION=p.precision,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, PARTS=_epilogue_parts(tile),
        num_warps=tile.warps, num_stages=tile.stages, **_registers(tile),
    )  # fmt: skip
    return out


def _grid(tile: Tile, most: int, device: torch.device) -> tuple[int]:
    """One program a tile, or as many as the card holds at once."""
    return (min(most, tile.per_sm * processors(device)) if tile.per_sm else most,)


def _registers(tile: Tile) -> dict[str, int]:
    """Two programs of 8 warps on one processor need 128 registers a thread or fewer: one multiplies while the other is in its epilogue."""
    return {"maxnreg": 128} if torch.cuda.is_available() and tile.warps == 8 and tile.bm * tile.bn <= 16384 else {}


def _epilogue_parts(tile: Tile) -> int:
    return max(1, min(tile.bm * tile.bn // (32 * tile.warps * _PART), tile.bn // 16))


def _operands(tensors: Sequence[Tensor], parts: Sequence[Tensor], n_fast: bool, table: bool, tile: Tile) -> tuple[Any, list[Any]]:
    """How the kernels reach the matrices in `tensors`, and the arguments for it. n_fast: blocks are stored [bk, bn]."""
    if table:
        return kernels.TABLE if all(t.data_ptr() % 16 == 0 for t in tensors) else kernels.LOOSE_TABLE, list(parts)
    if tile.tma and parts[0].is_cuda and all(tma_fits(t) for t in tensors):
        block = (tile.bk, tile.bn) if n_fast else (tile.bn, tile.bk)
        return kernels.TMA, [descriptor(t, block) for t in tensors]
    return kernels.POINTER, list(parts)


def _grad_input(p: Pass, d_pre: Tensor | None, need_x: bool, sums: bool) -> Tensor | None:
    """The tokens' gradient into p.out; with `sums` the partial sums of the routing weights' [N, blocks]."""
    assert d_pre is not None
    c = p.call
    out = empty(c.x, c.slots, c.up.k) if need_x else None
    w = hopper_calls.input_operand(c, list(p.out.given.up)) if p.hopper and not sums else None
    partial, rank = None, None
    if w is not None and out is not None:
        hopper_calls.grad_input(d_pre, w, p.rows, out)
        rank = p.rows.rank
    else:
        partial = _plain_grad_input(p, d_pre, out, sums)
    if out is not None:
        grad_x = empty(c.x, *c.x.shape)
        identity = (p.layout.num_experts, p.layout.num_identity)
        p.out.of_x = combine(out, c.ids, c.weights, p.grad, None, grad_x, *identity, weighted=False, rank=rank)
    return partial


def _plain_grad_input(p: Pass, d_pre: Tensor, by_slot: Tensor | None, sums: bool) -> Tensor | None:
    c, tile, layout = p.call, p.tiles.input, p.layout
    w, separate = c.up, layout.form == Form.SEPARATE
    n, blocks = w.k, cdiv(w.k, tile.bn)
    k = w.n if separate or not layout.gated else 2 * w.n
    stride_k = w.stride_n // 2 if layout.form == Form.INTERLEAVED else w.stride_n  # the parts are every other row
    kind, operands = _operands(p.out.given.up, w.parts if separate else w.parts[:1], w.out_in, w.table, tile)
    partial = empty(c.x, c.slots, blocks, dtype=torch.float32) if sums else None
    tiles = p.rows.tiles[tile.bm]
    launch(
        kernels.grad_input, _grid(tile, tiles.shape[1] * blocks, c.x.device),
        _rows(d_pre, (tile.bm, tile.bk)) if p.tiles.padded else d_pre, c.x, c.weights, operands[0], operands[-1], by_slot, partial,
        p.rows.order, p.rows.offsets, p.starts, tiles, p.rows.num_tiles[tile.bm],
        tiles.shape[1], blocks, n, k, d_pre.stride(0), c.x.stride(0), w.stride_e, stride_k, w.stride_k,
        HALVES=2 if separate else 1, WEIGHTED=layout.weight_on_input, SLOTS=p.k, OUT=by_slot is not None, SUMS=sums,
        A_TMA=p.tiles.padded, PAD=p.pad, KIND=kind, N_FAST=w.out_in, EVEN=n % tile.bn == 0 and k % tile.bk == 0, PRECISION=p.precision,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial


def _up_grads(p: Pass, d_pre: Tensor | None, x: Tensor | None) -> None:
    assert d_pre is not None
    x = _sorted(p, p.call.x)[0] if x is None else x
    width = d_pre.shape[1] // p.layout.halves()
    for part in range(p.layout.halves()):
        if p.out.wants("up", part):
            columns = Operand(d_pre, width * part, width, False)
            tokens = Operand(x, 0, x.shape[1], not p.tiles.padded)
            weight_grad(p, p.out.empty("up", part), columns, tokens, p.layout.up_transposed, p.tiles.up)


def _down_grads(p: Pass, grad: Tensor, hidden: Tensor | None) -> None:
    assert hidden is not None
    left = Operand(grad, 0, grad.shape[1], not p.tiles.padded)
    weight_grad(p, p.out.empty("down", 0), left, Operand(hidden, 0, hidden.shape[1], False), p.layout.down_transposed, p.tiles.down)


@dataclass(frozen=True)
class Operand:
    """Some columns of a tensor of rows; `gather`: its rows are tokens."""

    rows: Tensor
    first: int
    width: int
    gather: bool

    @property
    def columns(self) -> Tensor:
        return self.rows[:, self.first : self.first + self.width]


def weight_grad(p: Pass, targets: list[Tensor], out: Operand, into: Operand, transposed: bool, tile: Tile) -> None:
    """targets[e] = Σ over e's rows of out[row]ᵀ into[row]; `transposed`: of into[row]ᵀ out[row]."""
    left, right = (into, out) if transposed else (out, into)
    m, n = left.width, right.width
    if p.hopper and hopper_calls.weights_fit(p.layout, m, n, left.rows.element_size()):
        hopper_calls.weight_grad(left.rows, left.first, right.rows, right.first, targets[0], p.rows)
        return
    blocks_m, blocks_n = cdiv(m, tile.bm), cdiv(n, tile.bn)
    grid = (p.layout.num_experts * blocks_m * blocks_n,)
    target = targets[0] if p.layout.stacked else _table(targets)
    even = m % tile.bm == 0 and n % tile.bn == 0
    if p.tiles.padded:
        launch(
            row_kernels.weight_grad_padded, grid,
            _rows(left.rows, (PAD, tile.bm)), _rows(right.rows, (PAD, tile.bn)), target, p.starts,
            m, n, left.first, right.first, blocks_m, blocks_n, m * n, n,
            TABLED=not p.layout.stacked, EVEN=even, PRECISION=p.precision, DTYPE=_TYPES[left.rows.dtype],
            BM=tile.bm, BN=tile.bn, PAD=PAD, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return
    launch(
        row_kernels.weight_grad, grid,
        left.columns, right.columns, target, p.rows.order, p.rows.offsets,
        m, n, blocks_m, blocks_n, left.rows.stride(0), right.rows.stride(0), m * n, n,
        GATHER_LEFT=left.gather, GATHER_RIGHT=right.gather, SLOTS=p.k, TABLED=not p.layout.stacked,
        EVEN=even, PRECISION=p.precision,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
