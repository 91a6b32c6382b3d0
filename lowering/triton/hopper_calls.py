"""The products of the gradient that run warp-specialised on Hopper: what they ask of their operands, their descriptors, their launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir import Form
from ..reference.generic import Layout
from . import activation
from .call import Call
from .dispatch import Dispatch
from .experts import Product, hopper_fits, warp_specialised
from .host import capability, cdiv, processors
from .launch.tape import launch
from .tune import Tile
from .weights import Matrices, flat_descriptor, flat_fits, rows_descriptor

PAD = 64
ROWS = 128  # of a tile: two consumers


@dataclass(frozen=True)
class Warped:
    """A tile of 128 rows: columns (a power of two), stages of the ring, row tiles walked together."""

    bn: int
    stages: int
    group: int = 8


HIDDEN = Warped(256, 4)
INPUT = Tile(ROWS, 128, 64, 8, 4, tma=True, hopper=True, group=8)
SUM_STAGES = 3  # of the weight gradients' ring
SUM_TILE = (192, 256)  # rows (three consumers) and columns of a tile of theirs


def capable(x: Tensor) -> bool:
    """A card and dtype that the kernels are written for."""
    return x.dtype in (torch.bfloat16, torch.float16) and capability(x.device) == (9, 0)


def hidden_fits(c: Call, given: list[Tensor], pre: Tensor) -> bool:
    """For `grad_hidden`, with `given` the down projection."""
    layout, w = c.layout, c.down
    form = layout.form != Form.INTERLEAVED and not layout.weight_on_input and not w.table
    return form and all(flat_fits(t) for t in given) and w.k % HIDDEN.bn == 0 and w.n % PAD == 0 and pre.data_ptr() % 16 == 0


def input_operand(c: Call, given: list[Tensor]) -> Matrices | None:
    """The up projection as the right operand of `grad_input`, [E, H, its rows]; None where the product is the plain kernel's."""
    if c.layout.weight_on_input or c.up.table or len(given) != 1:
        return None
    w = given[0] if c.layout.up_transposed else given[0].transpose(-1, -2)
    found = Matrices((w,), None, w.shape[1], w.shape[2], *w.stride(), table=False, aligned=16)
    return found if hopper_fits(c.x, found, INPUT) else None


def weights_fit(layout: Layout, m: int, n: int, size: int) -> bool:
    """For `weight_grad` of matrices [m, n] of elements of `size` bytes."""
    return layout.stacked and m % PAD == 0 and n * size % 16 == 0 and layout.num_experts * m < 2**31


def grad_hidden(
    c: Call,
    grad: Tensor,
    pre: Tensor,
    down: Tensor,
    rows: Dispatch,
    d_pre: Tensor | None,
    hidden: Tensor | None,
    sums: Tensor | None,
) -> None:
    """As backward_kernels.grad_hidden; grad, d_pre and hidden in padded order, sums [N, I / HIDDEN.bn]."""
    from . import hopper_backward

    layout, w, tile = c.layout, c.down, HIDDEN
    tiles = rows.tiles[ROWS]

    def box(t: Tensor | None, height: int) -> Any:
        return None if t is None else rows_descriptor(t, (height, PAD))

    launch(
        hopper_backward.grad_hidden, (min(tiles.shape[1] * (w.k // tile.bn), processors(grad.device)),),
        box(grad, ROWS), flat_descriptor(down, (PAD, tile.bn) if w.out_in else (tile.bn, PAD)), box(pre, ROWS), c.weights,
        box(d_pre, PAD), box(hidden, PAD), sums,
        rows.order, rows.offsets, rows.tile_starts[PAD], tiles, rows.tile_starts[ROWS], rows.num_tiles[ROWS], rows.counters,
        w.k, w.n, down.stride(0) // max(down.stride()[1:]),
        DUAL=activation.gluon_dual(layout.act_ops, layout.act_consts), GATED=layout.gated, WEIGHTED=not layout.weight_on_input,
        D_PRE=d_pre is not None, HIDDEN=hidden is not None, SUMS=sums is not None,
        BN=tile.bn, STAGES=tile.stages, N_FAST=w.out_in, GROUP=tile.group, num_warps=4,
    )  # fmt: skip


def grad_input(d_pre: Tensor, w: Matrices, rows: Dispatch, out: Tensor) -> None:
    """out [N, H] by sorted row = d_pre W, d_pre in padded order."""
    warp_specialised(Product(d_pre, w, None, rows, out, INPUT), pad=PAD)


def weight_grad(left: Tensor, left0: int, right: Tensor, right0: int, out: Tensor, rows: Dispatch) -> None:
    """out[e] [m, n] = Σ over e's rows of left[row, left0 :]ᵀ right[row, right0 :], both in padded order; experts without rows get zeros."""
    from . import hopper_weights

    experts, (_, m, n) = rows.offsets.shape[0] - 1, out.shape
    tiles = experts * cdiv(m, SUM_TILE[0]) * cdiv(n, SUM_TILE[1])
    box = (PAD, SUM_TILE[1] // 2)
    launch(
        hopper_weights.weight_grad, (min(tiles, processors(out.device)),),
        rows_descriptor(left, (PAD, PAD)), rows_descriptor(right, box), rows_descriptor(out.view(-1, n), box),
        rows.tile_starts[PAD], rows.counters, experts, m, n, left0, right0, STAGES=SUM_STAGES, num_warps=4,
    )  # fmt: skip
