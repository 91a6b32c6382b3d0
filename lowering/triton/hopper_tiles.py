"""Which tile is whose in the warp-specialised kernels (Gluon): claimed in order from a counter by the producer, told to the consumers."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

HALF_ROWS = gl.constexpr(64)  # of a consumer
EARLY = gl.constexpr(8)  # steps before a tile's end at which the next one is claimed: each load that hangs on another has two to arrive,
# and all parts of a tile are of even length where steps go by twos


@gluon.jit
def eights(number):
    """The same number, seen by the compiler to be a multiple of 8: so masked and strided rows move 16 bytes at a time."""
    return number // 8 * 8


@gluon.jit
def expert_of(tile, tiles, num_tiles, blocks):
    """Whose tile it is; of the last one for a tile beyond it. An expert's tiles follow each other."""
    return gl.maximum(gl.load(tiles + gl.maximum(gl.minimum(tile // blocks, num_tiles - 1), 0)), 0)


@gluon.jit
def place_of(tile, begin, end, blocks, GROUP: gl.constexpr):
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
def part_of(block, blocks, steps, SPLIT: gl.constexpr):
    """(part of the depth, its steps [begin, end), column block) of a row tile's place of `blocks`: the parts one after the other."""
    if SPLIT == 1:
        return 0, 0, steps, block
    else:
        part = block // (blocks // SPLIT)
        return part, part * steps // SPLIT, (part + 1) * steps // SPLIT, block % (blocks // SPLIT)


@gluon.jit
def claim(counter):
    """The next tile that no program has taken; the first of each is its own number."""
    return gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")


@gluon.jit
def leave(counter):
    """The last program leaves the counters as it found them: zero."""
    if gl.atomic_add(counter + 1, 1, sem="relaxed") == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def tell(news, told, heard, number, e, first, end, block, at):
    """What the producer's tile is, to the consumers; first -1: there is none."""
    slot = number % 2
    mbarrier.wait(heard.index(slot), ((number // 2) & 1) ^ 1)
    i = gl.arange(0, 8, layout=gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    rest = gl.where(i == 2, end, gl.where(i == 3, block, at))
    news.index(slot).store(gl.where(i == 0, e, gl.where(i == 1, first, rest)))
    mbarrier.arrive(told.index(slot))


@gluon.jit
def hear(news, told, heard, number):
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
def channel(CONSUMERS: gl.constexpr = 2):
    """Where a producer tells its consumers about tiles: (news, told, heard)."""
    news = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(2):
        mbarrier.init(told.index(s), count=1)
        mbarrier.init(heard.index(s), count=CONSUMERS)
    return news, told, heard
