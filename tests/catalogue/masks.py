"""Masks made of the weights themselves, and rows accumulated in place onto a shared expert's output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RENORM, SHARED, SWIGLU_EXPERTS, AsWritten, Case, E, Fused, H, Rejected, SwiGlu, mlp


class _WeightMask(Case):
    """Verdict: fused. Weights are scattered [T, E]; where they are not 0, an expert is applied: [w ≠ 0] w = w."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "weight mask"

    def mask(self, weights: Tensor) -> Tensor:
        return weights != 0

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        weights = x.new_zeros(x.shape[0], E).scatter(1, ids, w)
        mask, out = self.mask(weights), torch.zeros_like(x)
        for e in range(E):
            (rows,) = torch.where(mask[:, e])
            out = out.index_add(0, rows, mlp(x[rows], self.up[e], self.down[e]) * weights[rows, e, None])
        return out


class WeightMaskNotZero(_WeightMask):
    """Verdict: fused. w ≠ 0."""


class WeightMaskPositive(_WeightMask):
    """Verdict: fused as WeightMaskNotZero. w > 0, of weights that are never negative."""

    def mask(self, weights: Tensor) -> Tensor:
        return weights > 0


class WeightMaskBool(_WeightMask):
    """Verdict: fused as WeightMaskNotZero. Weights as truth values."""

    def mask(self, weights: Tensor) -> Tensor:
        return weights.bool()


class WeightMaskWhere(_WeightMask):
    """Verdict: fused as WeightMaskNotZero. Every expert on every token, and zeros in place of its result where the weight is 0."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        weights = x.new_zeros(x.shape[0], E).scatter(1, ids, w)
        out = torch.zeros_like(x)
        for e in range(E):
            y = mlp(x, self.up[e], self.down[e]) * weights[:, e, None]
            out = out + torch.where(weights[:, e, None] == 0, torch.zeros_like(y), y)
        return out


class WeightMaskAbove(_WeightMask):
    """Verdict: rejected. One step beside: weights up to 0.3 are left out, and those are no zeros."""

    expect = Rejected("")
    group = ""
    near = "WeightMaskNotZero"

    def mask(self, weights: Tensor) -> Tensor:
        return weights > 0.3


class WeightMaskOfOthers(_WeightMask):
    """Verdict: rejected. One step beside: the mask is of the next expert's weights."""

    expect = Rejected("")
    group = ""
    near = "WeightMaskNotZero"

    def mask(self, weights: Tensor) -> Tensor:
        return weights.roll(1, 1) != 0


class _OntoShared(Case):
    """Verdict: fused, the shared expert in the block. Rows of experts are added in place to what the shared expert gave."""

    expect = Fused(RENORM, SWIGLU_EXPERTS, SHARED)
    group = "onto shared"

    def __init__(self) -> None:
        super().__init__()
        self.shared = SwiGlu()

    def accumulate(self, out: Tensor, rows: Tensor, y: Tensor) -> None:
        out.index_add_(0, rows, y)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = self.shared(x)
        for e in range(E):
            rows, slot = torch.where(ids == e)
            self.accumulate(out, rows, mlp(x[rows], self.up[e], self.down[e]) * w[rows, slot, None])
        return out

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": self.shared(x)}


class OntoSharedIndexAdd(_OntoShared):
    """Verdict: fused, the shared expert in the block. index_add_ onto the shared expert's output."""


class OntoSharedRows(_OntoShared):
    """Verdict: fused as OntoSharedIndexAdd. out[rows] += y."""

    def accumulate(self, out: Tensor, rows: Tensor, y: Tensor) -> None:
        out[rows] += y


class OntoSharedHit(_OntoShared):
    """Verdict: fused as OntoSharedIndexAdd. A loop that passes over experts without tokens, read by example."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = self.shared(x)
        for e in range(E):
            rows, slot = torch.where(ids == e)
            if rows.numel() == 0:
                continue
            out.index_add_(0, rows, mlp(x[rows], self.up[e], self.down[e]) * w[rows, slot, None])
        return out


class OntoSharedHalfRead(_OntoShared):
    """Verdict: rejected. One step beside: the sum is read when half of the experts have been added."""

    expect = Rejected("overwritten")
    group = ""
    near = "OntoSharedIndexAdd"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, half = self.shared(x), x
        for e in range(E):
            rows, slot = torch.where(ids == e)
            out.index_add_(0, rows, mlp(x[rows], self.up[e], self.down[e]) * w[rows, slot, None])
            half = out * 0.5 if e == E // 2 else half
        return out + half


class OntoSharedSeenThroughView(_OntoShared):
    """Verdict: rejected. One step beside: the result is read through a view that was made before the experts were added."""

    expect = Rejected("overwritten")
    group = ""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = self.shared(x)
        view = out.view(-1, 1, H)
        for e in range(E):
            rows, slot = torch.where(ids == e)
            out.index_add_(0, rows, mlp(x[rows], self.up[e], self.down[e]) * w[rows, slot, None])
        return view.flatten(1)


class OntoItself(Case):
    """Verdict: left alone. One step beside: rows are added to the tokens themselves, and later experts read them."""

    expect = Rejected("")
    near = ""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        x = x * 1
        for e in range(E):
            rows, slot = torch.where(ids == e)
            x.index_add_(0, rows, mlp(x[rows], self.up[e], self.down[e]) * w[rows, slot, None])
        return x


class IdsByAnOperationWithoutRule(Case):
    """Verdict: experts fused, routing as written. Neighbouring experts change places: the ids go through an operation without a rule."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x, ids ^ 1, w)


class CapacityForAll(Case):
    """Verdict: rejected, truthfully: an expert has a place for every token, so that none is dropped."""

    expect = Rejected("none is dropped")

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        chosen = F.one_hot(ids, E).sum(1)
        place = (chosen.cumsum(0) - 1) * chosen
        dispatch = (F.one_hot(place, x.shape[0]) * chosen[..., None]).to(x.dtype)
        g, u = torch.einsum("tec,th,eoh->eco", dispatch, x, self.up).chunk(2, -1)
        y = torch.einsum("eci,ehi->ech", F.silu(g) * u, self.down)
        return torch.einsum("tec,te,ech->th", dispatch, x.new_zeros(x.shape[0], E).scatter(1, ids, w), y)
