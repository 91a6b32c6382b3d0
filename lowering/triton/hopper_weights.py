"""The experts' weight gradients on Hopper, by hand: copies and products in warps of their own (Gluon).

The contract of `backward_row_kernels.weight_grad_padded`, its twin: out[e] = Σ_r L[r]ᵀ R[r] over the expert's groups of 64 rows, zeros
for an expert without rows.

    producer (1 warp)               claims a tile; 64 rows of both operands a step, by TMA, into a ring of stages
    consumer 0, 1, 2 (4 warps)      64 rows of the tile each, all its columns: wgmma on a stage as soon as it is full, then the epilogue

An expert's tiles follow each other and are claimed in order from a counter, so that all processors work on an expert or two at a time and
their operands are read from memory once. The sums are short (four groups of rows at 256 tokens an expert): the next tile's operands arrive
while this one's products finish, and what is stored leaves by TMA while the next one runs. The producer knows a tile's number two tiles
ahead and its rows one ahead; it claims when all that it may ask for is under way.

Three consumers read a quarter less from L2 for each product than two do, but leave a thread too few registers for an instruction of 256
columns: they take the columns in two pieces, each with stages and an accumulator of its own.

The tile loops are `while`: Triton (3.6 and 3.7) takes a value that a `for` loop carries for dead, and keeps its first one, if all that it
is used for is the bounds of a loop inside (ForOpDeadArgElimination passes over the operands of inner loops).
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_backward import PAD, _await_empty, _await_full, _barriers, _release, _ring, _skip
from .hopper_tiles import channel, claim, hear, leave, tell

CONSUMERS = gl.constexpr(3)

# ---- producer ----------------------------------------------------------------------------------------------------


@gluon.jit
def _groups(tile, starts, total, per_expert):
    """Expert and its groups of rows [first, end); of the last tile for a tile beyond it."""
    e = gl.minimum(tile, total - 1) // per_expert
    return e, gl.load(starts + e), gl.load(starts + e + 1)


@gluon.jit
def _produce(
    left, right, starts, counter, total, m, blocks_m, blocks_n, left0, right0, ring_l, ring_r, full, empty, news, told, heard
):  # fmt: skip
    WIDTH: gl.constexpr = right.block_shape[1]
    bytes: gl.constexpr = CONSUMERS * left.block_type.nbytes + 2 * right.block_type.nbytes
    per_expert = blocks_m * blocks_n
    tile = gl.program_id(0)
    following = tile + gl.num_programs(0)  # the first two tiles of a program are its own
    e, first, end = _groups(tile, starts, total, per_expert)
    step = 0
    number = 0
    while tile < total:
        block = tile - e * per_expert
        m0 = block // blocks_n * (CONSUMERS * PAD)
        n0 = block % blocks_n * (2 * WIDTH)
        tell(news, told, heard, number, e * m + m0, first, end, n0, m - m0)
        next_e, next_first, next_end = _groups(following, starts, total, per_expert)
        for group in range(first, end):
            s = _await_empty(full, empty, step, bytes)
            for i in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(left, [group * PAD, left0 + m0 + i * PAD], full.index(s), ring_l.index(s * CONSUMERS + i))
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(right, [group * PAD, right0 + n0 + i * WIDTH], full.index(s), ring_r.index(2 * s + i))
            step += 1
        tile, following = following, gl.num_programs(0) + claim(counter)
        e, first, end = next_e, next_first, next_end
        number += 1
    tell(news, told, heard, number, 0, -1, 0, 0, 0)
    if following >= total:  # always: a program's numbers grow. So its last claim has arrived before it leaves
        leave(counter)


# ---- consumers ---------------------------------------------------------------------------------------------------


@gluon.jit
def _send(values, out, place, row, column):
    """values to out at (row, column) by way of shared memory; nothing waits for them."""
    tma.store_wait(0)  # what the place held has been read
    place.store(values.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], place)


@gluon.jit
def _step(acc0, acc1, ring_l, ring_r, full, step, PART: gl.constexpr):
    """acc + Lᵀ R of a stage's 64 rows, the step before it finished."""
    s = _await_full(full, step)
    a = ring_l.index(s * CONSUMERS + PART).permute((1, 0))
    pending0 = warpgroup_mma(a, ring_r.index(2 * s), acc0, is_async=True)
    pending1 = warpgroup_mma(a, ring_r.index(2 * s + 1), acc1, is_async=True)
    return warpgroup_mma_wait(num_outstanding=2, deps=(pending0, pending1))


@gluon.jit
def _consume(out, ring_l, ring_r, place, full, empty, news, told, heard, PART: gl.constexpr):
    """Rows PART · 64 and on of every tile."""
    WIDTH: gl.constexpr = ring_r.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    step = 0
    number = 0
    row, first, end, column, rows = hear(news, told, heard, number)
    while first >= 0:
        after = step + end - first
        if rows > PART * PAD:
            acc0 = gl.zeros((PAD, WIDTH), gl.float32, mma)
            acc1 = acc0
            for i in range(step, after):
                acc0, acc1 = _step(acc0, acc1, ring_l, ring_r, full, i, PART)
                _release(empty, i - 1, pred=i > step)  # the step before has been read
            acc0, acc1 = warpgroup_mma_wait(num_outstanding=0, deps=(acc0, acc1))
            _release(empty, after - 1, pred=step < after)
            _send(acc0, out, place, row + PART * PAD, column)
            _send(acc1, out, place, row + PART * PAD, column + WIDTH)
        else:
            _skip(full, empty, step, end - first)
        step = after
        number += 1
        row, first, end, column, rows = hear(news, told, heard, number)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["experts", "left0", "right0"])
def weight_grad(left, right, out, starts, counter, experts, m, n, left0, right0, STAGES: gl.constexpr):
    """out[e][m, n] = Σ over the expert's rows of left[row, left0 + m] right[row, right0 + n]; zero for an expert without rows.

    `left`, `right`: descriptors of rows, boxes [64, 64] and [64, WIDTH]; `out`: of the matrices one below the other, [E · m, n], boxes
    [64, WIDTH]. `starts` [E + 1]: the first group of 64 rows of every expert. `counter`: two zeros, which this call leaves behind as
    zeros. m is a multiple of 64. Tiles are CONSUMERS · 64 x 2 · WIDTH.
    """
    ring_l = _ring(left, STAGES * CONSUMERS)
    ring_r = _ring(right, STAGES * 2)
    places = _ring(out, CONSUMERS)
    news, told, heard = channel(CONSUMERS)
    full, empty = _barriers(STAGES, CONSUMERS)
    blocks_m = gl.cdiv(m, CONSUMERS * PAD)
    blocks_n = gl.cdiv(n, 2 * right.block_shape[1])
    total = experts * blocks_m * blocks_n
    gl.warp_specialize([
        (_consume, (out, ring_l, ring_r, places.index(0), full, empty, news, told, heard, 0)),
        (_consume, (out, ring_l, ring_r, places.index(1), full, empty, news, told, heard, 1)),
        (_consume, (out, ring_l, ring_r, places.index(2), full, empty, news, told, heard, 2)),
        (_produce, (left, right, starts, counter, total, m, blocks_m, blocks_n, left0, right0, ring_l, ring_r, full, empty,
                    news, told, heard)),
    ], [4, 4, 1], [160, 160, 32])  # fmt: skip
