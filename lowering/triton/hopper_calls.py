"""Launching hopper_backward.py: what it asks of its operands, their descriptors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import Form
from ..generic import Layout
from . import activation
from .dispatch import Dispatch
from .experts import Call
from .sizes import cdiv
from .weights import Matrices, flat_fits

PAD = 64
_SHARED_BYTES = 225 * 1024  # of a processor's 227 KB; the rest holds barriers
ROWS = 128  # of a tile whose rows are an expert's: two consumers


@dataclass(frozen=True)
class Warped:
    """A tile: columns (a power of two), stages of the ring, consumers of 64 rows (weight gradients), row tiles walked together (others)."""

    bn: int
    stages: int
    consumers: int = 2
    group: int = 8


@dataclass(frozen=True)
class Hopper:
    """Which products run warp-specialised, where they fit."""

    hidden: Warped | None = Warped(256, 4)
    input: Warped | None = Warped(256, 4)
    weight: Warped | None = Warped(256, 3)


def capable(x: Tensor) -> bool:
    """A card and dtype that the kernels are written for."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.version.hip is None and _capability(x.device) == (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _weights_fit(w: Matrices, given: list[Tensor]) -> bool:
    return not w.table and all(flat_fits(t) for t in given)


def hidden_fits(c: Call, given: list[Tensor], pre: Tensor, tile: Warped) -> bool:
    """For `grad_hidden`, with `given` the down projection."""
    layout, w = c.layout, c.down
    form = layout.form != Form.INTERLEAVED and not layout.weight_on_input
    return form and _weights_fit(w, given) and w.k % tile.bn == 0 and w.n % PAD == 0 and pre.data_ptr() % 16 == 0


def input_fits(c: Call, given: list[Tensor]) -> bool:
    """For `grad_input`, with `given` the up projection."""
    layout, w = c.layout, c.up
    depth = w.n if layout.form == Form.SEPARATE or not layout.gated else 2 * w.n
    return not layout.weight_on_input and _weights_fit(w, given) and depth % PAD == 0 and w.k * c.x.element_size() % 16 == 0


def weight_fits(layout: Layout, m: int) -> bool:
    """For a weight gradient of m rows."""
    return layout.stacked and m % PAD == 0


@functools.cache
def _shared(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    kind = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, columns], kind)


def _boxes(t: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of t [., .], contiguous rows, for boxes of rows x columns."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns], _shared(rows, columns, t.dtype))


def _weight_boxes(t: Tensor, n_fast: bool, bn: int) -> tuple[Any, int]:
    """A descriptor of the matrices in t, one below the other (`flat_fits`), and the rows of each."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    (experts, rows, columns), (apart, row, inner) = t.shape, t.stride()
    if inner != 1:
        rows, columns, row = columns, rows, inner
    box = [PAD, bn] if n_fast else [bn, PAD]
    per_expert = apart // row
    shape = [(experts - 1) * per_expert + rows, columns]
    return TensorDescriptor(t, shape, [row, 1], box, _shared(*box, t.dtype)), per_expert


def _programs(most: int, device: torch.device) -> tuple[int]:
    return (min(most, _processors(device)),)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def grad_hidden(
    c: Call,
    grad: Tensor,
    pre: Tensor,
    down: Tensor,
    rows: Dispatch,
    d_pre: Tensor | None,
    hidden: Tensor | None,
    sums: Tensor | None,
    tile: Warped,
) -> None:
    """As backward_kernels.grad_hidden; grad, d_pre and hidden in padded order, sums [N, I / bn]."""
    from . import hopper_backward

    layout, w = c.layout, c.down
    weights, per_expert = _weight_boxes(down, w.out_in, tile.bn)
    tiles = rows.tiles[ROWS]
    hopper_backward.grad_hidden[_programs(tiles.shape[1] * (w.k // tile.bn), grad.device)](
        _boxes(grad, ROWS, PAD), weights, _boxes(pre, ROWS, PAD), c.weights,
        None if d_pre is None else _boxes(d_pre, PAD, PAD), None if hidden is None else _boxes(hidden, PAD, PAD), sums,
        rows.order, rows.offsets, rows.tile_starts[PAD], tiles, rows.num_tiles[ROWS], tiles.shape[1], w.k, w.n, per_expert,
        DUAL=activation.gluon_dual(layout.act_ops, layout.act_consts), GATED=layout.gated, WEIGHTED=not layout.weight_on_input,
        D_PRE=d_pre is not None, HIDDEN=hidden is not None, SUMS=sums is not None,
        BN=tile.bn, STAGES=tile.stages, N_FAST=w.out_in, GROUP=tile.group, REGISTERS=232, num_warps=4,
    )  # fmt: skip


def grad_input(c: Call, d_pre: Tensor, up: list[Tensor], rows: Dispatch, out: Tensor, tile: Warped) -> None:
    """As backward_kernels.grad_input; d_pre in padded order, `up` one tensor or two, out [N, H] by slot."""
    from . import hopper_backward

    layout, w = c.layout, c.up
    weights = [_weight_boxes(t, w.out_in, tile.bn) for t in up]
    depth = w.n if layout.form == Form.SEPARATE or not layout.gated else 2 * w.n
    tiles = rows.tiles[ROWS]
    hopper_backward.grad_input[_programs(tiles.shape[1] * cdiv(w.k, tile.bn), out.device)](
        _boxes(d_pre, ROWS, PAD), weights[0][0], weights[-1][0], out,
        rows.order, rows.offsets, rows.tile_starts[PAD], tiles, rows.num_tiles[ROWS], tiles.shape[1], w.k, depth, weights[0][1],
        HALVES=len(up), BN=tile.bn, STAGES=tile.stages, N_FAST=w.out_in, GROUP=tile.group, REGISTERS=232, num_warps=4,
    )  # fmt: skip


def weight_grad(left: Tensor, left0: int, right: Tensor, right0: int, out: Tensor, starts: Tensor, tile: Warped) -> None:
    """out[e] [m, n] = Σ over e's rows of left[row, left0 :]ᵀ right[row, right0 :], for experts [0, len(starts) - 1)."""
    from . import hopper_backward

    _, m, n = out.shape
    experts = starts.shape[0] - 1
    tiles = experts * cdiv(m, tile.consumers * PAD) * cdiv(n, tile.bn)
    pieces = 2 if tile.consumers == 3 and tile.bn > 128 else 1  # an instruction of 256 columns needs more registers than three leave it
    width = tile.bn // pieces
    hopper_backward.weight_grad[_programs(tiles, out.device)](
        _boxes(left, PAD, PAD), _boxes(right, PAD, width), _boxes(out.view(-1, n), PAD, width), starts,
        experts, m, n, left0, right0,
        CONSUMERS=tile.consumers, PIECES=pieces, BUFFERS=_buffers(tile, pieces, out.element_size()), STAGES=tile.stages,
        REGISTERS=232 if tile.consumers == 2 else 160, num_warps=4,
    )  # fmt: skip


def _buffers(tile: Warped, pieces: int, size: int) -> int:
    """Pieces of its results that a consumer can have on their way at once: all, where shared memory allows it."""
    stages = tile.stages * PAD * (tile.consumers * PAD + tile.bn) * size
    return pieces if stages + tile.consumers * PAD * tile.bn * size <= _SHARED_BYTES else 1
