"""The grouped GEMM for many rows on Hopper, by hand: copies and products in warps of their own (Gluon).

The same contract as `gemm.grouped_gemm`, whose plain Triton code is its twin, but for where results go: to the dispatch's row, never to
the slot. A program is 12 warps over a tile of 128 rows, or of 64 with twice the columns:

    producer (4 warps)      claims a tile; weights by TMA, gathered rows by cp.async (Hopper's TMA cannot gather), into a ring of stages
    consumer 0, 1 (4 each)  64 rows each, or all 64 and half of the columns each: wgmma on a stage as soon as it is full, then the
                            epilogue, stored by TMA while the next tile runs

Tiles are claimed in order from a counter, so that tiles which share an expert's columns start together and find them in L2: with a fixed
share for each program they drift apart, and memory is read once a tile. A consumer whose 64 rows are all beyond the expert's end skips
its products: an expert's rows are padded to 64, not to 128. A consumer has two column blocks of BN: gate and up, or neighbours of a
plain product.

Where tiles are too few to fill the card's last wave, a plain product's depth is split: each part is a tile of its own, with results of its
own, that are added where they are read.

Tiles of 64 rows are for experts with few: more of the ring is weights, and a stage is given back as soon as its own product is done, not
a step later, since memory is waited for and not the tensor cores.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper_consumer import DUAL, INTERLEAVED, PLAIN, consume
from .hopper_producer import produce
from .hopper_tiles import HALF_ROWS, channel, eights


@gluon.jit(do_not_specialize=["num_slots"])
def grouped_gemm(
    a, a_tma, w0, w1, bias0, bias1, row_weights, out, out_tma, pre, pre0_tma, pre1_tma, order, offsets, starts, tiles, tile_starts,
    num_tiles, counter, num_slots, n, k, slots_per_token, rows_per_expert, stride_a, stride_be, stride_bn, stride_out, stride_pre,
    MODE: gl.constexpr, ACT: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, PAD: gl.constexpr, SAVE: gl.constexpr,
    BIAS: gl.constexpr, WEIGHTED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, SPLIT: gl.constexpr, TOGETHER: gl.constexpr, EVEN_K: gl.constexpr,
):  # fmt: skip
    """Tiles of BM = 128 rows and two blocks of BN columns, or of 64 rows and four.

    `w0`, `w1`: descriptors over the matrices one below the other, boxes [BN, 64] or [BK, BN]. `out_tma`, `pre0_tma`, `pre1_tma`: over
    out and the halves of pre, boxes [64, BN]. `counter`: two zeros, which this call leaves behind as zeros.

    `PAD`: rows of `a` are in the dispatch's order with every expert's filled up to whole groups of PAD, `starts` [E + 1] the first group
    of each. n, k and the strides of rows are multiples of 8; k is one of BK (EVEN_K), but where matrices are [n, k].
    Interleaved projections: w0 and w1 are the one matrix, n its pairs of rows.

    `SPLIT` > 1, for a plain product of rows that are not gathered, not weighted and not kept: row r of part p of the depth, the steps
    [p · steps / SPLIT, (p + 1) · steps / SPLIT), goes to out[p · num_slots + r]; part 0 has the bias. k / BK is at least SPLIT.
    """
    gl.static_assert((TOGETHER == 1) | ((TOGETHER == 2) & (STAGES > 2)))  # a consumer may hold one stage until it has the next
    gl.static_assert((SPLIT == 1) | ((MODE == PLAIN) & (not GATHER) & (not SAVE) & (not WEIGHTED)))
    n, k = eights(n), eights(k)
    stride_a, stride_out, stride_pre = eights(stride_a), eights(stride_out), eights(stride_pre)
    DTYPE: gl.constexpr = out.dtype.element_ty
    layout_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], DTYPE)
    ring_a = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], layout_a)
    PARTS: gl.constexpr = 2 * HALF_ROWS // BM  # of a tile's columns
    CHUNKS: gl.constexpr = BK // w0.block_shape[1] if OUT_IN else 1
    ring_w = gl.allocate_shared_memory(DTYPE, [2 * STAGES * PARTS * CHUNKS] + w0.block_shape, w0.layout)
    stages_out = gl.allocate_shared_memory(DTYPE, [2, HALF_ROWS, BN], out_tma.layout)
    news, told, heard = channel()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=129 if GATHER else 1)  # every producer thread's copies, and the weights' bytes
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    WIDE: gl.constexpr = BN if MODE == DUAL else 2 * BN  # rows of a matrix that a part of the columns reads
    blocks = SPLIT * gl.cdiv(n, PARTS * (BN if (MODE == DUAL) | (MODE == INTERLEAVED) else 2 * BN))
    steps = gl.cdiv(k, BK)
    gl.warp_specialize([
        (consume, (bias0, bias1, row_weights, out, out_tma, pre, pre0_tma, pre1_tma, order, steps, n,
                    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_w, stages_out, full, empty, news, told, heard,
                    0, OUT_IN, GATHER, MODE, ACT, SAVE, BIAS, WEIGHTED, BN, SPLIT)),
        (consume, (bias0, bias1, row_weights, out, out_tma, pre, pre0_tma, pre1_tma, order, steps, n,
                    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_w, stages_out, full, empty, news, told, heard,
                    1, OUT_IN, GATHER, MODE, ACT, SAVE, BIAS, WEIGHTED, BN, SPLIT)),
        (produce, (a, a_tma, w0, w1, order, offsets, starts, tiles, tile_starts, num_tiles, counter, num_slots, blocks, steps, k,
                    slots_per_token, stride_a, rows_per_expert, ring_a, ring_w, full, empty, full, empty, news, told, heard,
                    EVEN_K, WIDE, 0 if MODE == DUAL else BN, OUT_IN, GATHER, PAD, GROUP, SPLIT, TOGETHER)),
    ], [4, 4], [184, 136] if (PARTS == 2) & (BN <= 64) else [216, 72])  # fmt: skip
