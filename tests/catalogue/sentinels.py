"""Ids kept inside the experts before weights are looked up by them, and rows of ids outside zeroed: no expert is outside here.

transformers 5.10 to 5.22 writes this for every model, on one device too, where the router's ids never leave the experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RENORM, AsWritten, E, Fused, H, K, Rejected, Sound
from .weights import Interleaved

BF16 = torch.bfloat16


class ClampedBatched(Interleaved):
    """Verdict: fused as Interleaved. batched_mm: weights and biases of ids.clamp(0, E - 1), one row per (token, slot)."""

    expect = Interleaved.expect
    low: ClassVar[int] = 0
    high: ClassVar[int] = E - 1

    def inside(self, flat: Tensor) -> Tensor:
        return flat.clamp(self.low, self.high)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        flat = self.inside(ids.reshape(-1))
        rows = x.repeat_interleave(K, dim=0).unsqueeze(1)
        h = torch.bmm(rows, self.up[flat]).squeeze(1)
        h.add_(self.up_bias[flat])
        y = torch.bmm(self.act(h).unsqueeze(1), self.down[flat]).squeeze(1)
        y.add_(self.down_bias[flat])
        return (y * w.reshape(-1).unsqueeze(-1)).view(-1, K, H).sum(dim=1)


class ClampedFarAway(ClampedBatched):
    """Verdict: fused as Interleaved. Limits that no id comes near, written as two minimums."""

    expect = Interleaved.expect

    def inside(self, flat: Tensor) -> Tensor:
        return flat.clamp_max(E + 3).clamp_min(-2)


class ClampedBeforeLoop(Interleaved):
    """Verdict: fused as Interleaved. A loop over the ids, kept inside the experts first."""

    expect = Interleaved.expect

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x, torch.minimum(ids, torch.tensor(E - 1)), w)


class ClampedGrouped(Interleaved):
    """Verdict: fused. grouped_mm in bf16: offsets count the ids as they are, biases are of clamped ids, rows of ids >= E zeroed."""

    dtype = BF16
    limit: ClassVar[int] = E
    top: ClassVar[int] = E - 1
    assert isinstance(Interleaved.expect, Fused)
    expect = Fused(replace(RENORM, weight_dtype=BF16), replace(Interleaved.expect.experts, dtype=BF16))
    group = "interleaved bf16"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = logits.softmax(-1, dtype=torch.float).topk(K)
        return (w / w.sum(-1, keepdim=True)).to(logits.dtype), ids

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor, expert: Tensor, outside: Tensor, ends: Tensor) -> Tensor:
        y = F.grouped_mm(rows, weight, offs=ends)
        y.add_(bias[expert])
        return y.masked_fill(outside, 0.0)

    def for_histogram(self, expert: Tensor) -> Tensor:
        return expert.int().float()

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        expert, order = torch.sort(ids.reshape(-1))
        rows = x[order // K]
        ends = torch.cumsum(torch.histc(self.for_histogram(expert), bins=E, min=0, max=E - 1), dim=0, dtype=torch.int32)
        outside = (expert >= self.limit).unsqueeze(-1)
        expert.clamp_(max=self.top)
        rows.masked_fill_(outside, 0.0)
        h = self.product(rows, self.up, self.up_bias, expert, outside, ends)
        y = self.product(self.act(h), self.down, self.down_bias, expert, outside, ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0), device=order.device)
        return (y * w.reshape(-1)[order].unsqueeze(-1))[back].view(-1, K, H).sum(dim=1)


class ClampedGroupedFloats(ClampedGrouped):
    """Verdict: fused as ClampedGrouped. The histogram is of the ids as floats at once: transformers up to 5.17."""

    def for_histogram(self, expert: Tensor) -> Tensor:
        return expert.float()


class ClampedGroupedPlain(ClampedGrouped):
    """Verdict: fused as ClampedGrouped. Nothing is clamped and nothing zeroed: transformers from 5.23 on."""

    expect = ClampedGrouped.expect

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor, expert: Tensor, outside: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight, offs=ends) + bias[expert]


class ClampedJoined(ClampedBatched):
    """Verdict: experts fused, routing as written: sparsemixer. The best expert, then the best of the others; ids joined, kept inside."""

    assert isinstance(Interleaved.expect, Fused)
    expect = AsWritten(Interleaved.expect.experts, "top-k")
    group = "joined"
    routes_all = False

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        first = logits.argmax(-1, keepdim=True)
        second = logits.scatter(-1, first, -torch.inf).argmax(-1, keepdim=True)
        ids = torch.cat([first, second], dim=-1)
        return logits.gather(-1, ids).sigmoid(), ids


class ClampedJoinedStack(ClampedJoined):
    """Verdict: experts fused, routing as written, as ClampedJoined: stacked, and rows of ids >= E zeroed."""

    expect = ClampedJoined.expect

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        first = logits.argmax(-1)
        second = logits.scatter(-1, first[:, None], -torch.inf).argmax(-1)
        ids = torch.stack((first, second), dim=-1)
        return logits.gather(-1, ids).sigmoid(), ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        outside = (ids >= E).unsqueeze(-1)
        h = torch.einsum("th,tkho->tko", x, self.up[ids.clamp(max=E - 1)]) + self.up_bias[ids.clamp(max=E - 1)]
        h = self.act(h.masked_fill(outside, 0.0))
        y = torch.einsum("tki,tkih->tkh", h, self.down[ids]) + self.down_bias[ids]
        return (y.masked_fill(outside, 0.0) * w.unsqueeze(-1)).sum(1)


# Near misses: the clamp reaches an id, the mask a row ---------------------------------------------------------------------


class ClampedOneShort(ClampedBatched):
    """Verdict: fused with ids mapped, or left: the last expert's tokens go to the one before it, for every weight alike."""

    expect = Sound()
    group, near = "", "ClampedBatched"
    high = E - 2


class ClampedFromOne(ClampedOneShort):
    """Verdict: fused with ids mapped, or left: expert 0's tokens go to expert 1."""

    expect = Sound()
    near = "ClampedBatched"
    low, high = 1, E - 1


class BiasOneShort(ClampedBatched):
    """Verdict: rejected. The biases alone are those of ids kept below the last expert."""

    expect = Rejected("different ids")
    group, near = "", "ClampedBatched"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up_bias = self.up_bias[ids.clamp(max=E - 2)]
        h = torch.einsum("th,tkho->tko", x, self.up[ids]) + up_bias
        y = torch.einsum("tki,tkih->tkh", self.act(h), self.down[ids]) + self.down_bias[ids]
        return (y * w.unsqueeze(-1)).sum(1)


class ClampedGroupedBias(ClampedGrouped):
    """Verdict: rejected. The biases of ids clamped one short, beside products of the ids as they are."""

    expect = Rejected("different ids")
    group, near = "", "ClampedGrouped"
    top = E - 2


class OutsideOneShort(ClampedGrouped):
    """Verdict: rejected. The mask takes the last expert's rows away."""

    expect = Rejected("masked by their ids")
    group, near = "", "ClampedGrouped"
    limit = E - 1


class JoinedOneShort(ClampedJoined):
    """Verdict: left, or fused with ids mapped: the second id is one of twice as many, and those beyond go to the last expert."""

    expect = Sound()
    group, near = "", "ClampedBatched"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.cat([logits, -logits], dim=-1)
        ids = torch.cat([logits.argmax(-1, keepdim=True), wide.argmax(-1, keepdim=True)], dim=-1)
        return wide.gather(-1, ids).sigmoid(), ids
