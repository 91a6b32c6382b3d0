"""Sigmoid routers (R3): spellings of the score, the bias, and the gather."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import BiasOn

from .base import SIGMOID, SIGMOID_BIAS, SWIGLU_EXPERTS, Case, E, Fused, K

Routed = tuple[Tensor, Tensor]


class _SigmoidBias(Case):
    """Verdict: fused. w = σ(l)[top2 of σ(l)+b] / (Σ + 1e-20) · 2.5; biases of both signs."""

    expect = Fused(SIGMOID_BIAS, SWIGLU_EXPERTS)
    group = "sigmoid-bias"

    def scored(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def select(self, s: Tensor) -> Tensor:
        return torch.topk(s + self.bias, K, dim=-1)[1]

    def pick(self, s: Tensor, ids: Tensor) -> Tensor:
        return s.gather(1, ids)

    def route(self, logits: Tensor) -> Routed:
        s = self.scored(logits)
        ids = self.select(s)
        w = self.pick(s, ids)
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


class SigmoidMethod(_SigmoidBias):
    """Verdict: fused. logits.float().sigmoid()."""

    def scored(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()


class SigmoidExp(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. 1 / (1 + exp(-l))."""

    def scored(self, logits: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-logits))


class SigmoidReciprocal(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. (exp(-l) + 1).reciprocal()."""

    def scored(self, logits: Tensor) -> Tensor:
        return ((-logits).exp() + 1.0).reciprocal()


class SigmoidExpOver(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. exp(l) / (1 + exp(l))."""

    def scored(self, logits: Tensor) -> Tensor:
        e = logits.exp()
        return e / (e + 1)


class SigmoidTanh(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. (1 + tanh(l / 2)) / 2."""

    def scored(self, logits: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(0.5 * logits))


class SigmoidLogsigmoid(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. exp(logsigmoid(l))."""

    def scored(self, logits: Tensor) -> Tensor:
        return F.logsigmoid(logits).exp()


class SigmoidExpit(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. torch.special.expit."""

    def scored(self, logits: Tensor) -> Tensor:
        return torch.special.expit(logits)


class SigmoidMinusOther(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. 1 - σ(-l)."""

    def scored(self, logits: Tensor) -> Tensor:
        return 1 - torch.sigmoid(-logits)


class BiasParameter(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. The bias is a Parameter, broadcast from [1, E], selection under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.correction = nn.Parameter(self.bias.clone())

    def select(self, s: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.topk(s.detach() + self.correction.unsqueeze(0), K, dim=-1, sorted=False)[1]


class BiasFirst(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. bias + scores, by sort."""

    def select(self, s: Tensor) -> Tensor:
        return (self.bias + s).sort(-1, descending=True).indices[:, :K]


class BiasAddAlpha(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. torch.add and a float32 cast that does nothing."""

    def select(self, s: Tensor) -> Tensor:
        return torch.add(s.float(), self.bias.float(), alpha=1).argsort(-1, True)[:, :K]


class BiasSubNeg(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. s - (-b)."""

    def select(self, s: Tensor) -> Tensor:
        return (s - (-self.bias)).topk(K).indices


class BiasTakenOffAgain(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. The top-k values less the bias of their experts are the scores."""

    def route(self, logits: Tensor) -> Routed:
        v, ids = (logits.sigmoid() + self.bias).topk(K)
        w = v - self.bias[ids]
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


class PickIndexed(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. Gathered by row and column index."""

    def pick(self, s: Tensor, ids: Tensor) -> Tensor:
        return s[torch.arange(s.size(0)).unsqueeze(1), ids]


class PickScoreAgain(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. The logits are gathered and scored a second time."""

    def route(self, logits: Tensor) -> Routed:
        ids = self.select(logits.sigmoid())
        w = logits.gather(1, ids).sigmoid()
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


class PickMaskedDense(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. Normalised as a masked [T, E] matrix, gathered last."""

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        ids = self.select(s)
        chosen = s * torch.zeros_like(s).scatter_(1, ids, 1.0)
        return (chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * 2.5).gather(1, ids), ids


class SoftcappedLogits(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. The logits are capped by tanh first; the cap belongs to their producer."""

    def logits(self, x: Tensor) -> Tensor:
        return torch.tanh(super().logits(x) / 5.0) * 5.0


class SoftcapLogitsMultiplied(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. The logits are multiplied by a constant; that belongs to their producer."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x) * 0.7


class LogitsLiveOutside(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. The logits are returned too."""

    def forward(self, x: Tensor) -> Any:
        logits = self.logits(x)
        w, ids = self.route(logits)
        return self.run_experts(x, ids, w), logits


class WeightsAndIdsLiveOutside(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. Weights and ids are returned too."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(self.logits(x))
        return self.run_experts(x, ids, w), w, ids


class AuxLossOutside(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. A balance loss reads scores and ids; both stay alive."""

    def forward(self, x: Tensor) -> Any:
        logits = self.logits(x)
        w, ids = self.route(logits)
        load = F.one_hot(ids, E).float().sum(1).mean(0)
        loss = (load * logits.softmax(-1).mean(0)).sum() * E
        return self.run_experts(x, ids, w), loss


class DenseScoresOutside(_SigmoidBias):
    """Verdict: fused as SigmoidMethod. The whole score matrix is returned too."""

    def forward(self, x: Tensor) -> Any:
        logits = self.logits(x)
        s = logits.sigmoid()
        ids = self.select(s)
        w = s.gather(1, ids)
        return self.run_experts(x, ids, w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5), s


# No bias -----------------------------------------------------------------------------------------------------------------


class _Sigmoid(Case):
    """Verdict: fused. w = σ(l)[top2] / Σ."""

    expect = Fused(SIGMOID, SWIGLU_EXPERTS)
    group = "sigmoid"


class SigmoidValues(_Sigmoid):
    """Verdict: fused. The top-k values of σ(l)."""

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.sigmoid().topk(K)
        return w / w.sum(-1, keepdim=True), ids


class SigmoidGather(_Sigmoid):
    """Verdict: fused as SigmoidValues. Indices and gather."""

    def route(self, logits: Tensor) -> Routed:
        s = logits.sigmoid()
        ids = s.topk(K)[1]
        w = s.gather(-1, ids)
        return w / w.sum(-1, keepdim=True), ids


class SigmoidAfterTopk(_Sigmoid):
    """Verdict: fused as SigmoidValues. Top-k on the logits, σ on the k values: σ keeps their order."""

    def route(self, logits: Tensor) -> Routed:
        v, ids = logits.topk(K)
        w = v.sigmoid()
        return w / w.sum(-1, keepdim=True), ids


# Bias on the logits ------------------------------------------------------------------------------------------------------


class _LogitBias(Case):
    """Verdict: fused. ids = top2 of l+b, w = σ(l)[ids] / (Σ + 1e-20) · 2.5: another selection than σ(l)+b."""

    expect = Fused(replace(SIGMOID_BIAS, bias=BiasOn.LOGIT), SWIGLU_EXPERTS)
    group = "logit-bias"
    near, differs = "SigmoidMethod", ("gating.bias",)


class LogitBiasGatherFirst(_LogitBias):
    """Verdict: fused, differs from SigmoidMethod in gating.bias. σ of the gathered logits."""

    def route(self, logits: Tensor) -> Routed:
        ids = (logits + self.bias).topk(K)[1]
        w = logits.gather(1, ids).sigmoid()
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


class LogitBiasScoreFirst(_LogitBias):
    """Verdict: fused as LogitBiasGatherFirst. σ of all logits, gathered."""

    def route(self, logits: Tensor) -> Routed:
        ids = (logits + self.bias).topk(K)[1]
        w = logits.sigmoid().gather(1, ids)
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids
