"""The routed experts on weights in few bits, decoded where they are used: two launches for few tokens, the grouped GEMM for more.

Operands that these kernels do not take run in `stored`'s workspace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...ir import Rows
from ...ir.operands import Operands
from ...ir.records import Layout, Storage
from ..reference import generic
from . import activation, coded_gemm, codes_kernels, gemm, hopper_coded_calls, hopper_float8_calls, rounding
from .call import Late
from .coded_tiles import DECODING, FEW_OF_ONE, FLOAT8, TWO_PARTS_FROM, Choice, Tile, Vector, decoding, of_bytes, of_halves
from .codes import NO_SCALE, Codes, read
from .combine import combine, early_launch
from .dispatch import Dispatch, dispatch
from .experts import _bias_args, _bias_strides, precision
from .host import capability, cdiv, power_of_2
from .launch.tape import empty, launch
from .weights import Biases, down_biases, up_biases

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_NUMBERS = {**DTYPES, torch.uint8: tl.uint8, torch.float64: tl.float64, torch.int8: tl.int8, torch.int32: tl.int32}
FEW = 4  # tokens of the pair of kernels without a dispatch


@dataclass(frozen=True)
class Coded:
    """The operands of one call, as the kernels take them."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    up: Codes
    down: Codes
    up_bias: Biases | None
    down_bias: Biases | None
    add: Tensor | None
    layout: Layout
    rows: tuple[Rows | None, Rows | None] = (None, None)  # how those of the up and of the down projection are rounded first


def forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    add: Tensor | None,
    layout: Layout,
    storage: Storage,
    choice: Choice | None = None,
) -> Tensor | None:
    """x [T, H], ids and weights [T, k] -> [T, H_out] in x.dtype; None where operands are not for these kernels.

    Raises ValueError where a parameter holds too few experts.
    """
    c = operands(x, ids, weights, p, add, layout, storage)
    if c is None:
        return None
    out = empty(x, x.shape[0], c.down.at.n)
    if ids.numel() == 0:
        return out.zero_() if add is None else out.copy_(add)
    choice = choice or choose(c)
    return None if choice is None else run(c, choice, out)


def run(c: Coded, choice: Choice, out: Tensor, late: Late | None = None) -> Tensor:
    """`out`, filled. `late`: takes the place of c.add."""
    if choice.few is None:
        return _grouped(c, out, choice, late)
    return _few(c, out, *choice.few, late)


def operands(
    x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout, storage: Storage
) -> Coded | None:
    """The operands for the kernels, None where they are beyond them."""
    up, down = storage.stored()
    floats = (*p.up_bias, *p.down_bias)
    if x.dtype not in DTYPES or up is None or down is None or layout.num_identity or x.shape[1] == 0:
        return None
    if any(t.dtype != x.dtype for t in floats):
        return None
    generic.check_sizes(layout, p.of_experts())
    u, d = read(p, "up", up, layout), read(p, "down", down, layout)
    if u is None or d is None:
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    outer, inner = storage.rows()
    if any(how is not None and not rounding.fits(how, width) for how, width in ((outer, u.k), (inner, d.k))):
        return None
    if (outer or inner) and layout.weight_on_input:
        return None
    add = add if add is None or add.stride(1) == 1 else add.contiguous()
    biases = up_biases(layout, p.up_bias), down_biases(layout, p.down_bias)
    return Coded(x, ids.contiguous(), weights.contiguous(), u, d, *biases, add, layout, (outer, inner))


def _rounded(a: Tensor, how: Rows | None) -> Tensor:
    """Rows as a product in their own type reads them."""
    return a if how is None else rounding.rounded(a, how)


# ---- few tokens ----------------------------------------------------------------------------------------------------


def _few(c: Coded, out: Tensor, up: Vector, down: Vector, late: Late | None = None) -> Tensor:
    a = empty(c.x, c.ids.numel(), c.up.at.n)
    few_up(replace(c, x=_rounded(c.x, c.rows[0])), a, up)
    a = _rounded(a, c.rows[1])
    if late is not None:
        late.issue()
        c = replace(c, add=late.join())
    few_down(c, a, out, down, early=late is None)  # else two kernels come before it
    return out


def few_up(c: Coded, a: Tensor, up: Vector) -> None:
    """a [T·k, I] = act(up x)."""
    layout = c.layout
    fns = activation.functions(layout.act_ops, layout.act_consts)
    pdl = {"launch_pdl": True} if early_launch(c.x) else {}
    mode = gemm.DUAL if layout.gated else gemm.SINGLE
    launch(
        codes_kernels.up_coded, (c.ids.numel(), cdiv(c.up.at.n, up.bn)),
        c.x, c.ids, c.weights, *_twice(c.up), c.up.table, *_bias_args(c.up_bias, c.x), a,
        c.up.at.n, c.up.k, c.ids.shape[1], layout.num_experts, c.up.offset, c.x.stride(0), *_at(c.up), *_bias_strides(c.up_bias),
        FIRST0=c.up.first[0], FIRST1=c.up.first[-1], STEP=c.up.step, MODE=mode, ACT=fns.act, **_how(c.up, c.x),
        BIAS=c.up_bias is not None, WEIGHTED=layout.weight_on_input, **_extents(c.up, up), PDL=bool(pdl), num_warps=up.warps, **pdl,
    )  # fmt: skip


def few_down(c: Coded, a: Tensor, out: Tensor, down: Vector, early: bool = True) -> None:
    """out [T, H] = add + Σ_j w down a. `early`: may start while the kernel before it still runs."""
    layout, slots = c.layout, c.ids.shape[1]
    pdl = {"launch_pdl": True} if early and early_launch(c.x) else {}
    launch(
        codes_kernels.down_coded, (c.ids.shape[0], cdiv(c.down.at.n, down.bn)),
        a, c.ids, c.weights, c.down.at.parts[0], _first(c.down.scales), _first(c.down.zeros), c.down.table,
        _bias_args(c.down_bias, c.x)[0], c.add, out,
        c.down.at.n, c.down.k, slots, layout.num_experts, c.down.offset, *_at(c.down), *_bias_strides(c.down_bias),
        0 if c.add is None else c.add.stride(0),
        **_how(c.down, c.x), BIAS=c.down_bias is not None, WEIGHTED=not layout.weight_on_input, ADD=c.add is not None,
        AT_ONCE=at_once(slots, down.bn, down.bb, down.warps), **_extents(c.down, down), PDL=bool(pdl), num_warps=down.warps, **pdl,
    )  # fmt: skip


_HELD = 128  # codes that a thread of the few-token down projection holds at once


def at_once(slots: int, bn: int, bb: int, warps: int) -> int:
    """Slots of a token whose codes a program of the few-token down projection has under way together."""
    return min(power_of_2(slots), max(1, _HELD * 32 * warps // (bn * bb)))


def _extents(w: Codes, v: Vector) -> dict[str, Any]:
    """A program's tile; a group of bytes that share a scale is a whole number of times in it."""
    row = w.k // w.per_byte
    bb = max(w.group, min(v.bb, power_of_2(row)))
    return {"BN": v.bn, "BB": bb, "GROUP": w.group, "EVEN": w.at.n % v.bn == 0 and row % bb == 0}


# ---- grouped -------------------------------------------------------------------------------------------------------


def _grouped(c: Coded, out: Tensor, choice: Choice, late: Late | None = None) -> Tensor:
    layout, (outer, inner) = c.layout, c.rows
    a = empty(c.x, c.ids.numel(), c.up.at.n)
    up, down = runnable(c.x, c.up, choice.up, outer), runnable(a, c.down, choice.down, inner)
    rows = dispatch(c.ids, layout.num_experts, tuple(dict.fromkeys((up.bm, down.bm))))
    y = empty(c.x, c.ids.numel(), c.down.at.n)
    grouped_gemm(c.x, c.up, c.up_bias, rows, a, up, layout, c.ids.shape[1], c.weights if layout.weight_on_input else None, outer)
    if late is not None:
        late.issue()
    grouped_gemm(a, c.down, c.down_bias, rows, y, down, how=inner)
    add, rank = c.add if late is None else late.join(), rows.rank if down.by_row else None
    return combine(y, c.ids, c.weights, c.x, add, out, layout.num_experts, 0, weighted=not layout.weight_on_input,
                   early=late is None, rank=rank)  # fmt: skip


def runnable(a: Tensor, w: Codes, tile: Tile, how: Rows | None = None) -> Tile:
    """The tile, or where it is a warp-specialised kernel's, which does not take these operands, the plain kernel's."""
    hopper = tile.hopper and hopper_coded_calls.fits(a, w)
    return replace(tile, hopper=hopper, float8=tile.float8 and hopper_float8_calls.fits(a, w, how))


def grouped_gemm(
    a: Tensor,
    w: Codes,
    bias: Biases | None,
    rows: Dispatch,
    out: Tensor,
    tile: Tile,
    layout: Layout | None = None,
    gather: int = 0,
    row_weights: Tensor | None = None,
    how: Rows | None = None,
) -> None:
    """The up projection with its activation, gathered (`layout`), or the down projection, scattered to the slots.

    `how`: the rows are rounded so first. The warp-specialised kernels (`tile.by_row`) leave the results in the dispatch's rows.
    """
    if tile.float8:
        hopper_float8_calls.grouped_gemm(a, w, bias, rows, out, tile.group, layout, gather, row_weights, how)
        return
    a = _rounded(a, how)
    if tile.hopper:
        hopper_coded_calls.grouped_gemm(a, w, bias, rows, out, tile.group, layout, gather, row_weights)
        return
    mode = gemm.PLAIN if layout is None else gemm.DUAL if layout.gated else gemm.SINGLE
    act = activation.functions(layout.act_ops, layout.act_consts).act if layout is not None else None
    tiles, pdl = rows.tiles[tile.bm], {"launch_pdl": True} if early_launch(a) else {}
    grouping, bk = depth(w, tile.bk, tile.early)
    launch(
        coded_gemm.coded_gemm, (tiles.shape[1] * cdiv(w.at.n, tile.bn),),
        a, *_twice(w), w.table, *_bias_args(bias, a), row_weights, out, rows.order, rows.offsets, tiles, rows.num_tiles[tile.bm],
        tiles.shape[1], w.at.n, w.k, max(gather, 1), w.offset, a.stride(0), *_at(w), *_bias_strides(bias), out.stride(0),
        FIRST0=w.first[0], FIRST1=w.first[-1], STEP=w.step, MODE=mode, ACT=act, **_how(w, a), OFFSET=w.offset != 0, GROUPING=grouping,
        GATHER=gather > 0, SCATTER=layout is None, BIAS=bias is not None, WEIGHTED=row_weights is not None,
        EVEN_N=w.at.n % tile.bn == 0, EVEN_K=w.k % bk == 0, PRECISION=precision(a.dtype),
        BM=tile.bm, BN=tile.bn, BK=bk, STAGES=tile.stages, GROUP=tile.group, PDL=bool(pdl),
        num_warps=tile.warps, num_stages=tile.stages, **pdl,
    )  # fmt: skip


def depth(w: Codes, bk: int, early: bool = False) -> tuple[Any, int]:
    """Where scales are applied, and the depth of a step that makes it possible."""
    if w.scale == NO_SCALE:
        return coded_gemm.NONE, bk
    if not w.columns and not w.zeros:
        return coded_gemm.BEHIND, bk
    if not w.columns:
        return coded_gemm.STEPS, bk
    step = bk
    while step > 64 and w.columns % step:
        step //= 2
    if early and w.columns % step == 0:
        return coded_gemm.BEFORE, step
    return (coded_gemm.STEPS, step) if w.columns % step == 0 else (coded_gemm.BEFORE, bk)


def fits(w: Codes, bk: int) -> bool:
    """Whether blocks of scales and steps of depth meet."""
    grouping, step = depth(w, bk)
    in_step = step % w.columns == 0 and w.columns & (w.columns - 1) == 0 if w.columns else True
    return grouping is not coded_gemm.BEFORE or w.columns % step == 0 or in_step


# ---- both ----------------------------------------------------------------------------------------------------------


def _first(tensors: tuple[Tensor, ...]) -> Tensor | None:
    return tensors[0] if tensors else None


def _twice(w: Codes) -> tuple[Tensor | None, ...]:
    """Codes, scales and zero points of the first part and of the last one."""
    return tuple(None if not ts else ts[i] for ts in (w.at.parts, w.scales, w.zeros) for i in (0, -1))


def _at(w: Codes) -> tuple[int, ...]:
    return (w.at.stride_e, w.at.stride_n, w.at.stride_k, *w.strides)


def _how(w: Codes, like: Tensor) -> dict[str, Any]:
    """What kernels are compiled for, of the codes."""
    card = capability(like.device)
    return {
        "WEIGHTS": w.at.table, "KIND": w.kind, "NATIVE": not like.is_cuda or card >= (8, 9), "PACKED": w.packed, "HIGH": w.high,
        "ASSEMBLY": like.is_cuda and torch.version.hip is None,
        "SCALE": w.scale, "SDTYPE": _NUMBERS[w.scale_dtype], "ZERO": bool(w.zeros), "ZDTYPE": _NUMBERS[w.zero_dtype],
        "ROWS": w.rows, "COLUMNS": w.columns,
    }  # fmt: skip


def choose(c: Coded) -> Choice | None:
    """By the rows an expert sees on average, as measured on an H200; None where no tile has these blocks of scales."""
    tokens, rows = c.ids.shape[0], c.ids.numel() / c.layout.num_experts
    if not c.x.is_cuda:
        tile = Tile(16, 16, 16, 4, 1)
        choice = Choice(tile, tile, (Vector(16, 16, 4), Vector(16, 16, 4)) if tokens <= 2 else None)
    else:
        up, down = of_halves(rows) if c.up.packed else of_bytes(rows)
        if decoding(rows, c.up.packed):
            up = DECODING if hopper_coded_calls.fits(c.x, c.up) else up
            down = DECODING if hopper_coded_calls.fits(c.x, c.down, c.up.at.n) else down
        up = FLOAT8 if hopper_float8_calls.fits(c.x, c.up, c.rows[0]) else up
        if c.rows[1] is not None or rows > TWO_PARTS_FROM:
            down = FLOAT8 if hopper_float8_calls.fits(c.x, c.down, c.rows[1]) else down
        choice = Choice(up, down, _vectors(c) if tokens <= (FEW_OF_ONE if c.layout.num_experts == 1 else FEW) else None)
    if choice.few is None and not (fits(c.up, choice.up.bk) and fits(c.down, choice.down.bk)):
        return None
    return choice


def _vectors(c: Coded) -> tuple[Vector, Vector]:
    if c.up.packed:
        return Vector(8, _span(c.up, 1024), 4), Vector(8, _span(c.down, 256), 4)
    return Vector(4, _span(c.up, 2048), 2), Vector(4, _span(c.down, 1024), 4)


def _span(w: Codes, most: int) -> int:
    """Bytes of a row at a time: so many, or half of them where that leaves less of the last load empty."""
    row = w.k // w.per_byte
    return min((most, most // 2), key=lambda n: (cdiv(row, n) * n, -n))
