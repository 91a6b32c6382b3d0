"""Code that says what is so anyhow: masks of what no id is, of experts that nobody chose, of tokens that have some; functions by hand."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RENORM, SWIGLU_EXPERTS, AsWritten, Case, E, Fused, H, K, Sound, mlp


class _Redundant(Case):
    """Verdict: fused. Weights as they were before the mask."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "redundant"

    def weight(self, w: Tensor, ids: Tensor) -> Tensor:
        return w

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x, ids, self.weight(w, ids))


class PaddingId(_Redundant):
    """Verdict: fused. Exchanges that drop tokens give them the id -1, which no top-k chooses."""

    none: ClassVar[int] = -1

    def weight(self, w: Tensor, ids: Tensor) -> Tensor:
        return w.masked_fill(ids == self.none, 0.0)


class PaddingIdOfAnExpert(PaddingId):
    """Verdict: either. One step beside: the id that is left out is an expert's."""

    expect, group, near, none = Sound(), "", "PaddingId", 1


class AnyExpert(_Redundant):
    """Verdict: fused. Weights of ids that are one of the experts'."""

    def weight(self, w: Tensor, ids: Tensor) -> Tensor:
        return w * F.one_hot(ids, E).bool().any(-1)


class AnySlot(_Redundant):
    """Verdict: fused. Tokens of which no slot has an expert are left out, and there are none."""

    def weight(self, w: Tensor, ids: Tensor) -> Tensor:
        return w * (ids >= 0).any(-1, keepdim=True)


class ScaledByOne(_Redundant):
    """Verdict: fused. Some experts have a factor of their own, which is 1."""

    def weight(self, w: Tensor, ids: Tensor) -> Tensor:
        return torch.where(ids < E // 2, w * 1.0, w)


class MaskedTwice(_Redundant):
    """Verdict: fused. Weights of other experts are masked by a product, and by a choice once more."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            hit = ids == e
            out = out + mlp(x, self.up[e], self.down[e]) * torch.where(hit, w * hit, 0.0).sum(-1, keepdim=True)
        return out


class IdleExperts(_Redundant):
    """Verdict: fused. What an expert gives to tokens that chose it no time is left out."""

    times: ClassVar[int] = 0

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            hit = ids == e
            y = mlp(x, self.up[e], self.down[e]) * (w * hit).sum(-1, keepdim=True)
            out = out + y.masked_fill(hit.sum(-1, keepdim=True) == self.times, 0.0)
        return out


class SiluByExponentials(_Redundant):
    """Verdict: fused. silu(g) = g e^g / (1 + e^g), which overflows in eager from g = 89 on."""

    huge_logits = False
    sign: ClassVar[int] = 1

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
        h = g * (torch.exp(g) / (1 + torch.exp(self.sign * g))) * u
        return (torch.einsum("tki,tkhi->tkh", h, self.down[ids]) * w.unsqueeze(-1)).sum(dim=1)


class SiluByOtherExponentials(SiluByExponentials):
    """Verdict: either. One step beside: g e^g / (1 + e^-g)."""

    expect, group, near, sign = Sound(), "", "SiluByExponentials", -1


class PlacesByCounting(_Redundant):
    """Verdict: fused. Rows are put behind each other for each expert, by how many came before: room for all of them, none is dropped."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        e, hot = ids.reshape(-1), F.one_hot(ids.reshape(-1), E)
        place = (hot.cumsum(0) * hot).sum(-1) - 1
        rows = x.new_zeros(E, len(e), H)
        rows[e, place] = x[torch.arange(len(e)) // K]
        g, u = torch.bmm(rows, self.up.mT).chunk(2, dim=-1)
        y = torch.bmm(F.silu(g) * u, self.down.mT)
        return (y[e, place].view(-1, K, H) * w.unsqueeze(-1)).sum(dim=1)


class PaddedTail(Case):
    """Verdict: experts fused, routing as written. The last two tokens are padding, told by their pairs of token and slot."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        keep = torch.arange(ids.numel()) < (x.shape[0] - 2) * K
        return super().run_experts(x, ids, (w.reshape(-1) * keep).view_as(w))
