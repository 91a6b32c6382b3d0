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
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# as in gemm.py
PLAIN, SINGLE, DUAL, INTERLEAVED = (gl.constexpr(i) for i in range(4))
HALF_ROWS = gl.constexpr(64)
EARLY = gl.constexpr(8)  # steps before a tile's end at which the next one is claimed: each load that hangs on another has two to arrive,
# and all parts of a tile are of even length where steps go by twos


@gluon.jit
def _eights(number):
    """The same number, seen by the compiler to be a multiple of 8: so masked and strided rows move 16 bytes at a time."""
    return number // 8 * 8


# ---- tiles -------------------------------------------------------------------------------------------------------


@gluon.jit
def _expert(tile, tiles, num_tiles, blocks):
    """Whose tile it is; of the last one for a tile beyond it. An expert's tiles follow each other."""
    return gl.maximum(gl.load(tiles + gl.maximum(gl.minimum(tile // blocks, num_tiles - 1), 0)), 0)


@gluon.jit
def _place(tile, begin, end, blocks, GROUP: gl.constexpr):
    """Which of an expert's row tiles, [begin, end) of the list, and column block: up to GROUP row tiles are walked together, rows fastest.

    So those that share columns of the weights are neighbours, an expert's weights are read by as few groups as can be, and no group is
    much smaller than the others.
    """
    rows = gl.maximum(end - begin, 1)
    most = gl.cdiv(rows, gl.cdiv(rows, GROUP))
    rest = tile - begin * blocks
    group = rest // (most * blocks)
    size = gl.maximum(gl.minimum(rows - group * most, most), 1)
    rest -= group * most * blocks
    return group * most + rest % size, rest // size


@gluon.jit
def _part(block, blocks, steps, SPLIT: gl.constexpr):
    """(part of the depth, its steps [begin, end), column block) of a row tile's place of `blocks`: the parts one after the other."""
    if SPLIT == 1:
        return 0, 0, steps, block
    else:
        part = block // (blocks // SPLIT)
        return part, part * steps // SPLIT, (part + 1) * steps // SPLIT, block % (blocks // SPLIT)


@gluon.jit
def _claim(counter):
    """The next tile that no program has taken; the first of each is its own number."""
    return gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")


@gluon.jit
def _release(counter):
    """The last program leaves the counters as it found them: zero."""
    if gl.atomic_add(counter + 1, 1, sem="relaxed") == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def _tell(news, told, heard, number, e, first, end, block, at):
    """What the producer's tile is, to the consumers; first -1: there is none."""
    slot = number % 2
    mbarrier.wait(heard.index(slot), ((number // 2) & 1) ^ 1)
    i = gl.arange(0, 8, layout=gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    rest = gl.where(i == 2, end, gl.where(i == 3, block, at))
    news.index(slot).store(gl.where(i == 0, e, gl.where(i == 1, first, rest)))
    mbarrier.arrive(told.index(slot))


@gluon.jit
def _hear(news, told, heard, number):
    """Expert, first row, end of the expert's rows, column block, and `at`: the first row's place in padded order or a part of the depth."""
    slot = number % 2
    mbarrier.wait(told.index(slot), (number // 2) & 1)
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    values = news.index(slot).load(layout)
    mbarrier.arrive(heard.index(slot))
    i = gl.arange(0, 8, layout=layout)
    e, first = gl.sum(gl.where(i == 0, values, 0), 0), gl.sum(gl.where(i == 1, values, 0), 0)
    end, block = gl.sum(gl.where(i == 2, values, 0), 0), gl.sum(gl.where(i == 3, values, 0), 0)
    return e, first, end, block, gl.sum(gl.where(i == 4, values, 0), 0)


@gluon.jit
def _news(CONSUMERS: gl.constexpr = 2):
    """Where a producer tells its consumers about tiles: (news, told, heard)."""
    news = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(told.index(s), count=1)
        mbarrier.init(heard.index(s), count=CONSUMERS)
    return news, told, heard


# ---- producer ----------------------------------------------------------------------------------------------------


@gluon.jit
def _feed(
    begin, end, step, pointers, mask, at_k, k_end, a_tma, w0, w1, first, row_w, n0, ring_a, ring_w, full, empty,
    EVEN_K: gl.constexpr, WIDE: gl.constexpr, NEXT: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """A stage for each step of depth in [begin, end), TOGETHER of them at a time: what lies side by side in memory is asked for
    together. A stage's weights lie by (part of the columns, depth, block). Beyond the end of the depth, zeros arrive."""
    STAGES: gl.constexpr = ring_a.shape[0]
    BK: gl.constexpr = ring_a.shape[2]
    PARTS: gl.constexpr = 2 * HALF_ROWS // ring_a.shape[1]
    CHUNKS: gl.constexpr = ring_w.shape[0] // (2 * STAGES * PARTS)  # boxes along the depth: rows of 128 bytes each
    DEPTH: gl.constexpr = BK // CHUNKS
    PIECE: gl.constexpr = pointers.shape[1]
    bytes: gl.constexpr = PARTS * CHUNKS * (w0.block_type.nbytes + w1.block_type.nbytes) + (0 if GATHER else a_tma.block_type.nbytes)
    for k in range(begin, end, TOGETHER):
        for i in gl.static_range(TOGETHER):
            s = (step + i) % STAGES
            mbarrier.wait(empty.index(s), (((step + i) // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(s), bytes)
        for part in gl.static_range(PARTS):
            column = n0 + part * WIDE
            for i in gl.static_range(2 * TOGETHER * CHUNKS):  # by block, then depth
                s = (step + i // CHUNKS % TOGETHER) % STAGES
                depth = (k + i // CHUNKS % TOGETHER) * BK + i % CHUNKS * DEPTH
                at = 2 * ((s * PARTS + part) * CHUNKS + i % CHUNKS) + i // (TOGETHER * CHUNKS)
                if i < TOGETHER * CHUNKS:
                    _ask(w0, row_w, column, depth, full.index(s), ring_w.index(at), OUT_IN)
                else:
                    _ask(w1, row_w, column + NEXT, depth, full.index(s), ring_w.index(at), OUT_IN)
        for i in gl.static_range(TOGETHER):
            s = (step + i) % STAGES
            if GATHER:  # rows beyond the expert's end are not read
                for at in gl.static_range(0, BK, PIECE):
                    inside = mask
                    if not EVEN_K:
                        inside = mask & gl.expand_dims(at_k + ((k + i) * BK + at) < k_end, 0)
                    async_copy.async_copy_global_to_shared(ring_a.index(s).slice(at, PIECE, dim=1), pointers + at, mask=inside)
                async_copy.mbarrier_arrive(full.index(s), increment_count=False)
                pointers += BK
            else:
                tma.async_copy_global_to_shared(a_tma, [first, (k + i) * BK], full.index(s), ring_a.index(s))
        step += TOGETHER
    return step, pointers


@gluon.jit
def _ask(w, row, column, depth, full, place, OUT_IN: gl.constexpr):
    """A box of an expert's matrix, whose rows begin at `row` of all matrices one below the other."""
    if OUT_IN:
        tma.async_copy_global_to_shared(w, [row + column, depth], full, place)
    else:
        tma.async_copy_global_to_shared(w, [row + depth, column], full, place)


@gluon.jit
def _produce(
    a, a_tma, w0, w1, order, offsets, starts, tiles, tile_starts, num_tiles, counter, num_slots, blocks, steps, k,
    slots_per_token, stride_a, rows_per_expert, ring_a, ring_w, full, empty, news, told, heard,
    EVEN_K: gl.constexpr, WIDE: gl.constexpr, NEXT: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, PAD: gl.constexpr,
    GROUP: gl.constexpr,
    SPLIT: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = ring_a.shape[1]
    BK: gl.constexpr = ring_a.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    at_row = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    at_k = gl.arange(0, min(BK, 64), layout=gl.SliceLayout(0, layout))
    row_tiles = gl.load(num_tiles)
    tile = gl.program_id(0)
    e = _expert(tile, tiles, row_tiles, blocks)
    begin, end = gl.load(offsets + e), gl.load(offsets + e + 1)
    row, block = _place(tile, gl.load(tile_starts + e), gl.load(tile_starts + e + 1), blocks, GROUP)
    slots = at_row
    if GATHER:
        slots = gl.load(order + begin + row * BM + at_row, mask=begin + row * BM + at_row < num_slots, other=0)
    step = 0
    number = 0
    while tile < row_tiles * blocks:
        first = begin + row * BM
        row_a = first
        if PAD > 0:
            row_a = gl.load(starts + e) * PAD + row * BM
        part, from_step, to_step, column = _part(block, blocks, steps, SPLIT)
        _tell(news, told, heard, number, e, first + part * num_slots, end + part * num_slots, column, part)
        claim_at = gl.maximum(to_step - EARLY, from_step)
        expert_at = gl.maximum(to_step - EARLY + 2, from_step)
        place_at = gl.maximum(to_step - EARLY + 4, from_step)
        rows_at = gl.maximum(to_step - EARLY + 6, from_step)
        n0 = column * WIDE * (2 * HALF_ROWS // BM)
        row_w = e * rows_per_expert
        live = first + at_row < end
        mask = gl.expand_dims(live, 1)
        source = gl.where(live, slots, 0) // slots_per_token
        pointers = gl.expand_dims(a + source.to(gl.int64) * stride_a, 1) + gl.expand_dims(at_k, 0)
        step, pointers = _feed(from_step, claim_at, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0, ring_a, ring_w,
                               full, empty, EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        tile = _claim(counter)
        step, pointers = _feed(claim_at, expert_at, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0, ring_a, ring_w,
                               full, empty, EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        e = _expert(tile, tiles, row_tiles, blocks)
        step, pointers = _feed(expert_at, place_at, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0, ring_a, ring_w,
                               full, empty, EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        begin, end = gl.load(offsets + e), gl.load(offsets + e + 1)
        tile_begin, tile_end = gl.load(tile_starts + e), gl.load(tile_starts + e + 1)
        step, pointers = _feed(place_at, rows_at, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0, ring_a, ring_w,
                               full, empty, EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        row, block = _place(tile, tile_begin, tile_end, blocks, GROUP)
        if GATHER:
            slots = gl.load(order + begin + row * BM + at_row, mask=begin + row * BM + at_row < num_slots, other=0)
        step, pointers = _feed(rows_at, to_step, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0, ring_a, ring_w,
                               full, empty, EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        number += 1
    _tell(news, told, heard, number, 0, -1, 0, 0, 0)
    _release(counter)


# ---- consumers ---------------------------------------------------------------------------------------------------


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
def _consume(
    bias0, bias1, row_weights, out, out_tma, pre, pre0_tma, pre1_tma, order, steps, n,
    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_w, stages_out, full, empty, news, told, heard,
    HALF: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, MODE: gl.constexpr, ACT: gl.constexpr, SAVE: gl.constexpr,
    BIAS: gl.constexpr, WEIGHTED: gl.constexpr, BN: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = ring_a.shape[0]
    BK: gl.constexpr = ring_a.shape[2]
    PARTS: gl.constexpr = 2 * HALF_ROWS // ring_a.shape[1]
    PART: gl.constexpr = HALF if PARTS == 2 else 0  # of the columns
    AT_ROW: gl.constexpr = 0 if PARTS == 2 else HALF * HALF_ROWS
    COLUMNS: gl.constexpr = BN if (MODE == DUAL) | (MODE == INTERLEAVED) else 2 * BN  # of the result
    LAG: gl.constexpr = 1 if PARTS == 1 else 0  # products under way when the next one's stage is waited for
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BN, 16])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    both: gl.constexpr = [STAGES * PARTS, 2 * BN, BK] if OUT_IN else [STAGES * PARTS, BK, 2 * BN]
    ring_w = ring_w._reinterpret(ring_w.dtype, both, ring_w.layout)  # two blocks, one behind the other, are one operand
    stage = stages_out.index(HALF)
    step = 0
    number = 0
    e, first, end, block, part = _hear(news, told, heard, number)
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
            if (MODE == DUAL) | (MODE == INTERLEAVED):
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
        e, first, end, block, part = _hear(news, told, heard, number)
    tma.store_wait(0)


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
    n, k = _eights(n), _eights(k)
    stride_a, stride_out, stride_pre = _eights(stride_a), _eights(stride_out), _eights(stride_pre)
    DTYPE: gl.constexpr = out.dtype.element_ty
    layout_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], DTYPE)
    ring_a = gl.allocate_shared_memory(DTYPE, [STAGES, BM, BK], layout_a)
    PARTS: gl.constexpr = 2 * HALF_ROWS // BM  # of a tile's columns
    CHUNKS: gl.constexpr = BK // w0.block_shape[1] if OUT_IN else 1
    ring_w = gl.allocate_shared_memory(DTYPE, [2 * STAGES * PARTS * CHUNKS] + w0.block_shape, w0.layout)
    stages_out = gl.allocate_shared_memory(DTYPE, [2, HALF_ROWS, BN], out_tma.layout)
    news, told, heard = _news()
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
        (_consume, (bias0, bias1, row_weights, out, out_tma, pre, pre0_tma, pre1_tma, order, steps, n,
                    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_w, stages_out, full, empty, news, told, heard,
                    0, OUT_IN, GATHER, MODE, ACT, SAVE, BIAS, WEIGHTED, BN, SPLIT)),
        (_consume, (bias0, bias1, row_weights, out, out_tma, pre, pre0_tma, pre1_tma, order, steps, n,
                    stride_be, stride_bn, stride_out, stride_pre, ring_a, ring_w, stages_out, full, empty, news, told, heard,
                    1, OUT_IN, GATHER, MODE, ACT, SAVE, BIAS, WEIGHTED, BN, SPLIT)),
        (_produce, (a, a_tma, w0, w1, order, offsets, starts, tiles, tile_starts, num_tiles, counter, num_slots, blocks, steps, k,
                    slots_per_token, stride_a, rows_per_expert, ring_a, ring_w, full, empty, news, told, heard,
                    EVEN_K, WIDE, 0 if MODE == DUAL else BN, OUT_IN, GATHER, PAD, GROUP, SPLIT, TOGETHER)),
    ], [4, 4], [184, 136] if (PARTS == 2) & (BN <= 64) else [216, 72])  # fmt: skip
