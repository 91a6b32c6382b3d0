"""The dispatch in plain torch: (token, slot) pairs ordered by expert, and sums of their rows by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ir.records import Layout


@dataclass(frozen=True)
class Rows:
    """The (token, slot) pairs ordered by expert; pairs of no expert are left out."""

    slots: Tensor  # [N] position t * k + j
    tokens: Tensor  # [N]
    counts: list[int]  # rows per expert
    identity: Tensor  # [M] slots of identity experts
    ids: Tensor  # [T, k]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Experts that have rows, and where these are."""
        start = 0
        for e, count in enumerate(self.counts):
            if count:
                yield e, slice(start, start + count)
            start += count

    @property
    def placed(self) -> int:
        """Slots of any expert."""
        return len(self.slots) + len(self.identity)

    def results(self, width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Room for the rows' results: experts' in their order, then identity experts', then zeros for slots of none."""
        room = like.new_empty(self.placed + (self.placed < self.ids.numel()), width, dtype=dtype)
        room[self.placed :].zero_()
        return room

    def summed(self, results: Tensor, weights: Tensor | None) -> Tensor:
        """out[t] = Σ_j w[t, j] results[row of slot (t, j)], in the order of the slots; w [T, k] is 1 where None."""
        if not self.ids.numel():
            return results.new_zeros(self.ids.shape[0], results.shape[1])
        n, none = len(self.slots), self.placed < self.ids.numel()
        at = torch.full_like(self.ids.reshape(-1), self.placed, dtype=torch.int64)
        at[self.slots] = torch.arange(n, device=at.device)
        if len(self.identity):
            at[self.identity] = torch.arange(n, self.placed, device=at.device)
        padding = self.placed if none else None
        return F.embedding_bag(at.view_as(self.ids), results, per_sample_weights=weights, mode="sum", padding_idx=padding)


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
    return Rows(slots, slots // k, counts, identity, ids)
