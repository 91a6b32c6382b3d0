"""The grouped GEMM for many rows on Hopper, by hand: copies and products in warps of their own (Gluon).

The same contract as `gemm.grouped_gemm`, whose plain Triton code is its twin. A program is 12 warps over a tile of 128 rows:

    producer (4 warps)      weights by TMA, gathered rows by cp.async (Hopper's TMA cannot gather), into a ring of stages
    consumer 0, 1 (4 each)  64 rows each: wgmma on a stage as soon as it is full, then the epilogue

so that the next tile's operands arrive while this one's epilogue runs. A consumer whose 64 rows are all beyond the expert's end skips its
products: an expert's rows are padded to 64, not to 128. A tile has two column blocks of BN: gate and up, or neighbours of a plain product.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# as in gemm.py
PLAIN, SINGLE, DUAL = (gl.constexpr(i) for i in range(3))
HALF_ROWS = gl.constexpr(64)


@gluon.jit
def _tile(tile, row_tiles, blocks, tiles, max_tiles, offsets, GROUP: gl.constexpr):
    """Expert, first row, end of the expert's rows, column block; of the last tile for a tile beyond it. The order is gemm.py's."""
    tile = gl.maximum(gl.minimum(tile, row_tiles * blocks - 1), 0)
    group = tile // (GROUP * blocks)
    size = gl.maximum(gl.minimum(row_tiles - group * GROUP, GROUP), 1)
    rest = tile - group * GROUP * blocks
    at = group * GROUP + rest % size
    e = gl.load(tiles + at)
    return e, gl.load(tiles + max_tiles + at), gl.load(offsets + e + 1), rest // size


@gluon.jit
def _produce(
    a, a_tma, w0, w1, order, offsets, tiles, num_tiles, max_tiles, blocks, steps, slots_per_token, stride_a, rows_per_expert,
    ring_a, ring_0, ring_1, full, empty,
    NEXT: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, WIDE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """What a tile is (and which rows it gathers) is loaded one or two tiles before it is needed: nothing waits for it."""
    STAGES: gl.constexpr = ring_a.shape[0]
    BM: gl.constexpr = ring_a.shape[1]
    BK: gl.constexpr = ring_a.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    at_row = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    at_k = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    row_tiles = gl.load(num_tiles)
    total = row_tiles * blocks
    stride = gl.num_programs(0)
    begin = gl.program_id(0)
    e, first, end, block = _tile(begin, row_tiles, blocks, tiles, max_tiles, offsets, GROUP)
    e1, first1, end1, block1 = _tile(begin + stride, row_tiles, blocks, tiles, max_tiles, offsets, GROUP)
    slots = gl.load(order + first + at_row, mask=first + at_row < end, other=-1) if GATHER else at_row
    step = 0
    for tile in range(begin, total, stride):
        e2, first2, end2, block2 = _tile(tile + 2 * stride, row_tiles, blocks, tiles, max_tiles, offsets, GROUP)
        if GATHER:
            mask = gl.expand_dims(slots >= 0, 1)
            source = gl.maximum(slots, 0) // slots_per_token
            pointers = gl.expand_dims(a + source.to(gl.int64) * stride_a, 1) + gl.expand_dims(at_k, 0)
            slots = gl.load(order + first1 + at_row, mask=first1 + at_row < end1, other=-1)
        n0 = block * WIDE
        base = e * rows_per_expert
        for k in range(steps):
            s = step % STAGES
            mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
            bytes: gl.constexpr = w0.block_type.nbytes + w1.block_type.nbytes + (0 if GATHER else a_tma.block_type.nbytes)
            mbarrier.expect(full.index(s), bytes)
            if OUT_IN:
                tma.async_copy_global_to_shared(w0, [base + n0, k * BK], full.index(s), ring_0.index(s))
                tma.async_copy_global_to_shared(w1, [base + n0 + NEXT, k * BK], full.index(s), ring_1.index(s))
            else:
                tma.async_copy_global_to_shared(w0, [base + k * BK, n0], full.index(s), ring_0.index(s))
                tma.async_copy_global_to_shared(w1, [base + k * BK, n0 + NEXT], full.index(s), ring_1.index(s))
            if GATHER:  # rows beyond the expert's end are not read
                async_copy.async_copy_global_to_shared(ring_a.index(s), pointers, mask=mask)
                async_copy.mbarrier_arrive(full.index(s), increment_count=False)
                pointers += BK
            else:
                tma.async_copy_global_to_shared(a_tma, [first, k * BK], full.index(s), ring_a.index(s))
            step += 1
        e, first, end, block = e1, first1, end1, block1
        e1, first1, end1, block1 = e2, first2, end2, block2


@gluon.jit
def _store(values, pointer, rows, columns_from, n, stride, live):
    """values [rows, columns] to pointer, 16 bytes a thread: through shared memory into a layout of whole rows."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16] if values.shape[1] >= 128 else [4, 8], [4, 1], [1, 0])
    values = gl.convert_layout(values, layout)
    columns = columns_from + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    rows = gl.convert_layout(rows, gl.SliceLayout(1, layout))
    live = gl.convert_layout(live, gl.SliceLayout(1, layout))
    at = gl.expand_dims(rows.to(gl.int64) * stride, 1) + gl.expand_dims(columns, 0)
    gl.store(pointer + at, values, mask=gl.expand_dims(live, 1) & gl.expand_dims(columns < n, 0))


@gluon.jit
def _add_bias(values, bias, e, columns_from, n, stride_e, stride_n, layout: gl.constexpr):
    columns = columns_from + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    b = gl.load(bias + e.to(gl.int64) * stride_e + columns * stride_n, mask=columns < n, other=0.0).to(gl.float32)
    return values + gl.expand_dims(b, 0)


@gluon.jit
def _finish(
    g, u, e, rows, live, slots, column, n, bias0, bias1, row_weights, out, pre, stride_be, stride_bn, stride_out, stride_pre,
    mma: gl.constexpr, MODE: gl.constexpr, ACT: gl.constexpr, SCATTER: gl.constexpr, SAVE: gl.constexpr, BIAS: gl.constexpr,
    WEIGHTED: gl.constexpr,
):  # fmt: skip
    """The epilogue of one column block: scale, bias, keep, activate, store."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    GATED: gl.constexpr = MODE == DUAL
    if WEIGHTED:  # (w x) Wᵀ = w (x Wᵀ)
        scale = gl.expand_dims(gl.load(row_weights + slots, mask=live, other=0.0).to(gl.float32), 1)
        g = g * scale
        if GATED:
            u = u * scale
    if BIAS:
        g = _add_bias(g, bias0, e, column, n, stride_be, stride_bn, mma)
        if GATED:
            u = _add_bias(u, bias1, e, column, n, stride_be, stride_bn, mma)
    if SAVE:
        kept = g.to(DTYPE)
        _store(kept, pre, rows, column, n, stride_pre, live)
        g = kept.to(gl.float32)  # the backward pass sees these values: so does the activation
        if GATED:
            kept = u.to(DTYPE)
            _store(kept, pre + n, rows, column, n, stride_pre, live)
            u = kept.to(gl.float32)
    if MODE == PLAIN:
        result = g
    elif MODE == SINGLE:
        result = ACT(g, g)
    else:
        result = ACT(g, u)
    target = slots if SCATTER else rows
    _store(result.to(DTYPE), out, target, column, n, stride_out, live)


@gluon.jit
def _consume(
    bias0, bias1, row_weights, out, pre, order, offsets, tiles, num_tiles, max_tiles, blocks, steps, n,
    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_0, ring_1, full, empty,
    HALF: gl.constexpr, OUT_IN: gl.constexpr, MODE: gl.constexpr, ACT: gl.constexpr, SCATTER: gl.constexpr, SAVE: gl.constexpr,
    BIAS: gl.constexpr, WEIGHTED: gl.constexpr, BN: gl.constexpr, LAG: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ring_a.shape[0]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    row_tiles = gl.load(num_tiles)
    total = row_tiles * blocks
    stride = gl.num_programs(0)
    begin = gl.program_id(0)
    e, first, end, block = _tile(begin, row_tiles, blocks, tiles, max_tiles, offsets, GROUP)
    if LAG > 0:  # consumers that never finish together leave the tensor cores to each other during their epilogues
        if (begin < total) & (steps > LAG):
            mbarrier.wait(full.index(LAG), 0)
    step = 0
    for tile in range(begin, total, stride):
        e1, first1, end1, block1 = _tile(tile + stride, row_tiles, blocks, tiles, max_tiles, offsets, GROUP)
        first += HALF * HALF_ROWS
        if first < end:
            rows = first + gl.arange(0, HALF_ROWS, layout=gl.SliceLayout(1, mma))
            live = rows < end
            slots = rows
            if SCATTER or WEIGHTED:
                slots = gl.load(order + rows, mask=live, other=0)
            acc0 = gl.zeros((HALF_ROWS, BN), gl.float32, mma)
            acc1 = gl.zeros((HALF_ROWS, BN), gl.float32, mma)
            for k in range(steps):
                s = step % STAGES
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                fence_async_shared()  # rows came by cp.async, wgmma reads through the other proxy
                rows_a = ring_a.index(s).slice(HALF * HALF_ROWS, HALF_ROWS)
                b0, b1 = ring_0.index(s), ring_1.index(s)
                if OUT_IN:
                    b0, b1 = b0.permute((1, 0)), b1.permute((1, 0))
                pending0 = warpgroup_mma(rows_a, b0, acc0, is_async=True)
                pending1 = warpgroup_mma(rows_a, b1, acc1, is_async=True)
                acc0, acc1 = warpgroup_mma_wait(num_outstanding=2, deps=(pending0, pending1))
                if k > 0:  # the step before has been read
                    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
                step += 1
            acc0, acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0, acc1))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))

            if MODE == DUAL:
                _finish(acc0, acc1, e, rows, live, slots, block * BN, n, bias0, bias1, row_weights, out, pre, stride_be, stride_bn,
                        stride_out, stride_pre, mma, MODE, ACT, SCATTER, SAVE, BIAS, WEIGHTED)  # fmt: skip
            else:
                _finish(acc0, acc0, e, rows, live, slots, block * 2 * BN, n, bias0, bias1, row_weights, out, pre, stride_be, stride_bn,
                        stride_out, stride_pre, mma, MODE, ACT, SCATTER, SAVE, BIAS, WEIGHTED)  # fmt: skip
                _finish(acc1, acc1, e, rows, live, slots, block * 2 * BN + BN, n, bias0, bias1, row_weights, out, pre, stride_be, stride_bn,
                        stride_out, stride_pre, mma, MODE, ACT, SCATTER, SAVE, BIAS, WEIGHTED)  # fmt: skip
        else:
            for _ in range(steps):
                s = step % STAGES
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(s))
                step += 1
        e, first, end, block = e1, first1, end1, block1


@gluon.jit(do_not_specialize=["max_tiles"])
def grouped_gemm(
    a, a_tma, w0, w1, bias0, bias1, row_weights, out, pre, order, offsets, tiles, num_tiles,
    max_tiles, n, k, slots_per_token, rows_per_expert, stride_a, stride_be, stride_bn, stride_out, stride_pre,
    MODE: gl.constexpr, ACT: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, SCATTER: gl.constexpr, SAVE: gl.constexpr,
    BIAS: gl.constexpr, WEIGHTED: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """`w0`, `w1`: descriptors over the matrices one below the other, boxes [BN, BK] or [BK, BN].

    k is a multiple of BK; interleaved projections are the plain kernel's.
    """
    DTYPE: gl.constexpr = out.dtype.element_ty
    layout_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * HALF_ROWS, BK], DTYPE)
    ring_a = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * HALF_ROWS, BK], layout_a)
    ring_0 = gl.allocate_shared_memory(DTYPE, [STAGES] + w0.block_shape, w0.layout)
    ring_1 = gl.allocate_shared_memory(DTYPE, [STAGES] + w1.block_shape, w1.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=129 if GATHER else 1)  # every producer thread's copies, and the weights' bytes
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    WIDE: gl.constexpr = BN if MODE == DUAL else 2 * BN
    blocks = gl.cdiv(n, WIDE)
    steps = gl.cdiv(k, BK)
    gl.warp_specialize([
        (_consume, (bias0, bias1, row_weights, out, pre, order, offsets, tiles, num_tiles, max_tiles, blocks, steps, n,
                    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_0, ring_1, full, empty,
                    0, OUT_IN, MODE, ACT, SCATTER, SAVE, BIAS, WEIGHTED, BN, 0, GROUP)),
        (_consume, (bias0, bias1, row_weights, out, pre, order, offsets, tiles, num_tiles, max_tiles, blocks, steps, n,
                    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_0, ring_1, full, empty,
                    1, OUT_IN, MODE, ACT, SCATTER, SAVE, BIAS, WEIGHTED, BN, LAG, GROUP)),
        (_produce, (a, a_tma, w0, w1, order, offsets, tiles, num_tiles, max_tiles, blocks, steps, slots_per_token, stride_a,
                    rows_per_expert, ring_a, ring_0, ring_1, full, empty, 0 if MODE == DUAL else BN, OUT_IN, GATHER, WIDE, GROUP)),
    ], [4, 4], [224, 56])  # fmt: skip
