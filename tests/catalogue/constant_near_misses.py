"""The same text with another constant or another layout: fused as the different function it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Form
from moe_compile.ir import scalar as act

from .base import RENORM, Fused, I, experts
from .weights import Interleaved, StackedOutIn

g, u = sp.symbols("g u", real=True)


def capped(limit: float, low: Any = -sp.oo, alpha: float = 1.702) -> Any:
    gate = act.clamp(g, low, limit)
    return (act.clamp(u, -limit, limit) + 1) * gate * act.sigmoid(sp.Float(alpha) * gate)


def with_activation(expr: Any) -> Fused:
    assert isinstance(Interleaved.expect, Fused)
    return replace(Interleaved.expect, experts=replace(Interleaved.expect.experts, activation=expr))


class OtherClampLimit(Interleaved):
    """Verdict: fused as written, differs from Interleaved in the activation: limits of 5, not 7."""

    expect = with_activation(capped(5))
    group = ""
    near, differs = "Interleaved", ("experts.activation",)

    def act(self, h: Tensor) -> Tensor:
        g, u = self.halves(h)
        g, u = g.clamp(max=5.0), u.clamp(-5.0, 5.0)
        return (u + 1) * (g * torch.sigmoid(g * 1.702))


class GateClampedBelow(Interleaved):
    """Verdict: fused as written, differs from Interleaved in the activation: the gate is clamped below as well."""

    expect = with_activation(capped(7, -1))
    group = ""
    near, differs = "Interleaved", ("experts.activation",)

    def act(self, h: Tensor) -> Tensor:
        g, u = self.halves(h)
        g, u = g.clamp(-1.0, 7.0), u.clamp(-7.0, 7.0)
        return (u + 1) * (g * torch.sigmoid(g * 1.702))


class OtherAlpha(Interleaved):
    """Verdict: fused as written, differs from Interleaved in the activation: σ(1.5 g)."""

    expect = with_activation(capped(7, alpha=1.5))
    group = ""
    near, differs = "Interleaved", ("experts.activation",)

    def act(self, h: Tensor) -> Tensor:
        g, u = self.halves(h)
        g, u = g.clamp(max=7.0), u.clamp(-7.0, 7.0)
        return (u + 1) * (g * torch.sigmoid(g * 1.5))


class HalfSplit(Interleaved):
    """Verdict: fused as written, differs from Interleaved in form: the same text on half-split weights."""

    assert isinstance(Interleaved.expect, Fused)
    expect = replace(Interleaved.expect, experts=replace(Interleaved.expect.experts, form=Form.CONCAT))
    group = ""
    near, differs = "Interleaved", ("experts.form",)

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h[..., :I], h[..., I:]


class OddEven(Interleaved):
    """Verdict: fused as written, differs from Interleaved in the activation: the odd outputs are the gate."""

    expect = with_activation(Interleaved.expect.experts.activation.subs({g: u, u: g}, simultaneous=True))  # type: ignore[union-attr]
    group = ""
    near, differs = "Interleaved", ("experts.activation",)

    def halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h[..., 1::2], h[..., 0::2]


class ClampAfterSilu(StackedOutIn):
    """Verdict: fused as written: step3p7's clamp comes after silu."""

    expect = Fused(RENORM, experts(activation=act.clamp(act.silu(g), -sp.oo, 1) * act.clamp(u, -1, 1)))
    group = ""
    near, differs = "StackedOutIn", ("experts.activation",)

    def expert(self, e: int, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.silu(a).clamp(max=1.0) * b.clamp(-1.0, 1.0), self.down[e])


class ClampBeforeSilu(StackedOutIn):
    """Verdict: fused as written, differs from ClampAfterSilu in the activation."""

    expect = Fused(RENORM, experts(activation=act.silu(act.clamp(g, -sp.oo, 1)) * act.clamp(u, -1, 1)))
    group = ""
    near, differs = "ClampAfterSilu", ("experts.activation",)

    def expert(self, e: int, x: Tensor) -> Tensor:
        a, b = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(F.silu(a.clamp(max=1.0)) * b.clamp(-1.0, 1.0), self.down[e])
