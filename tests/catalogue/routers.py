"""Softmax routers (R1, R2, R6): where softmax, top-k and the selection are spelled in many equal ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import BiasOn, Norm, Normaliser, Score, SumK, W

from .base import RENORM, SOFTMAX, SWIGLU_EXPERTS, Case, E, Fused, H, K, Sound, experts, gating, norm_sum

Routed = tuple[Tensor, Tensor]


class _Softmax(Case):
    """Verdict: fused. w = softmax(l)[top2], weights not renormalised."""

    expect = Fused(SOFTMAX, SWIGLU_EXPERTS)
    group = "softmax"


class SoftmaxTopk(_Softmax):
    """Verdict: fused. w = softmax(l)[top2]; the top-k values are the weights."""

    def route(self, logits: Tensor) -> Routed:
        return tuple(logits.softmax(-1).topk(K))


class SoftmaxDtype(_Softmax):
    """Verdict: fused as SoftmaxTopk. `F.softmax(dtype=float)`, the cast inside the op."""

    def route(self, logits: Tensor) -> Routed:
        p = F.softmax(logits, dim=1, dtype=torch.float)
        w, ids = torch.topk(p, K, dim=-1)
        return w.to(logits.dtype), ids


class SoftmaxFloat(_Softmax):
    """Verdict: fused as SoftmaxTopk. The cast before the op, positive dim."""

    def route(self, logits: Tensor) -> Routed:
        return torch.topk(torch.nn.Softmax(dim=1)(logits.float()), k=K, dim=1)


class SoftmaxLogsumexp(_Softmax):
    """Verdict: fused as SoftmaxTopk. exp(l - logsumexp(l))."""

    def route(self, logits: Tensor) -> Routed:
        return (logits - torch.logsumexp(logits, -1, keepdim=True)).exp().topk(K, -1)


class SoftmaxLogSoftmax(_Softmax):
    """Verdict: fused as SoftmaxTopk. exp(log_softmax(l))."""

    def route(self, logits: Tensor) -> Routed:
        return F.log_softmax(logits, -1).exp().topk(K, -1)


class SoftmaxByHand(_Softmax):
    """Verdict: fused as SoftmaxTopk. exp(l - max) over its own sum: the shift cancels."""

    def route(self, logits: Tensor) -> Routed:
        e = (logits - logits.amax(-1, keepdim=True)).exp()
        return (e / e.sum(-1, keepdim=True)).topk(K, -1)


class SoftmaxGather(_Softmax):
    """Verdict: fused as SoftmaxTopk. Only the indices are taken, the weights gathered."""

    def route(self, logits: Tensor) -> Routed:
        p = logits.softmax(-1)
        ids = p.topk(K, dim=-1)[1]
        return p.gather(-1, ids), ids


class SoftmaxSelectByLogits(_Softmax):
    """Verdict: fused as SoftmaxTopk. Selected by the logits: softmax keeps their order."""

    def route(self, logits: Tensor) -> Routed:
        ids = logits.topk(K, dim=-1).indices
        return logits.softmax(-1).gather(1, ids), ids


class SoftmaxTakeAlongDim(_Softmax):
    """Verdict: fused as SoftmaxTopk. take_along_dim, unsorted top-k."""

    def route(self, logits: Tensor) -> Routed:
        p = logits.softmax(-1)
        ids = p.topk(K, dim=-1, sorted=False)[1]
        return torch.take_along_dim(p, ids, dim=-1), ids


class SoftmaxIndexRows(_Softmax):
    """Verdict: fused as SoftmaxTopk. p[arange(T)[:, None], ids]."""

    def route(self, logits: Tensor) -> Routed:
        p = logits.softmax(-1)
        ids = p.topk(K, dim=-1)[1]
        return p[torch.arange(p.shape[0])[:, None], ids], ids


class SoftmaxOneHot(_Softmax):
    """Verdict: fused as SoftmaxTopk. The gather as a product with one-hot rows."""

    def route(self, logits: Tensor) -> Routed:
        p = logits.softmax(-1)
        ids = p.topk(K, dim=-1)[1]
        return (F.one_hot(ids, E).to(p.dtype) * p[:, None, :]).sum(-1), ids


class SoftmaxSort(_Softmax):
    """Verdict: fused as SoftmaxTopk. sort(descending)[:, :k]."""

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).sort(dim=-1, descending=True)
        return w[:, :K], ids[:, :K]


class SoftmaxSortFlipped(_Softmax):
    """Verdict: fused as SoftmaxTopk. An ascending sort from its end: sort().flip(-1)[:, :k]."""

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).sort(dim=-1)
        return w.flip(-1)[:, :K], ids.flip(-1)[:, :K]


class SoftmaxArgsort(_Softmax):
    """Verdict: fused as SoftmaxTopk. argsort(descending)[:, :k] and gather."""

    def route(self, logits: Tensor) -> Routed:
        p = logits.softmax(-1)
        ids = torch.argsort(p, dim=-1, descending=True).narrow(-1, 0, K)
        return p.gather(-1, ids), ids


class SoftmaxTokens3d(_Softmax):
    """Verdict: fused as SoftmaxTopk. Tokens come as [batch, sequence, H]; the block flattens them and views back."""

    def example_inputs(self, tokens: int = 7) -> tuple[Any, ...]:
        return (torch.randn(1, tokens, H),)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        w, ids = self.logits(flat).softmax(-1).topk(K, dim=-1)
        return self.run_experts(flat, ids, w).view(*x.shape)


class SoftmaxRouterModule(_Softmax):
    """Verdict: fused as SoftmaxTopk. The router is an nn.Linear in a submodule of its own; ids as int32."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.router.weight = self.gate

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        return self.run_experts(x, ids.to(torch.int32), w)


class SoftmaxMatmulRouter(_Softmax):
    """Verdict: fused as SoftmaxTopk. Logits through einsum."""

    def logits(self, x: Tensor) -> Tensor:
        return torch.einsum("th,eh->te", x, self.gate)

    def route(self, logits: Tensor) -> Routed:
        return logits.softmax(-1).topk(K)


# Renormalised, and top-k before softmax: one meaning -------------------------------------------------------------------


class _Renorm(Case):
    """Verdict: fused. w = softmax(l)[top2] / Σ, which is softmax over the two best logits."""

    expect = Fused(RENORM, SWIGLU_EXPERTS)
    group = "renorm"


class RenormDiv(_Renorm):
    """Verdict: fused. w / w.sum(-1, keepdim=True)."""


class TopkSoftmax(_Renorm):
    """Verdict: fused as RenormDiv. Top-k on the logits, softmax over the k values."""

    def route(self, logits: Tensor) -> Routed:
        v, ids = logits.topk(K, dim=-1)
        return v.softmax(-1), ids


class TopkFloatSoftmax(_Renorm):
    """Verdict: fused as RenormDiv. The cast between top-k and softmax, type_as after."""

    def route(self, logits: Tensor) -> Routed:
        v, ids = logits.topk(K, dim=1)
        return torch.softmax(v.float(), dim=1).type_as(logits), ids


class TopkExpSum(_Renorm):
    """Verdict: fused as RenormDiv. exp over its sum, over the k values only."""

    huge_logits = False  # exp(l) overflows in eager

    def route(self, logits: Tensor) -> Routed:
        v, ids = logits.topk(K, dim=1)
        e = v.exp()
        return e / e.sum(1, keepdim=True), ids


class TopkLogsumexp(_Renorm):
    """Verdict: fused as RenormDiv. exp(v - logsumexp(v)) over the k values."""

    def route(self, logits: Tensor) -> Routed:
        v, ids = logits.topk(K, dim=1)
        return torch.exp(v - v.logsumexp(1, keepdim=True)), ids


class SortSoftmax(_Renorm):
    """Verdict: fused as RenormDiv. Sorted logits, sliced, softmax."""

    def route(self, logits: Tensor) -> Routed:
        v, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        return v[..., :K].softmax(-1), ids[..., :K]


class ArgsortGatherSoftmax(_Renorm):
    """Verdict: fused as RenormDiv. argsort on the logits, gather, softmax."""

    def route(self, logits: Tensor) -> Routed:
        ids = logits.argsort(dim=-1, descending=True)[:, :K]
        return logits.gather(1, ids).softmax(-1), ids


class MaskedSoftmaxGather(_Renorm):
    """Verdict: fused as RenormDiv. All but the k best logits at -inf, softmax over E, then gathered."""

    def route(self, logits: Tensor) -> Routed:
        v, ids = logits.topk(K, dim=-1)
        dense = torch.full_like(logits, -torch.inf).scatter(-1, ids, v)
        return dense.softmax(-1).gather(-1, ids), ids


class SoftmaxTwice(_Renorm):
    """Verdict: fused as RenormDiv. Softmax over the logs of the selected probabilities."""

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        return w.log().softmax(-1), ids


# Score with a selection bias (R6), per-expert scale (R1g) --------------------------------------------------------------


class SoftmaxBiasClamp(Case):
    """Verdict: fused. s = softmax(l); ids = top2 of s+b; w = s[ids] / max(Σ, 1e-12)."""

    expect = Fused(gating(norm=norm_sum(clamp_min=1e-12), bias=BiasOn.SCORE), SWIGLU_EXPERTS)
    group = "softmax-bias"

    def route(self, logits: Tensor) -> Routed:
        s = F.softmax(logits, dim=1, dtype=torch.float)
        _, ids = torch.topk(s + self.bias, K, dim=-1)
        w = torch.gather(s, dim=-1, index=ids)
        return w / torch.clamp(w.sum(dim=-1, keepdim=True), min=1e-12), ids


class SoftmaxBiasClampMin(SoftmaxBiasClamp):
    """Verdict: fused as SoftmaxBiasClamp. clamp_min_ in place, bias as a row [1, E]."""

    def route(self, logits: Tensor) -> Routed:
        s = logits.softmax(-1)
        ids = (s + self.bias.unsqueeze(0)).topk(K)[1]
        w = s.gather(1, ids)
        d = w.sum(-1, keepdim=True)
        d.clamp_min_(1e-12)
        return w / d, ids


class SoftmaxBiasScale(Case):
    """Verdict: fused. s = softmax(l); ids = top2 of s+b; w = 6 s[ids]."""

    expect = Fused(gating(bias=BiasOn.SCORE, scale=6.0), SWIGLU_EXPERTS)

    def route(self, logits: Tensor) -> Routed:
        s = logits.softmax(-1)
        ids = (s + self.bias).topk(K)[1]
        return s.gather(1, ids) * 6.0, ids


class _ExpertScale(Case):
    """Verdict: fused. w = RenormDiv's times a table's entry of the expert."""

    expect = Fused(replace(RENORM, expert_scale=True), SWIGLU_EXPERTS)
    group = "expert-scale"

    def __init__(self) -> None:
        super().__init__()
        self.expert_scale = nn.Parameter(torch.rand(E) + 0.5)

    def parts(self, *inputs: Any) -> Any:
        p = super().parts(*inputs)
        p.expert_scale = self.expert_scale
        return p


class ExpertScaleIndex(_ExpertScale):
    """Verdict: fused. w * scale[ids], the router reading a normed input of its own."""

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, (H,)) * H**-0.5, self.gate)

    def route(self, logits: Tensor) -> Routed:
        w, ids = super().route(logits)
        return w * self.expert_scale[ids], ids


class ExpertScaleGather(_ExpertScale):
    """Verdict: fused as ExpertScaleIndex. The table expanded to [T, E] and gathered."""

    def route(self, logits: Tensor) -> Routed:
        w, ids = super().route(logits)
        return w * self.expert_scale.expand(ids.shape[0], E).gather(1, ids), ids


class ExpertScaleEmbedding(_ExpertScale):
    """Verdict: fused as ExpertScaleIndex. index_select on flattened ids."""

    def route(self, logits: Tensor) -> Routed:
        w, ids = super().route(logits)
        return w * self.expert_scale.index_select(0, ids.flatten()).view_as(ids), ids


class ExpertScaleAfterCustomNorm(_ExpertScale):
    """Verdict: fused. A normaliser no kernel knows, then the table: the scale must not enter the sum of the normaliser."""

    expect = Fused(gating(Score.SIGMOID, Normaliser(Norm.EXPR, expr=W / sp.sqrt(SumK(W) + 1)), expert_scale=True), SWIGLU_EXPERTS)
    group = ""

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.sigmoid().topk(K)
        return w / (w.sum(-1, keepdim=True) + 1).sqrt() * self.expert_scale[ids], ids


class ExpertScaleBeforeNorm(_ExpertScale):
    """Verdict: either as written or rejected, with a reason: the table's entries enter the sum they are divided by."""

    expect = Sound()
    group = ""
    near = "ExpertScaleIndex"

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1).topk(K)
        w = w * self.expert_scale[ids]
        return w / w.sum(-1, keepdim=True), ids


# Dtypes are part of the meaning ---------------------------------------------------------------------------------------


class _Bf16(Case):
    dtype: ClassVar[torch.dtype] = torch.bfloat16


class Bf16SoftmaxCastBack(_Bf16):
    """Verdict: fused. Scores in float32, weights cast back to bf16."""

    expect = Fused(replace(RENORM, weight_dtype=torch.bfloat16), experts(dtype=torch.bfloat16))
    group = "bf16"

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1, dtype=torch.float).topk(K)
        w = w / w.sum(-1, keepdim=True)
        return w.to(logits.dtype), ids


class Bf16SoftmaxFloatFirst(Bf16SoftmaxCastBack):
    """Verdict: fused as Bf16SoftmaxCastBack. `.float()` on the logits, in-place division, type_as."""

    def route(self, logits: Tensor) -> Routed:
        w, ids = torch.softmax(logits.float(), 1).topk(K)
        w /= w.sum(-1, keepdim=True)
        return w.type_as(logits), ids


class Bf16WeightsStayFloat(_Bf16):
    """Verdict: fused as written: the weights stay float32, and multiply in float32."""

    expect = Fused(RENORM, experts(dtype=torch.bfloat16))
    near, differs = "Bf16SoftmaxCastBack", ("gating.weight_dtype",)

    def route(self, logits: Tensor) -> Routed:
        w, ids = logits.softmax(-1, dtype=torch.float).topk(K)
        return w / w.sum(-1, keepdim=True), ids

    def run_experts(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return super().run_experts(x, ids, w).to(x.dtype)


class Bf16ScoresInBf16(_Bf16):
    """Verdict: fused as written: the softmax itself runs in bf16."""

    expect = Fused(gating(score_dtype=torch.bfloat16, weight_dtype=torch.bfloat16), experts(dtype=torch.bfloat16))

    def route(self, logits: Tensor) -> Routed:
        return logits.softmax(-1).topk(K)


class SqrtSoftplus(Case):
    """Verdict: fused. s = sqrt(softplus(l)), selected and weighted, w / (Σ + 1e-20) * 1.5."""

    expect = Fused(gating(Score.SQRT_SOFTPLUS, norm_sum(1e-20), bias=BiasOn.SCORE, scale=1.5), SWIGLU_EXPERTS)
    group = "sqrt-softplus"

    def scored(self, logits: Tensor) -> Tensor:
        return F.softplus(logits).sqrt()

    def route(self, logits: Tensor) -> Routed:
        s = self.scored(logits)
        ids = (s + self.bias).topk(K)[1]
        w = s.gather(1, ids)
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 1.5, ids


class SqrtLog1pExp(SqrtSoftplus):
    """Verdict: fused as SqrtSoftplus. log1p(exp(l)) ** 0.5."""

    def scored(self, logits: Tensor) -> Tensor:
        return logits.exp().log1p() ** 0.5


class SqrtLogOnePlusExp(SqrtSoftplus):
    """Verdict: fused as SqrtSoftplus. torch.pow(log(1 + exp(l)), 0.5)."""

    def scored(self, logits: Tensor) -> Tensor:
        return torch.pow(torch.log(1 + logits.exp()), 0.5)


class IdentityScore(Case):
    """Verdict: fused. The logits themselves are the weights: w = l[top2]."""

    expect = Fused(gating(Score.IDENTITY), SWIGLU_EXPERTS)

    def route(self, logits: Tensor) -> Routed:
        return logits.topk(K)
