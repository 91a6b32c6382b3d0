"""The launches of `hopper_coded`, and what it asks of its operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ir.records import Layout
from . import activation, gemm
from .codes import BITS, E2M1, E4M3, EXPONENT, PLAIN, Codes
from .dispatch import Dispatch
from .host import capability, cdiv, processors
from .launch.tape import launch
from .weights import Biases, flat_descriptor, flat_fits, rows_descriptor

ROWS = 128  # of a tile
DEPTH = 64  # of a step
COLUMNS = 128  # of a block, of which a tile has two
STAGES = 3


def fits(a: Tensor, w: Codes, stride: int | None = None) -> bool:
    """Rows bf16 in whole 16 bytes, matrices [n, k] in one stack, e4m3 with blocks of whole steps or e2m1 with blocks of 32.

    `stride`: of rows that are not there yet, as `a` else.
    """
    if capability(a.device) != (9, 0) or a.dtype != torch.bfloat16 or w.zeros or w.offset or w.at.table or not w.at.out_in:
        return False
    if (a.stride(0) % 8 or a.data_ptr() % 16 if stride is None else stride % 8) or w.at.n % 8 or w.k % 8 or w.k <= DEPTH:
        return False
    scaled = w.scale == PLAIN and w.columns % DEPTH == 0 if w.kind == E4M3 else w.kind == E2M1 and _powers(w)
    return scaled and all(flat_fits(t) for t in _whole(w))


def _powers(w: Codes) -> bool:
    return w.scale in (EXPONENT, BITS) and w.columns == DEPTH // 2 and not w.high


def _whole(w: Codes) -> tuple[Tensor, ...]:
    """The codes as they lie in memory: interleaved projections are one matrix."""
    return w.at.parts if w.at.whole is None else (w.at.whole,)


def grouped_gemm(
    a: Tensor,
    w: Codes,
    bias: Biases | None,
    rows: Dispatch,
    out: Tensor,
    group: int,
    layout: Layout | None = None,
    gather: int = 0,
    row_weights: Tensor | None = None,
) -> None:
    """out [N, n] = epilogue(a[r] W[e]ᵀ) by the dispatch's row. `layout`: whose activation runs; `gather` = k: rows of `a` are tokens."""
    from . import hopper_coded

    mode: Any = gemm.PLAIN if layout is None else gemm.SINGLE if not layout.gated else gemm.DUAL
    matrices = _whole(w)
    step, first = (w.step, w.first) if w.at.whole is None else (1, (0,))
    mode = gemm.INTERLEAVED if w.at.whole is not None else mode
    codes = [flat_descriptor(t, (COLUMNS, DEPTH // w.per_byte)) for t in matrices]
    tiles = rows.tiles[ROWS]
    blocks = cdiv(w.at.n, COLUMNS if mode in (gemm.DUAL, gemm.INTERLEAVED) else 2 * COLUMNS)
    box = (ROWS // 2, COLUMNS // 2 if mode == gemm.INTERLEAVED else COLUMNS)
    biases = (bias.parts[0], bias.parts[-1], bias.stride_e, bias.stride_n) if bias is not None else (None, None, 0, 0)
    launch(
        hopper_coded.coded_gemm, (min(tiles.shape[1] * blocks, processors(a.device)),),
        a, None if gather else rows_descriptor(a, (ROWS, DEPTH)), codes[0], codes[-1], w.scales[0], w.scales[-1], *biases[:2], row_weights,
        out, rows_descriptor(out, box), rows.order, rows.offsets, tiles, rows.tile_starts[ROWS], rows.num_tiles[ROWS],
        rows.counters, rows.order.shape[0], w.at.n, w.k, max(gather, 1), w.at.stride_e // max(matrices[0].stride()[1:]), a.stride(0),
        *w.strides, *biases[2:], out.stride(0),
        MODE=mode, ACT=activation.gluon_act(layout.act_ops, layout.act_consts) if layout is not None else None, GATHER=gather > 0,
        BIAS=bias is not None, WEIGHTED=row_weights is not None, FIRST0=first[0], FIRST1=first[-1], STEP=step, ROWS=w.rows,
        BLOCK=w.columns // DEPTH, BN=COLUMNS, STAGES=STAGES, CODES=3, GROUP=group, EVEN_K=w.k % DEPTH == 0, num_warps=4,
    )  # fmt: skip
