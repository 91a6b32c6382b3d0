"""Dispatch metadata of a routing: rows ordered by expert, and the row tiles that the grouped GEMMs walk.

    order   = stable argsort of the experts of all pairs          a counting sort
    offsets = [0, cumsum(counts)]
    tile i  belongs to the expert e with tile_end[e-1] <= i < tile_end[e]

Few pairs: one launch, a program per expert, each reads all pairs (they are in the cache) and places its own. Many pairs: two launches, a
program per segment of pairs; the first counts, the second sorts its pairs meanwhile, adds up the counts of the segments before and places.
Nothing depends on the order in which programs run, and no program waits for another.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine import early_launch
from .host import cdiv, power_of_2
from .launch.tape import empty, launch

_ONE_LAUNCH = 2048  # pairs that one program reads at once
_BUCKETS = (128, 1024, _ONE_LAUNCH)
_SMALL_CHUNK, _CHUNK = 256, 1024  # pairs that one program sorts at once
_TABLE = 8192  # entries of (segment, expert) that a program adds up at once
_WRITERS, _SLOTS = 64, 32  # programs that write the tile lists, entries that one finds at once


@dataclass(frozen=True)
class Dispatch:
    """The (token, slot) pairs of ids [T, k] ordered by expert, stable by position; ids outside [0, E) are left out. N = T * k.

    order: int32 [N], sorted row -> slot t * k + j; valid up to offsets[E].
    offsets: int32 [E + 1], first sorted row of each expert.
    tiles: row-tile height BM -> int32 [2, E + N // BM] of (expert, first sorted row), expert -1 behind the last tile.
    num_tiles: row-tile height BM -> int32 [1], how many tiles there are (read by persistent kernels on the device).
    tile_starts: row-tile height BM -> int32 [E + 1], the first tile of each expert.
    rank: int32 [N], slot -> sorted row, the inverse of `order`; undefined at slots without an expert.
    counters: int32 [2], zero: a kernel that claims tiles counts there, and leaves zeros behind.
    """

    order: Tensor
    offsets: Tensor
    tiles: dict[int, Tensor]
    num_tiles: dict[int, Tensor]
    tile_starts: dict[int, Tensor]
    rank: Tensor
    counters: Tensor


@triton.jit
def _experts_of(ids, i, n, E: tl.constexpr):
    """(expert or 0, whether the pair has one) of pairs i."""
    e = tl.load(ids + i, mask=i < n, other=-1)
    known = (e >= 0) & (e < E)
    return tl.where(known, e, 0).to(tl.int32), known


@triton.jit
def _write_tiles(counts, starts, tiles, tile_starts, length, program, E: tl.constexpr, BM: tl.constexpr, SLOTS: tl.constexpr):
    """Entries [program * SLOTS, ...) of the tile list from counts and starts [EP]; program 0 writes the first tile of each expert."""
    EP: tl.constexpr = counts.shape[0]
    each = (counts + (BM - 1)) // BM
    ends = tl.cumsum(each, 0)
    total = tl.sum(each, 0)
    i = program * SLOTS + tl.arange(0, SLOTS)
    e = tl.sum((ends[None, :] <= i[:, None]).to(tl.int32), 1)
    mine = tl.arange(0, EP)[None, :] == e[:, None]
    row = tl.sum(tl.where(mine, (starts - (ends - each) * BM)[None, :], 0), 1) + i * BM
    used = i < total
    tl.store(tiles + i, tl.where(used, e, -1), mask=i < length)
    tl.store(tiles + length + i, tl.where(used, row, 0), mask=i < length)
    _write_offsets(tile_starts, ends, program, E)


@triton.jit
def _write_offsets(offsets, ends, program, E: tl.constexpr):
    """[0, ends]."""
    if program == 0:
        e = tl.arange(0, ends.shape[0])
        tl.store(offsets + e + 1, ends, mask=e < E)
        tl.store(offsets, 0)


@triton.jit
def _clear(counters, program):
    if program == 0:
        tl.store(counters + tl.arange(0, 2), tl.zeros((2,), tl.int32))


@triton.jit(do_not_specialize=["n", "length0", "length1"])
def _sort_few(
    ids, order, rank, offsets, tiles0, tiles1, tile_starts, n, length0, length1,
    E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr, BM0: tl.constexpr, BM1: tl.constexpr, SLOTS0: tl.constexpr, SLOTS1: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program e places the pairs of expert e."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    i = tl.arange(0, BN)
    e, known = _experts_of(ids, i, n, E)
    counts = tl.histogram(e, EP, mask=known)
    ends = tl.cumsum(counts, 0)
    starts = ends - counts
    mine = known & (e == program)
    row = tl.sum(tl.where(tl.arange(0, EP) == program, starts, 0), 0) + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(order + row, i, mask=mine)
    tl.store(rank + i, row, mask=mine)
    _write_offsets(offsets, ends, program, E)
    _clear(offsets + E + 1, program)
    if BM0 > 0:
        _write_tiles(counts, starts, tiles0, tile_starts, length0, program, E, BM0, SLOTS0)
    if BM1 > 0:
        _write_tiles(counts, starts, tiles1, tile_starts + (E + 1), length1, program, E, BM1, SLOTS1)


@triton.jit(do_not_specialize=["n", "segment"])
def _count(ids, counts, n, segment, E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr):
    """counts[p] = pairs per expert in segment p."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # only now: who starts early reads ids before it waits
    first = tl.program_id(0) * segment
    total = tl.zeros((EP,), tl.int32)
    for c in range(first, tl.minimum(first + segment, n), CHUNK):
        e, known = _experts_of(ids, c + tl.arange(0, CHUNK), n, E)
        total += tl.histogram(e, EP, mask=known)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), total.to(counts.dtype.element_ty))


@triton.jit
def _add_up(counts, segments, program, EP: tl.constexpr, BP: tl.constexpr, MOST: tl.constexpr):
    """(pairs per expert in all segments, in those before `program`); at most MOST segments."""
    total = tl.zeros((BP, EP), tl.int32)
    before = tl.zeros((BP, EP), tl.int32)
    for p0 in tl.static_range(0, MOST, BP):
        p = p0 + tl.arange(0, BP)[:, None]
        part = tl.load(counts + p * EP + tl.arange(0, EP)[None, :], mask=p < segments, other=0).to(tl.int32)
        total += part
        before += tl.where(p < program, part, 0)
    return tl.sum(total, 0), tl.sum(before, 0)


@triton.jit
def _sort(ids, c, n, E: tl.constexpr, EP: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """(expert << BITS | position, ascending, E where there is none; pairs per expert) of the chunk from c on."""
    at = tl.arange(0, CHUNK)
    e, known = _experts_of(ids, c + at, n, E)
    return tl.sort((tl.where(known, e, E) << BITS) | at), tl.histogram(e, EP, mask=known)


@triton.jit
def _put(order, rank, c, pairs, here, target, E: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk's runs go to where each expert's rows go on, `target` [EP]."""
    e = pairs >> BITS
    shift = target - (tl.cumsum(here, 0) - here)
    row = tl.gather(shift, tl.where(e < E, e, 0), 0) + tl.arange(0, CHUNK)
    slot = c + (pairs & (CHUNK - 1))
    tl.store(order + row, slot, mask=e < E)
    tl.store(rank + slot, row, mask=e < E)


@triton.jit(do_not_specialize=["n", "segment", "segments", "length0", "length1"])
def _place(
    ids, counts, order, rank, offsets, tiles0, tiles1, tile_starts, n, segment, segments, length0, length1,
    E: tl.constexpr, EP: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr, MOST: tl.constexpr,
    BM0: tl.constexpr, BM1: tl.constexpr, SLOTS: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs below `segments` place the pairs of their segment, the others write the tile lists. ONE: a segment is one chunk, sorted
    by (expert, position) before the counts are there.

    With PDL a program starts while the counts are not there yet; the ids are: whoever counts has waited for them.
    """
    program = tl.program_id(0)
    if program < segments:
        first = program * segment
        if ONE:
            pairs, here = _sort(ids, first, n, E, EP, BITS, CHUNK)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        total, before = _add_up(counts, segments, program, EP, BP, MOST)
        target = tl.cumsum(total, 0) - total + before
        if ONE:
            _put(order, rank, first, pairs, here, target, E, BITS, CHUNK)
        else:
            for c in range(first, tl.minimum(first + segment, n), CHUNK):
                pairs, here = _sort(ids, c, n, E, EP, BITS, CHUNK)
                _put(order, rank, c, pairs, here, target, E, BITS, CHUNK)
                target += here
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        total, before = _add_up(counts, segments, 0, EP, BP, MOST)
        ends = tl.cumsum(total, 0)
        writer = program - segments
        writers = tl.num_programs(0) - segments
        _write_offsets(offsets, ends, writer, E)
        _clear(offsets + E + 1, writer)
        if BM0 > 0:
            for part in range(writer, tl.cdiv(length0, SLOTS), writers):
                _write_tiles(total, ends - total, tiles0, tile_starts, length0, part, E, BM0, SLOTS)
        if BM1 > 0:
            for part in range(writer, tl.cdiv(length1, SLOTS), writers):
                _write_tiles(total, ends - total, tiles1, tile_starts + (E + 1), length1, part, E, BM1, SLOTS)


def dispatch(ids: Tensor, num_experts: int, blocks: tuple[int, ...]) -> Dispatch:
    """Sort the pairs of ids [T, k] (any int dtype) by expert, with a tile list for every BM in `blocks` (at most two).

    One launch up to 2048 pairs, two beyond; the host never waits. Raises ValueError for 2^31 pairs or more.
    """
    n = ids.numel()
    if n >= 2**31 - _CHUNK:
        raise ValueError(f"{n} pairs of tokens and experts do not fit the int32 metadata")
    lengths = [num_experts + n // block for block in blocks]
    order, rank, offsets, starts = (empty(ids, size, dtype=torch.int32) for size in (n, n, num_experts + 3, 2 * (num_experts + 1)))
    tiles = [empty(ids, 2, length, dtype=torch.int32) for length in lengths]
    sort = _launch_few if n <= _ONE_LAUNCH else _launch_many
    sort(ids.contiguous(), num_experts, blocks, lengths, [order, rank, offsets, *tiles, *[None] * (2 - len(tiles)), starts])
    by_block = dict(zip(blocks, starts.view(2, -1).unbind(0)))
    num_tiles = {b: t[num_experts:] for b, t in by_block.items()}
    return Dispatch(order, offsets[: num_experts + 1], dict(zip(blocks, tiles)), num_tiles, by_block, rank, offsets[num_experts + 1 :])


def _bins(num_experts: int) -> int:
    return max(32, power_of_2(num_experts))


def _pair(values: list[int], none: int = 0) -> list[int]:
    return [*values, none, none][:2]


def _slots(lengths: list[int], programs: int) -> list[int]:
    """Tile list entries that each program writes, of either list."""
    return _pair([power_of_2(cdiv(length, programs)) for length in lengths], 1)


def _early(ids: Tensor) -> dict[str, Any]:
    """Launch options: start while the kernel before still runs, where the card can."""
    return {"launch_pdl": True} if early_launch(ids) else {}


def _launch_few(ids: Tensor, num_experts: int, blocks: tuple[int, ...], lengths: list[int], out: list[Tensor | None]) -> None:
    bucket = next(b for b in (*_BUCKETS, power_of_2(max(1, ids.numel()))) if b >= ids.numel())
    programs = num_experts
    slots = _slots([num_experts + bucket // block for block in blocks], programs)  # of the bucket: fewer kernels
    bms, pdl = _pair(list(blocks)), _early(ids)
    launch(
        _sort_few, (programs,),
        ids, *out, ids.numel(), *_pair(lengths),
        E=num_experts, EP=_bins(num_experts), BN=bucket, BM0=bms[0], BM1=bms[1], SLOTS0=slots[0], SLOTS1=slots[1],
        PDL=bool(pdl), num_warps=8 if bucket > 1024 else 4, **pdl,
    )  # fmt: skip


def _segments(pairs: int, bins: int) -> tuple[int, bool, bool, int]:
    """(segments at most, whether the first launch and the second start early, warps of the second), as measured on an H100.

    Many programs that wait take the place of those they wait for, unless they are small; adding up the counts of many experts is not.
    """
    if bins <= 128 and pairs <= 2**17:
        return (256, True, True, 4) if pairs > 2**16 else (128, pairs <= 2**15, True, 4)
    early = pairs <= 2**15
    return (128 if bins <= 256 and not early else 64), early, early, 8


def _launch_many(ids: Tensor, num_experts: int, blocks: tuple[int, ...], lengths: list[int], out: list[Tensor | None]) -> None:
    n, bins = ids.numel(), _bins(num_experts)
    programs, count_early, place_early, warps = _segments(n, bins)
    pdl_count, pdl = (_early(ids) if early else {} for early in (count_early, place_early))
    chunk = min(_CHUNK, max(_SMALL_CHUNK, power_of_2(cdiv(n, programs))))
    segment = cdiv(cdiv(n, chunk), programs) * chunk
    segments = cdiv(n, segment)
    counts = empty(ids, segments, bins, dtype=torch.int16 if segment < 2**15 else torch.int32)
    launch(_count, (segments,), ids, counts, n, segment, E=num_experts, EP=bins, CHUNK=chunk, PDL=bool(pdl_count), num_warps=4, **pdl_count)
    writers = min(_WRITERS, max([1, *(cdiv(length, _SLOTS) for length in lengths)]))
    bms = _pair(list(blocks))
    launch(
        _place, (segments + writers,),
        ids, counts, *out, n, segment, segments, *_pair(lengths),
        E=num_experts, EP=bins, BITS=chunk.bit_length() - 1, CHUNK=chunk, BP=max(1, _TABLE // bins), MOST=programs,
        BM0=bms[0], BM1=bms[1], SLOTS=_SLOTS, ONE=segment == chunk, PDL=bool(pdl), num_warps=warps, **pdl,
    )  # fmt: skip
