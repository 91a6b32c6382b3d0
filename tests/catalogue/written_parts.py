"""Routers of which a part is written after it was made, through a slice or a view: the name of the tensor does not tell its value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import SWIGLU_EXPERTS, AsWritten, Case, E, K

WRITTEN = AsWritten(SWIGLU_EXPERTS, "written through another view")


class _Softmax(Case):
    expect = WRITTEN
    near = "SoftmaxTopk"


class PaddedExpertsMasked(_Softmax):
    """Verdict: experts fused, routing as written: the logits of the last two experts are overwritten through a slice."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits[:, E - 2 :] = -math.inf
        return logits.softmax(-1).topk(K)


class ClonedLogitsMasked(_Softmax):
    """Verdict: experts fused, routing as written: the same on a clone of the logits."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.clone()
        logits[:, 0] = -math.inf
        return logits.softmax(-1).topk(K)


class LogitsNegatedInView(_Softmax):
    """Verdict: experts fused, routing as written: the logits change their sign through a flat view."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits.view(-1).mul_(-1)
        return logits.softmax(-1).topk(K)


class MaskedAfterSoftmax(_Softmax):
    """Verdict: experts fused, routing as written: the weights are those before the write, the choice that after it."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(-1)
        logits[:, 0] = -math.inf
        ids = logits.topk(K).indices
        return scores.gather(-1, ids), ids


class BiasEntryWritten(_Softmax):
    """Verdict: experts fused, routing as written: one entry of a copy of the bias is overwritten."""

    near = "SigmoidMethod"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        bias = self.bias.clone()
        bias[3] = 5.0
        scores = logits.sigmoid()
        ids = torch.topk(scores + bias, K).indices
        w = scores.gather(-1, ids)
        return w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5, ids
