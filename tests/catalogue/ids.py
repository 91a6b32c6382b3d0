"""Ids that are not the selection's own: mapped so that they repeat, below zero, in a narrow type."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import RENORM, SWIGLU_EXPERTS, AsWritten, Case, E, Fused, K, Rejected, experts, mlp

APART = "put in one place"
MAPPED = Fused(RENORM, experts(ids_mapped=True))


class DenseScatter(Case):
    """Verdict: fused. Weights scattered at the selection's own ids: no token has an expert twice."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "stacked"

    def mapped(self, ids: Tensor) -> Tensor:
        return ids

    def dense(self, ids: Tensor, w: Tensor) -> Tensor:
        return w.new_zeros(ids.shape[0], E).scatter(1, self.mapped(ids), w)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,eoh->teo", x, self.up).chunk(2, dim=-1)
        y = torch.einsum("tei,ehi->teh", F.silu(g) * u, self.down)
        return torch.einsum("te,teh->th", self.dense(ids, w), y)


class DensePut(DenseScatter):
    """Verdict: fused as DenseScatter. full[arange, ids] = w."""

    def dense(self, ids: Tensor, w: Tensor) -> Tensor:
        full = w.new_zeros(ids.shape[0], E)
        full[torch.arange(ids.shape[0])[:, None], self.mapped(ids)] = w
        return full


class DenseScatterClamped(DenseScatter):
    """Verdict: rejected. Clamped ids repeat, and the last weight wins."""

    expect = Rejected(APART)
    near = "DenseScatter"
    group = ""

    def mapped(self, ids: Tensor) -> Tensor:
        return ids.clamp(max=2)


class DenseScatterRemainder(DenseScatterClamped):
    """Verdict: rejected. 2 and 6 are one expert."""

    def mapped(self, ids: Tensor) -> Tensor:
        return ids % 4


class DenseScatterTable(DenseScatterClamped):
    """Verdict: rejected. A table of numbers that nobody knows when compiling."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor([0, 0, 1, 1, 2, 3, 4, 4]))

    def mapped(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class DensePutClamped(DensePut):
    """Verdict: rejected. As DenseScatterClamped, by index_put."""

    expect = Rejected(APART)
    near = "DenseScatter"
    group = ""

    def mapped(self, ids: Tensor) -> Tensor:
        return ids.clamp(max=2)


class DensePutNegative(DensePutClamped):
    """Verdict: rejected. full[arange, ids - 3] = w writes to the last experts where ids are below three."""

    def mapped(self, ids: Tensor) -> Tensor:
        return ids - 3


class AddedAtMapped(Case):
    """Verdict: rejected. out[token] += rows counts one of the rows of a token that has an expert twice."""

    expect = Rejected(APART)
    near = "DenseScatter"

    def mapped(self, ids: Tensor) -> Tensor:
        return ids // 2 * 2

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out, ids = torch.zeros_like(x), self.mapped(ids)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out[token] += mlp(x[token], self.up[e], self.down[e]) * w[token, slot, None]
        return out


class GatherShifted(Case):
    """Verdict: fused, ids mapped. up[ids - 3] is the expert that many from the end where ids are below three."""

    expect = MAPPED

    def mapped(self, ids: Tensor) -> Tensor:
        return ids - 3

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x, self.mapped(ids), w)

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"table": self.mapped(torch.arange(E)) % E}


class GatherTableNegative(GatherShifted):
    """Verdict: fused, ids mapped. A table with numbers below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor([-1, 3, -8, 2, 0, -3, 6, 1]))

    def mapped(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class GatherMarked(GatherShifted):
    """Verdict: fused, ids mapped. Padding gets -1 and, looked up by index, is the last expert's."""

    routes_all: ClassVar[bool] = False
    one_token_is_less = True  # it is no padding: its ids are not mapped

    def mapped(self, ids: Tensor) -> Tensor:
        return ids.masked_fill((torch.arange(ids.shape[0]) % 3 == 1)[:, None], -1)


class GatherNarrow(GatherShifted):
    """Verdict: fused. Eight experts fit into a byte."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)

    def mapped(self, ids: Tensor) -> Tensor:
        return ids.to(torch.int8).long()


class GatherTooNarrow(GatherShifted):
    """Verdict: experts fused, routing as written: of 160 experts those beyond 127 come back below zero."""

    expect = AsWritten(experts(num_experts=160, ids_mapped=False), "top-k")
    num_experts: ClassVar[int] = 160
    routes_all: ClassVar[bool] = False

    def mapped(self, ids: Tensor) -> Tensor:
        return ids.to(torch.int8).long()


class GatherCutRemainder(GatherShifted):
    """Verdict: experts fused, routing as written: fmod of what may be negative is no remainder."""

    expect = AsWritten(experts(), "top-k")
    routes_all: ClassVar[bool] = False

    def mapped(self, ids: Tensor) -> Tensor:
        return torch.fmod(ids - 3, 4)


class GatherSetInPlace(GatherShifted):
    """Verdict: fused, ids mapped. `ids[rows] = 0` is a statement, it gives no tensor: the op takes the one that was written."""

    routes_all: ClassVar[bool] = False

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        ids = ids.clone()  # those of the top-k are kept for its gradient
        ids[x.detach()[:, 0] > 0] = 0
        return Case.run_experts(self, x, ids, w)


class WeightsCut(Case):
    """Verdict: experts fused, routing as written: the fractional part of a weight is no remainder of indices."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(logits.softmax(-1) * 3, K, dim=-1)
        return w % 1, ids
