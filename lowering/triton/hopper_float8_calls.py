"""The launches of `hopper_float8`, and what it asks of its operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ir import Rows
from ..reference.generic import Layout
from . import activation, gemm, rounding
from .codes import E4M3, PLAIN, Codes
from .dispatch import Dispatch
from .host import capability, cdiv, processors
from .launch.tape import launch
from .weights import Biases, flat_descriptor, flat_fits, rows_descriptor

ROWS = 128  # of a tile
DEPTH = 128  # of a step, and of a sum in the tensor cores
COLUMNS = 128  # of a block, of which a tile has two
STAGES = {1: 4, 2: 3}  # by parts of a row


def fits(x: Tensor, w: Codes, how: Rows | None) -> bool:
    """Rows of 16 bits rounded to e4m3 by groups of whole steps, or bf16 ones as they are and whole steps of depth; e4m3 matrices [n, k] in
    stacks, with scales that every 128 columns and inputs from the first one on share."""
    if how is None:
        rows = x.dtype == torch.bfloat16 and w.k % DEPTH == 0
    else:
        rows = x.dtype in (torch.bfloat16, torch.float16) and how.dtype is torch.float8_e4m3fn and how.group % DEPTH == 0
    if not rows or capability(x.device) != (9, 0) or w.kind != E4M3 or w.scale != PLAIN:
        return False
    if w.zeros or w.offset or w.at.table or not w.at.out_in or w.at.whole is not None or w.step != 1 or w.at.n % 8 or w.k % 16:
        return False
    blocks = w.columns % DEPTH == 0 and w.rows % COLUMNS == 0 and (w.rows == 0 or all(f % COLUMNS == 0 for f in w.first))
    return blocks and all(flat_fits(t) for t in w.at.parts)


def grouped_gemm(
    a: Tensor,
    w: Codes,
    bias: Biases | None,
    rows: Dispatch,
    out: Tensor,
    walk: int,
    layout: Layout | None = None,
    gather: int = 0,
    row_weights: Tensor | None = None,
    how: Rows | None = None,
) -> None:
    """out [N, n] = epilogue(a[r] W[e]ᵀ) by the dispatch's row, of rows a [., k] that are rounded so first, or kept as they are.

    `layout`: whose activation runs; `gather` = k: rows of `a` are tokens.
    """
    from . import hopper_float8

    a, scales = rounding.in_two(a) if how is None else rounding.coded(a, how)
    parts = a.shape[1] // w.k

    mode: Any = gemm.PLAIN if layout is None else gemm.SINGLE if not layout.gated else gemm.DUAL
    codes = [flat_descriptor(t, (COLUMNS, DEPTH)) for t in w.at.parts]
    tiles = rows.tiles[ROWS]
    blocks = cdiv(w.at.n, COLUMNS if mode == gemm.DUAL else 2 * COLUMNS)
    biases = (bias.parts[0], bias.parts[-1], bias.stride_e, bias.stride_n) if bias is not None else (None, None, 0, 0)
    launch(
        hopper_float8.float8_gemm, (min(tiles.shape[1] * blocks, processors(a.device)),),
        a, None if gather else rows_descriptor(a, (ROWS, parts * DEPTH)), scales, codes[0], codes[-1], w.scales[0], w.scales[-1],
        *biases[:2], row_weights, out, rows_descriptor(out, (ROWS // 2, COLUMNS)), rows.order, rows.offsets, tiles, rows.tile_starts[ROWS],
        rows.num_tiles[ROWS], rows.counters, rows.order.shape[0], w.at.n, w.k, max(gather, 1),
        w.at.stride_e // max(w.at.parts[0].stride()[1:]), a.stride(0), scales.stride(0), *w.strides, *biases[2:], out.stride(0),
        MODE=mode, ACT=activation.gluon_act(layout.act_ops, layout.act_consts) if layout is not None else None, GATHER=gather > 0,
        BIAS=bias is not None, WEIGHTED=row_weights is not None, FIRST0=w.first[0], FIRST1=w.first[-1], ROWS=w.rows,
        BLOCK=w.columns // DEPTH, GROUP=1 if how is None else how.group // DEPTH, STAGES=STAGES[parts], WALK=walk,
        EVEN_K=w.k % DEPTH == 0, PARTS=parts, num_warps=4,
    )  # fmt: skip
