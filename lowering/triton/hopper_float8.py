"""The grouped GEMM on float8 rows and float8 weights on Hopper, by hand (Gluon): `hopper`'s kernel with products of codes.

    P_b = Σ_{j in block b} q[r, j] c[i, j],   out[r, i] = epilogue(Σ_b P_b · s[r, b] · S[i, b])

A block is 128 of depth: its product starts from zero and is added up in fp32 with both scales, since the tensor cores keep 14 bits of a
float8 sum. A consumer's two column blocks take turns in the registers of one product: while one consumer adds up, the other's product runs.

Rows that nobody rounds come as two codes, x = (q + q') s, and both are multiplied (`PARTS` 2): no weight is ever decoded.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper_consumer import DUAL, _finish
from .hopper_producer import produce
from .hopper_tiles import HALF_ROWS, channel, eights, hear


@gluon.jit
def _scales_of(scales, e, row, n, scale_e, scale_n, FIRST: gl.constexpr, ROWS: gl.constexpr):
    """Pointer to the first scale of a block of columns, which share it; of the last one for a block beyond the matrix."""
    at = row * 0
    if ROWS != 0:
        at = (gl.minimum(row, n - 1) + FIRST) // ROWS
    return scales + e.to(gl.int64) * scale_e + at * scale_n


@gluon.jit
def _block(k, last, BLOCK: gl.constexpr):
    """Which scale step k of the depth has, the last step's beyond it. BLOCK: steps that share one, 0: all."""
    k = gl.minimum(k, last)
    return k * 0 if BLOCK == 0 else k // BLOCK


@gluon.jit
def _added(total, ring, at, weights, scale, AT: gl.constexpr, PARTS: gl.constexpr, mma: gl.constexpr):
    """total + scale · Σ (rows weightsᵀ) over the parts of a stage, of 64 rows from AT on, scale [64]."""
    zero = gl.zeros(total.shape, gl.float32, mma)
    weights = weights.permute((1, 0))
    pending = warpgroup_mma(ring.index(at).slice(AT, HALF_ROWS), weights, zero, use_acc=False, is_async=True)
    if PARTS == 2:
        pending = warpgroup_mma(ring.index(at + 1).slice(AT, HALF_ROWS), weights, pending, is_async=True)
    product = warpgroup_mma_wait(num_outstanding=0, deps=(pending,))
    return total + product * gl.expand_dims(scale, 1)


@gluon.jit
def _consume(
    scales_a, scales0, scales1, bias0, bias1, row_weights, out, out_tma, order, steps, n, slots_per_token, num_slots,
    stride_sa, scale_e, scale_n, scale_k, stride_be, stride_bn, stride_out, ring_a, ring_w, stages_out, full, empty, news, told, heard,
    HALF: gl.constexpr, GATHER: gl.constexpr, MODE: gl.constexpr, ACT: gl.constexpr, BIAS: gl.constexpr, WEIGHTED: gl.constexpr,
    FIRST0: gl.constexpr, FIRST1: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ring_a.shape[0]
    BN: gl.constexpr = ring_w.shape[1]
    COLUMNS: gl.constexpr = BN if MODE == DUAL else 2 * BN  # of the result
    NEXT: gl.constexpr = 0 if MODE == DUAL else BN
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    DEPTH: gl.constexpr = ring_w.shape[2]
    PARTS: gl.constexpr = ring_a.shape[2] // DEPTH
    # a row's 256 bytes of a step lie as two blocks of 128 bytes, one behind the other
    ring_a = ring_a._reinterpret(gl.float8e4nv, [STAGES * PARTS, 2 * HALF_ROWS, DEPTH], ring_w.layout)
    ring_w = ring_w._reinterpret(gl.float8e4nv, ring_w.shape, ring_w.layout)
    stage = stages_out.index(HALF)
    at_row = gl.arange(0, HALF_ROWS, layout=gl.SliceLayout(1, mma))
    step = 0
    number = 0
    e, first, end, block, part = hear(news, told, heard, number)
    while first >= 0:
        first += HALF * HALF_ROWS
        column = block * COLUMNS
        if first < end:
            rows = first + at_row
            live = rows < end
            if GATHER:
                rows = gl.load(order + rows, mask=live, other=0) // slots_per_token
            from_a = scales_a + gl.where(live, rows, 0) * stride_sa
            from0 = _scales_of(scales0, e, column, n, scale_e, scale_n, FIRST0, ROWS)
            from1 = _scales_of(scales1, e, column + NEXT, n, scale_e, scale_n, FIRST1, ROWS)
            sa = gl.load(from_a)
            s0, s1 = gl.load(from0).to(gl.float32), gl.load(from1).to(gl.float32)
            acc0 = gl.zeros((HALF_ROWS, BN), gl.float32, mma)
            acc1 = gl.zeros((HALF_ROWS, BN), gl.float32, mma)
            for k in range(steps):
                s = step % STAGES
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                if GATHER:
                    fence_async_shared()  # rows came by cp.async, wgmma reads through the other proxy
                # the next step's, asked for before this one's products
                next_a = gl.load(from_a + _block(k + 1, steps - 1, GROUP))
                next0 = gl.load(from0 + _block(k + 1, steps - 1, BLOCK) * scale_k).to(gl.float32)
                next1 = gl.load(from1 + _block(k + 1, steps - 1, BLOCK) * scale_k).to(gl.float32)
                acc0 = _added(acc0, ring_a, PARTS * s, ring_w.index(2 * s), sa * s0, HALF * HALF_ROWS, PARTS, mma)
                acc1 = _added(acc1, ring_a, PARTS * s, ring_w.index(2 * s + 1), sa * s1, HALF * HALF_ROWS, PARTS, mma)
                mbarrier.arrive(empty.index(s))
                sa, s0, s1 = next_a, next0, next1
                step += 1
            if MODE == DUAL:
                _finish(acc0, acc1, stage, e, first, end, column, n, part, order, bias0, bias1, row_weights, out, out_tma,
                        None, None, None, stride_be, stride_bn, stride_out, 0, MODE, ACT, False, BIAS, WEIGHTED, 1)  # fmt: skip
            else:
                _finish(acc0, acc0, stage, e, first, end, column, n, part, order, bias0, bias1, row_weights, out, out_tma,
                        None, None, None, stride_be, stride_bn, stride_out, 0, MODE, ACT, False, BIAS, WEIGHTED, 1)  # fmt: skip
                _finish(acc1, acc1, stage, e, first, end, column + BN, n, part, order, bias0, bias1, row_weights, out, out_tma,
                        None, None, None, stride_be, stride_bn, stride_out, 0, MODE, ACT, False, BIAS, WEIGHTED, 1)  # fmt: skip
        else:
            for _ in range(steps):
                s = step % STAGES
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(s))
                step += 1
        number += 1
        e, first, end, block, part = hear(news, told, heard, number)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_slots"])
def float8_gemm(
    a, a_tma, scales_a, codes0, codes1, scales0, scales1, bias0, bias1, row_weights, out, out_tma, order, offsets, tiles, tile_starts,
    num_tiles, counter, num_slots, n, k, slots_per_token, rows_per_expert, stride_a, stride_sa, scale_e, scale_n, scale_k,
    stride_be, stride_bn, stride_out,
    MODE: gl.constexpr, ACT: gl.constexpr, GATHER: gl.constexpr, BIAS: gl.constexpr, WEIGHTED: gl.constexpr,
    FIRST0: gl.constexpr, FIRST1: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, WALK: gl.constexpr, EVEN_K: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """As `hopper.grouped_gemm`, tiles of 128 rows and two blocks of 128 columns, 128 of depth a step; all codes are bytes.

    `a` [., k], or [., blocks of 128 · 2 · 128] for rows in two parts (then k is whole blocks).
    `scales_a` [., blocks of GROUP steps]: of the rows of `a`. `scales0`, `scales1`: of the first matrix of each part; a column's scale i
    lies at (column + FIRST) // ROWS (0: the first), i by steps // BLOCK (0: the first). n and ROWS: FIRST + 128 c begins no block midway.
    """
    n, stride_out = eights(n), eights(stride_out)
    k, stride_a = k // 16 * 16, stride_a // 16 * 16  # whole 16 bytes
    DTYPE: gl.constexpr = out.dtype.element_ty
    BM: gl.constexpr = 2 * HALF_ROWS
    BN: gl.constexpr = codes0.block_shape[0]
    BK: gl.constexpr = codes0.block_shape[1]
    layout_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, PARTS * BK], gl.uint8)
    ring_a = gl.allocate_shared_memory(gl.uint8, [STAGES, BM, PARTS * BK], layout_a)
    ring_w = gl.allocate_shared_memory(gl.uint8, [2 * STAGES, BN, BK], codes0.layout)
    stages_out = gl.allocate_shared_memory(DTYPE, [2, HALF_ROWS, BN], out_tma.layout)
    news, told, heard = channel()
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
        (_consume, (scales_a, scales0, scales1, bias0, bias1, row_weights, out, out_tma, order, steps, n, slots_per_token, num_slots,
                    stride_sa, scale_e, scale_n, scale_k, stride_be, stride_bn, stride_out, ring_a, ring_w, stages_out, full, empty,
                    news, told, heard, 0, GATHER, MODE, ACT, BIAS, WEIGHTED, FIRST0, FIRST1, ROWS, BLOCK, GROUP)),
        (_consume, (scales_a, scales0, scales1, bias0, bias1, row_weights, out, out_tma, order, steps, n, slots_per_token, num_slots,
                    stride_sa, scale_e, scale_n, scale_k, stride_be, stride_bn, stride_out, ring_a, ring_w, stages_out, full, empty,
                    news, told, heard, 1, GATHER, MODE, ACT, BIAS, WEIGHTED, FIRST0, FIRST1, ROWS, BLOCK, GROUP)),
        (produce, (a, a_tma, codes0, codes1, order, offsets, None, tiles, tile_starts, num_tiles, counter, num_slots, blocks, steps, k,
                   slots_per_token, stride_a, rows_per_expert, ring_a, ring_w, full, empty, full, empty, news, told, heard,
                   EVEN_K, WIDE, 0 if MODE == DUAL else BN, True, GATHER, 0, WALK, 1, 1)),
    ], [4, 4], [224, 64] if GATHER else [240, 32])  # fmt: skip
