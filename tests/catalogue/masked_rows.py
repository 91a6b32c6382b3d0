"""Rows in the order of a mask's true elements, expert by expert, as Megatron-core permutes its tokens: no id is sorted anywhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RENORM, SWIGLU_EXPERTS, Case, E, Fused, Rejected, mlp
from .dispatch import _Grouped


class MaskOrderSplit(Case):
    """Verdict: fused. masked_select of token numbers by a mask [E, T], sizes by the mask's sums, weights applied inside of the experts."""

    expect: Any = Fused(RENORM, SWIGLU_EXPERTS)
    group: Any = "mask order"

    def mask(self, chosen: Tensor) -> Tensor:
        """[E, T]: which tokens are each expert's. chosen: [T, E]."""
        return chosen.T.contiguous()

    def counts(self, chosen: Tensor) -> Tensor:
        return chosen.sum(dim=0).long().cpu()

    def experts(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        sizes = counts.tolist()
        out = []
        for e, (x, w) in enumerate(zip(rows.split(sizes), weights.split(sizes))):
            g, u = F.linear(x, self.up[e]).chunk(2, dim=-1)
            out.append(F.linear(F.silu(g) * u * w[:, None], self.down[e]))
        return torch.cat(out)

    def order(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.arange(len(x), device=x.device).expand(E, -1).masked_select(self.mask(chosen))

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros(len(x), E, dtype=w.dtype, device=x.device).scatter(1, ids, w)
        chosen = torch.zeros_like(dense).int().scatter(1, ids, 1).bool()
        token = self.order(x, chosen)
        weights = dense.T.contiguous().masked_select(self.mask(chosen))
        y = self.experts(x.index_select(0, token), weights, self.counts(chosen))
        return torch.zeros_like(x).scatter_add_(0, token[:, None].expand(-1, x.shape[1]), y)


class MaskOrderWhere(MaskOrderSplit):
    """Verdict: fused as MaskOrderSplit. Places by torch.where, the result scaled behind the experts."""

    def order(self, x: Tensor, chosen: Tensor) -> Tensor:
        _, token = torch.where(self.mask(chosen))
        return token

    def experts(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        pieces = rows.split(counts.tolist())
        return torch.cat([mlp(x, self.up[e], self.down[e]) for e, x in enumerate(pieces)]) * weights[:, None]


class MaskOrderGrouped(_Grouped):
    """Verdict: fused as GroupedSorted. The same rows through grouped products."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros(len(x), E, dtype=w.dtype, device=x.device).scatter(1, ids, w)
        mask = torch.zeros_like(dense).int().scatter(1, ids, 1).bool().T.contiguous()
        token = torch.where(mask)[1]
        ends = mask.sum(dim=1).cumsum(0).to(torch.int32)
        g, u = self.product(x[token], self.up.transpose(-2, -1), ends).chunk(2, dim=-1)
        y = self.product(F.silu(g) * u, self.down.transpose(-2, -1), ends) * dense.T[mask][:, None]
        return torch.zeros_like(x).index_add_(0, token, y)


class MaskOrderByToken(MaskOrderSplit):
    """Verdict: rejected. Near miss: the mask is [T, E], so that rows are in the order of tokens, yet they are split by experts' counts."""

    expect = Rejected("experts")
    group = None

    def mask(self, chosen: Tensor) -> Tensor:
        return chosen

    def order(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.arange(len(x), device=x.device)[:, None].expand(-1, E).masked_select(chosen)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        dense = torch.zeros(len(x), E, dtype=w.dtype, device=x.device).scatter(1, ids, w)
        chosen = torch.zeros_like(dense).int().scatter(1, ids, 1).bool()
        token = self.order(x, chosen)
        y = self.experts(x.index_select(0, token), dense.masked_select(chosen), self.counts(chosen))
        return torch.zeros_like(x).scatter_add_(0, token[:, None].expand(-1, x.shape[1]), y)


class MaskOrderOtherCounts(MaskOrderSplit):
    """Verdict: rejected. Near miss: the sizes are the counts of the experts in another order than the rows have."""

    expect = Rejected("experts")
    group = None

    def counts(self, chosen: Tensor) -> Tensor:
        return chosen.sum(dim=0).flip(0).long().cpu()
