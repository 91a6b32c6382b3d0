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
from ..reference import generic
from ..reference.generic import Layout
from . import activation, hopper_calls, library_backward
from . import backward_kernels as kernels
from .call import Call, read
from .combine import combine
from .dispatch import Dispatch, dispatch
from .experts import precision
from .host import cdiv, power_of_2, processors
from .launch.tape import empty, fill, launch
from .tune import Tile
from .weights import _table, descriptor, tma_fits

UP, DOWN, UP_BIAS, DOWN_BIAS = range(4)
_PAD = 64
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_COPIED_TOGETHER = 2**27  # elements; beyond, a launch less is not worth the memory
_PART = 16  # elements a thread that an epilogue holds at once: activation and slopes need several registers for each


@dataclass(frozen=True)
class Tiles:
    """Tiles of the four products: `bm` rows of the left operand, `bn` columns, `bk` of what is summed over.

    `padded`: tokens and incoming gradients are first copied in row order, every expert's rows filled up with zeros to whole groups of 64,
    and all products take both operands through the copy engine; else rows are gathered as they are read. Needs row tiles of 64 or more.
    `hopper`: the products run warp-specialised where they fit (padded, row tiles of 128).
    """

    hidden: Tile
    input: Tile
    up: Tile
    down: Tile
    padded: bool = False
    hopper: bool = False


def choose(slots: int, num_experts: int, dtype: torch.dtype, cuda: bool, hopper: bool = False) -> Tiles:
    """By rows an expert sees on average. `hopper`: for the warp-specialised kernels, which gain from fewer rows on."""
    rows = slots / max(num_experts, 1)
    if not cuda:
        tile = Tile(16, 16, 16, 4, 1)
        return Tiles(tile, tile, tile, tile)
    if dtype == torch.float32:
        by_row, by_weight = Tile(16 if rows <= 16 else 64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)
        return Tiles(by_row, by_row, by_weight, by_weight)
    bm = 16 if rows <= 16 else 32 if rows <= 40 else 64 if rows <= 96 and not hopper else 128
    hidden = Tile(bm, 128, 64, 8 if bm >= 64 else 4, 3, tma=True)
    to_input = Tile(bm, 256, 64, 8, 4 if bm == 128 else 3, tma=True) if bm >= 64 else hidden
    padded = bm == 128
    stages = 3 if padded else 5  # rows are gathered through loaded indices: two stages more for as many copies under way
    few = rows <= 512  # short sums: two small programs a processor, one multiplies while the other stores
    by_weight = Tile(128, 128 if few else 256, 64 if rows > 32 else 32, 4 if few else 8, stages)
    return Tiles(hidden, to_input, by_weight, by_weight, padded, hopper=padded)


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

    def given(self, which: int) -> Sequence[Tensor]:
        """The operands of one list."""
        return self.tensors[self.first[which] : self.first[which] + self.sizes[which]]

    def parts(self, which: int) -> int:
        return self.layout.halves() if which in (UP, UP_BIAS) else 1

    def wants(self, which: int, part: int | None = None) -> bool:
        parts = range(self.parts(which)) if part is None else [part]
        return any(self.needs[i] for p in parts for i in self._range(which, p))

    def empty(self, which: int, part: int) -> list[Tensor]:
        """Contiguous targets of one part: one tensor [E, ., .], or one per expert. What no kernel writes is zero."""
        out = [empty(self.tensors[i], *self.tensors[i].shape) for i in self._range(which, part)]
        if self.layout.stacked and out[0].shape[0] > self.layout.num_experts:
            fill(out[0][self.layout.num_experts :], 0)
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
    def pad(self) -> int:
        return _PAD if self.tiles.padded else 0

    @property
    def starts(self) -> Tensor | None:
        """The first group of 64 rows of every expert."""
        return self.rows.tile_starts[_PAD] if self.tiles.padded else None

    @property
    def length(self) -> int:
        """Rows of what is kept in row order."""
        return self.rows.tiles[_PAD].shape[1] * _PAD if self.tiles.padded else self.call.slots

    @property
    def precision(self) -> str:
        return precision(self.call.x.dtype)

    @property
    def hopper(self) -> bool:
        """Whether products run warp-specialised where they fit."""
        return self.tiles.hopper and self.tiles.padded and self.tiles.hidden.bm == hopper_calls.ROWS and hopper_calls.capable(self.call.x)


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
    if tiles is None and library_backward.better(call, up[0], down[0]):
        return _by_library(call, grad, pre, _Gradients(tensors, [len(ts) for ts in lists], needs, layout))
    if tiles is None:
        tiles = choose(ids.numel(), layout.num_experts, x.dtype, x.is_cuda, layout.stacked and hopper_calls.capable(x))
    tiles = replace(tiles, padded=tiles.padded and _can_pad(call, grad, tiles))
    blocks = (tiles.hidden.bm, tiles.hidden.bm if tiles.padded else tiles.input.bm, *[_PAD] * tiles.padded)
    rows = dispatch(call.ids, layout.num_experts, tuple(dict.fromkeys(blocks)))
    out = _Gradients(tensors, [len(ts) for ts in lists], needs, layout)
    _run(_Pass(call, grad, pre.contiguous(), rows, tiles, out))
    return out.asked()


def _by_library(c: Call, grad: Tensor, pre: Tensor, out: _Gradients) -> list[Tensor]:
    """All gradients that are asked for, by torch's products."""
    rows = dispatch(c.ids, c.layout.num_experts, ())
    needs = library_backward.Needs(*out.needs[:2], out.wants(UP), out.wants(DOWN))
    found = library_backward.gradients(c, grad, pre.contiguous(), out.given(UP)[0], out.given(DOWN)[0], rows, needs)
    if found.rows is not None:
        grad_x, identity = empty(c.x, *c.x.shape), (c.layout.num_experts, c.layout.num_identity)
        out.found[0] = combine(found.rows, c.ids, c.weights, grad, None, grad_x, *identity, weighted=False, rank=rows.rank)
    if needs.weights:
        _grad_weights(c, grad, out, found.sums)
    out.found.update({out.first[which]: t for which, t in ((UP, found.up), (DOWN, found.down)) if t is not None})
    return out.asked()


def _can_pad(c: Call, grad: Tensor, tiles: Tiles) -> bool:
    """Whether every operand can come through the copy engine: rows of whole 16 bytes, row tiles of whole groups, one row tile for both."""
    widths = (c.x.shape[1], grad.shape[1], c.down.k, c.up.n)
    rows = tiles.hidden.bm % _PAD == 0 and tiles.hidden.bm == tiles.input.bm
    return rows and all(w * c.x.element_size() % 16 == 0 for w in widths)


def _run(p: _Pass) -> None:
    """All gradients that are asked for, into p.out."""
    out, on_input = p.out, p.layout.weight_on_input
    need_x, need_w = p.out.needs[0], p.out.needs[1]
    d_pre = need_x or out.wants(UP) or out.wants(UP_BIAS) or (need_w and on_input)
    sums = None
    if d_pre or out.wants(DOWN) or need_w:
        grad, x = _operand_rows(p)
        hidden = _grad_hidden(p, grad, d_pre, scaled_pre=on_input and out.wants(UP), hidden=out.wants(DOWN), sums=need_w and not on_input)
        sums = hidden.sums
        if out.wants(DOWN):
            _down_grads(p, grad, hidden.hidden)
        del grad
        if out.wants(UP):
            _up_grads(p, hidden.scaled_pre if on_input else hidden.d_pre, x)
        del x
        _bias_grads(p, hidden.d_pre)
        if need_x or (need_w and on_input):
            partial = _grad_input(p, hidden.d_pre, need_x, need_w and on_input)
            sums = partial if on_input else sums
    else:
        _bias_grads(p, None)
    if need_w:
        _grad_weights(p.call, p.grad, p.out, sums)


@dataclass(frozen=True)
class _Hidden:
    """What `grad_hidden` gives; None is what nobody asked for."""

    d_pre: Tensor | None
    scaled_pre: Tensor | None
    hidden: Tensor | None
    sums: Tensor | None


def _operand_rows(p: _Pass) -> tuple[Tensor, Tensor | None]:
    """Incoming gradients and tokens as the products take them. Tokens None: copied when they are needed, to hold less memory at once."""
    if not p.tiles.padded:
        return p.grad, p.call.x
    if p.out.wants(UP) and p.length * p.call.x.shape[1] <= _COPIED_TOGETHER:
        grad, x = _sorted(p, p.grad, p.call.x)
        return grad, x
    return _sorted(p, p.grad)[0], None


def _sorted(p: _Pass, *sources: Tensor) -> list[Tensor]:
    """Rows of one source or two, [T, n] by token, in the dispatch's order, padded with zeros."""
    tiles = p.rows.tiles[_PAD]
    outs = [empty(source, tiles.shape[1] * _PAD, source.shape[1]) for source in sources]
    block = min(128, *(power_of_2(source.shape[1]) for source in sources))
    blocks = [cdiv(source.shape[1], block) for source in sources]
    second: tuple[Tensor | None, Tensor | None] = (sources[1], outs[1]) if len(sources) > 1 else (None, None)
    launch(
        kernels.sort_rows, (tiles.shape[1], sum(blocks)),
        sources[0], second[0], outs[0], second[1], p.rows.order, p.rows.offsets, tiles, tiles.shape[1], blocks[0],
        sources[0].shape[1], sources[-1].shape[1], sources[0].stride(0), sources[-1].stride(0),
        SLOTS=p.k, PAD=_PAD, BN=block, num_warps=4,
    )  # fmt: skip
    return outs


def _rows(t: Tensor, tile: tuple[int, int]) -> Any:
    """A descriptor over the rows of t, for blocks of `tile`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t, list(tile))


def _grad_hidden(p: _Pass, grad: Tensor, d_pre: bool, scaled_pre: bool, hidden: bool, sums: bool) -> _Hidden:
    c, tile, layout = p.call, p.tiles.hidden, p.layout
    w, n = c.down, c.down.k
    given = list(p.out.given(DOWN))
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


def _grad_input(p: _Pass, d_pre: Tensor | None, need_x: bool, sums: bool) -> Tensor | None:
    """The tokens' gradient into p.out; with `sums` the partial sums of the routing weights' [N, blocks]."""
    assert d_pre is not None
    c = p.call
    out = empty(c.x, c.slots, c.up.k) if need_x else None
    w = hopper_calls.input_operand(c, list(p.out.given(UP))) if p.hopper and not sums else None
    partial, rank = None, None
    if w is not None and out is not None:
        hopper_calls.grad_input(d_pre, w, p.rows, out)
        rank = p.rows.rank
    else:
        partial = _plain_grad_input(p, d_pre, out, sums)
    if out is not None:
        grad_x = empty(c.x, *c.x.shape)
        identity = (p.layout.num_experts, p.layout.num_identity)
        p.out.found[0] = combine(out, c.ids, c.weights, p.grad, None, grad_x, *identity, weighted=False, rank=rank)
    return partial


def _plain_grad_input(p: _Pass, d_pre: Tensor, by_slot: Tensor | None, sums: bool) -> Tensor | None:
    c, tile, layout = p.call, p.tiles.input, p.layout
    w, separate = c.up, layout.form == Form.SEPARATE
    n, blocks = w.k, cdiv(w.k, tile.bn)
    k = w.n if separate or not layout.gated else 2 * w.n
    stride_k = w.stride_n // 2 if layout.form == Form.INTERLEAVED else w.stride_n  # the parts are every other row
    kind, operands = _operands(p.out.given(UP), w.parts if separate else w.parts[:1], w.out_in, w.table, tile)
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


def _up_grads(p: _Pass, d_pre: Tensor | None, x: Tensor | None) -> None:
    assert d_pre is not None
    x = _sorted(p, p.call.x)[0] if x is None else x
    width = d_pre.shape[1] // p.layout.halves()
    for part in range(p.layout.halves()):
        if p.out.wants(UP, part):
            columns = _Operand(d_pre, width * part, width, False)
            tokens = _Operand(x, 0, x.shape[1], not p.tiles.padded)
            _weight_grad(p, p.out.empty(UP, part), columns, tokens, p.layout.up_transposed, p.tiles.up)


def _down_grads(p: _Pass, grad: Tensor, hidden: Tensor | None) -> None:
    assert hidden is not None
    left = _Operand(grad, 0, grad.shape[1], not p.tiles.padded)
    _weight_grad(p, p.out.empty(DOWN, 0), left, _Operand(hidden, 0, hidden.shape[1], False), p.layout.down_transposed, p.tiles.down)


@dataclass(frozen=True)
class _Operand:
    """Some columns of a tensor of rows; `gather`: its rows are tokens."""

    rows: Tensor
    first: int
    width: int
    gather: bool

    @property
    def columns(self) -> Tensor:
        return self.rows[:, self.first : self.first + self.width]


def _weight_grad(p: _Pass, targets: list[Tensor], out: _Operand, into: _Operand, transposed: bool, tile: Tile) -> None:
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
            kernels.weight_grad_padded, grid,
            _rows(left.rows, (_PAD, tile.bm)), _rows(right.rows, (_PAD, tile.bn)), target, p.starts,
            m, n, left.first, right.first, blocks_m, blocks_n, m * n, n,
            TABLED=not p.layout.stacked, EVEN=even, PRECISION=p.precision, DTYPE=_TYPES[left.rows.dtype],
            BM=tile.bm, BN=tile.bn, PAD=_PAD, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return
    launch(
        kernels.weight_grad, grid,
        left.columns, right.columns, target, p.rows.order, p.rows.offsets,
        m, n, blocks_m, blocks_n, left.rows.stride(0), right.rows.stride(0), m * n, n,
        GATHER_LEFT=left.gather, GATHER_RIGHT=right.gather, SLOTS=p.k, TABLED=not p.layout.stacked,
        EVEN=even, PRECISION=p.precision,
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
    whole = targets[0] if p.layout.stacked else empty(source, p.layout.num_experts, n)
    block = min(128, power_of_2(n))
    launch(
        kernels.row_sum, (p.layout.num_experts, cdiv(n, block)),
        source, p.call.weights, whole, p.rows.order, p.rows.offsets, p.starts, n, source.stride(0),
        GATHER=gather, PAD=0 if gather else p.pad, WEIGHTED=gather and not p.layout.weight_on_input, SLOTS=p.k,
        BK=32, BN=block, num_warps=4,
    )  # fmt: skip
    if not p.layout.stacked:
        torch._foreach_copy_(targets, list(whole.unbind(0)))


def _grad_weights(c: Call, grad: Tensor, found: _Gradients, sums: Tensor | None) -> None:
    layout = c.layout
    out = empty(c.weights, *c.weights.shape)
    bias = c.down_bias if not layout.weight_on_input else None
    blocks = sums.shape[1] if sums is not None else 0
    launch(
        kernels.slot_weight, (cdiv(c.slots, 8),),
        sums, c.ids, grad, c.x, bias.parts[0] if bias is not None else None, out,
        c.slots, blocks, grad.shape[1], layout.num_experts, layout.num_identity, grad.stride(0), c.x.stride(0),
        *((bias.stride_e, bias.stride_n) if bias is not None else (0, 0)),
        SLOTS=c.ids.shape[1], SUMS=sums is not None, BIAS=bias is not None, IDENTITY=layout.num_identity > 0,
        BS=8, BB=power_of_2(max(blocks, 1)), BN=min(512, power_of_2(grad.shape[1])), num_warps=4,
    )  # fmt: skip
    found.found[1] = out
