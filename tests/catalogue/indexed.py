"""Weights in whole numbers of few bits whose group of each input is looked up in an index (GPTQ's `g_idx`), and what is near."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import Form, Stored

from .base import E, H, I
from .packed import G, Int4PackedZeros, Int4ZerosLessOne
from .stored import FLOATS, RENORM, BlocksHitExperts, Fused, storing


def _by_index(how: Stored) -> Fused:
    """As `storing`, the group of an input being looked up."""
    ways = (replace(how, rows=1, indexed=1, groups=inner // G) for inner in (H, I))
    up, down = ways
    return Fused(RENORM, replace(storing(how).experts, up_stored=up, down_stored=down, up_transposed=True, down_transposed=True))


class Int4GroupsByIndex(Int4PackedZeros):
    """Verdict: fused. `g_idx` says which group an input is in, which may be any (GPTQ's desc_act), one for all experts."""

    expect = _by_index(Int4PackedZeros.how)
    near = "Int4PackedZeros"
    differs = tuple(f"experts.{p}_stored.{what}" for p in ("down", "up") for what in ("groups", "indexed", "rows"))

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name, inner in (("up", H), ("down", I)):
            self.register_buffer(f"{name}_group", self.index(n, inner))

    def index(self, n: int, inner: int) -> Tensor:
        return (torch.arange(inner) // G)[torch.randperm(inner)].int()

    def groups(self, name: str, e: Any) -> Tensor:
        return getattr(self, f"{name}_group")

    def matrix(self, name: str, e: Any) -> Tensor:
        group = self.groups(name, e)
        z, s = self.codes(getattr(self, f"{name}_zero")[e]) + self.less, getattr(self, f"{name}_scale_inv")[e]
        return ((self.codes(getattr(self, name)[e]) - z[group]) * s[group]).t()

    def weights(self) -> dict[str, list[Tensor]]:
        return super().weights() | {"up_group": [self.up_group], "down_group": [self.down_group]}


class Int4GroupsOfEach(Int4GroupsByIndex):
    """Verdict: fused, another index: each expert has its own."""

    near, differs = "", ()

    def index(self, n: int, inner: int) -> Tensor:
        return torch.stack([Int4GroupsByIndex.index(self, n, inner) for _ in range(n)])

    def groups(self, name: str, e: Any) -> Tensor:
        return getattr(self, f"{name}_group")[e]


class Int4GroupsLessOne(Int4GroupsByIndex):
    """Verdict: fused, another function: zero points are stored less one (GPTQ v1 with desc_act)."""

    expect = _by_index(Int4ZerosLessOne.how)
    near, differs = "Int4GroupsByIndex", Int4ZerosLessOne.differs
    less = 1


class Int4GroupsAlongInputs(Int4GroupsByIndex):
    """Verdict: fused. GPTQ as AutoGPTQ packs it: words along the inputs, zero points along the outputs, no zero point less one."""

    how = replace(Int4PackedZeros.how, axis=1, order=tuple(range(8)), zero_order=tuple(range(8)))
    expect = _by_index(how)
    near, differs = (
        "Int4GroupsByIndex",
        tuple(f"experts.{p}_stored.{what}" for p in ("down", "up") for what in ("axis", "order", "zero_order")),
    )
    order = tuple(range(8))

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        info = torch.iinfo(torch.int32)
        for name, (out, inner) in (("up", (2 * I, H)), ("down", (H, I))):
            self.register_buffer(name, torch.randint(info.min, info.max + 1, (n, inner // 8, out)).int())

    def matrix(self, name: str, e: Any) -> Tensor:
        group = self.groups(name, e).long()
        q = (getattr(self, name)[e][:, None, :] >> torch.arange(0, 32, 4, dtype=torch.int32)[:, None] & 15).flatten(0, 1)
        z, s = self.codes(getattr(self, f"{name}_zero")[e]), getattr(self, f"{name}_scale_inv")[e]
        return ((q - z[group]) * s[group]).t()


class Int4GroupsHit(Int4GroupsByIndex):
    """Verdict: fused as Int4GroupsByIndex. A loop over the experts that were hit, read by example."""

    near, differs = "", ()
    run_experts = BlocksHitExperts.run_experts


class _Quantised(nn.Module):
    """A linear as AutoGPTQ has it: words along the inputs, `g_idx`, zero points less one (15 is 0), shifts in a buffer of its own."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        info = torch.iinfo(torch.int32)
        for name, shape in (("qweight", (inner // 8, out)), ("qzeros", (inner // G, out // 8))):
            self.register_buffer(name, torch.randint(info.min, info.max + 1, shape).int())
        self.register_buffer("scales", (torch.rand(inner // G, out) + 0.3) / 40)
        self.register_buffer("g_idx", (torch.arange(inner) // G)[torch.randperm(inner)].int())
        self.register_buffer("wf", torch.arange(0, 32, 4, dtype=torch.int32)[None])

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.bitwise_right_shift(self.qzeros.unsqueeze(2).expand(-1, -1, 8), self.wf.unsqueeze(0)).to(torch.int8)
        zeros = torch.bitwise_and(zeros + 1, 15).reshape(self.scales.shape)
        q = torch.bitwise_right_shift(self.qweight.unsqueeze(1).expand(-1, 8, -1), self.wf.unsqueeze(-1)).to(torch.int8)
        q = torch.bitwise_and(q, 15)
        group = self.g_idx.long()
        return x @ (self.scales[group] * (q.reshape(-1, q.shape[2]) - zeros[group])).to(x.dtype)


class Int4GroupsListed(Int4GroupsByIndex):
    """Verdict: fused. A list of experts, each of three linears as AutoGPTQ has them, in a loop over those that were hit."""

    how = replace(Int4GroupsAlongInputs.how, zero_offset=1.0, zero_wraps=True, shifted=True)
    expect = Fused(RENORM, replace(_by_index(how).experts, form=Form.SEPARATE, stacked=False))
    near, differs = "", ()

    def build_experts(self, n: int) -> None:
        self.experts = nn.ModuleList(nn.ModuleList(_Quantised(*s) for s in ((H, I), (H, I), (I, H))) for _ in range(n))

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for hit in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            slot, token = torch.where(mask[hit[0]])
            gate, up, down = self.experts[hit.item()]
            out.index_add_(0, token, down(F.silu(gate(x[token])) * up(x[token])) * w[token, slot, None])
        return out

    def weights(self) -> dict[str, list[Tensor]]:
        names = {"": "qweight", "_scale": "scales", "_zero": "qzeros", "_group": "g_idx", "_table": "wf"}
        both = {"up": (0, 1), "down": (2,)}
        found = {f"{p}{what}": [getattr(e[i], b) for i in at for e in self.experts] for p, at in both.items() for what, b in names.items()}
        return found | {f"{p}_table": 2 * found[f"{p}_table"] for p in both}  # of codes, and of zero points


class Int4GroupsOfScalesOnly(Int4GroupsByIndex):
    """Verdict: fused, the weights being floats. Scales are by the index and zero points by the place of an input."""

    expect = Fused(RENORM, replace(FLOATS, up_transposed=True, down_transposed=True))
    near = "Int4GroupsByIndex"
    differs = ("experts.down_stored", "experts.stacked", "experts.up_stored")

    def matrix(self, name: str, e: Any) -> Tensor:
        group = self.groups(name, e)
        z, s = self.codes(getattr(self, f"{name}_zero")[e]), getattr(self, f"{name}_scale_inv")[e]
        return ((self.codes(getattr(self, name)[e]) - z.repeat_interleave(G, 0)) * s[group]).t()

    def weights(self) -> dict[str, list[Tensor]]:
        return {name: [self.matrix(name, e).t() for e in range(E)] for name in ("up", "down")}
