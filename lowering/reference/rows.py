"""The dispatch in plain torch: (token, slot) pairs ordered by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.records import Layout

# Bytes of a block's widest rows: what is made for one block stays in the caches, and the allocator has the same memory for the next
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Block:
    """Rows of consecutive experts. `spans`: experts that have rows, and where these are among the block's."""

    here: slice
    slots: Tensor  # [n] position t * k + j
    tokens: Tensor  # [n]
    spans: list[tuple[int, slice]]

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
        spans: list[tuple[int, slice]] = []
        for e, count in enumerate(self.counts):
            if spans and count and end - start + count > most:
                yield self._block(start, end, spans)
                start, spans = end, []
            if count:
                spans.append((e, slice(end - start, end - start + count)))
                end += count
        if spans:
            yield self._block(start, end, spans)

    def _block(self, start: int, end: int, spans: list[tuple[int, slice]]) -> Block:
        slots = self.slots[start:end]
        return Block(slice(start, end), slots, slots // self.k, spans)


def group_rows(ids: Tensor, layout: Layout) -> Rows:
    """Order the pairs of ids [T, k] by expert."""
    n, k = layout.num_experts, max(ids.shape[1], 1)
    flat = ids.reshape(-1).long()
    known = torch.where((flat >= 0) & (flat < n), flat, n)
    slots = known.argsort(stable=True)
    counts: list[int] = torch.bincount(known, minlength=n + 1)[:n].tolist()
    slots = slots[: sum(counts)]
    identity = slots[:0]
    if layout.num_identity:
        identity = ((flat >= n) & (flat < n + layout.num_identity)).nonzero().squeeze(-1)
    return Rows(slots, k, counts, Block(slice(0, len(identity)), identity, identity // k, []))
