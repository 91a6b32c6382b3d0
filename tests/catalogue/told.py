"""Routing that is left as written by design, told by its name: no top-k, tokens that are dropped, experts that choose."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import (
    RENORM,
    SWIGLU_EXPERTS,
    AsWritten,
    Case,
    E,
    Fused,
    K,
    ListCase,
    Rejected,
    Untouched,
    experts,
    mlp,
)

CAPACITY = 3


class _Told(Case):
    """Verdict: left alone."""

    routes_all = False
    huge_logits = False

    def all_experts(self, x: Tensor) -> Tensor:
        """[T, E, H]"""
        g, u = torch.einsum("th,eoh->teo", x, self.up).chunk(2, -1)
        return torch.einsum("tei,ehi->teh", F.silu(g) * u, self.down)


class DenseSoftmax(_Told):
    """Verdict: rejected. Softmax over all experts, every one of them on every token."""

    expect = Rejected("every expert every token")

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("te,teh->th", self.logits(x).softmax(-1), self.all_experts(x))


class DenseRelu(_Told):
    """Verdict: rejected. ReLU routing (ReMoE) as a dense product."""

    expect = Rejected("every expert every token")

    def forward(self, x: Tensor) -> Tensor:
        return (F.relu(self.logits(x))[..., None] * self.all_experts(x)).sum(1)


class DenseLoop(_Told):
    """Verdict: rejected. A loop over all experts, weights cut at a threshold: each expert runs on each token."""

    expect = Rejected("every expert every token")

    def forward(self, x: Tensor) -> Tensor:
        p = self.logits(x).sigmoid()
        w = p * (p > 0.4)
        return sum((w[:, e, None] * mlp(x, self.up[e], self.down[e]) for e in range(E)), torch.zeros_like(x))


class DenseList(ListCase):
    """Verdict: rejected. Experts in a ModuleList, all of them applied."""

    expect = Rejected("every expert every token")
    routes_all = False
    has_bias = True

    def forward(self, x: Tensor) -> Tensor:
        p = self.logits(x).softmax(-1)
        return sum((p[:, e : e + 1] * m(x) for e, m in enumerate(self.experts)), torch.zeros_like(x))


class DenseTopK(_Told):
    """Verdict: fused. One step from DenseSoftmax: all but the k best weights are 0."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    routes_all = True

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return torch.einsum("te,teh->th", torch.zeros(x.shape[0], E).scatter(1, ids, w), self.all_experts(x))


class Thresholds(_Told):
    """Verdict: rejected. Each expert gets the tokens whose score is above a number."""

    expect = Rejected("threshold")

    def forward(self, x: Tensor) -> Tensor:
        p, out = self.logits(x).sigmoid(), torch.zeros_like(x)
        for e in range(E):
            (token,) = torch.where(p[:, e] > 0.4)
            out = out.index_add(0, token, mlp(x[token], self.up[e], self.down[e]) * p[token, e, None])
        return out


class LinearMixture(_Told):
    """Verdict: left alone. A mixture of linear maps: no experts with an inside."""

    expect = Untouched()

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("te,teo->to", self.logits(x).softmax(-1), torch.einsum("th,eoh->teo", x, self.up))


class HeadsOfAttention(_Told):
    """Verdict: left alone. Softmax over as many heads as there are experts elsewhere: no mixture of experts."""

    expect = Untouched()

    def forward(self, x: Tensor) -> Tensor:
        q, v = torch.einsum("th,eoh->eto", x, self.up).chunk(2, -1)
        return torch.einsum("eti,ehi->th", (q @ q.mT).softmax(-1) @ v, self.down)


# Tokens that are dropped ------------------------------------------------------------------------------------------------------


class CapacityEinsum(_Told):
    """Verdict: rejected. GShard: places in an expert's queue by a cumulative sum, those past its capacity dropped, dispatch by einsum."""

    expect = Rejected("capacity dropped")
    counted = torch.int64

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        mask = F.one_hot(ids, E).to(self.counted)
        place = torch.cumsum(mask.reshape(-1, E), 0).reshape(mask.shape) - 1
        keep = mask * (place < CAPACITY)
        slot = F.one_hot((place * keep).sum(-1).long(), CAPACITY)
        send = keep[..., None].to(x.dtype) * slot[:, :, None].to(x.dtype)
        rows = torch.einsum("tkec,th->ech", send, x)
        g, u = torch.einsum("ech,eoh->eco", rows, self.up).chunk(2, -1)
        back = torch.einsum("eci,ehi->ech", F.silu(g) * u, self.down)
        return torch.einsum("tkec,tk,ech->th", send, w, back)


class CapacityInFloats(CapacityEinsum):
    """Verdict: rejected. Places are counted in floats."""

    counted = torch.float32


class CapacityFirstRows(_Told):
    """Verdict: rejected. A loop in which each expert takes its first rows only."""

    expect = Rejected("capacity dropped")

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            token, slot = token[:CAPACITY], slot[:CAPACITY]
            out = out.index_add(0, token, mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None])
        return out


class CapacityInWeights(_Told):
    """Verdict: experts fused, routing as written. The weights of tokens past the capacity are 0: the experts do not know."""

    expect = AsWritten(experts(), "capacity")

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(logits)
        place = F.one_hot(ids, E).sum(1).cumsum(0)
        return w * (place <= CAPACITY).gather(1, ids), ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None])
        return out


class ExpertsChoose(_Told):
    """Verdict: rejected. Each expert takes the tokens that score best."""

    expect = Rejected("experts choose tokens")

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return super().example_inputs(max(tokens, CAPACITY))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.logits(x).softmax(-1).t().topk(CAPACITY, -1)
        g, u = torch.einsum("ech,eoh->eco", x[ids], self.up).chunk(2, -1)
        y = torch.einsum("eci,ehi->ech", F.silu(g) * u, self.down) * w[..., None]
        return torch.zeros_like(x).index_add(0, ids.reshape(-1), y.flatten(0, 1))


class DenseStacked(_Told):
    """Verdict: rejected. Multi-gate mixtures (MMoE): what all experts gave is stacked, and weighed by a softmax."""

    expect = Rejected("every expert is applied to every token")

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([mlp(x, self.up[e], self.down[e]) for e in range(E)], 1)
        return (self.logits(x).softmax(-1)[..., None] * y).sum(1)


# Selections beside a block ------------------------------------------------------------------------------------------------------


class _Beside(Case):
    """Verdict: fused."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "beside"

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(self.logits(x))
        return self.run_experts(x, ids, w), self.loss(self.logits(x).softmax(-1))

    def loss(self, p: Tensor) -> Tensor:
        raise NotImplementedError


class BesideOneHotMean(_Beside):
    """Verdict: fused, and no word of the loss' own top-k: a balance loss from the mean of a one-hot mask."""

    def loss(self, p: Tensor) -> Tensor:
        return (F.one_hot(p.topk(K, -1).indices, E).float().mean(0) * p.mean(0)).sum()


class BesideHistogram(_Beside):
    """Verdict: fused as BesideOneHotMean. Counts by histc."""

    def loss(self, p: Tensor) -> Tensor:
        return (torch.histc(p.topk(K, -1).indices.float(), bins=E, min=0, max=E) * p.mean(0)).sum()


class BesideMaskedCounts(_Beside):
    """Verdict: fused as BesideOneHotMean. Padding is left out of counts that are added up by scatter_add."""

    def loss(self, p: Tensor) -> Tensor:
        real = (torch.arange(p.shape[0]) > 0).float()
        counts = torch.zeros(E).scatter_add_(0, p.topk(K, -1).indices.reshape(-1), real.repeat_interleave(K))
        return (counts * (p * real[:, None]).sum(0)).sum()
