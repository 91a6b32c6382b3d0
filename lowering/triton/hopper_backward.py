"""The hidden layer's gradient on Hopper, by hand: copies and products in warps of their own (Gluon).

The contract of `backward_kernels.grad_hidden`, its twin, on the padded path: operands in row order, an expert's rows filled up with zeros
to whole groups of 64, so that all of them come through the copy engine (TMA) and nothing in a loop is masked.

    producer (1 warp)          claims a tile as hopper.py's does; boxes of both operands, into a ring of stages
    consumer 0, 1 (4 warps)    64 rows each: wgmma on a stage as soon as it is full, then the epilogue

The next tile's operands arrive while this one's epilogue runs. The pre-activations that the epilogue needs are further stages of the same
ring, and their gradients are written into the stage they came in, which TMA stores from. (`grad_input` is hopper.py's kernel.)
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

from .hopper_tiles import EARLY, channel, claim, expert_of, hear, leave, place_of, tell

PAD = gl.constexpr(64)  # rows of a group and of a consumer; columns that an epilogue holds at once
ROWS = gl.constexpr(128)


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


# ---- producer ----------------------------------------------------------------------------------------------------

# ring: (rows, weights, full, empty)


@gluon.jit
def _second(ring, s):
    """The weights' part of a stage, for a second block of pre-activations."""
    rows, weights = ring[0], ring[1]
    return weights.index(s)._reinterpret(rows.dtype, [rows.shape[1], rows.shape[2]], rows.layout)


@gluon.jit
def _rows_feed(begin, end, step, grad, w, at, e, block, rows_per_expert, ring, N_FAST: gl.constexpr):
    """A stage for each step of depth in [begin, end)."""
    rows, weights, full, empty = ring
    for k in range(begin, end):
        s = _await_empty(full, empty, step, grad.block_type.nbytes + w.block_type.nbytes)
        tma.async_copy_global_to_shared(grad, [at, k * PAD], full.index(s), rows.index(s))
        if N_FAST:
            tma.async_copy_global_to_shared(w, [e * rows_per_expert + k * PAD, block * w.block_shape[1]], full.index(s), weights.index(s))
        else:
            tma.async_copy_global_to_shared(w, [e * rows_per_expert + block * w.block_shape[0], k * PAD], full.index(s), weights.index(s))
        step += 1
    return step


@gluon.jit
def _hidden_produce(
    grad, w, pre, offsets, starts, tiles, tile_starts, num_tiles, counter, steps, n, blocks, rows_per_expert, ring, news, told, heard,
    BN: gl.constexpr, N_FAST: gl.constexpr, GATED: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    rows, full, empty = ring[0], ring[2], ring[3]
    row_tiles = gl.load(num_tiles)
    tile = gl.program_id(0)
    e = expert_of(tile, tiles, row_tiles, blocks)
    begin, end, group = gl.load(offsets + e), gl.load(offsets + e + 1), gl.load(starts + e)
    row, block = place_of(tile, gl.load(tile_starts + e), gl.load(tile_starts + e + 1), blocks, GROUP)
    claim_at = gl.maximum(steps - EARLY, 0)
    expert_at = gl.maximum(steps - EARLY + 3, 0)
    step = 0
    number = 0
    while tile < row_tiles * blocks:
        first = begin + row * ROWS
        at = group * PAD + row * ROWS
        now, column = e, block
        tell(news, told, heard, number, e, first, end, block, at)
        step = _rows_feed(0, claim_at, step, grad, w, at, now, column, rows_per_expert, ring, N_FAST)
        tile = claim(counter)
        step = _rows_feed(claim_at, expert_at, step, grad, w, at, now, column, rows_per_expert, ring, N_FAST)
        e = expert_of(tile, tiles, row_tiles, blocks)
        step = _rows_feed(expert_at, steps, step, grad, w, at, now, column, rows_per_expert, ring, N_FAST)
        begin, end, group = gl.load(offsets + e), gl.load(offsets + e + 1), gl.load(starts + e)
        tile_begin, tile_end = gl.load(tile_starts + e), gl.load(tile_starts + e + 1)
        for j in range(BN // PAD):
            s = _await_empty(full, empty, step, (2 if GATED else 1) * pre.block_type.nbytes)
            tma.async_copy_global_to_shared(pre, [first, column * BN + j * PAD], full.index(s), rows.index(s))
            if GATED:
                tma.async_copy_global_to_shared(pre, [first, n + column * BN + j * PAD], full.index(s), _second(ring, s))
            step += 1
        row, block = place_of(tile, tile_begin, tile_end, blocks, GROUP)
        number += 1
    tell(news, told, heard, number, 0, -1, 0, 0, 0)
    leave(counter)


# ---- consumers ---------------------------------------------------------------------------------------------------


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
def _rows_of(first, end, order, PART: gl.constexpr):
    """The consumer's rows: which are the expert's, and their slots."""
    rows = first + PART * PAD + gl.arange(0, PAD, layout=gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAD, 16])))
    live = rows < end
    return live, gl.load(order + rows, mask=live, other=0)


@gluon.jit
def _hidden_consume(
    weights, d_pre, hidden, sums, order, steps, n, blocks, ring, news, told, heard, staging,
    DUAL: gl.constexpr, GATED: gl.constexpr, WEIGHTED: gl.constexpr, D_PRE: gl.constexpr, HIDDEN: gl.constexpr, SUMS: gl.constexpr,
    PART: gl.constexpr, BN: gl.constexpr, N_FAST: gl.constexpr,
):  # fmt: skip
    full, empty = ring[2], ring[3]
    step = 0
    number = 0
    held = False  # the stage before still sends gradients
    _, first, end, block, at = hear(news, told, heard, number)
    while first >= 0:
        if first + PART * PAD < end:
            live, slots = _rows_of(first, end, order, PART)
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
        number += 1
        _, first, end, block, at = hear(news, told, heard, number)
    tma.store_wait(0)


@gluon.jit
def grad_hidden(
    grad, w, pre, weights, d_pre, hidden, sums, order, offsets, starts, tiles, tile_starts, num_tiles, counter, n, k, rows_per_expert,
    DUAL: gl.constexpr, GATED: gl.constexpr, WEIGHTED: gl.constexpr, D_PRE: gl.constexpr, HIDDEN: gl.constexpr, SUMS: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, N_FAST: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """`backward_kernels.grad_hidden` of sorted rows padded to groups of 64; tiles of 128 rows, BN columns.

    Descriptors: `grad` rows, boxes [128, 64]; `w` the matrices one below the other, boxes [64, BN] (N_FAST) or [BN, 64]; `pre` (g | u),
    not padded, boxes [128, 64]; `d_pre` (g | u) and `hidden`, boxes [64, 64]. n is a multiple of BN, k of 64. `starts` [E + 1]: the
    first group of 64 rows of every expert. `counter`: two zeros, which this call leaves behind as zeros.
    """
    ring_a, ring_w = _ring(grad, STAGES), _ring(w, STAGES)
    staging = gl.allocate_shared_memory(grad.dtype, [2, PAD, PAD], gl.NVMMASharedLayout.get_default_for([PAD, PAD], grad.dtype))
    news, told, heard = channel()
    full, empty = _barriers(STAGES, 2)
    ring = (ring_a, ring_w, full, empty)
    blocks = n // BN
    steps = k // PAD
    gl.warp_specialize([
        (_hidden_consume, (weights, d_pre, hidden, sums, order, steps, n, blocks, ring, news, told, heard, staging.index(0),
                           DUAL, GATED, WEIGHTED, D_PRE, HIDDEN, SUMS, 0, BN, N_FAST)),
        (_hidden_consume, (weights, d_pre, hidden, sums, order, steps, n, blocks, ring, news, told, heard, staging.index(1),
                           DUAL, GATED, WEIGHTED, D_PRE, HIDDEN, SUMS, 1, BN, N_FAST)),
        (_hidden_produce, (grad, w, pre, offsets, starts, tiles, tile_starts, num_tiles, counter, steps, n, blocks, rows_per_expert,
                           ring, news, told, heard, BN, N_FAST, GATED, GROUP)),
    ], [4, 1], [232, 40])  # fmt: skip
