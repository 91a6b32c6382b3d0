"""What routing means: router logits to weights and expert ids."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from torch import Tensor

from . import scalar as act
from .score import Score, score


class BiasOn(enum.IntEnum):
    """Where the selection bias [E] enters: nowhere, on the scores, on the logits (selection only)."""

    NONE = 0
    SCORE = 1
    LOGIT = 2


class Norm(enum.IntEnum):
    """Reduction over the k weights that they are divided by."""

    NONE = 0
    SUM = 1
    MAX = 2
    PNORM = 3
    EXPR = 4  # a recovered expression that no kernel knows: evaluated outside the gating op


@dataclass(frozen=True)
class Groups:
    """Group-limited selection (DeepSeek-V3 technical report, section 2.1.2).

    Experts fall into `count` equal groups; a group's score is the sum of its `top` best selection scores (`top=1` is the
    max); the `kept` best groups stay, all other experts' selection scores become `fill`.
    """

    count: int
    kept: int
    top: int
    fill: float


@dataclass(frozen=True)
class Normaliser:
    """w -> w / guard(reduction(w)); the guard is `+ eps` or `max(·, clamp_min)`.

    `expr` (kind EXPR only) is the new weight as a sympy expression in the symbol `w` and the reductions
    SumK, MaxK, MinK over the k weights of a token.
    """

    kind: Norm
    eps: float = 0.0
    clamp_min: float = 0.0
    p: float = 1.0
    expr: sp.Expr | None = None


class SumK(sp.Function):  # type: ignore[misc]
    """Sum over the k selected experts of one token."""

    nargs = 1


class MaxK(sp.Function):  # type: ignore[misc]
    nargs = 1


class MinK(sp.Function):  # type: ignore[misc]
    nargs = 1


W = sp.Symbol("w", real=True)


@dataclass(frozen=True)
class Gating:
    """Router logits to (weights, ids).

    s = score(logits) over all experts, or over the selected ones when `score_over_selected` (top-k, then score);
    ids = topk(groups(s + bias)), or topk(logits + bias) with `BiasOn.LOGIT`; w = s[ids] (+ bias[ids] when `bias_in_weights`);
    w = normalise(w) * scale * expert_scale[ids].
    """

    num_experts: int
    k: int
    score: Score
    score_over_selected: bool = False
    bias: BiasOn = BiasOn.NONE
    bias_in_weights: bool = False
    groups: Groups | None = None
    norm: Normaliser | None = None
    scale: float = 1.0
    expert_scale: bool = False
    score_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32

    def evaluate(
        self, logits: Tensor, bias: Tensor | None = None, expert_scale: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:
        """logits [T, E], bias [E], expert_scale [E] -> weights [T, k] in `dtype`, ids [T, k] int64."""
        choice, raw = self.selection(logits, bias, dtype)
        ids = choice.topk(self.k, dim=-1).indices
        return self.weights_of(raw, ids, bias, expert_scale), ids

    def selection(self, logits: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """([T, E] what top-k chooses by, [T, E] what the weights are gathered from)."""
        logits = logits.to(dtype)
        raw = logits if self.score_over_selected else score(self.score, logits)
        choice = logits if self.bias is BiasOn.LOGIT else raw
        if self.bias is not BiasOn.NONE:
            assert bias is not None
            choice = choice + bias.to(dtype)
        if self.groups is not None:
            g = self.groups
            by_group = choice.unflatten(-1, (g.count, -1))
            best = by_group.topk(g.top, dim=-1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(g.kept, dim=-1).indices, True)
            choice = by_group.masked_fill(~kept[..., None], g.fill).flatten(-2)
        return choice, raw

    def weights_of(self, raw: Tensor, ids: Tensor, bias: Tensor | None = None, expert_scale: Tensor | None = None) -> Tensor:
        """Weights [T, k] of given ids: gather, score, normalise, scale."""
        w = raw.gather(-1, ids)
        if self.score_over_selected:
            w = score(self.score, w)
        if self.bias_in_weights:
            assert bias is not None
            w = w + bias.to(w.dtype)[ids]
        if self.norm is not None:
            w = normalise(self.norm, w)
        if self.scale != 1.0:
            w = w * self.scale
        if self.expert_scale:
            assert expert_scale is not None
            w = w * expert_scale.to(w.dtype)[ids]
        return w


def normalise(norm: Normaliser, w: Tensor) -> Tensor:
    """w [T, k] -> [T, k]."""
    if norm.kind is Norm.NONE:
        return w
    if norm.kind is Norm.EXPR:
        return _evaluate_norm(norm.expr, w)
    if norm.kind is Norm.SUM:
        d = w.sum(-1, keepdim=True)
    elif norm.kind is Norm.MAX:
        d = w.amax(-1, keepdim=True)
    else:
        d = torch.linalg.vector_norm(w, ord=norm.p, dim=-1, keepdim=True)
    if norm.clamp_min:
        d = d.clamp(min=norm.clamp_min)
    return w / (d + norm.eps)


def _evaluate_norm(expr: Any, w: Tensor) -> Tensor:
    """Evaluate a recovered normaliser expression on w [T, k]."""
    reductions: dict[Any, Any] = {SumK: torch.sum, MaxK: torch.amax, MinK: torch.amin}

    def full(v: Any) -> Tensor:
        return v if isinstance(v, Tensor) else torch.full_like(w, v)

    def known(e: Any, go: Any) -> Any:
        if e.func in reductions:
            return reductions[e.func](full(go(e.args[0])).expand_as(w), -1, keepdim=True)
        return w if e == W else None

    return full(act.fold(expr, act.Tensors(), known)).expand_as(w)
