"""Near misses in the normaliser: constants and terms that change the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_compile.ir import Norm, Normaliser

from .base import RENORM, SIGMOID_BIAS, SOFTMAX, SWIGLU_EXPERTS, AsWritten, Case, Fused, K, Sound, norm_sum

Routed = tuple[Tensor, Tensor]


class _Sigmoid(Case):
    near = "SigmoidMethod"

    def finish(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        ids = (s + self.bias).topk(K)[1]
        return self.finish(s.gather(1, ids)), ids


class SigmoidNoRenorm(_Sigmoid):
    """Verdict: fused, differs from SigmoidMethod in norm: the weights do not sum to one."""

    expect = Fused(replace(SIGMOID_BIAS, norm=None), SWIGLU_EXPERTS)
    differs = ("gating.norm",)

    def finish(self, w: Tensor) -> Tensor:
        return w * 2.5


class EpsilonMatters(_Sigmoid):
    """Verdict: fused, differs from SigmoidMethod in norm.eps: 0.05 is no rounding guard."""

    expect = Fused(replace(SIGMOID_BIAS, norm=norm_sum(0.05)), SWIGLU_EXPERTS)
    differs = ("gating.norm.eps",)

    def finish(self, w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 0.05) * 2.5


class EpsilonPerSlot(_Sigmoid):
    """Verdict: fused as written: eps is added to each of the k weights in the sum, so it counts k times."""

    expect = Fused(replace(SIGMOID_BIAS, norm=norm_sum(0.1)), SWIGLU_EXPERTS)
    differs = ("gating.norm.eps",)

    def finish(self, w: Tensor) -> Tensor:
        return w / (w + 0.05).sum(-1, keepdim=True) * 2.5


class EpsilonInNumeratorToo(_Sigmoid):
    """Verdict: either an expression or as written: (w + 0.05) / Σ(w + 0.05)."""

    expect = Sound()

    def finish(self, w: Tensor) -> Tensor:
        w = w + 0.05
        return w / w.sum(-1, keepdim=True) * 2.5


class ClampMatters(_Sigmoid):
    """Verdict: fused, differs from SigmoidMethod in the guard: the divisor is at least 0.9."""

    expect = Fused(replace(SIGMOID_BIAS, norm=norm_sum(clamp_min=0.9)), SWIGLU_EXPERTS)
    differs = ("gating.norm.clamp_min", "gating.norm.eps")

    def finish(self, w: Tensor) -> Tensor:
        return w / w.sum(-1, keepdim=True).clamp(min=0.9) * 2.5


class ClampMax(_Sigmoid):
    """Verdict: either an expression or as written: the divisor is at most 0.9."""

    expect = Sound()

    def finish(self, w: Tensor) -> Tensor:
        return w / w.sum(-1, keepdim=True).clamp(max=0.9) * 2.5


class OtherScale(_Sigmoid):
    """Verdict: fused, differs from SigmoidMethod in scale only."""

    expect = Fused(replace(SIGMOID_BIAS, scale=2.4), SWIGLU_EXPERTS)
    differs = ("gating.scale",)

    def finish(self, w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.4


class ScaleAdded(_Sigmoid):
    """Verdict: either an expression or as written: the 2.5 is added, not multiplied."""

    expect = Sound()

    def finish(self, w: Tensor) -> Tensor:
        return w / (w.sum(-1, keepdim=True) + 1e-20) + 2.5


class DifferenceInstead(_Sigmoid):
    """Verdict: experts fused, routing as written: w0 - w1 is no reduction of the set of weights."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def finish(self, w: Tensor) -> Tensor:
        return w / (w[:, :1] - w[:, 1:] + 3.0)


class _Renorm(Case):
    near = "RenormDiv"

    def finish(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return self.finish(w), ids


class MeanInsteadOfSum(_Renorm):
    """Verdict: fused, differs from RenormDiv in scale: w / mean is k times w / sum."""

    expect = Fused(replace(RENORM, scale=float(K)), SWIGLU_EXPERTS)
    differs = ("gating.scale",)

    def finish(self, w: Tensor) -> Tensor:
        return w / w.mean(-1, keepdim=True)


class MaxInsteadOfSum(_Renorm):
    """Verdict: fused, differs from RenormDiv in norm.kind."""

    expect = Fused(replace(SOFTMAX, norm=Normaliser(Norm.MAX)), SWIGLU_EXPERTS)
    differs = ("gating.norm.kind",)

    def finish(self, w: Tensor) -> Tensor:
        return w / w.amax(-1, keepdim=True)


class MinInsteadOfMax(_Renorm):
    """Verdict: either an expression or as written: w / min w."""

    expect = Sound()

    def finish(self, w: Tensor) -> Tensor:
        return w / w.amin(-1, keepdim=True)


class SumOfSquares(_Renorm):
    """Verdict: either an expression or as written: w / Σ w², no root."""

    expect = Sound()
    near = "Norm2ByHand"

    def finish(self, w: Tensor) -> Tensor:
        return w / w.pow(2).sum(-1, keepdim=True)


class EpsilonUnderRoot(_Renorm):
    """Verdict: either an expression or as written: w * rsqrt(Σ w² + 0.1)."""

    expect = Sound()
    near = "Norm2Rsqrt"

    def finish(self, w: Tensor) -> Tensor:
        return w * ((w * w).sum(-1, keepdim=True) + 0.1).rsqrt()


class HalfRenormalised(_Renorm):
    """Verdict: either an expression or as written: w / sqrt(Σ)."""

    expect = Sound()

    def finish(self, w: Tensor) -> Tensor:
        return w / w.sum(-1, keepdim=True).sqrt()


class SquareRootOfWeights(_Renorm):
    """Verdict: either an expression or as written: sqrt(w / Σ)."""

    expect = Sound()

    def finish(self, w: Tensor) -> Tensor:
        return (w / w.sum(-1, keepdim=True)).sqrt()


class SoftmaxOfSoftmax(_Renorm):
    """Verdict: either an expression or as written: softmax over the probabilities, not over their logs."""

    expect = Sound()
    near = "SoftmaxTwice"

    def finish(self, w: Tensor) -> Tensor:
        return w.softmax(-1)


class CumulativeSum(_Renorm):
    """Verdict: experts fused, routing as written: divided by the running sum over the slots."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def finish(self, w: Tensor) -> Tensor:
        return w / torch.cumsum(w, -1)


class RenormAllTokensTogether(_Renorm):
    """Verdict: experts fused, routing as written: one divisor for all tokens and slots."""

    expect = AsWritten(SWIGLU_EXPERTS)

    def finish(self, w: Tensor) -> Tensor:
        return w / w.sum()
