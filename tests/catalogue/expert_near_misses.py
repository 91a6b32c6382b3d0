"""Experts one step from a known block: rejected, or fused as the different thing they are; never as their neighbour."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RENORM, SWIGLU_EXPERTS, Case, E, Fused, H, K, ListCase, Rejected, Sound, Untouched, mlp, parameter


class _Loop(Case):
    """A loop over torch.where(ids == e); subclasses break one thing."""

    expect = Rejected()
    near = "LoopWhereStacked"

    def numbers(self) -> list[int]:
        return list(range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(x, self.up[e], self.down[e])

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_add(0, token, rows)

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = self.start(x)
        for e in self.numbers():
            token, slot = torch.where(ids == e)
            out = self.add(out, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class SwappedDown(_Loop):
    """Verdict: rejected. Expert 3 multiplies by expert 2's down weight."""

    expect = Rejected("weights another expert")

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(x, self.up[e], self.down[2 if e == 3 else e])


class SwappedPair(_Loop):
    """Verdict: rejected. Experts 2 and 3 have changed places in the down weights."""

    expect = Rejected("weights another expert")

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(x, self.up[e], self.down[{2: 3, 3: 2}.get(e, e)])


class StackedBiasesOfAList(ListCase):
    """Verdict: rejected. Weights in a list, biases in one tensor."""

    expect = Rejected("biases stacked")
    near = "LoopWhereStacked"

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.down_bias = parameter(n, H)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, (expert(x[token]) + self.down_bias[e]) * w[token, slot, None])
        return out


class SwappedHalves(_Loop):
    """Verdict: rejected. In expert 5 alone, up and gate have changed places."""

    expect = Rejected("weights another expert")

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        g, u = (u, g) if e == 5 else (g, u)
        return F.linear(F.silu(g) * u, self.down[e])


class SwappedListEntry(ListCase):
    """Verdict: either. With weights in a list, expert 3 using expert 2's module is a list that names it twice."""

    expect = Sound()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[2 if e == 3 else e](x[token]) * w[token, slot, None])
        return out


class MissingExpert(_Loop):
    """Verdict: rejected, or fused with one expert fewer: expert 7 is never run."""

    expect = Sound()

    def numbers(self) -> list[int]:
        return list(range(E - 1))


class MissingMiddleExpert(_Loop):
    """Verdict: rejected. Expert 4 is never run."""

    expect = Rejected("each once")

    def numbers(self) -> list[int]:
        return [0, 1, 2, 3, 5, 6, 7]


class ExpertTwice(_Loop):
    """Verdict: rejected. Expert 0 is run and added twice."""

    expect = Rejected("twice")

    def numbers(self) -> list[int]:
        return [*range(E), 0]


class ExpertOrder(_Loop):
    """Verdict: fused as DenseLoopScatter. The loop runs backwards; order is no part of a sum."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "stacked"
    near = ""

    def numbers(self) -> list[int]:
        return list(reversed(range(E)))


class OtherActivation(_Loop):
    """Verdict: rejected. Expert 3 activates with gelu."""

    expect = Rejected("same function")

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear((F.gelu(g) if e == 3 else F.silu(g)) * u, self.down[e])


class OtherConstant(_Loop):
    """Verdict: rejected. Each expert's output has a factor of its own, 1 + e."""

    expect = Rejected("same function")

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(x, self.up[e], self.down[e]) * (1.0 + e)


class OneBias(_Loop):
    """Verdict: rejected. Expert 6 alone has a bias."""

    expect = Rejected("same function")

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.extra_bias = parameter(H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        y = mlp(x, self.up[e], self.down[e])
        return y + self.extra_bias if e == 6 else y


class OneBiasForAll(_Loop):
    """Verdict: rejected, or fused with the addend outside: one bias [H] for all experts, inside the weighted sum."""

    expect = Sound()

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.extra_bias = parameter(H)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return mlp(x, self.up[e], self.down[e]) + self.extra_bias


class OtherTokens(_Loop):
    """Verdict: rejected. Expert 2 reads the tokens in reverse order."""

    expect = Rejected("expert 2 is not the same function")

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            rows = x.flip(0)[token] if e == 2 else x[token]
            out.index_add_(0, token, mlp(rows, self.up[e], self.down[e]) * w[token, slot, None])
        return out


class OtherDestination(_Loop):
    """Verdict: rejected. Rows are added to the tokens counted from the end."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_add(0, out.shape[0] - 1 - token, rows)


class Overwrites(_Loop):
    """Verdict: rejected. out[token] = rows: a later expert wipes out an earlier one."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_put((token,), rows)


class OverwritesSorted(Case):
    """Verdict: rejected. Sorted rows of all experts at once: out[token] += rows keeps one row of each token, not the sum."""

    expect = Rejected()
    near = "SortedSegments"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        token, chosen = order // K, ids.flatten()[order]
        g, u = torch.einsum("nh,noh->no", x[token], self.up[chosen]).chunk(2, -1)
        y = torch.einsum("ni,nhi->nh", F.silu(g) * u, self.down[chosen])
        out = torch.zeros_like(x)
        out[token] += y * w.flatten()[order, None]
        return out


class TakesMaximum(_Loop):
    """Verdict: rejected. Rows are combined by maximum."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_reduce(0, token, rows, "amax")


class AddsTwice(_Loop):
    """Verdict: rejected, or fused with scale 2: index_add(alpha=2)."""

    expect = Sound()

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return out.index_add(0, token, rows, alpha=2)


class AccumulatorDecays(_Loop):
    """Verdict: rejected. The accumulator is multiplied by 0.9 on the way, so expert order matters."""

    def add(self, out: Tensor, token: Tensor, rows: Tensor) -> Tensor:
        return (out * 0.9).index_add(0, token, rows)


class AccumulatorFromOnes(_Loop):
    """Verdict: rejected, or fused with ones as the addend: never with zeros."""

    expect = Sound()

    def start(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


class AccumulatorReadByExpert(_Loop):
    """Verdict: rejected. Each expert reads what the experts before it wrote."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(e, x[token] + out[token]) * w[token, slot, None])
        return out


class FirstSlotOnly(_Loop):
    """Verdict: rejected, or fused as top-1 with its weight: the second slot is never read."""

    expect = Sound()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token = torch.where(ids[:, 0] == e)[0]
            out = out.index_add(0, token, self.expert(e, x[token]) * w[token, 0, None])
        return out


class WeightOfOtherSlot(_Loop):
    """Verdict: rejected. Rows of slot j are weighted with the weight of slot 1 - j."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(e, x[token]) * w[token, 1 - slot, None])
        return out


class WeightTwice(_Loop):
    """Verdict: rejected, or fused with squared weights: w * w."""

    expect = Sound()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x, ids, w * w)


class Unweighted(_Loop):
    """Verdict: rejected, or fused with weights of one: the routing weights never reach the experts."""

    expect = Sound()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x, ids, torch.ones_like(w))


class MeanOverSlots(Case):
    """Verdict: fused, differs from GatherEinsum in scale: the mean over k slots is half the sum."""

    expect = Fused(replace(RENORM, scale=1.0 / K), SWIGLU_EXPERTS)
    near, differs = "GatherEinsum", ("gating.scale",)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, -1)
        return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids]) * w[..., None]).mean(1)


class CentredOverTokens(_Loop):
    """Verdict: rejected. An expert subtracts the mean over its tokens: no per-row function."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        y = mlp(x, self.up[e], self.down[e])
        return y - y.sum(0, keepdim=True) / 7


class WeightOnHiddenWithBias(_Loop):
    """Verdict: rejected. The weight multiplies the activated rows and not the down bias."""

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        self.down_bias = parameter(n, H)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            g, u = F.linear(x[token], self.up[e]).chunk(2, -1)
            y = F.linear(F.silu(g) * u * w[token, slot, None], self.down[e], self.down_bias[e])
            out = out.index_add(0, token, y)
        return out


class WeightOnInput(_Loop):
    """Verdict: fused, differs from LoopWhereStacked in weight_on_input: the weight multiplies the tokens."""

    expect = Fused(RENORM, replace(SWIGLU_EXPERTS, weight_on_input=True))
    differs = ("experts.weight_on_input",)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token] * w[token, slot, None]))
        return out


class WeightOnGateOnly(_Loop):
    """Verdict: rejected. The weight multiplies the gate half inside the activation."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            g, u = F.linear(x[token], self.up[e]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(g * w[token, slot, None]) * u, self.down[e]))
        return out


class Dropped(_Loop):
    """Verdict: rejected. Tokens of expert 1 beyond the first two are dropped."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            token, slot = (token[:1], slot[:1]) if e == 1 else (token, slot)
            out.index_add_(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


class RoomForTen(_Loop):
    """Verdict: rejected. Every expert takes ten tokens, which few tokens do not tell."""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            token, slot = token[:10], slot[:10]
            out.index_add_(0, token, self.expert(e, x[token]) * w[token, slot, None])
        return out


# Top-k that routes no experts -------------------------------------------------------------------------------------------------


class SparseAttention(Case):
    """Verdict: left alone. softmax, top-k, renorm and a gather, over keys: attention, not experts."""

    expect = Untouched()
    near = "GatherEinsum"

    def forward(self, x: Tensor) -> Tensor:
        keys, values = F.linear(x, self.up[0, :H]), F.linear(x, self.up[1, :H])
        k = min(K, x.shape[0])
        w, ids = (x @ keys.t()).softmax(-1).topk(k)
        w = w / w.sum(-1, keepdim=True)
        return (values[ids] * w[..., None]).sum(1)


class Retrieval(Case):
    """Verdict: left alone. Rows of a memory table, weighted and summed: no function of the token is applied."""

    expect = Untouched()
    near = "GatherEinsum"

    def build_experts(self, n: int) -> None:
        self.table = parameter(n, H)

    def weights(self) -> dict[str, list[Tensor]]:
        raise NotImplementedError

    near = ""

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return (self.table[ids] * w.unsqueeze(-1)).sum(1)


class OneMatrixExperts(Case):
    """Verdict: left alone. A gathered matrix per token, no second one and no activation: a mixture of linear maps."""

    expect = Rejected()
    near = ""

    def build_experts(self, n: int) -> None:
        self.matrix = parameter(n, H, H)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("th,tkoh,tk->to", x, self.matrix[ids], w)


class SamplerTopk(Case):
    """Verdict: left alone. Top-k over a vocabulary beside an MLP."""

    expect = Untouched()
    near = ""

    def forward(self, x: Tensor) -> Any:
        h = mlp(x, self.up[0], self.down[0])
        return torch.topk(F.linear(h, self.gate).softmax(-1), K)
