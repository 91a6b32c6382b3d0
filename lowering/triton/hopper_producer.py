"""The producer of `hopper`'s kernel (Gluon): claims tiles and fills a ring of stages with rows and weights."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_tiles import EARLY, HALF_ROWS, claim, expert_of, leave, part_of, place_of, tell

AHEAD = gl.constexpr(2)  # steps that codes are asked for before their rows: as many as a tile has left when the next one is known


@gluon.jit
def _feed(
    begin, end, last, step, pointers, mask, at_k, k_end, a_tma, w0, w1, first, row_w, n0, row_next, n0_next, more,
    ring_a, ring_w, full, empty, full_w, empty_w,
    EVEN_K: gl.constexpr, WIDE: gl.constexpr, NEXT: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """A stage for each step of depth in [begin, end), TOGETHER of them at a time: what lies side by side in memory is asked for
    together. A stage's weights lie by (part of the columns, depth, block). Beyond the end of the depth, zeros arrive."""
    if ring_w.dtype != ring_a.dtype:
        return _feed_codes(begin, end, last, step, pointers, mask, at_k, k_end, a_tma, w0, w1, first, row_w, n0, row_next, n0_next, more,
                           ring_a, ring_w, full, empty, full_w, empty_w, EVEN_K, NEXT, GATHER)  # fmt: skip
    STAGES: gl.constexpr = ring_a.shape[0]
    BK: gl.constexpr = ring_a.shape[2]
    PARTS: gl.constexpr = 2 * HALF_ROWS // ring_a.shape[1]
    CHUNKS: gl.constexpr = ring_w.shape[0] // (2 * STAGES * PARTS)  # boxes along the depth: rows of 128 bytes each
    DEPTH: gl.constexpr = w0.block_shape[1] if OUT_IN else BK  # of a box; rows in two parts have twice as many bytes a step as weights
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
                depth = ((k + i // CHUNKS % TOGETHER) * CHUNKS + i % CHUNKS) * DEPTH
                at = 2 * ((s * PARTS + part) * CHUNKS + i % CHUNKS) + i // (TOGETHER * CHUNKS)
                if i < TOGETHER * CHUNKS:
                    _ask(w0, row_w, column, depth, full.index(s), ring_w.index(at), OUT_IN)
                else:
                    _ask(w1, row_w, column + NEXT, depth, full.index(s), ring_w.index(at), OUT_IN)
        for i in gl.static_range(TOGETHER):
            s = (step + i) % STAGES
            pointers = _rows(k + i, s, pointers, mask, at_k, k_end, a_tma, first, ring_a, full, EVEN_K, GATHER)
        step += TOGETHER
    return step, pointers


@gluon.jit
def _feed_codes(
    begin, end, last, step, pointers, mask, at_k, k_end, a_tma, w0, w1, first, row_w, n0, row_next, n0_next, more,
    ring_a, ring_c, full, empty, full_c, empty_c,
    EVEN_K: gl.constexpr, NEXT: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """As `_feed` where weights are decoded on the way: their codes go to a ring of their own, AHEAD steps before their rows: behind `last`,
    where the tile's steps end, those of the next tile, if there is one (`more`)."""
    STAGES: gl.constexpr = ring_a.shape[0]
    for k in range(begin, end):
        s = step % STAGES
        mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
        if not GATHER:
            mbarrier.expect(full.index(s), a_tma.block_type.nbytes)
        pointers = _rows(k, s, pointers, mask, at_k, k_end, a_tma, first, ring_a, full, EVEN_K, GATHER)
        here = k + AHEAD < last
        if here | more:
            depth = gl.where(here, k + AHEAD, k + AHEAD - last)
            _ask_codes(
                step + AHEAD, w0, w1, gl.where(here, row_w, row_next), gl.where(here, n0, n0_next), depth, ring_c, full_c, empty_c, NEXT
            )
        step += 1
    return step, pointers


@gluon.jit
def _ask_codes(number, w0, w1, row, n0, k, ring_c, full_c, empty_c, NEXT: gl.constexpr):
    """Codes of step k of a tile, the number-th that are asked for."""
    CODES: gl.constexpr = ring_c.shape[0] // 2
    c = number % CODES
    mbarrier.wait(empty_c.index(c), ((number // CODES) & 1) ^ 1)
    mbarrier.expect(full_c.index(c), w0.block_type.nbytes + w1.block_type.nbytes)
    _ask(w0, row, n0, k * w0.block_shape[1], full_c.index(c), ring_c.index(2 * c), True)
    _ask(w1, row, n0 + NEXT, k * w1.block_shape[1], full_c.index(c), ring_c.index(2 * c + 1), True)


@gluon.jit
def _rows(k, s, pointers, mask, at_k, k_end, a_tma, first, ring_a, full, EVEN_K: gl.constexpr, GATHER: gl.constexpr):
    """Asks for the rows of step k of the depth, into stage s: gathered ones are not read beyond the expert's end."""
    BK: gl.constexpr = ring_a.shape[2]
    PIECE: gl.constexpr = pointers.shape[1]
    if GATHER:
        for at in gl.static_range(0, BK, PIECE):
            inside = mask
            if not EVEN_K:
                inside = mask & gl.expand_dims(at_k + (k * BK + at) < k_end, 0)
            async_copy.async_copy_global_to_shared(ring_a.index(s).slice(at, PIECE, dim=1), pointers + at, mask=inside)
        async_copy.mbarrier_arrive(full.index(s), increment_count=False)
        pointers += BK
    else:
        tma.async_copy_global_to_shared(a_tma, [first, k * BK], full.index(s), ring_a.index(s))
    return pointers


@gluon.jit
def _ask(w, row, column, depth, full, place, OUT_IN: gl.constexpr):
    """A box of an expert's matrix, whose rows begin at `row` of all matrices one below the other."""
    if OUT_IN:
        tma.async_copy_global_to_shared(w, [row + column, depth], full, place)
    else:
        tma.async_copy_global_to_shared(w, [row + depth, column], full, place)


@gluon.jit
def produce(
    a, a_tma, w0, w1, order, offsets, starts, tiles, tile_starts, num_tiles, counter, num_slots, blocks, steps, k,
    slots_per_token, stride_a, rows_per_expert, ring_a, ring_w, full, empty, full_w, empty_w, news, told, heard,
    EVEN_K: gl.constexpr, WIDE: gl.constexpr, NEXT: gl.constexpr, OUT_IN: gl.constexpr, GATHER: gl.constexpr, PAD: gl.constexpr,
    GROUP: gl.constexpr,
    SPLIT: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = ring_a.shape[1]
    BK: gl.constexpr = ring_a.shape[2]
    WIDTH: gl.constexpr = 128 // ring_a.dtype.primitive_bitwidth  # 16 bytes
    layout: gl.constexpr = gl.BlockedLayout([1, WIDTH], [4, 8], [gl.num_warps(), 1], [1, 0])
    at_row = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    at_k = gl.arange(0, min(BK, 8 * WIDTH), layout=gl.SliceLayout(0, layout))
    row_tiles = gl.load(num_tiles)
    tile = gl.program_id(0)
    e = expert_of(tile, tiles, row_tiles, blocks)
    begin, end = gl.load(offsets + e), gl.load(offsets + e + 1)
    row, block = place_of(tile, gl.load(tile_starts + e), gl.load(tile_starts + e + 1), blocks, GROUP)
    slots = at_row
    if GATHER:
        slots = gl.load(order + begin + row * BM + at_row, mask=begin + row * BM + at_row < num_slots, other=0)
    if ring_w.dtype != ring_a.dtype:
        if tile < row_tiles * blocks:
            for i in gl.static_range(AHEAD):
                _ask_codes(i, w0, w1, e * rows_per_expert, block * WIDE, i, ring_w, full_w, empty_w, NEXT)
    step = 0
    number = 0
    while tile < row_tiles * blocks:
        first = begin + row * BM
        row_a = first
        if PAD > 0:
            row_a = gl.load(starts + e) * PAD + row * BM
        part, from_step, to_step, column = part_of(block, blocks, steps, SPLIT)
        tell(news, told, heard, number, e, first + part * num_slots, end + part * num_slots, column, part)
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
        step, pointers = _feed(from_step, claim_at, to_step, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0,
                               row_w, n0, True, ring_a, ring_w, full, empty, full_w, empty_w,
                               EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        tile = claim(counter)
        step, pointers = _feed(claim_at, expert_at, to_step, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0,
                               row_w, n0, True, ring_a, ring_w, full, empty, full_w, empty_w,
                               EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        e = expert_of(tile, tiles, row_tiles, blocks)
        step, pointers = _feed(expert_at, place_at, to_step, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0,
                               row_w, n0, True, ring_a, ring_w, full, empty, full_w, empty_w,
                               EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        begin, end = gl.load(offsets + e), gl.load(offsets + e + 1)
        tile_begin, tile_end = gl.load(tile_starts + e), gl.load(tile_starts + e + 1)
        step, pointers = _feed(place_at, rows_at, to_step, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0,
                               row_w, n0, True, ring_a, ring_w, full, empty, full_w, empty_w,
                               EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        row, block = place_of(tile, tile_begin, tile_end, blocks, GROUP)
        if GATHER:
            slots = gl.load(order + begin + row * BM + at_row, mask=begin + row * BM + at_row < num_slots, other=0)
        step, pointers = _feed(rows_at, to_step, to_step, step, pointers, mask, at_k, k, a_tma, w0, w1, row_a, row_w, n0,
                               e * rows_per_expert, block * WIDE, tile < row_tiles * blocks, ring_a, ring_w,
                               full, empty, full_w, empty_w, EVEN_K, WIDE, NEXT, OUT_IN, GATHER, TOGETHER)  # fmt: skip
        number += 1
    tell(news, told, heard, number, 0, -1, 0, 0, 0)
    leave(counter)
