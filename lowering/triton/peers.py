"""Exchanges through peers' memory, each in one launch: rows and choices are gathered, results are summed.

The first half of a launch's programs writes this rank's part into its peers' memory, chunk by chunk, raises a flag there behind each, and
waits for nobody. The second half waits for the peers' flags and reads what they have written into its own, so that nothing waits for a
program that has not started. (Reading from peers takes longer: a request travels first. docs/distributed.md has both.) There are as many
programs as there are tiles, up to a number that fills the card: a launch of few rows is latency alone, which grows with its programs.

A flag holds the number of the call, which is the same on all ranks, and in its low 32 bits a number that the rank says: of tokens, so that
a rank that says another one may have other rows, and fewer programs that raise flags. Whoever waits for one of those sees it by the peer's
first flag, which every launch raises, and goes on; what it reads then is undefined. Calls alternate
between two halves of the memory, and no barrier ends them: a rank that is through call n + 1 has heard of every peer that it is in n + 1,
so that it has read all of n, and call n + 2 may write where n did. The count of calls is on the device: CUDA graphs of any number of
calls may be replayed in any order.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, check-untyped-defs=False

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.summed import FLAGS as BYTES
from ...ops.summed import Peers
from .host import cdiv

WORKERS, CHUNKS = tl.constexpr(512), tl.constexpr(4)  # at most: each has a flag of each of up to 8 ranks in each half
FLAGS = tl.constexpr(BYTES)  # bytes in front of the halves: 2 x chunks x workers x ranks x 8
CALLS = tl.constexpr((1 << 30) - 1)  # the number of a call is taken modulo 2^30: it shares a flag with what a rank says
WARPS = 8  # each thread has 64 bytes of rows on the way, at 4,096 words of 4 bytes
OFTEN = tl.constexpr(32)  # looks at a flag between two looks at the first one of that rank


@triton.jit
def _flag(bases, owner, source, call, chunk, i, RANKS: tl.constexpr):
    """Where rank `source` tells `owner` that its worker i is through a chunk."""
    base = tl.load(bases + owner).to(tl.pointer_type(tl.int64))
    return base + (((call & 1) * CHUNKS + chunk) * WORKERS + i) * RANKS + source


@triton.jit
def _half(bases, owner, call, half):
    """The address in a rank's memory of what it is given in this call."""
    return tl.load(bases + owner) + FLAGS + (call & 1) * half


@triton.jit
def _at(address, DTYPE: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _tell(bases, call, chunk, i, said, RANK: tl.constexpr, RANKS: tl.constexpr):
    """All that this program has stored is to be seen by whoever sees the flag."""
    tl.debug_barrier()
    for s in tl.static_range(1, RANKS):
        flag = _flag(bases, (RANK + s) % RANKS, RANK, call, chunk, i, RANKS)
        tl.atomic_xchg(flag, (call << 32) | said, sem="release", scope="sys")


@triton.jit
def _hear(bases, call, chunk, i, peer, said, lost, limit, RANK: tl.constexpr, RANKS: tl.constexpr, TIMED: tl.constexpr):
    """Waits for a peer; what it says. Behind `limit` nanoseconds it is noted as lost, and the program traps.

    A peer that says another number than `said` is heard by its first flag: it may raise no other one."""
    flag, first = _flag(bases, RANK, peer, call, chunk, i, RANKS), _flag(bases, RANK, peer, call, 0, 0, RANKS)
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    looks = 0
    began = call  # of one type with the clock
    if TIMED:
        began = tl.extra.cuda.globaltimer()
    while (seen >> 32) != call:
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        looks += 1
        if looks % OFTEN == 0:
            other = tl.atomic_add(first, 0, sem="acquire", scope="sys")
            seen = tl.where((other >> 32 == call) & ((other & 0xFFFFFFFF) != said), other, seen)
        if TIMED:
            if tl.extra.cuda.globaltimer() - began > limit:
                tl.store(lost + peer, 1)
                tl.inline_asm_elementwise("membar.sys; trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    return seen & 0xFFFFFFFF


@triton.jit
def _leave(count, call):
    """The last program of a launch counts the call."""
    tl.debug_barrier()
    if tl.atomic_add(count + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(count + 1, 0)
        tl.store(count, call)


@triton.jit
def _copy(source, target, n, first, steps, i, workers, TILE: tl.constexpr):
    """Worker i's tiles of a chunk: `steps` from its tile `first` on."""
    for s in range(steps):
        at = ((first + s) * workers + i).to(tl.int64) * TILE + tl.arange(0, TILE)
        tl.store(target + at, tl.load(source + at, mask=at < n), mask=at < n)


@triton.jit(do_not_specialize=["said", "n_ids", "n_weights", "limit"])
def _gather(
    x, ids, weights, rows, all_ids, all_weights, told, even, bases, count, lost,
    said, words, n_ids, n_weights, weights_at, rows_at, half, limit,
    RANK: tl.constexpr, RANKS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    workers = tl.num_programs(0) // 2
    call = (tl.load(count) + 1) & CALLS
    each = tl.cdiv(tl.cdiv(words, TILE), workers * PARTS)
    ids_steps, weights_steps = tl.cdiv(tl.cdiv(n_ids, TILE), workers), tl.cdiv(tl.cdiv(n_weights, TILE), workers)
    i = tl.program_id(0) % workers
    id_type: tl.constexpr = ids.dtype.element_ty
    weight_type: tl.constexpr = weights.dtype.element_ty
    if tl.program_id(0) < workers:
        for c in tl.static_range(PARTS):
            for s in tl.static_range(1, RANKS):
                base = _half(bases, (RANK + s) % RANKS, call, half)
                if c == 0:
                    _copy(ids, _at(base, id_type) + RANK * n_ids, n_ids, 0, ids_steps, i, workers, TILE)
                    place = _at(base + weights_at, weight_type) + RANK * n_weights
                    _copy(weights, place, n_weights, 0, weights_steps, i, workers, TILE)
                _copy(x, _at(base + rows_at, tl.int32) + RANK * words, words, c * each, each, i, workers, TILE)
            _tell(bases, call, c, i, said, RANK, RANKS)
        _copy(ids, all_ids + RANK * n_ids, n_ids, 0, ids_steps, i, workers, TILE)
        _copy(weights, all_weights + RANK * n_weights, n_weights, 0, weights_steps, i, workers, TILE)
        _copy(x, rows + RANK * words, words, 0, each * PARTS, i, workers, TILE)
    else:
        same = said == said
        base = _half(bases, RANK, call, half)
        for c in tl.static_range(PARTS):
            for s in tl.static_range(1, RANKS):
                peer = (RANK + s) % RANKS
                number = _hear(bases, call, c, i, peer, said, lost, limit, RANK, RANKS, TIMED)
                if i == 0:
                    tl.store(told + peer, number.to(tl.int32))
                    same = same & (number == said)
                if c == 0:
                    _copy(_at(base, id_type) + peer * n_ids, all_ids + peer * n_ids, n_ids, 0, ids_steps, i, workers, TILE)
                    place = _at(base + weights_at, weight_type) + peer * n_weights
                    _copy(place, all_weights + peer * n_weights, n_weights, 0, weights_steps, i, workers, TILE)
                _copy(_at(base + rows_at, tl.int32) + peer * words, rows + peer * words, words, c * each, each, i, workers, TILE)
        if i == 0:
            tl.store(told + RANK, said.to(tl.int32))
            tl.store(even, same)
    _leave(count, call)


@triton.jit(do_not_specialize=["limit"])
def _add(
    part, out, bases, count, lost, n, rows_at, half, limit,
    RANK: tl.constexpr, RANKS: tl.constexpr, SCATTER: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    workers = tl.num_programs(0) // 2
    call = (tl.load(count) + 1) & CALLS
    each = tl.cdiv(tl.cdiv(n, TILE), workers * PARTS)
    i = tl.program_id(0) % workers
    dtype: tl.constexpr = part.dtype.element_ty
    total: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    if tl.program_id(0) < workers:
        for c in tl.static_range(PARTS):
            for s in tl.static_range(1, RANKS):
                peer = (RANK + s) % RANKS
                place = _at(_half(bases, peer, call, half) + rows_at, dtype) + RANK * n
                _copy(part + (peer if SCATTER else 0) * n, place, n, c * each, each, i, workers, TILE)
            _tell(bases, call, c, i, 0, RANK, RANKS)
    else:
        own = part + (RANK if SCATTER else 0) * n
        base = _at(_half(bases, RANK, call, half) + rows_at, dtype)
        for c in tl.static_range(PARTS):
            for s in tl.static_range(1, RANKS):
                _hear(bases, call, c, i, (RANK + s) % RANKS, 0, lost, limit, RANK, RANKS, TIMED)
            for step in range(each):
                at = ((c * each + step) * workers + i).to(tl.int64) * TILE + tl.arange(0, TILE)
                sums = tl.zeros((TILE,), total)
                for r in tl.static_range(RANKS):
                    addend = tl.load((own if r == RANK else base + r * n) + at, mask=at < n, other=0.0)
                    sums += addend.to(total)
                tl.store(out + at, sums.to(dtype), mask=at < n)
    _leave(count, call)


def gathered(p: Peers, x: Tensor, ids: Tensor, weights: Tensor, said: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [T, ...] (whole vectors of 16 bytes), ids and weights, contiguous -> those of all ranks by rank, what each rank says [ranks], in
    int32, and whether all say the same []. Where they do not the rest is undefined."""
    whole = [t.new_empty(p.size * t.shape[0], *t.shape[1:]) for t in (x, ids, weights)]
    told, even = (torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in (((p.size,), torch.int32), ((), torch.bool)))
    own = [_words(t) for t in (x, ids, weights)]
    every = [t.view(-1).view(w.dtype) for t, w in zip(whole, own, strict=True)]
    workers, parts, tile = _grid(p, own[0].numel())
    with _on(x):
        _gather[(2 * workers,)](
            *own, *every, told, even, p.bases, p.count, p.lost, said & 0xFFFFFFFF, *(t.numel() for t in own),
            cdiv(p.size * own[1].numel() * own[1].element_size(), 16) * 16, p.message, p.half, p.timeout * 1_000_000,
            RANK=p.rank, RANKS=p.size, PARTS=parts, TILE=tile, TIMED=x.is_cuda, num_warps=WARPS,
        )  # fmt: skip
    return whole[0], whole[1], whole[2], told, even


def added(p: Peers, part: Tensor, scatter: bool) -> Tensor:
    """part, contiguous, of whole vectors -> Σ over the ranks, in their order, in float32 or wider. scatter: part [ranks · n, ...], of which
    each rank gets the sums of its [n, ...]."""
    out = part.new_empty(part.shape[0] // p.size, *part.shape[1:]) if scatter else torch.empty_like(part)
    part = _aligned(part)
    workers, parts, tile = _grid(p, out.numel())
    with _on(part):
        _add[(2 * workers,)](
            part, out, p.bases, p.count, p.lost, out.numel(), p.message, p.half, p.timeout * 1_000_000,
            RANK=p.rank, RANKS=p.size, SCATTER=scatter, PARTS=parts, TILE=tile, TIMED=part.is_cuda, num_warps=WARPS,
        )  # fmt: skip
    return out


def _grid(p: Peers, n: int) -> tuple[int, int, int]:
    """(programs that write, chunks, words of a tile) for n words, or elements, of each rank: no more of either than there are tiles."""
    tile = p.tile if n > p.workers * p.few else p.few
    tiles = max(1, cdiv(n, tile))
    workers = max(min(tiles, p.workers), p.least)
    return workers, min(p.chunks, cdiv(tiles, workers)), tile


def _aligned(t: Tensor) -> Tensor:
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _words(t: Tensor) -> Tensor:
    """As words of 4 bytes, or the widest that it is a whole number of: one width for all, so that the compiler loads and stores alike."""
    size = t.numel() * t.element_size()
    return _aligned(t).view(-1).view(torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.int8)


def _on(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
