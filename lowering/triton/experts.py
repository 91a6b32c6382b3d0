"""The routed experts on CUDA: dispatch, up GEMM with gather and activation, down GEMM, combine; or two launches for few tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ir import Form
from ...ir.operands import Operands
from ..reference import generic
from ..reference.generic import Layout
from . import activation, gemm, library, tune
from .call import Call, Late, read
from .combine import combine, early_launch
from .dispatch import Dispatch, dispatch
from .host import capability, cdiv, power_of_2, processors
from .launch.tape import empty, launch
from .tune import Choice, Tile, Vector
from .weights import (
    Biases,
    Matrices,
    descriptor,
    flat_descriptor,
    flat_fits,
    rows_descriptor,
    tma_fits,
)

_WARPED_ROWS = (64, 128)  # of the warp-specialised kernel's tiles
_MODES = {Form.SINGLE: gemm.SINGLE, Form.CONCAT: gemm.DUAL, Form.SEPARATE: gemm.DUAL, Form.INTERLEAVED: gemm.DUAL}


def forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    add: Tensor | None,
    layout: Layout,
    save: bool,
    choice: Choice | None = None,
    late: Late | None = None,
) -> tuple[Tensor, Tensor]:
    """As `generic.forward`; the second result (pre-activations in the dispatch's row order) is only filled when `save`.

    `late`: takes the place of `add`.
    """
    call = read(x, ids, weights, p, add, layout)
    if late is not None and (call is None or call.slots == 0):
        late.issue()
        add = late.join()
    if call is None:
        return generic.forward(x, ids, weights, p, add, layout)
    out = empty(x, x.shape[0], call.down.n)
    pre = empty(x, call.slots if save else 0, layout.pre_width(p.down))
    if call.slots == 0:
        return (out.zero_() if add is None else out.copy_(add)), pre
    chosen = choice
    if choice is None:
        problem = tune.Problem(layout.num_experts, call.up.k, call.up.n, ids.shape[1], x.dtype, layout.gated)
        choice = tune.choose(problem, x.shape[0], x.device)
    call = replace(call, late=late)
    if choice.decode is not None and not save:
        return _few_tokens(call, out, *choice.decode), pre
    if chosen is None and library.better(call):
        out, kept = library.run(call, p.up[0], p.down[0], out)
        return out, kept if save else pre
    return _grouped(call, out, pre if save else None, choice), pre


def _few_tokens(c: Call, out: Tensor, up: Vector, down: Vector) -> Tensor:
    a = empty(c.x, c.slots, c.up.n)
    few_up(c, a, up)
    if c.late is None:
        few_down(c, a, c.add, out, down, early=True)
    else:
        c.late.issue()
        few_down(c, a, c.late.join(), out, down, early=False)  # two kernels come before it
    return out


def few_up(c: Call, a: Tensor, tile: Vector) -> None:
    """a [T·k, I] = act(up x), a program per pair and block of columns."""
    from . import decode, decode_columns

    if not c.up.out_in:
        decode_columns.up(c, a)
        return
    layout, bias = c.layout, c.up_bias
    fns = activation.functions(layout.act_ops, layout.act_consts)
    pdl = {"launch_pdl": True} if early_launch(c.x) else {}
    bn, bk = _extents(tile, c.up)
    launch(
        decode.up_decode, (c.slots, cdiv(c.up.n, bn)),
        c.x, c.ids, c.weights, c.up.parts[0], c.up.parts[-1], *_bias_args(bias, c.x), a,
        c.up.n, c.up.k, c.ids.shape[1], layout.num_experts, c.x.stride(0), c.up.stride_e, c.up.stride_n, c.up.stride_k,
        *_bias_strides(bias),
        MODE=_mode(layout), ACT=fns.act, WEIGHTS=_kind(c.up), BIAS=bias is not None, WEIGHTED=layout.weight_on_input,
        BN=bn, BK=bk, EVEN=c.up.n % bn == 0 and c.up.k % bk == 0, PDL=bool(pdl), ALIGNED=c.up.aligned, num_warps=tile.warps, **pdl,
    )  # fmt: skip


def few_down(c: Call, a: Tensor, add: Tensor | None, out: Tensor, tile: Vector, early: bool) -> None:
    """out [T, H] = add + Σ_j w down a, in the dtype of `out`. `early`: may start while the kernel before it still runs."""
    from . import decode, decode_columns

    if not c.down.out_in:
        decode_columns.down(c, a, add, out, early)
        return
    layout, bias = c.layout, c.down_bias
    pdl = {"launch_pdl": True} if early and early_launch(c.x) else {}
    bn, bk = _extents(tile, c.down)
    launch(
        decode.down_decode, (c.ids.shape[0], cdiv(c.down.n, bn)),
        a, c.ids, c.weights, c.down.parts[0], _bias_args(bias, c.x)[0], c.x, add, out,
        c.down.n, c.down.k, c.ids.shape[1], layout.num_experts, layout.num_identity, c.down.stride_e, c.down.stride_n, c.down.stride_k,
        *_bias_strides(bias), c.x.stride(0), add.stride(0) if add is not None else 0,
        WEIGHTS=_kind(c.down), BIAS=bias is not None, WEIGHTED=not layout.weight_on_input,
        ADD=add is not None, IDENTITY=layout.num_identity > 0, BN=bn, **depths(c, bn, bk, tile.warps),
        PDL=bool(pdl), ALIGNED=c.down.aligned, num_warps=tile.warps, **pdl,
    )  # fmt: skip


_HELD = 128  # elements of weights that a thread of the few-token down projection holds at once


def depths(c: Call, bn: int, bk: int, warps: int) -> dict[str, int]:
    """How the few-token down projection walks the depths of a token's slots, laid one behind the other: BK at first, at most a power of two
    that is full, then REST at a time, VEC that lie side by side a load."""
    slots, k = c.ids.shape[1], c.down.k
    whole = slots * k
    vec = math.gcd(k, 16 // c.x.element_size())
    held = min(power_of_2(slots), max(1, _HELD * 32 * warps // (bn * bk))) * bk
    first = max(vec, min(held, power_of_2(whole + 1) // 2))
    return {"BK": first, "REST": max(vec, min(first, power_of_2(whole - first))), "VEC": vec}


def _grouped(c: Call, out: Tensor, pre: Tensor | None, choice: Choice) -> Tensor:
    layout = c.layout
    a = empty(c.x, c.slots, c.up.n)
    up, down = runnable(c.x, c.up, choice.up), runnable(a, c.down, choice.down)
    rows = dispatch(c.ids, layout.num_experts, tuple(dict.fromkeys((up.bm, down.bm))))
    y = empty(c.x, depth_parts(a, c.down, down) * c.slots, c.down.n)
    grouped_gemm(c.x, c.up, c.up_bias, rows, a, up, layout, gather=c.ids.shape[1], pre=pre,
                 row_weights=c.weights if layout.weight_on_input else None)  # fmt: skip
    if c.late is not None:
        c.late.issue()
    in_rows = uses_hopper(a, c.down, down)
    grouped_gemm(a, c.down, c.down_bias, rows, y, down, None, scatter=not in_rows)
    add = c.add if c.late is None else c.late.join()
    return combine(y, c.ids, c.weights, c.x, add, out, layout.num_experts, layout.num_identity, weighted=not layout.weight_on_input,
                   early=c.late is None, rank=rows.rank if in_rows else None)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """out[r] = epilogue(a[r] W[e]ᵀ) over the rows of a dispatch, with a tile.

    `out`: [N, n], or where `depth_parts` is s [s·N, n], row r of part p at p·N + r. `layout`: whose activation runs on the projections;
    None: the plain product. `gather` = k: row r of the product is a[slot(r) // k]. `pre`: keeps the pre-activations. `row_weights` [N] by
    slot scale the input rows.
    """

    a: Tensor
    w: Matrices
    bias: Biases | None
    rows: Dispatch
    out: Tensor
    tile: Tile
    layout: Layout | None = None
    gather: int = 0
    pre: Tensor | None = None
    row_weights: Tensor | None = None

    @property
    def mode(self) -> Any:
        """What the epilogue does with the accumulators."""
        mode = gemm.PLAIN if self.layout is None else _mode(self.layout)
        return gemm.INTERLEAVED if mode == gemm.DUAL and self.w.whole is not None else mode

    @property
    def epilogue(self) -> dict[str, bool]:
        return {"GATHER": self.gather > 0, "SAVE": self.pre is not None, "BIAS": self.bias is not None,
                "WEIGHTED": self.row_weights is not None}  # fmt: skip


def grouped_gemm(
    a: Tensor,
    w: Matrices,
    bias: Biases | None,
    rows: Dispatch,
    out: Tensor,
    tile: Tile,
    layout: Layout | None,
    gather: int = 0,
    scatter: bool = False,
    pre: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> None:
    """A `Product`. `scatter`: results go to out[slot(r)], which the warp-specialised kernel does not do."""
    p = Product(a, w, bias, rows, out, tile, layout, gather, pre, row_weights)
    if not scatter and uses_hopper(a, w, tile):
        warp_specialised(p)
    else:
        _plain(p, scatter)


def _plain(p: Product, scatter: bool) -> None:
    """A product by gemm.py."""
    a, w, tile, rows, mode = p.a, p.w, p.tile, p.rows, p.mode
    bn = tile.bn if w.whole is None else max(tile.bn // 2, 16)
    parts, kind = _reached(p, (2 * bn if mode == gemm.INTERLEAVED else bn, tile.bk))
    tiles, count = rows.tiles[tile.bm], rows.num_tiles[tile.bm]
    fns = activation.functions(p.layout.act_ops, p.layout.act_consts) if p.layout is not None else None
    most = tiles.shape[1] * cdiv(w.n, bn)
    pdl = {"launch_pdl": True} if early_launch(a) else {}
    launch(
        gemm.grouped_gemm, (min(most, tile.per_sm * processors(a.device)) if tile.per_sm else most,),
        a, parts[0], parts[-1], *_bias_args(p.bias, a), p.row_weights, p.out, p.pre, rows.order, rows.offsets, tiles, count,
        tiles.shape[1], w.n, w.k, max(p.gather, 1),
        a.stride(0), w.stride_e, w.stride_n if w.whole is None else w.whole.stride(-2), w.stride_k, *_bias_strides(p.bias),
        p.out.stride(0), p.pre.stride(0) if p.pre is not None else 0,
        MODE=mode, ACT=fns.act if fns else None, WEIGHTS=kind, OUT_IN=w.out_in, SCATTER=scatter, **p.epilogue,
        EVEN_N=w.n % bn == 0, EVEN_K=w.k % tile.bk == 0, PRECISION=precision(a.dtype),
        BM=tile.bm, BN=bn, BK=tile.bk, STAGES=tile.stages, PDL=bool(pdl), GROUP=tile.group, ALIGNED=w.aligned,
        num_warps=tile.warps, num_stages=tile.stages, **pdl,
    )  # fmt: skip


def _reached(p: Product, box: tuple[int, int]) -> tuple[tuple[Any, ...], Any]:
    """The matrices as the plain kernel takes them, and how it reaches them; `box`: columns and depth of a tile."""
    parts = _whole(p.w)
    if not (p.tile.tma and not p.w.table and p.a.is_cuda and all(tma_fits(t) for t in parts)):
        return parts, _kind(p.w)
    return tuple(descriptor(t, box if p.w.out_in else box[::-1]) for t in parts), gemm.TMA


def uses_hopper(a: Tensor, w: Matrices, tile: Tile) -> bool:
    """Whether the warp-specialised kernel is chosen, and its operands are as it needs them."""
    return tile.hopper and hopper_fits(a, w, tile)


def runnable(a: Tensor, w: Matrices, tile: Tile) -> Tile:
    """The tile, or where it is the warp-specialised kernel's, which does not take these operands, one that suits the plain kernel."""
    if not tile.hopper or hopper_fits(a, w, tile):
        return tile
    return Tile(64, 128, 64, 8, 4, tma=True, group=tile.group) if tile.bm == 64 else replace(tile, hopper=False)


def depth_parts(a: Tensor, w: Matrices, tile: Tile) -> int:
    """Into how many parts `grouped_gemm` splits the depth of the plain product of a [N, k]: as the tile says, or 1 where it cannot.

    The buffer of results has so many times N rows, and tells the kernel and the combine. In fp16 a part could overflow where all of them
    do not.
    """
    possible = a.dtype != torch.float16 and w.k % tile.bk == 0 and tile.split <= w.k // tile.bk and tile.split * a.shape[0] < 2**31
    fits = possible and uses_hopper(a, w, tile)
    return tile.split if fits else 1


def hopper_fits(a: Tensor, w: Matrices, tile: Tile) -> bool:
    """What the warp-specialised kernel asks of its operands."""
    card = capability(a.device) == (9, 0)
    rows = a.stride(0) * a.element_size() % 16 == 0 and a.data_ptr() % 16 == 0 and w.n * a.element_size() % 16 == 0
    # [k, n]: rows of 128 bytes in shared memory, and no step may reach into the next expert's matrix; [n, k]: a row's rest comes as zeros
    depth = w.k * a.element_size() % 16 == 0 if w.out_in else w.k % tile.bk == 0 and tile.bn >= 64
    shape = tile.bm in _WARPED_ROWS and depth
    return card and rows and shape and a.dtype != torch.float32 and not w.table and all(flat_fits(p) for p in _whole(w))


def warp_specialised(p: Product, pad: int = 0) -> None:
    """A product by hopper.py, in as many parts as `out` has rows for. `pad`: every expert's rows of `a` fill whole groups of so many."""
    from . import hopper, hopper_tiles

    a, w, tile, rows, out, pre = p.a, p.w, p.tile, p.rows, p.out, p.pre
    matrices = _whole(w)
    parts = [flat_descriptor(t, (tile.bn, min(tile.bk, 128 // a.element_size())) if w.out_in else (tile.bk, tile.bn)) for t in matrices]
    tiles, count = rows.tiles[tile.bm], rows.num_tiles[tile.bm]
    split = out.shape[0] // rows.order.shape[0]
    blocks = split * cdiv(w.n, (1 if p.mode in (gemm.DUAL, gemm.INTERLEAVED) else 2) * tile.bn * (_WARPED_ROWS[-1] // tile.bm))
    store = (hopper_tiles.HALF_ROWS.value, tile.bn)
    kept = [rows_descriptor(t, store) for t in pre.split(w.n, -1)] if pre is not None else [None]
    launch(
        hopper.grouped_gemm, (min(tiles.shape[1] * blocks, processors(a.device)),),
        a, None if p.gather else rows_descriptor(a, (tile.bm, tile.bk)), parts[0], parts[-1],
        *_bias_args(p.bias, a), p.row_weights, out, rows_descriptor(out, store), pre, kept[0], kept[-1],
        rows.order, rows.offsets, rows.tile_starts.get(pad), tiles, rows.tile_starts[tile.bm], count, rows.counters,
        rows.order.shape[0], w.n, w.k, max(p.gather, 1), w.stride_e // max(matrices[0].stride()[1:]), a.stride(0),
        *_bias_strides(p.bias), out.stride(0), pre.stride(0) if pre is not None else 0,
        MODE=p.mode, ACT=activation.gluon_act(p.layout.act_ops, p.layout.act_consts) if p.layout is not None else None,
        OUT_IN=w.out_in, PAD=pad, **p.epilogue, BM=tile.bm, BN=tile.bn, BK=tile.bk, STAGES=tile.stages, GROUP=tile.group, SPLIT=split,
        TOGETHER=_together(w, tile, split), EVEN_K=w.k % tile.bk == 0, num_warps=4,
    )  # fmt: skip


def _together(w: Matrices, tile: Tile, split: int) -> int:
    """Steps of depth that are asked for at a time."""
    return 2 if tile.together == 2 and w.out_in and tile.stages > 2 and w.k % (2 * split * tile.bk) == 0 else 1


def _whole(w: Matrices) -> tuple[Tensor, ...]:
    """The matrices as they lie in memory: interleaved projections are one."""
    return w.parts if w.whole is None else (w.whole,)


def precision(dtype: torch.dtype) -> str:
    """tf32 only where the user allows it to torch's own products."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _mode(layout: Layout) -> Any:
    return _MODES[Form(layout.form)]


def _kind(w: Matrices) -> Any:
    return gemm.TABLE if w.table else gemm.POINTER


def _extents(v: Vector, w: Matrices) -> tuple[int, int]:
    """Columns and depth of a program's tile."""
    return v.bn, min(v.bk, power_of_2(w.k))


def _bias_args(bias: Biases | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (bias.parts[0], bias.parts[-1]) if bias is not None else (None, None)


def _bias_strides(bias: Biases | None) -> tuple[int, int]:
    return (bias.stride_e, bias.stride_n) if bias is not None else (0, 0)
