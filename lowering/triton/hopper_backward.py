"""The products of the experts' gradient on Hopper, by hand: copies and products in warps of their own (Gluon).

Each kernel has the contract of its twin in backward_kernels.py on the padded path: every operand in row order, an expert's rows filled up
with zeros to whole groups of 64, so that all of them come through the copy engine (TMA) and nothing in a loop is masked.

    producer (1 warp)          boxes of both operands, into a ring of stages
    consumers (4 warps each)   64 rows of the tile each: wgmma on a stage as soon as it is full, then the epilogue

One program a processor walks the tiles: the next tile's operands arrive while this one's epilogue runs, and what an epilogue writes leaves
through shared memory by TMA; it is waited for only before that memory is written again. `grad_hidden` gets the pre-activations of its
epilogue as further stages of the same ring, and writes their gradients into the stage they came in.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import _store

PAD = gl.constexpr(64)  # rows of a group and of a consumer; columns that an epilogue holds at once


@gluon.jit
def _barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=CONSUMERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def _ring(desc, STAGES: gl.constexpr):
    return gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_shape, desc.layout)


@gluon.jit
def _await_full(full, step):
    """The stage of a step, once it is full."""
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    return step % STAGES


@gluon.jit
def _await_empty(full, empty, step, bytes: gl.constexpr):
    """The stage of a step once every consumer has read what it held; `bytes` are to come."""
    STAGES: gl.constexpr = full.shape[0]
    s = step % STAGES
    mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(s), bytes)
    return s


@gluon.jit
def _release(empty, step, pred=True):
    """This consumer has read the stage of a step."""
    STAGES: gl.constexpr = empty.shape[0]
    mbarrier.arrive(empty.index((step + STAGES) % STAGES), pred=pred)


@gluon.jit
def _skip(full, empty, step, count):
    """A consumer without rows lets the stages of `count` steps pass."""
    for i in range(step, step + count):
        _await_full(full, i)
        _release(empty, i)


# ---- sums over an expert's rows -------------------------------------------------------------------------------------


# walk: (starts, tiles, row blocks, column blocks); ring: (left operands, one a consumer; right operands, one a piece; full, empty)


@gluon.jit
def _weight_tile(tile, walk):
    """Expert, its groups of rows [first, end), row and column block; of the last tile for a tile beyond it. An expert's tiles follow
    each other: its operands stay in L2."""
    starts, total, blocks_m, blocks_n = walk
    tile = gl.minimum(tile, total - 1)
    e = tile // (blocks_m * blocks_n)
    block = tile % (blocks_m * blocks_n)
    return e, gl.load(starts + e), gl.load(starts + e + 1), block // blocks_n, block % blocks_n


@gluon.jit
def _weight_produce(left, right, walk, left0, right0, ring, CONSUMERS: gl.constexpr, PIECES: gl.constexpr):
    lefts, rights, full, empty = ring
    bytes: gl.constexpr = PIECES * right.block_type.nbytes + CONSUMERS * left.block_type.nbytes
    WIDTH: gl.constexpr = right.block_shape[1]
    stride = gl.num_programs(0)
    now = _weight_tile(gl.program_id(0), walk)
    step = 0
    for tile in range(gl.program_id(0), walk[1], stride):
        following = _weight_tile(tile + stride, walk)
        first, end, block_m, block_n = now[1], now[2], now[3], now[4]
        m0 = left0 + block_m * CONSUMERS * PAD
        n0 = right0 + block_n * PIECES * WIDTH
        for group in range(first, end):
            s = _await_empty(full, empty, step, bytes)
            for i in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(left, [group * PAD, m0 + i * PAD], full.index(s), lefts[i].index(s))
            for i in gl.static_range(PIECES):
                tma.async_copy_global_to_shared(right, [group * PAD, n0 + i * WIDTH], full.index(s), rights[i].index(s))
            step += 1
        now = following


@gluon.jit
def _weight_step(acc0, acc1, ring, step, PART: gl.constexpr, PIECES: gl.constexpr, use_acc: gl.constexpr):
    """acc + Lᵀ R of a stage's 64 rows, the step before it finished. acc1 is the second piece's, or acc0."""
    lefts, rights, full = ring[0], ring[1], ring[2]
    s = _await_full(full, step)
    a = lefts[PART].index(s).permute((1, 0))
    pending0 = warpgroup_mma(a, rights[0].index(s), acc0, use_acc=use_acc, is_async=True)
    if PIECES == 1:
        acc0 = warpgroup_mma_wait(num_outstanding=1, deps=(pending0,))
        return acc0, acc0
    else:
        pending1 = warpgroup_mma(a, rights[1].index(s), acc1, use_acc=use_acc, is_async=True)
        return warpgroup_mma_wait(num_outstanding=2, deps=(pending0, pending1))


@gluon.jit
def _leave(values, out, staging, piece: gl.constexpr, row, column):
    """values to out at (row, column), through shared memory; nothing waits for them."""
    BUFFERS: gl.constexpr = staging.shape[0]
    place = staging.index(piece % BUFFERS)
    tma.store_wait(BUFFERS - 1)  # what it held has left
    place.store(values)
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], place)


@gluon.jit
def _weight_consume(out, walk, m, ring, staging, PART: gl.constexpr, CONSUMERS: gl.constexpr, PIECES: gl.constexpr):
    """Rows PART · 64 and on of every tile."""
    full, empty = ring[2], ring[3]
    WIDTH: gl.constexpr = out.block_shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    stride = gl.num_programs(0)
    now = _weight_tile(gl.program_id(0), walk)
    step = 0
    for tile in range(gl.program_id(0), walk[1], stride):
        following = _weight_tile(tile + stride, walk)
        e, first, end, block_m, block_n = now
        row = (block_m * CONSUMERS + PART) * PAD
        column = block_n * PIECES * WIDTH
        if row < m:
            if first < end:
                zeros = gl.zeros((PAD, WIDTH), gl.float32, mma)  # the first step does not read it
                acc0, acc1 = _weight_step(zeros, zeros, ring, step, PART, PIECES, False)
                for i in range(step + 1, step + end - first):
                    acc0, acc1 = _weight_step(acc0, acc1, ring, i, PART, PIECES, True)
                    _release(empty, i - 1)  # the step before has been read
                step += end - first
                if PIECES == 1:
                    acc0 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0,))
                else:
                    acc0, acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0, acc1))
                _release(empty, step - 1)
                _leave(acc0.to(out.dtype), out, staging, 0, e * m + row, column)
                if PIECES == 2:
                    _leave(acc1.to(out.dtype), out, staging, 1, e * m + row, column + WIDTH)
            else:
                for i in gl.static_range(PIECES):
                    _leave(gl.zeros((PAD, WIDTH), out.dtype, mma), out, staging, i, e * m + row, column + i * WIDTH)
        else:
            _skip(full, empty, step, end - first)
            step += end - first
        now = following
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["experts"])
def weight_grad(
    left, right, out, starts, experts, m, n, left0, right0,
    CONSUMERS: gl.constexpr, PIECES: gl.constexpr, BUFFERS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out[e][m, n] = Σ over the expert's rows of left[row, left0 + m] right[row, right0 + n]; zero for an expert without rows.

    `left`, `right`: descriptors of rows, boxes [64, 64] and [64, WIDTH]; `out`: of the matrices one below the other, [E · m, n], boxes
    [64, WIDTH]. `starts` [E + 1]: the first group of 64 rows of every expert. m is a multiple of 64. Tiles are CONSUMERS · 64 x
    PIECES · WIDTH (three consumers of 256 columns need two pieces of 128: no instruction may have more than half the registers), and
    BUFFERS pieces may be leaving at once.
    """
    blocks_m = gl.cdiv(m, CONSUMERS * PAD)
    blocks_n = gl.cdiv(n, PIECES * right.block_shape[1])
    walk = (starts, experts * blocks_m * blocks_n, blocks_m, blocks_n)
    full, empty = _barriers(STAGES, CONSUMERS)
    out0, out1 = _ring(out, BUFFERS), _ring(out, BUFFERS)
    if PIECES == 1:
        rights = (_ring(right, STAGES),)
    else:
        rights = (_ring(right, STAGES), _ring(right, STAGES))
    if CONSUMERS == 2:
        ring = ((_ring(left, STAGES), _ring(left, STAGES)), rights, full, empty)
        gl.warp_specialize([
            (_weight_consume, (out, walk, m, ring, out0, 0, CONSUMERS, PIECES)),
            (_weight_consume, (out, walk, m, ring, out1, 1, CONSUMERS, PIECES)),
            (_weight_produce, (left, right, walk, left0, right0, ring, CONSUMERS, PIECES)),
        ], [4, 1], [REGISTERS, 40])  # fmt: skip
    else:
        ring3 = ((_ring(left, STAGES), _ring(left, STAGES), _ring(left, STAGES)), rights, full, empty)
        gl.warp_specialize([
            (_weight_consume, (out, walk, m, ring3, out0, 0, CONSUMERS, PIECES)),
            (_weight_consume, (out, walk, m, ring3, out1, 1, CONSUMERS, PIECES)),
            (_weight_consume, (out, walk, m, ring3, _ring(out, BUFFERS), 2, CONSUMERS, PIECES)),
            (_weight_produce, (left, right, walk, left0, right0, ring3, CONSUMERS, PIECES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


# ---- rows times an expert's matrix ----------------------------------------------------------------------------------

# walk: (offsets, starts, tiles, num_tiles, max_tiles, column blocks); ring: (rows, weights, full, empty)


@gluon.jit
def _row_tile(tile, walk, GROUP: gl.constexpr):
    """Expert, first row, end of the expert's rows, the first row's place in padded order, column block; of the last tile for a tile beyond
    it. GROUP row tiles are walked together, rows fastest."""
    offsets, starts, tiles, num_tiles, max_tiles, blocks = walk
    row_tiles = gl.load(num_tiles)
    tile = gl.maximum(gl.minimum(tile, row_tiles * blocks - 1), 0)
    group = tile // (GROUP * blocks)
    size = gl.maximum(gl.minimum(row_tiles - group * GROUP, GROUP), 1)
    rest = tile - group * GROUP * blocks
    at = group * GROUP + rest % size
    e = gl.maximum(gl.load(tiles + at), 0)
    first = gl.load(tiles + max_tiles + at)
    return e, first, gl.load(offsets + e + 1), first + gl.load(starts + e) * PAD - gl.load(offsets + e), rest // size


@gluon.jit
def _second(ring, s):
    """The weights' part of a stage, for a second block of pre-activations."""
    rows, weights = ring[0], ring[1]
    return weights.index(s)._reinterpret(rows.dtype, [rows.shape[1], rows.shape[2]], rows.layout)


@gluon.jit
def _rows_produce(
    a, w0, w1, pre, walk, steps, n, rows_per_expert, ring,
    BN: gl.constexpr, N_FAST: gl.constexpr, HALVES: gl.constexpr, PRE: gl.constexpr, GATED: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    rows, weights, full, empty = ring
    stride = gl.num_programs(0)
    begin = gl.program_id(0)
    now = _row_tile(begin, walk, GROUP)
    step = 0
    for tile in range(begin, gl.load(walk[3]) * walk[5], stride):
        following = _row_tile(tile + stride, walk, GROUP)
        e, first, at, block = now[0], now[1], now[3], now[4]
        for half in gl.static_range(HALVES):
            w = w0 if half == 0 else w1
            for k in range(steps):
                s = _await_empty(full, empty, step, a.block_type.nbytes + w0.block_type.nbytes)
                tma.async_copy_global_to_shared(a, [at, (half * steps + k) * PAD], full.index(s), rows.index(s))
                if N_FAST:
                    tma.async_copy_global_to_shared(w, [e * rows_per_expert + k * PAD, block * BN], full.index(s), weights.index(s))
                else:
                    tma.async_copy_global_to_shared(w, [e * rows_per_expert + block * BN, k * PAD], full.index(s), weights.index(s))
                step += 1
        if PRE:
            for j in range(BN // PAD):
                s = _await_empty(full, empty, step, (2 if GATED else 1) * pre.block_type.nbytes)
                tma.async_copy_global_to_shared(pre, [first, block * BN + j * PAD], full.index(s), rows.index(s))
                if GATED:
                    tma.async_copy_global_to_shared(pre, [first, n + block * BN + j * PAD], full.index(s), _second(ring, s))
                step += 1
        now = following


@gluon.jit
def _rows_step(acc, ring, step, PART: gl.constexpr, N_FAST: gl.constexpr, use_acc: gl.constexpr):
    """acc + A W of a stage for rows PART · 64 and on, the step before it finished."""
    rows, weights, full = ring[0], ring[1], ring[2]
    s = _await_full(full, step)
    w = weights.index(s)
    if not N_FAST:
        w = w.permute((1, 0))
    pending = warpgroup_mma(rows.index(s).slice(PART * PAD, PAD), w, acc, use_acc=use_acc, is_async=True)
    return warpgroup_mma_wait(num_outstanding=1, deps=(pending,))


@gluon.jit
def _rows_product(ring, step, steps, held, PART: gl.constexpr, BN: gl.constexpr, N_FAST: gl.constexpr):
    """The sum of `steps` steps. `held`: the stage before the first is released as soon as nothing leaves from it any more."""
    empty = ring[3]
    acc = gl.zeros((PAD, BN), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16]))  # the first step does not read it
    acc = _rows_step(acc, ring, step, PART, N_FAST, False)
    tma.store_wait(0)
    _release(empty, step - 1, pred=held)
    for i in range(step + 1, step + steps):
        acc = _rows_step(acc, ring, i, PART, N_FAST, True)
        _release(empty, i - 1)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    _release(empty, step + steps - 1)
    return acc


@gluon.jit
def _put(values, bits, place):
    """values [64, 64] into shared memory, zero in a row whose `bits` are 0 (else -1): two values at a time."""
    kept = values.to(place.dtype)
    place.store(gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [kept, bits], kept.dtype, True, 2))


@gluon.jit
def _hidden_columns(
    acc, live, scale, d_pre, hidden, at, column, n, ring, staging, step,
    DUAL: gl.constexpr, GATED: gl.constexpr, WEIGHTED: gl.constexpr, D_PRE: gl.constexpr, HIDDEN: gl.constexpr, PART: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    """The epilogue of `grad_hidden` for some of a tile's columns, 64 at a time, each with a stage of pre-activations; Σ dA a."""
    WIDTH: gl.constexpr = acc.shape[1]
    if WIDTH > PAD:
        left, right = acc.reshape(PAD, 2, WIDTH // 2).permute(0, 2, 1).split()
        total = _hidden_columns(left, live, scale, d_pre, hidden, at, column, n, ring, staging, step,
                                DUAL, GATED, WEIGHTED, D_PRE, HIDDEN, PART, FIRST)  # fmt: skip
        total += _hidden_columns(right, live, scale, d_pre, hidden, at, column + WIDTH // 2, n, ring, staging, step + WIDTH // (2 * PAD),
                                 DUAL, GATED, WEIGHTED, D_PRE, HIDDEN, PART, False)  # fmt: skip
        return total
    else:
        rows, full, empty = ring[0], ring[2], ring[3]
        mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAD, 16])
        acc = gl.convert_layout(acc, mma, assert_trivial=True)
        s = _await_full(full, step)
        place_g = rows.index(s).slice(PART * PAD, PAD)
        place_u = _second(ring, s).slice(PART * PAD, PAD)
        g = place_g.load(mma).to(gl.float32)
        u = place_u.load(mma).to(gl.float32) if GATED else g
        value, slope_g, slope_u = DUAL(g, u)
        total = gl.sum(acc * value, 1)
        bits = gl.expand_dims(gl.where(live, -1, 0).to(gl.int16), 1)
        if WEIGHTED:
            value = value * gl.expand_dims(scale, 1)
            acc = acc * gl.expand_dims(scale, 1)
        tma.store_wait(0)  # the part before has left: its stage, and the staging, are free
        if not FIRST:
            _release(empty, step - 1)
        if HIDDEN:
            _put(value, bits, staging)
        if D_PRE:
            _put(acc * slope_g, bits, place_g)
            if GATED:
                _put(acc * slope_u, bits, place_u)
        fence_async_shared()
        if HIDDEN:
            tma.async_copy_shared_to_global(hidden, [at, column], staging)
        if D_PRE:
            tma.async_copy_shared_to_global(d_pre, [at, column], place_g)
            if GATED:
                tma.async_copy_shared_to_global(d_pre, [at, n + column], place_u)
        return total


@gluon.jit
def _rows_of(first, end, order, PART: gl.constexpr, BN: gl.constexpr):
    """The consumer's rows: which are the expert's, and their slots."""
    rows = first + PART * PAD + gl.arange(0, PAD, layout=gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])))
    live = rows < end
    return live, gl.load(order + rows, mask=live, other=0)


@gluon.jit
def _hidden_consume(
    weights, d_pre, hidden, sums, order, walk, steps, n, ring, staging,
    DUAL: gl.constexpr, GATED: gl.constexpr, WEIGHTED: gl.constexpr, D_PRE: gl.constexpr, HIDDEN: gl.constexpr, SUMS: gl.constexpr,
    PART: gl.constexpr, BN: gl.constexpr, N_FAST: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    full, empty = ring[2], ring[3]
    blocks = walk[5]
    stride = gl.num_programs(0)
    begin = gl.program_id(0)
    now = _row_tile(begin, walk, GROUP)
    step = 0
    held = False  # the stage before still sends gradients
    for tile in range(begin, gl.load(walk[3]) * blocks, stride):
        following = _row_tile(tile + stride, walk, GROUP)
        first, end, at, block = now[1], now[2], now[3], now[4]
        if first + PART * PAD < end:
            live, slots = _rows_of(first, end, order, PART, PAD)
            scale = gl.load(weights + slots, mask=live, other=0.0).to(gl.float32)
            acc = _rows_product(ring, step, steps, held, PART, BN, N_FAST)
            total = _hidden_columns(acc, live, scale, d_pre, hidden, at + PART * PAD, block * BN, n, ring, staging, step + steps,
                                    DUAL, GATED, WEIGHTED, D_PRE, HIDDEN, PART, True)  # fmt: skip
            if SUMS:
                gl.store(sums + slots.to(gl.int64) * blocks + block, total, mask=live)
            held = True
        else:
            tma.store_wait(0)
            _release(empty, step - 1, pred=held)
            _skip(full, empty, step, steps + BN // PAD)
            held = False
        step += steps + BN // PAD
        now = following
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["max_tiles"])
def grad_hidden(
    grad, w, pre, weights, d_pre, hidden, sums, order, offsets, starts, tiles, num_tiles, max_tiles, n, k, rows_per_expert,
    DUAL: gl.constexpr, GATED: gl.constexpr, WEIGHTED: gl.constexpr, D_PRE: gl.constexpr, HIDDEN: gl.constexpr, SUMS: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, N_FAST: gl.constexpr, GROUP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """`backward_kernels.grad_hidden` of sorted rows padded to groups of 64; tiles of 128 rows, BN columns.

    Descriptors: `grad` rows, boxes [128, 64]; `w` the matrices one below the other, boxes [64, BN] (N_FAST) or [BN, 64]; `pre` (g | u),
    not padded, boxes [128, 64]; `d_pre` (g | u) and `hidden`, boxes [64, 64]. n is a multiple of BN, k of 64.
    """
    ring_a, ring_w = _ring(grad, STAGES), _ring(w, STAGES)
    staging = gl.allocate_shared_memory(grad.dtype, [2, PAD, PAD], gl.NVMMASharedLayout.get_default_for([PAD, PAD], grad.dtype))
    full, empty = _barriers(STAGES, 2)
    ring = (ring_a, ring_w, full, empty)
    walk = (offsets, starts, tiles, num_tiles, max_tiles, n // BN)
    steps = k // PAD
    gl.warp_specialize([
        (_hidden_consume, (weights, d_pre, hidden, sums, order, walk, steps, n, ring, staging.index(0),
                           DUAL, GATED, WEIGHTED, D_PRE, HIDDEN, SUMS, 0, BN, N_FAST, GROUP)),
        (_hidden_consume, (weights, d_pre, hidden, sums, order, walk, steps, n, ring, staging.index(1),
                           DUAL, GATED, WEIGHTED, D_PRE, HIDDEN, SUMS, 1, BN, N_FAST, GROUP)),
        (_rows_produce, (grad, w, w, pre, walk, steps, n, rows_per_expert, ring, BN, N_FAST, 1, True, GATED, GROUP)),
    ], [4, 1], [REGISTERS, 40])  # fmt: skip


@gluon.jit
def _input_columns(acc, out, slots, live, column, n):
    """acc to the rows' slots, at most 64 columns at a time."""
    WIDTH: gl.constexpr = acc.shape[1]
    if WIDTH > PAD:
        left, right = acc.reshape(PAD, 2, WIDTH // 2).permute(0, 2, 1).split()
        _input_columns(left, out, slots, live, column, n)
        _input_columns(right, out, slots, live, column + WIDTH // 2, n)
    else:
        _store(acc.to(out.dtype.element_ty), out, slots, column, n, n, live)


@gluon.jit
def _input_consume(
    out, order, walk, steps, n, ring,
    PART: gl.constexpr, BN: gl.constexpr, N_FAST: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    full, empty = ring[2], ring[3]
    stride = gl.num_programs(0)
    begin = gl.program_id(0)
    now = _row_tile(begin, walk, GROUP)
    step = 0
    for tile in range(begin, gl.load(walk[3]) * walk[5], stride):
        following = _row_tile(tile + stride, walk, GROUP)
        first, end, block = now[1], now[2], now[4]
        if first + PART * PAD < end:
            live, slots = _rows_of(first, end, order, PART, BN)
            acc = _rows_product(ring, step, steps, False, PART, BN, N_FAST)
            _input_columns(acc, out, slots, live, block * BN, n)
        else:
            _skip(full, empty, step, steps)
        step += steps
        now = following


@gluon.jit(do_not_specialize=["max_tiles"])
def grad_input(
    d_pre, w0, w1, out, order, offsets, starts, tiles, num_tiles, max_tiles, n, k, rows_per_expert,
    HALVES: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, N_FAST: gl.constexpr, GROUP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """`backward_kernels.grad_input` of rows padded to groups of 64; tiles of 128 rows, BN columns. out [N, n] by slot.

    Descriptors as in `grad_hidden`; k columns of d_pre for each of the HALVES, a multiple of 64.
    """
    ring_a, ring_w = _ring(d_pre, STAGES), _ring(w0, STAGES)
    full, empty = _barriers(STAGES, 2)
    ring = (ring_a, ring_w, full, empty)
    walk = (offsets, starts, tiles, num_tiles, max_tiles, gl.cdiv(n, BN))
    steps = k // PAD
    gl.warp_specialize([
        (_input_consume, (out, order, walk, HALVES * steps, n, ring, 0, BN, N_FAST, GROUP)),
        (_input_consume, (out, order, walk, HALVES * steps, n, ring, 1, BN, N_FAST, GROUP)),
        (_rows_produce, (d_pre, w0, w1, d_pre, walk, steps, n, rows_per_expert, ring, BN, N_FAST, HALVES, False, False, GROUP)),
    ], [4, 1], [REGISTERS, 40])  # fmt: skip
