"""Group-limited routers (R4, R5): the mask of the kept groups in all its spellings. 12 experts, 3 groups, 2 kept."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Groups, Score

from .base import GROUPED, GROUPED_SOFTMAX, GROUPED_ZERO, Case, Fused, K, experts, norm_sum

Routed = tuple[Tensor, Tensor]
GROUPS, KEPT, SIZE, BEST = 3, 2, 4, 4
EXPERTS12 = experts(num_experts=12)


class _Grouped(Case):
    """Verdict: fused. w = σ(l)[top4 of the 2 best of 3 groups of σ(l)+b] / (Σ + 1e-20) · 2.5; a group ranks by its top-2 sum."""

    expect = Fused(GROUPED, EXPERTS12)
    group = "grouped"
    num_experts: ClassVar[int] = 12

    def __init__(self) -> None:
        super().__init__()
        self.bias.mul_(0.3).sub_(0.6)  # biased scores of both signs

    def rank(self, c: Tensor) -> Tensor:
        """Choice scores [T, E] -> group scores [T, G]."""
        return c.view(-1, GROUPS, SIZE).topk(2, dim=-1)[0].sum(dim=-1)

    def best(self, ranks: Tensor) -> Tensor:
        return torch.topk(ranks, k=KEPT, dim=-1, sorted=False)[1]

    def mask(self, ranks: Tensor) -> Tensor:
        """Group scores [T, G] -> kept [T, G] as 0 / 1."""
        return torch.zeros_like(ranks).scatter_(1, self.best(ranks), 1)

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        wide = kept.unsqueeze(-1).expand(-1, GROUPS, SIZE).reshape(-1, self.num_experts)
        return c.masked_fill(~wide.bool(), float("-inf"))

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        c = s + self.bias.unsqueeze(0)
        ids = torch.topk(self.limit(c, self.mask(self.rank(c))), k=BEST, dim=-1, sorted=False)[1]
        w = s.gather(1, ids)
        w = w / (w.sum(dim=-1, keepdim=True) + 1e-20)
        return w * 2.5, ids


class GroupScatterMaskedFill(_Grouped):
    """Verdict: fused. zeros.scatter_(1), expand, reshape, masked_fill(~mask, -inf)."""


class GroupScatterBool(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. A bool mask with True scattered into it."""

    def mask(self, ranks: Tensor) -> Tensor:
        return torch.zeros_like(ranks, dtype=torch.bool).scatter(1, self.best(ranks), True)


class GroupScatterFalse(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. Ones with False scattered in: the mask of the losers."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        lost = torch.ones_like(kept, dtype=torch.bool).scatter(1, self.best(self.rank(c)), False)
        return c.masked_fill(lost.repeat_interleave(SIZE, dim=1), -torch.inf)


class GroupWhere(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. torch.where with a scalar."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept.bool().repeat_interleave(SIZE, dim=-1), c, -torch.inf)


class GroupWhereTensor(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. torch.where with a tensor of -inf, condition turned round."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        wide = kept[:, :, None].expand(-1, -1, SIZE).flatten(1)
        return torch.where(wide == 0, torch.full_like(c, -torch.inf), c)


class GroupView(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. Masked in the [T, G, E/G] view by broadcasting."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        return c.unflatten(-1, (GROUPS, SIZE)).masked_fill(~kept.bool()[..., None], -torch.inf).flatten(1)


class GroupOneHot(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. The mask is the sum of one-hot rows."""

    def mask(self, ranks: Tensor) -> Tensor:
        return F.one_hot(self.best(ranks), GROUPS).sum(1)


class GroupCompare(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. The mask compares group numbers with the kept ones."""

    def mask(self, ranks: Tensor) -> Tensor:
        return (torch.arange(GROUPS)[None, None, :] == self.best(ranks)[:, :, None]).any(1)


class GroupAdditive(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. A bias of 0 / -inf is added."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        wide = kept.bool().unsqueeze(-1).expand(-1, GROUPS, SIZE).reshape(-1, 12)
        return c + torch.zeros_like(c).masked_fill(~wide, -torch.inf)


class GroupSortRank(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. Group scores by sort and slice."""

    def rank(self, c: Tensor) -> Tensor:
        return c.view(-1, GROUPS, SIZE).sort(-1, descending=True)[0][..., :2].sum(-1)


class GroupRankAdded(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. The top-2 sum as an addition of two columns."""

    def rank(self, c: Tensor) -> Tensor:
        v = c.reshape(-1, GROUPS, SIZE).topk(2).values
        return v[..., 0] + v[..., 1]


class GroupArgsortBest(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. Kept groups through argsort."""

    def best(self, ranks: Tensor) -> Tensor:
        return ranks.argsort(dim=-1, descending=True)[:, :KEPT]


class GroupTempInPlace(_Grouped):
    """Verdict: fused as GroupScatterMaskedFill. A clone masked in place."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        out = c.clone()
        return out.masked_fill_(~kept.bool().repeat_interleave(SIZE, 1), -torch.inf)


# Losing groups at 0.0 -----------------------------------------------------------------------------------------------------


class _GroupedZero(_Grouped):
    """Verdict: fused as written: losing experts score 0, and beat kept ones whose biased score is negative."""

    expect = Fused(GROUPED_ZERO, EXPERTS12)
    group = "grouped-zero"
    near, differs = "GroupScatterMaskedFill", ("gating.groups.fill",)

    def __init__(self) -> None:
        super().__init__()
        # All biased scores negative: the 4 losers at 0 are exactly the 4 best, with no tie for the last place.
        self.bias.copy_(-1.2 - 0.5 * torch.rand(12))


class GroupZeroMaskedFill(_GroupedZero):
    """Verdict: fused as written, differs from GroupScatterMaskedFill in groups.fill. masked_fill(~mask, 0.0)."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        wide = kept.unsqueeze(-1).expand(-1, GROUPS, SIZE).reshape(-1, self.num_experts)
        return c.masked_fill(~wide.bool(), 0.0)


class GroupZeroMultiply(_GroupedZero):
    """Verdict: fused as GroupZeroMaskedFill. Multiplied by the 0 / 1 mask."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        return c * kept.repeat_interleave(SIZE, dim=1)


class GroupZeroWhere(_GroupedZero):
    """Verdict: fused as GroupZeroMaskedFill. torch.where with 0.0."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept.bool().repeat_interleave(SIZE, dim=1), c, 0.0)


class GroupZeroView(_GroupedZero):
    """Verdict: fused as GroupZeroMaskedFill. Multiplied in the [T, G, E/G] view."""

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        return (c.view(-1, GROUPS, SIZE) * kept.unsqueeze(-1)).flatten(1)


class GroupMax(_Grouped):
    """Verdict: fused as written, differs from GroupScatterMaskedFill in groups.top: ranked by the best expert."""

    expect = Fused(replace(GROUPED, groups=replace(GROUPED.groups, top=1)), EXPERTS12)  # type: ignore[type-var]
    group = "grouped-max"
    near, differs = "GroupScatterMaskedFill", ("gating.groups.top",)

    def rank(self, c: Tensor) -> Tensor:
        return c.view(-1, GROUPS, SIZE).max(dim=-1).values


class GroupMaxAmax(GroupMax):
    """Verdict: fused as GroupMax. amax."""

    def rank(self, c: Tensor) -> Tensor:
        return c.unflatten(1, (GROUPS, -1)).amax(2)


class GroupMaxTopk(GroupMax):
    """Verdict: fused as GroupMax. topk(1)."""

    def rank(self, c: Tensor) -> Tensor:
        return c.view(-1, GROUPS, SIZE).topk(1, dim=-1).values.squeeze(-1)


# Softmax with groups ------------------------------------------------------------------------------------------------------


class GroupSoftmaxMaxValues(Case):
    """Verdict: fused. w = 16 softmax(l)[top2 of the kept groups]; losers at 0 never win, top-k values are the weights."""

    expect = Fused(GROUPED_SOFTMAX, EXPERTS12)
    group = "grouped-softmax"
    num_experts: ClassVar[int] = 12

    def route(self, logits: Tensor) -> Routed:
        s = logits.softmax(dim=-1, dtype=torch.float32)
        ranks = s.view(-1, GROUPS, SIZE).max(dim=-1).values
        kept = torch.topk(ranks, k=KEPT, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(ranks).scatter_(1, kept, 1)
        wide = mask.unsqueeze(-1).expand(s.shape[0], GROUPS, SIZE).reshape(s.shape[0], -1)
        w, ids = torch.topk(s.masked_fill(~wide.bool(), 0.0), k=K, dim=-1, sorted=False)
        return w * 16.0, ids


class GroupSoftmaxMaxGather(GroupSoftmaxMaxValues):
    """Verdict: fused as GroupSoftmaxMaxValues. The weights gathered from the unmasked scores."""

    def route(self, logits: Tensor) -> Routed:
        s = logits.softmax(-1)
        kept = s.view(-1, GROUPS, SIZE).amax(-1).topk(KEPT).indices
        mask = F.one_hot(kept, GROUPS).sum(1).to(s.dtype)
        ids = (s.view(-1, GROUPS, SIZE) * mask[..., None]).flatten(1).topk(K)[1]
        return s.gather(1, ids) * 16.0, ids


class GroupSoftmaxTop2Renorm(Case):
    """Verdict: fused. Softmax scores, groups ranked by top-2 sum, losers at 0, w = s[ids] / (Σ + 1e-20) · 2.5."""

    expect = Fused(replace(GROUPED_ZERO, score=Score.SOFTMAX, norm=norm_sum(1e-20), bias=replace(GROUPED_SOFTMAX).bias), EXPERTS12)
    num_experts: ClassVar[int] = 12

    def route(self, logits: Tensor) -> Routed:
        s = logits.softmax(-1)
        ranks = s.view(-1, GROUPS, SIZE).topk(2, dim=-1)[0].sum(-1)
        mask = torch.zeros_like(ranks).scatter_(1, ranks.topk(KEPT)[1], 1)
        c = s.masked_fill(~mask.bool().repeat_interleave(SIZE, 1), 0.0)
        ids = c.topk(BEST)[1]
        w = s.gather(1, ids)
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


class GroupOne(_Grouped):
    """Verdict: fused without groups. One group of all experts, of which one is kept (GLM-4.5-Air): the mask hides nobody."""

    expect = Fused(replace(GROUPED, groups=None), EXPERTS12)
    group = "grouped one"

    def limit(self, c: Tensor, kept: Tensor) -> Tensor:
        ranks = c.view(-1, 1, self.num_experts).topk(2, dim=-1)[0].sum(dim=-1)
        mask = torch.zeros_like(ranks).scatter_(1, torch.topk(ranks, k=1, dim=-1, sorted=False)[1], 1)
        return c.masked_fill(~mask.unsqueeze(-1).expand(-1, 1, self.num_experts).reshape(-1, self.num_experts).bool(), float("-inf"))


class GroupAll(_Grouped):
    """Verdict: fused as GroupOne. Three groups of three are kept."""

    group = "grouped one"

    expect = Fused(replace(GROUPED, groups=None), EXPERTS12)

    def best(self, ranks: Tensor) -> Tensor:
        return torch.topk(ranks, k=GROUPS, dim=-1, sorted=False)[1]


class GroupNotAll(_Grouped):
    """Verdict: fused, one step from GroupAll: one group of three is kept."""

    expect = Fused(replace(GROUPED, groups=Groups(GROUPS, 1, 2, -math.inf)), EXPERTS12)
    group = ""
    near, differs = "GroupAll", ("gating.groups",)

    def best(self, ranks: Tensor) -> Tensor:
        return torch.topk(ranks, k=1, dim=-1, sorted=False)[1]
