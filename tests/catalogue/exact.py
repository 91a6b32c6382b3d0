"""Casts that round and functions that are there for their digits: what is kept, and what must not be taken for something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Form, Score
from moe_compile.ir import scalar as act

from .base import RENORM, SWIGLU_EXPERTS, AsWritten, Case, E, Fused, H, I, K, Rejected, experts, gating, parameter
from .naive import Parts


def in_float8(t: Tensor) -> Tensor:
    return t.to(torch.float8_e4m3fn).to(t.dtype)


class RowsInFloat8(Case):
    """Verdict: fused. The experts' rows are rounded to eight bits before: their input is the rounded tensor, the router's is not."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(in_float8(x), ids, w)

    def parts(self, *inputs: Any) -> Parts:
        p = super().parts(*inputs)
        p.x = in_float8(p.x)
        return p


class WeightsInFloat8(Case):
    """Verdict: fused. So are the weights, in each call."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, in_float8(self.up)[ids]).chunk(2, dim=-1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids])
        return (y * w.unsqueeze(-1)).sum(dim=1)

    def weights(self) -> dict[str, list[Tensor]]:
        return {"up": [in_float8(self.up)], "down": [self.down]}


class LogitsInFloat8(Case):
    """Verdict: fused. Rounded logits are the routing's logits."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    faint_logits = huge_logits = False  # they tie in eight bits, or have none

    def logits(self, x: Tensor) -> Tensor:
        return in_float8(super().logits(x))


class RoutingWeightsInFloat8(Case):
    """Verdict: experts fused, routing as written: no gating rounds its weights to eight bits."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = super().route(logits)
        return in_float8(w), ids


class ActivationsInFloat8(Case):
    """Verdict: rejected. The rows between the two products are rounded."""

    expect = Rejected("float8_e4m3fn")
    near = "GatherEinsum"

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tki,tkhi->tkh", in_float8(F.silu(g) * u), self.down[ids])
        return (y * w.unsqueeze(-1)).sum(dim=1)


class _Activation(Case):
    """Verdict: fused. One projection, one function; `size` of the tokens at which it shows what it is there for."""

    f: ClassVar[Callable[[Tensor], Tensor]]
    size: ClassVar[float] = 1.0

    def build_experts(self, n: int) -> None:
        self.up = parameter(n, I, H)
        self.down = parameter(n, H, I)

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return (torch.randn(tokens, H) * self.size,)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x / self.size)

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        h = type(self).f(torch.einsum("th,tkoh->tko", x, self.up[ids]))
        return (torch.einsum("tki,tkhi->tkh", h, self.down[ids]) * w.unsqueeze(-1)).sum(dim=1)


def _single(activation: Any) -> Fused:
    return Fused(RENORM, experts(form=Form.SINGLE, activation=activation))


class LogSigmoidFar(_Activation):
    """Verdict: fused. logsigmoid is -softplus(-x), finite where log(sigmoid(x)) is not."""

    expect = _single(-act.softplus(-act.G))
    f = staticmethod(F.logsigmoid)
    size = 100.0


class Log1pSmall(_Activation):
    """Verdict: fused. log1p keeps the digits of small values."""

    expect = _single(act.log1p(act.relu(act.G)))
    f = staticmethod(lambda v: torch.log1p(v.relu()))
    size = 1e-4


class Expm1Small(_Activation):
    """Verdict: fused. So does expm1."""

    expect = _single(act.expm1(act.G))
    f = staticmethod(torch.expm1)
    size = 1e-4


class LogOfOnePlus(_Activation):
    """Verdict: fused. log(1 + x) is what was written."""

    expect = _single(sp.log(1 + act.relu(act.G)))
    f = staticmethod(lambda v: torch.log(1 + v.relu()))


class Exp2(_Activation):
    """Verdict: fused. A power of two."""

    expect = _single(act.exp2(act.G))
    huge_logits = False  # of huge tokens, whose power of two is not finite
    f = staticmethod(torch.exp2)


class Mish(_Activation):
    """Verdict: fused. x tanh(softplus(x))."""

    expect = _single(act.G * sp.tanh(act.softplus(act.G)))
    f = staticmethod(F.mish)


class SoftplusOfItsOwn(_Activation):
    """Verdict: rejected. Above its threshold this softplus is x, not log(1 + exp(x))."""

    expect = Rejected("softplus")
    f = staticmethod(lambda v: F.softplus(v, threshold=1))


class Relu6(_Activation):
    """Verdict: fused. Without gradients it is a clamp."""

    expect = _single(act.clamp(act.G, 0, 6))
    f = staticmethod(F.relu6)
    inference_only = True


class LeakyRelu(_Activation):
    """Verdict: fused. s x + (1 - s) relu(x)."""

    expect = _single(act.G / 100 + sp.Rational(99, 100) * act.relu(act.G))
    f = staticmethod(F.leaky_relu)


class LeakyReluSteeper(_Activation):
    """Verdict: fused, another function: another slope below 0."""

    expect = _single(act.G / 5 + sp.Rational(4, 5) * act.relu(act.G))
    f = staticmethod(lambda v: F.leaky_relu(v, 0.2))
    near = "LeakyRelu"
    differs = ("experts.activation",)


class HardSwish(_Activation):
    """Verdict: fused. x clamp(x + 3; 0, 6) / 6; without gradients, for its slopes at the limits are relu6's."""

    expect = _single(act.G * act.clamp(act.G + 3, 0, 6) / 6)
    f = staticmethod(F.hardswish)
    size = 3.0
    inference_only = True


class MaskedSigmoid(Case):
    """Verdict: fused. A filled logit so low that exp of its negative overflows."""

    expect = Fused(gating(Score.SIGMOID), SWIGLU_EXPERTS)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("off", torch.arange(E) % 3 == 0)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x).masked_fill(self.off, -1e9)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(logits.sigmoid(), K)


class SigmoidOfTheNegative(Case):
    """Verdict: experts fused, the weights as a function of the logits. σ(-l) of the largest l: nothing is left of 1 - σ(l) there."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) + 20

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.topk(logits, K).indices
        w = (-logits).sigmoid().gather(1, ids)
        return w / w.sum(-1, keepdim=True), ids
