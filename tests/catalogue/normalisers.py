"""Renormalisation and scale: equal spellings of what happens to the k weights."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile.ir import Norm, Normaliser, Score, SumK

from .base import RENORM, SIGMOID_BIAS, SWIGLU_EXPERTS, Case, Fused, K, gating, norm_sum

Routed = tuple[Tensor, Tensor]


class _Renorm(Case):
    """Verdict: fused. w = softmax(l)[top2] / Σ; subclasses spell the division."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "renorm"

    def divide(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return self.divide(w), ids


class RenormInPlace(_Renorm):
    """Verdict: fused as RenormDiv. w /= Σ."""

    def divide(self, w: Tensor) -> Tensor:
        w /= w.sum(dim=-1, keepdim=True)
        return w


class RenormReciprocal(_Renorm):
    """Verdict: fused as RenormDiv. w * Σ.reciprocal()."""

    def divide(self, w: Tensor) -> Tensor:
        return w * w.sum(dim=-1, keepdim=True).reciprocal()


class RenormNormalize(_Renorm):
    """Verdict: fused as RenormDiv. F.normalize(p=1): its guard of 1e-12 is under any sum of top softmax scores."""

    def divide(self, w: Tensor) -> Tensor:
        return F.normalize(w, p=1, dim=-1)


class RenormUnsqueeze(_Renorm):
    """Verdict: fused as RenormDiv. The sum without keepdim, unsqueezed."""

    def divide(self, w: Tensor) -> Tensor:
        return torch.div(w, w.sum(1).unsqueeze(-1))


class RenormMean(_Renorm):
    """Verdict: fused as RenormDiv. w / (k * mean)."""

    def divide(self, w: Tensor) -> Tensor:
        return w / (w.mean(-1, keepdim=True) * K)


class RenormAddSlices(_Renorm):
    """Verdict: fused as RenormDiv. The sum written out as the addition of the k columns."""

    def divide(self, w: Tensor) -> Tensor:
        return w / (w[:, 0:1] + w[:, 1:2])


class RenormPow(_Renorm):
    """Verdict: fused as RenormDiv. w * Σ ** -1, expanded to [T, k] first."""

    def divide(self, w: Tensor) -> Tensor:
        return w * (w.sum(-1, keepdim=True).expand_as(w) ** -1)


class RenormTwice(_Renorm):
    """Verdict: fused as RenormDiv. Normalising the normalised changes nothing."""

    def divide(self, w: Tensor) -> Tensor:
        w = w / w.sum(-1, keepdim=True)
        return w / w.sum(-1, keepdim=True)


class RenormScaleCancels(_Renorm):
    """Verdict: fused as RenormDiv. A scale before the division cancels."""

    def divide(self, w: Tensor) -> Tensor:
        w = w * 3.0
        return w / w.sum(-1, keepdim=True)


class RenormNorm1(_Renorm):
    """Verdict: fused as RenormDiv. torch.norm(p=1): softmax scores are not negative."""

    def divide(self, w: Tensor) -> Tensor:
        return w / torch.norm(w, p=1, dim=-1, keepdim=True)


class RenormLogSpace(_Renorm):
    """Verdict: fused as RenormDiv. exp(log w - log Σ)."""

    def divide(self, w: Tensor) -> Tensor:
        return (w.log() - w.sum(-1, keepdim=True).log()).exp()


# Other reductions -------------------------------------------------------------------------------------------------------


class _Norm2(_Renorm):
    """Verdict: fused. w / sqrt(Σ w²)."""

    expect = Fused(gating(norm=Normaliser(Norm.PNORM, p=2.0)), SWIGLU_EXPERTS)
    group = "norm2"


class Norm2TorchNorm(_Norm2):
    """Verdict: fused. w / torch.norm(w, p=2)."""

    def divide(self, w: Tensor) -> Tensor:
        return w / torch.norm(w, p=2.0, dim=-1, keepdim=True)


class Norm2VectorNorm(_Norm2):
    """Verdict: fused as Norm2TorchNorm. linalg.vector_norm."""

    def divide(self, w: Tensor) -> Tensor:
        return w / torch.linalg.vector_norm(w, dim=-1, keepdim=True)


class Norm2ByHand(_Norm2):
    """Verdict: fused as Norm2TorchNorm. sqrt of the sum of squares."""

    def divide(self, w: Tensor) -> Tensor:
        return w / w.pow(2).sum(-1, keepdim=True).sqrt()


class Norm2Rsqrt(_Norm2):
    """Verdict: fused as Norm2TorchNorm. w * rsqrt(Σ w·w)."""

    def divide(self, w: Tensor) -> Tensor:
        return w * (w * w).sum(-1, keepdim=True).rsqrt()


class _NormMax(_Renorm):
    """Verdict: fused. w / max w."""

    expect = Fused(gating(norm=Normaliser(Norm.MAX)), SWIGLU_EXPERTS)
    group = "norm-max"


class NormMaxAmax(_NormMax):
    """Verdict: fused. w / w.amax(-1)."""

    def divide(self, w: Tensor) -> Tensor:
        return w / w.amax(-1, keepdim=True)


class NormMaxValues(_NormMax):
    """Verdict: fused as NormMaxAmax. w / w.max(-1).values."""

    def divide(self, w: Tensor) -> Tensor:
        return w / w.max(dim=-1, keepdim=True).values


class NormCustom(_Renorm):
    """Verdict: fused. A reduction no kernel knows, w / sqrt(Σ w + 1): kept as an expression."""

    expect = Fused(
        gating(norm=Normaliser(Norm.EXPR, expr=sp.Symbol("w", real=True) / sp.sqrt(SumK(sp.Symbol("w", real=True)) + 1))), SWIGLU_EXPERTS
    )
    group = "norm-custom"

    def divide(self, w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 1).sqrt()


class NormCustomRsqrt(NormCustom):
    """Verdict: fused as NormCustom. The same through rsqrt."""

    def divide(self, w: Tensor) -> Tensor:
        return torch.rsqrt(1 + w.sum(-1, keepdim=True)) * w


# Scale positions --------------------------------------------------------------------------------------------------------


class _Scaled(Case):
    """Verdict: fused. σ(l)[top2 of σ(l)+b] / (Σ + 1e-20) · 2.5; subclasses place the 2.5."""

    expect = Fused(SIGMOID_BIAS, SWIGLU_EXPERTS)
    group = "sigmoid-bias"

    def finish(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        ids = (s + self.bias).topk(K)[1]
        return self.finish(s.gather(1, ids)), ids


class ScaleAfter(_Scaled):
    """Verdict: fused. (w / (Σ + eps)) * 2.5."""

    def finish(self, w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5


class ScaleInNumerator(_Scaled):
    """Verdict: fused as ScaleAfter. (w * 2.5) / (Σ w + eps)."""

    def finish(self, w: Tensor) -> Tensor:
        return (w * 2.5) / (w.sum(-1, keepdim=True) + 1e-20)


class ScaleInFactor(_Scaled):
    """Verdict: fused as ScaleAfter. w * (2.5 / (Σ + eps))."""

    def finish(self, w: Tensor) -> Tensor:
        return w * (2.5 / (w.sum(-1, keepdim=True) + 1e-20))


class ScaleInPlace(_Scaled):
    """Verdict: fused as ScaleAfter. add_, div_ and mul_ in place."""

    def finish(self, w: Tensor) -> Tensor:
        d = w.sum(-1, keepdim=True).add_(1e-20)
        return w.div_(d).mul_(2.5)


class ScaleTensor(_Scaled):
    """Verdict: fused as ScaleAfter. The scale divided by its inverse, 0.4."""

    def finish(self, w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 1e-20) / 0.4


class ScaleOnOutput(_Scaled):
    """Verdict: fused as ScaleAfter. The scale multiplies the combined output."""

    def finish(self, w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 1e-20)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.5


class ScaleOnExpertOutput(ScaleOnOutput):
    """Verdict: fused as ScaleAfter. The scale multiplies each expert's rows, before the weights."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(self.logits(x))
        g, u = torch.einsum("th,tkoh->tko", x, self.up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids]) * 2.5
        return (y * w.unsqueeze(-1)).sum(dim=1)


class ScaleBeforeNormWithEps(_Scaled):
    """Verdict: fused. (2.5 w) / (Σ 2.5 w + 0.25) is w / (Σ w + 0.1): the scale cancels, the epsilon shrinks."""

    expect = Fused(gating(Score.SIGMOID, norm_sum(0.1), bias=SIGMOID_BIAS.bias), SWIGLU_EXPERTS)
    group = ""
    near, differs = "ScaleAfter", ("gating.norm.eps", "gating.scale")

    def finish(self, w: Tensor) -> Tensor:
        w = w * 2.5
        return w / (w.sum(-1, keepdim=True) + 0.25)


class RenormClampSigmoid(_Scaled):
    """Verdict: fused. F.normalize(p=1) on sigmoid scores: the guard max(Σ, 1e-12) can matter and is carried."""

    expect = Fused(gating(Score.SIGMOID, norm_sum(clamp_min=1e-12), bias=SIGMOID_BIAS.bias), SWIGLU_EXPERTS)
    group = "sigmoid-clamp"

    def finish(self, w: Tensor) -> Tensor:
        return F.normalize(w, p=1, dim=-1)


class RenormClampByHand(RenormClampSigmoid):
    """Verdict: fused as RenormClampSigmoid. w / Σ.clamp(min=1e-12)."""

    def finish(self, w: Tensor) -> Tensor:
        return w / w.sum(-1, keepdim=True).clamp(min=1e-12)


class RenormClampMaximum(RenormClampSigmoid):
    """Verdict: fused as RenormClampSigmoid. torch.maximum with a constant tensor."""

    def finish(self, w: Tensor) -> Tensor:
        return w / torch.maximum(w.sum(-1, keepdim=True), w.new_tensor(1e-12))


class UserReduce(_Scaled):
    """Verdict: fused as ScaleAfter. The reduction is a function the user hands in."""

    def __init__(self, reduce: Any = torch.sum) -> None:
        super().__init__()
        self.reduce = reduce

    def finish(self, w: Tensor) -> Tensor:
        return w / (self.reduce(w, dim=-1, keepdim=True) + 1e-20) * 2.5
