"""The dispatch in plain torch: (token, slot) pairs ordered by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.records import ChainedLayout, Layout

# Bytes of a block's widest rows: what is made for one block stays in the caches, and the allocator has the same memory for the next
_BLOCK = 1 << 19
_FEW = 32  # pairs


@dataclass(frozen=True)
class Block:
    """Rows of consecutive experts. `experts`: those that have rows; `counts`: how many each."""

    here: slice
    slots: Tensor  # [n] position t * k + j
    tokens: Tensor  # [n]
    experts: list[int]
    counts: list[int]

    def each(self, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
        """(e, its part of each matrix of the block's rows) for every expert that has rows."""
        return zip(self.experts, *(r.split(self.counts) for r in rows), strict=True)

    def by_row(self, w: Tensor) -> Tensor:
        """Routing weights [T, k] as a column, one for each row."""
        return w.reshape(-1).index_select(0, self.slots).unsqueeze(-1)


@dataclass(frozen=True)
class Rows:
    """The (token, slot) pairs ordered by expert; pairs of no expert are left out."""

    slots: Tensor  # [N]
    k: int
    counts: list[int]  # rows per expert
    identity: Block  # pairs of identity experts

    def blocks(self, row_bytes: int) -> Iterator[Block]:
        """Experts that have rows, as many at a time as fit; an expert is never divided."""
        most = max(_BLOCK // max(row_bytes, 1), 1)
        start = end = 0
        experts: list[int] = []
        for e, count in enumerate(self.counts):
            if experts and count and end - start + count > most:
                yield self._block(start, end, experts)
                start, experts = end, []
            if count:
                experts.append(e)
                end += count
        if experts:
            yield self._block(start, end, experts)

    def _block(self, start: int, end: int, experts: list[int]) -> Block:
        slots = self.slots[start:end]
        return Block(slice(start, end), slots, slots // self.k, experts, [self.counts[e] for e in experts])


def group_rows(ids: Tensor, layout: Layout | ChainedLayout) -> Rows:
    """Order the pairs of ids [T, k] by expert."""
    n, k = layout.num_experts, max(ids.shape[1], 1)
    if ids.numel() <= _FEW and ids.device.type == "cpu" and not layout.num_identity:
        return _few_rows(ids, n, k)
    flat = ids.reshape(-1).long()
    known = torch.where((flat >= 0) & (flat < n), flat, n)
    slots = known.argsort(stable=True)
    counts: list[int] = torch.bincount(known, minlength=n + 1)[:n].tolist()
    slots = slots[: sum(counts)]
    identity = slots[:0]
    if layout.num_identity:
        identity = ((flat >= n) & (flat < n + layout.num_identity)).nonzero().squeeze(-1)
    return Rows(slots, k, counts, Block(slice(0, len(identity)), identity, identity // k, [], []))


class TokenSums:
    """out [T, n] += Σ of the rows put for each token.

    On the CPU they are added as they come, experts in order. Elsewhere `index_add_` adds in any order: rows wait at their slots, [T·k, n],
    and are added slot by slot at the end.
    """

    def __init__(self, out: Tensor, ids: Tensor) -> None:
        self.out, self.k = out, max(ids.shape[1], 1)
        self.waiting = None if in_order(out.device) else out.new_zeros(ids.numel(), out.shape[1])

    def add(self, block: Block, rows: Tensor) -> None:
        """Rows of a block; a slot has one at most."""
        if self.waiting is None:
            self.out.index_add_(0, block.tokens, rows)
        else:
            self.waiting[block.slots] = rows

    def result(self) -> Tensor:
        if self.waiting is not None:
            self.out += self.waiting.view(-1, self.k, self.out.shape[1]).sum(1)
        return self.out


def in_order(device: torch.device) -> bool:
    """Whether `index_add_` adds rows one after the other."""
    return device.type == "cpu"


def _few_rows(ids: Tensor, n: int, k: int) -> Rows:
    """As `group_rows`: for a few pairs Python is faster than calls of torch."""
    chosen = ids.reshape(-1).tolist()
    counts = [0] * n
    for e in chosen:
        if 0 <= e < n:
            counts[e] += 1
    slots = torch.tensor(sorted((i for i, e in enumerate(chosen) if 0 <= e < n), key=chosen.__getitem__), dtype=torch.int64)
    return Rows(slots, k, counts, Block(slice(0, 0), slots[:0], slots[:0], [], []))
