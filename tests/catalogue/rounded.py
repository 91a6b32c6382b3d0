"""Rows that a model rounds before its products, each group by its own scale (W8A8), beside weights in few bits; and what is near."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Rows

from .base import RENORM, SHARED, E, Fused, H, I, Rejected
from .stored import BLOCKS, F8, STORED, B, _Blocks

GROUPS = Rows(8, F8, B, 1e-12 / 448)
BOTH = Fused(RENORM, replace(STORED, up_rows=GROUPS, down_rows=GROUPS))


class RowsInGroups(_Blocks):
    """Verdict: fused. Rows in float8, a scale for every four inputs, with a floor, multiplied back: what block FP8 kernels compute."""

    expect: Any = BOTH

    def scale(self, t: Tensor) -> Tensor:
        return t.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448

    def rows(self, x: Tensor) -> Tensor:
        t = x.unflatten(-1, (-1, B))
        s = self.scale(t)
        return ((t / s).to(F8).float() * s).flatten(-2)

    def expert(self, e: Any, x: Tensor) -> Tensor:
        g, u = F.linear(self.rows(x), self.floats(self.up[e], self.up_scale_inv[e])).chunk(2, -1)
        return F.linear(self.rows(F.silu(g) * u), self.floats(self.down[e], self.down_scale_inv[e]))


class _Near(RowsInGroups):
    near = "RowsInGroups"


class RowsByPowersOfTwo(_Near):
    """Verdict: fused, other rows: their scales are rounded up to powers of two, as ue8m0 kernels have them."""

    expect = Fused(RENORM, replace(STORED, up_rows=replace(GROUPS, power=True), down_rows=replace(GROUPS, power=True)))
    differs = ("experts.down_rows.power", "experts.up_rows.power")

    def scale(self, t: Tensor) -> Tensor:
        return torch.exp2(torch.ceil(torch.log2(super().scale(t))))


class RowsAsWholes(_Near):
    """Verdict: fused, other rows: one scale for a row, saturating, one of zeros by a number of its own."""

    whole = replace(GROUPS, group=0, floor=torch.finfo(torch.float32).tiny)
    expect = Fused(RENORM, replace(STORED, up_rows=whole, down_rows=whole))
    differs = tuple(f"experts.{p}_rows.{what}" for p in ("down", "up") for what in ("floor", "group"))

    def rows(self, x: Tensor) -> Tensor:
        m = x.abs().amax(-1, keepdim=True)
        s = torch.where(m > 0, m, 1.0) / 448
        return (x / s).clamp(-448, 448).to(F8).float() * s


class RowsRoundedOnce(_Near):
    """Verdict: fused, other rows: those between the products keep their precision."""

    expect = Fused(RENORM, replace(STORED, up_rows=GROUPS))
    differs = ("experts.down_rows",)

    def rows(self, x: Tensor) -> Tensor:
        return super().rows(x) if x.shape[-1] == self.up.shape[-1] else x


class RowsOfTheGateOnly(_Near):
    """Verdict: rejected. The up half reads rows as they are."""

    expect = Rejected("some of the up projections")

    def expert(self, e: Any, x: Tensor) -> Tensor:
        w = self.floats(self.up[e], self.up_scale_inv[e])
        half = w.shape[0] // 2
        h = F.silu(F.linear(self.rows(x), w[:half])) * F.linear(x, w[half:])
        return F.linear(self.rows(h), self.floats(self.down[e], self.down_scale_inv[e]))


class RowsByANumber(_Near):
    """Verdict: fused, other rows: by one calibrated number for all of them (static), and what lies beyond is cut."""

    static = Rows(8, F8, static=True, step=0.02, low=-448.0, top=448.0)
    expect = Fused(RENORM, replace(STORED, up_rows=static, down_rows=static))
    differs = tuple(f"experts.{p}_rows.{what}" for p in ("down", "up") for what in ("floor", "group", "low", "static", "step", "top"))

    def rows(self, x: Tensor) -> Tensor:
        return (x / 0.02).clamp(-448, 448).to(F8).float() * 0.02


class RowsByOtherScales(_Near):
    """Verdict: rejected. What is multiplied back is twice what was divided by in the first group."""

    expect = Rejected("in a way that is not recovered")

    def rows(self, x: Tensor) -> Tensor:
        t = x.unflatten(-1, (-1, B))
        s = self.scale(t)
        return ((t / s).to(F8).float() * s.flip(-2)).flatten(-2)


class RowsWeighedFirst(_Near):
    """Verdict: fused, the weight on the experts' rows. They are multiplied by it before they are rounded."""

    expect = Fused(RENORM, replace(STORED, up_rows=GROUPS, down_rows=GROUPS, weight_on_input=True))
    differs = ("experts.weight_on_input",)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(e, x[token] * w[token, slot, None]))
        return out


class SharedInBlocks(_Blocks):
    """Verdict: fused with its shared expert, whose weights are codes too."""

    shared_ir: Any = replace(SHARED, up_stored=BLOCKS, down_stored=BLOCKS)
    expect: Any = Fused(RENORM, STORED, shared_ir)

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name, shape in (("shared_up", (2 * I, H)), ("shared_down", (H, I))):
            self.register_buffer(name, (torch.randn(*shape) * 20).to(F8))
            self.register_buffer(f"{name}_scale", self.scales(*self.how.scales_of(shape)))

    def of_rows(self, x: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
        g, u = F.linear(rows(x), self.floats(self.shared_up, self.shared_up_scale)).chunk(2, -1)
        return F.linear(rows(F.silu(g) * u), self.floats(self.shared_down, self.shared_down_scale))

    def shared(self, x: Tensor) -> Tensor:
        return self.of_rows(x, lambda rows: rows)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        return self.run_experts(x, ids, w) + self.shared(x)

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": SharedInBlocks.of_rows(self, x, lambda rows: rows)}


class SharedRowsInGroups(SharedInBlocks):
    """Verdict: fused, another shared expert: its rows are rounded to float8 before both products."""

    expect = Fused(RENORM, STORED, replace(SharedInBlocks.shared_ir, up_rows=GROUPS, down_rows=GROUPS))
    near, differs = "SharedInBlocks", ("shared.down_rows", "shared.up_rows")
    rows, scale = RowsInGroups.rows, RowsInGroups.scale

    def shared(self, x: Tensor) -> Tensor:
        return self.of_rows(x, self.rows)

    def extra(self, x: Tensor) -> dict[str, Any]:
        return {"add": self.shared(x)}


class SharedScalesTransposed(SharedInBlocks):
    """Verdict: fused, the shared expert being a part of the graph: its grids lie with rows and columns exchanged, which no storage says."""

    expect = Fused(RENORM, STORED)
    zoo_only = True

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        own = s.shape == tuple(n // B for n in q.shape)
        return super().floats(q, s if own else s.t())

    def build_experts(self, n: int) -> None:
        super().build_experts(n)
        for name in ("shared_up_scale", "shared_down_scale"):
            setattr(self, name, getattr(self, name).t().contiguous())
