"""Routers one step from a known one. Same shapes, other maths: another IR, or the routing stays as written."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Score

from .base import SIGMOID_BIAS, SOFTMAX, SWIGLU_EXPERTS, AsWritten, Case, E, Fused, H, K, Rejected, Sound, gating

Routed = tuple[Tensor, Tensor]
WRITTEN = AsWritten(SWIGLU_EXPERTS)


class _Softmax(Case):
    near = "SoftmaxTopk"


class _Sigmoid(Case):
    near = "SigmoidMethod"

    def finish(self, w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5


class SoftmaxOverTokens(_Softmax):
    """Verdict: experts fused, routing as written: the softmax runs over the tokens."""

    expect = WRITTEN

    def route(self, logits: Tensor) -> Routed:
        return logits.softmax(0).topk(K)


class RenormOverTokens(_Softmax):
    """Verdict: experts fused, routing as written: the sum runs over the tokens."""

    expect = WRITTEN
    near = "RenormDiv"

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return w / w.sum(0, keepdim=True), ids


class SmallestK(_Softmax):
    """Verdict: experts fused, routing as written: largest=False."""

    expect = WRITTEN

    def route(self, logits: Tensor) -> Routed:
        return torch.topk(logits.softmax(-1), K, dim=-1, largest=False)


class SortAscending(_Softmax):
    """Verdict: experts fused, routing as written: an ascending sort's first k are the smallest."""

    expect = WRITTEN

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).sort(-1)
        return w[:, :K], ids[:, :K]


class SortFlippedAscending(_Softmax):
    """Verdict: experts fused, routing as written: a descending sort from its end gives the smallest."""

    expect = WRITTEN

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).sort(-1, descending=True)
        return w.flip(-1)[:, :K], ids.flip(-1)[:, :K]


class SecondToThird(_Softmax):
    """Verdict: experts fused, routing as written: the slice leaves the best expert out."""

    expect = WRITTEN

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).sort(-1, descending=True)
        return w[:, 1 : K + 1], ids[:, 1 : K + 1]


class LastKAscending(Case):
    """Verdict: either. The last k of an ascending sort are the top k in another order, which no sum can tell."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).sort(-1)
        return w[:, -K:], ids[:, -K:]


class ExpertChoice(Case):
    """Verdict: left alone. Experts choose tokens: top-k runs over the tokens, an expert takes as many as the capacity."""

    expect = Rejected()
    near = "SoftmaxTopk"

    def forward(self, x: Tensor) -> Tensor:
        w, tokens = self.logits(x).softmax(-1).t().topk(1 + x.shape[0] // 4, dim=-1)  # [E, C]
        g, u = torch.einsum("ech,eoh->eco", x[tokens], self.up).chunk(2, dim=-1)
        y = torch.einsum("eci,ehi->ech", F.silu(g) * u, self.down) * w[..., None]
        return torch.zeros_like(x).index_add(0, tokens.flatten(), y.flatten(0, 1))


class RuntimeNoise(_Sigmoid):
    """Verdict: experts fused, routing as written: the selection bias is a run-time [T, E] tensor."""

    expect = WRITTEN

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return torch.randn(tokens, H), torch.randn(tokens, E)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        s = self.logits(x).sigmoid()
        ids = (s + noise).topk(K)[1]
        return self.run_experts(x, ids, self.finish(s.gather(1, ids)))


class BiasOnePerToken(_Sigmoid):
    """Verdict: experts fused, routing as written or an equal one: a bias [T, 1] changes no order."""

    expect = Sound()
    near = ""

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        ids = (s + logits.mean(-1, keepdim=True)).topk(K)[1]
        return self.finish(s.gather(1, ids)), ids


class NoiseInWeights(_Sigmoid):
    """Verdict: experts fused, routing as written: a run-time factor per token and expert is in the weights."""

    expect = WRITTEN

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return torch.randn(tokens, H), torch.rand(tokens, E)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        s = self.logits(x).sigmoid()
        ids = (s + self.bias).topk(K)[1]
        return self.run_experts(x, ids, self.finish((s * noise).gather(1, ids)))


class BiasInWeights(_Sigmoid):
    """Verdict: fused, differs from SigmoidMethod in bias_in_weights: the top-k values are taken, bias and all."""

    expect = Fused(replace(SIGMOID_BIAS, bias_in_weights=True), SWIGLU_EXPERTS)
    group = "bias-in-weights"
    differs = ("gating.bias_in_weights",)

    def route(self, logits: Tensor) -> Routed:
        w, ids = (logits.sigmoid() + self.bias).topk(K)
        return self.finish(w), ids


class BiasInWeightsGather(BiasInWeights):
    """Verdict: fused as BiasInWeights. The biased scores gathered."""

    def route(self, logits: Tensor) -> Routed:
        c = logits.sigmoid() + self.bias
        ids = c.topk(K)[1]
        return self.finish(c.gather(1, ids)), ids


class BiasTimesTwo(_Sigmoid):
    """Verdict: either. s + 2b is a bias of 2b, a value the graph need not hold."""

    expect = Sound()
    near = "SigmoidMethod"

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        ids = torch.add(s, self.bias, alpha=2).topk(K)[1]
        return self.finish(s.gather(1, ids)), ids


class BiasSubtracted(_Sigmoid):
    """Verdict: either. s - b is a bias of -b, a value the graph need not hold."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        ids = (s - self.bias).topk(K)[1]
        return self.finish(s.gather(1, ids)), ids


class BiasMultiplied(_Sigmoid):
    """Verdict: experts fused, routing as written: s * b is no additive bias."""

    expect = WRITTEN

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        ids = (s * self.bias).topk(K)[1]
        return self.finish(s.gather(1, ids)), ids


class SelectedByOther(_Sigmoid):
    """Verdict: experts fused, routing as written: one router selects, another one weighs."""

    expect = WRITTEN

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        other = F.linear(x, self.gate.flip(0))
        ids = (other.sigmoid() + self.bias).topk(K)[1]
        return self.run_experts(x, ids, self.finish(logits.sigmoid().gather(1, ids)))


class WeightsFlipped(_Softmax):
    """Verdict: experts fused, routing as written: the weights belong to the other slots."""

    expect = WRITTEN

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return w.flip(-1), ids


class IdsFlipped(_Softmax):
    """Verdict: either as written or rejected, with a reason: the ids belong to the other slots."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return w, ids.flip(1)


class GatherOtherIds(_Softmax):
    """Verdict: either as written or rejected, with a reason: the weights are gathered for the worst experts."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        p = logits.softmax(-1)
        ids = p.topk(K)[1]
        return p.gather(1, (-p).topk(K)[1]), ids


class IdsShifted(_Softmax):
    """Verdict: either a mapping of the ids or as written: expert ids are moved on by one."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return w, (ids + 1) % E


class TokensRolled(_Softmax):
    """Verdict: either as written or rejected, with a reason: each token uses its neighbour's routing."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return w.roll(1, 0), ids.roll(1, 0)


class NegativeSigmoid(Case):
    """Verdict: either. 1 / (1 + exp(l)) is σ(-l): another selection, on logits the graph need not hold."""

    expect = Sound()
    near = "SigmoidGather"

    def route(self, logits: Tensor) -> Routed:
        s = 1 / (1 + logits.exp())
        w, ids = s.topk(K)
        return w / w.sum(-1, keepdim=True), ids


class Temperature(Case):
    """Verdict: either. softmax(l / 2) of the selected is a softmax of other logits than the selection's."""

    expect = Sound()
    near = "TopkSoftmax"

    def route(self, logits: Tensor) -> Routed:
        v, ids = logits.topk(K)
        return (v / 2.0).softmax(-1), ids


class SigmoidSelectSoftmaxWeigh(Case):
    """Verdict: experts fused, routing as written or an equal one: biased σ selects, softmax over E weighs."""

    expect = WRITTEN
    near = "SigmoidMethod"

    def route(self, logits: Tensor) -> Routed:
        ids = (logits.sigmoid() + self.bias).topk(K)[1]
        return logits.softmax(-1).gather(1, ids), ids


class PerTokenFactor(_Softmax):
    """Verdict: experts fused, routing as written: an extra factor per token that is no function of the k weights."""

    expect = WRITTEN

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.logits(x).softmax(-1).topk(K)
        return self.run_experts(x, ids, w * x.mean(-1, keepdim=True).sigmoid())


class SlotFactor(_Softmax):
    """Verdict: experts fused, routing as written: the first slot weighs double."""

    expect = WRITTEN

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return w * torch.tensor([2.0, 1.0]), ids


class ThresholdedWeights(_Softmax):
    """Verdict: either an expression or as written: weights under 0.2 become zero."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return torch.where(w < 0.2, 0.0, w), ids


class RenormOverAllExperts(Case):
    """Verdict: experts fused, routing as written: the divisor sums all experts' σ, not the selected ones'."""

    expect = WRITTEN
    near = "SigmoidGather"

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        w, ids = s.topk(K)
        return w / s.sum(-1, keepdim=True), ids


class OneMoreSelected(Case):
    """Verdict: experts fused, routing as written: the divisor sums one expert more than is used."""

    expect = WRITTEN
    near = "SigmoidGather"

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.sigmoid().topk(K + 1)
        return w[:, :K] / w.sum(-1, keepdim=True), ids[:, :K]


class AnotherK(Case):
    """Verdict: fused, differs from SoftmaxTopk in k."""

    expect = Fused(replace(SOFTMAX, k=3), SWIGLU_EXPERTS)
    near, differs = "SoftmaxTopk", ("gating.k",)

    def route(self, logits: Tensor) -> Routed:
        return logits.softmax(-1).topk(3)


class KOfOne(Case):
    """Verdict: fused. Top-1 with its softmax score as weight (k = 1 keeps the weight: no renormalisation)."""

    expect = Fused(gating(k=1), SWIGLU_EXPERTS)
    near, differs = "SoftmaxTopk", ("gating.k",)

    def route(self, logits: Tensor) -> Routed:
        return logits.softmax(-1).topk(1)


class MaxOfOne(Case):
    """Verdict: either, and if fused, as KOfOne: top-1 through max."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).max(-1, keepdim=True)
        return w, ids


class ReluScore(Case):
    """Verdict: fused, differs from IdentityScore in the score: w = relu(l)[top2]."""

    expect = Fused(gating(Score.RELU), SWIGLU_EXPERTS)
    near, differs = "IdentityScore", ("gating.score",)

    def route(self, logits: Tensor) -> Routed:
        return logits.relu().topk(K)


class SquaredSigmoid(Case):
    """Verdict: either an expression of the weight or as written: w = σ(l)² / Σ σ²."""

    expect = Sound()
    near = "SigmoidGather"

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.sigmoid().topk(K)
        w = w * w
        return w / w.sum(-1, keepdim=True), ids


class NoTopk(Case):
    """Verdict: either. Every expert for every token (k = E), weights softmax(l)."""

    expect = Sound()

    def route(self, logits: Tensor) -> Routed:
        return logits.softmax(-1), torch.arange(E).expand(logits.shape[0], E)


class HashRouting(_Softmax):
    """Verdict: experts fused, routing as written: ids come from a table of token numbers, no top-k chooses."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randint(0, E, (50, K)))

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return torch.randn(tokens, H), torch.randint(0, 50, (tokens,))

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        ids = self.table[numbers]
        return self.run_experts(x, ids, self.logits(x).sigmoid().gather(1, ids))


class TwoArgmaxes(_Softmax):
    """Verdict: experts fused, routing as written: ids and weights put together from two selections, the second without the first's."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def route(self, logits: Tensor) -> Routed:
        first, best = logits.max(dim=-1, keepdim=True)
        second, next_best = logits.scatter(-1, best, -math.inf).max(dim=-1, keepdim=True)
        w = torch.cat([torch.sigmoid(first - second), torch.sigmoid(second - first)], dim=-1)
        return w, torch.cat([best, next_best], dim=-1)


class TwoArgmaxesHalf(TwoArgmaxes):
    """Verdict: experts fused, routing as written. Unlike TwoArgmaxes the second weighs half, and comes first."""

    def route(self, logits: Tensor) -> Routed:
        w, ids = super().route(logits)
        return torch.cat([w[:, 1:] * 0.5, w[:, :1]], dim=-1), torch.cat([ids[:, 1:], ids[:, :1]], dim=-1)


class SkipExpert(_Softmax):
    """Verdict: experts fused, routing as written: one class more than experts, which stands for no expert (id 0, weight 0)."""

    expect = AsWritten(replace(SWIGLU_EXPERTS, ids_mapped=True))
    num_experts = E + 1
    local_experts = E

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        skip = ids == E
        return super().run_experts(x, ids.masked_fill(skip, 0), w.masked_fill(skip, 0.0))


class SkipExpertHalf(SkipExpert):
    """Verdict: experts fused, routing as written. Unlike SkipExpert who chose the last class goes to expert 0 with half the weight."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        skip = ids == E
        return Case.run_experts(self, x, ids.masked_fill(skip, 0), torch.where(skip, 0.5 * w, w))
