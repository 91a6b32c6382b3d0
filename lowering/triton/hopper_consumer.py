"""A consumer of `hopper`'s kernel (Gluon): products of the stages of a tile, and the epilogue."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper_tiles import HALF_ROWS, hear

# as in gemm.py
PLAIN, SINGLE, DUAL, INTERLEAVED = (gl.constexpr(i) for i in range(4))


@gluon.jit
def _store(values, stage, target, pointer, first, end, column, n, stride):
    """values [64, BN] to rows first.. and columns column.. of `target`, a descriptor of the matrix at `pointer`; rows from `end` on stay.

    Whole tiles leave by TMA, which goes on after this returns; an expert's last rows leave by masked stores.
    """
    tma.store_wait(0)  # the tile before has been read
    stage.store(values.to(stage.dtype))
    fence_async_shared()
    if first + HALF_ROWS <= end:
        tma.async_copy_shared_to_global(target, [first, column], stage)
    else:
        LANES: gl.constexpr = min(stage.shape[1] // 8, 16)
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
        rows = first + gl.arange(0, HALF_ROWS, layout=gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, stage.shape[1], layout=gl.SliceLayout(0, layout))
        at = gl.expand_dims(rows.to(gl.int64) * stride, 1) + gl.expand_dims(columns, 0)
        gl.store(pointer + at, stage.load(layout), mask=gl.expand_dims(rows < end, 1) & gl.expand_dims(columns < n, 0))


@gluon.jit
def _add_bias(values, bias, e, columns_from, n, part, stride_e, stride_n, layout: gl.constexpr, SPLIT: gl.constexpr):
    if SPLIT > 1:  # one of the parts has it
        n = gl.where(part == 0, n, 0)
    columns = columns_from + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    b = gl.load(bias + e.to(gl.int64) * stride_e + columns * stride_n, mask=columns < n, other=0.0).to(gl.float32)
    return values + gl.expand_dims(b, 0)


@gluon.jit
def _finish(
    g, u, stage, e, first, end, column, n, part, order, bias0, bias1, row_weights, out, out_tma, pre, pre0_tma, pre1_tma,
    stride_be, stride_bn, stride_out, stride_pre,
    MODE: gl.constexpr, ACT: gl.constexpr, SAVE: gl.constexpr, BIAS: gl.constexpr, WEIGHTED: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The epilogue of one column block: scale, bias, keep, activate, store."""
    GATED: gl.constexpr = (MODE == DUAL) | (MODE == INTERLEAVED)
    layout: gl.constexpr = g.type.layout
    if WEIGHTED:  # (w x) Wᵀ = w (x Wᵀ)
        rows = first + gl.arange(0, HALF_ROWS, layout=gl.SliceLayout(1, layout))
        slots = gl.load(order + rows, mask=rows < end, other=0)
        scale = gl.expand_dims(gl.load(row_weights + slots, mask=rows < end, other=0.0).to(gl.float32), 1)
        g = g * scale
        if GATED:
            u = u * scale
    if BIAS:
        g = _add_bias(g, bias0, e, column, n, part, stride_be, stride_bn, layout, SPLIT)
        if GATED:
            u = _add_bias(u, bias1, e, column, n, part, stride_be, stride_bn, layout, SPLIT)
    if SAVE:  # the backward pass sees these values: so does the activation
        g = g.to(stage.dtype).to(gl.float32)
        _store(g, stage, pre0_tma, pre, first, end, column, n, stride_pre)
        if GATED:
            u = u.to(stage.dtype).to(gl.float32)
            _store(u, stage, pre1_tma, pre + n, first, end, column, n, stride_pre)
    if MODE == PLAIN:
        result = g
    elif MODE == SINGLE:
        result = ACT(g, g)
    else:
        result = ACT(g, u)
    _store(result, stage, out_tma, out, first, end, column, n, stride_out)


@gluon.jit
def _two_products(depth, step, ring_a, ring_w, full, empty, AT_ROW: gl.constexpr, GATHER: gl.constexpr, BN: gl.constexpr):
    """(products with the first and the second column block over `depth` steps, the step behind them). The other consumer's products run
    while this one's are waited for: so a stage is given back at once."""
    STAGES: gl.constexpr = ring_a.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc0 = gl.zeros((HALF_ROWS, BN), gl.float32, mma)
    acc1 = gl.zeros((HALF_ROWS, BN), gl.float32, mma)
    for _ in range(depth):
        s = step % STAGES
        mbarrier.wait(full.index(s), (step // STAGES) & 1)
        if GATHER:
            fence_async_shared()
        rows = ring_a.index(s).slice(AT_ROW, HALF_ROWS)
        pending0 = warpgroup_mma(rows, ring_w.index(2 * s).permute((1, 0)), acc0, is_async=True)
        pending1 = warpgroup_mma(rows, ring_w.index(2 * s + 1).permute((1, 0)), acc1, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(pending0, pending1))
        mbarrier.arrive(empty.index(s))
        step += 1
    return acc0, acc1, step


@gluon.jit
def consume(
    bias0, bias1, row_weights, out, out_tma, pre, pre0_tma, pre1_tma, order, steps, n,
    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_w, stages_out, full, empty, news, told, heard,
    HALF: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, MODE: gl.constexpr, ACT: gl.constexpr, SAVE: gl.constexpr,
    BIAS: gl.constexpr, WEIGHTED: gl.constexpr, BN: gl.constexpr, SPLIT: gl.constexpr,
    APART: gl.constexpr = False,
):  # fmt: skip
    """APART: the two column blocks are two products, where a kernel's many threads leave an instruction too few registers for both."""
    STAGES: gl.constexpr = ring_a.shape[0]
    BK: gl.constexpr = ring_a.shape[2]
    PARTS: gl.constexpr = 2 * HALF_ROWS // ring_a.shape[1]
    PART: gl.constexpr = HALF if PARTS == 2 else 0  # of the columns
    AT_ROW: gl.constexpr = 0 if PARTS == 2 else HALF * HALF_ROWS
    COLUMNS: gl.constexpr = BN if (MODE == DUAL) | (MODE == INTERLEAVED) else 2 * BN  # of the result
    LAG: gl.constexpr = 1 if PARTS == 1 else 0  # products under way when the next one's stage is waited for
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BN, 16])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    blocks_w = ring_w
    both: gl.constexpr = [STAGES * PARTS, 2 * BN, BK] if OUT_IN else [STAGES * PARTS, BK, 2 * BN]
    ring_w = ring_w._reinterpret(ring_w.dtype, both, ring_w.layout)  # two blocks, one behind the other, are one operand
    stage = stages_out.index(HALF)
    step = 0
    number = 0
    e, first, end, block, part = hear(news, told, heard, number)
    while first >= 0:
        depth = steps
        if SPLIT > 1:
            depth = (part + 1) * steps // SPLIT - part * steps // SPLIT
        first += AT_ROW
        column = (block * PARTS + PART) * COLUMNS
        live = first < end
        if PART > 0:
            live = live & (column < n)
        if live:
            if APART:
                acc0, acc1, step = _two_products(depth, step, ring_a, blocks_w, full, empty, AT_ROW, GATHER, BN)
            else:
                acc = gl.zeros((HALF_ROWS, 2 * BN), gl.float32, wide)
                for k in range(depth):
                    s = step % STAGES
                    mbarrier.wait(full.index(s), (step // STAGES) & 1)
                    if GATHER:
                        fence_async_shared()  # rows came by cp.async, wgmma reads through the other proxy
                    w = ring_w.index(s * PARTS + PART)
                    if OUT_IN:
                        w = w.permute((1, 0))
                    pending = warpgroup_mma(ring_a.index(s).slice(AT_ROW, HALF_ROWS), w, acc, is_async=True)
                    acc = warpgroup_mma_wait(num_outstanding=LAG, deps=(pending,))
                    if LAG == 0:
                        mbarrier.arrive(empty.index(s))
                    elif k > 0:  # the step before has been read
                        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
                    step += 1
                if LAG > 0:
                    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
                    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))

                if MODE == INTERLEAVED:
                    acc0, acc1 = gl.split(gl.reshape(acc, [HALF_ROWS, BN, 2]))
                else:
                    acc0, acc1 = gl.split(gl.permute(gl.reshape(acc, [HALF_ROWS, 2, BN]), (0, 2, 1)))
                    acc0 = gl.convert_layout(acc0, mma, assert_trivial=True)
                    acc1 = gl.convert_layout(acc1, mma, assert_trivial=True)

            if APART and MODE == INTERLEAVED:
                for half in gl.static_range(2):
                    g, u = gl.split(gl.reshape(acc0 if half == 0 else acc1, [HALF_ROWS, BN // 2, 2]))
                    _finish(g, u, stage, e, first, end, column + half * (BN // 2), n, part, order, bias0, bias1, row_weights, out, out_tma,
                            pre, pre0_tma, pre1_tma, stride_be, stride_bn, stride_out, stride_pre,
                            MODE, ACT, SAVE, BIAS, WEIGHTED, SPLIT)  # fmt: skip
            elif (MODE == DUAL) | (MODE == INTERLEAVED):
                _finish(acc0, acc1, stage, e, first, end, column, n, part, order, bias0, bias1, row_weights, out, out_tma,
                        pre, pre0_tma, pre1_tma, stride_be, stride_bn, stride_out, stride_pre,
                        MODE, ACT, SAVE, BIAS, WEIGHTED, SPLIT)  # fmt: skip
            else:
                _finish(acc0, acc0, stage, e, first, end, column, n, part, order, bias0, bias1, row_weights, out, out_tma,
                        pre, pre0_tma, pre1_tma, stride_be, stride_bn, stride_out, stride_pre,
                        MODE, ACT, SAVE, BIAS, WEIGHTED, SPLIT)  # fmt: skip
                _finish(acc1, acc1, stage, e, first, end, column + BN, n, part, order, bias0, bias1, row_weights, out, out_tma,
                        pre, pre0_tma, pre1_tma, stride_be, stride_bn, stride_out, stride_pre,
                        MODE, ACT, SAVE, BIAS, WEIGHTED, SPLIT)  # fmt: skip
        else:
            for _ in range(depth):
                s = step % STAGES
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(s))
                step += 1
        number += 1
        e, first, end, block, part = hear(news, told, heard, number)
    tma.store_wait(0)
