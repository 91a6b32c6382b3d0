"""Router logits to weights and ids in plain torch, and the gradients: what `ir.Gating.evaluate` says, in the op's dtypes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ir import BiasOn, Norm, Score
from ...ir import score as apply_score
from ...ir.records import Routing as Routing


def forward(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, r: Routing) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> (weights [T, k] in r.weight_dtype, ids [T, k] int64)."""
    logits = logits.to(r.score_dtype)
    raw = logits if r.score_over_selected else apply_score(Score(r.score), logits)
    choice = logits if r.bias_on == BiasOn.LOGIT else raw
    if r.bias_on != BiasOn.NONE and bias is not None:
        choice = choice + bias.to(r.score_dtype)
    ids = _keep_groups(choice, r).topk(r.k, dim=-1).indices
    return _weights(raw, ids, bias, expert_scale, r), ids


def weights_of(logits: Tensor, ids: Tensor, bias: Tensor | None, expert_scale: Tensor | None, r: Routing) -> Tensor:
    """Weights [T, k] of given ids, in the dtype of the logits until they are done; differentiable any number of times."""
    return _weights(logits if r.score_over_selected else apply_score(Score(r.score), logits), ids, bias, expert_scale, r)


def _weights(raw: Tensor, ids: Tensor, bias: Tensor | None, expert_scale: Tensor | None, r: Routing) -> Tensor:
    w = _chosen(raw, bias, ids, r)
    if r.norm != Norm.NONE:
        w = w / _guarded(_reduce(w, r), r)
    if r.scale != 1.0:
        w = w * r.scale
    if expert_scale is not None:
        w = w * expert_scale.to(w.dtype)[ids]
    return w.to(r.weight_dtype)


def _keep_groups(choice: Tensor, r: Routing) -> Tensor:
    """Selection scores [T, E] with the losing groups' filled."""
    if not r.n_groups:
        return choice
    by_group = choice.unflatten(-1, (r.n_groups, -1))
    best = by_group.topk(r.group_top, dim=-1).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(r.kept_groups, dim=-1).indices, True)
    return by_group.masked_fill(~kept[..., None], r.group_fill).flatten(-2)


def _chosen(raw: Tensor, bias: Tensor | None, ids: Tensor, r: Routing) -> Tensor:
    """Weights [T, k] before normalisation."""
    w = raw.gather(-1, ids)
    if r.score_over_selected:
        w = apply_score(Score(r.score), w)
    if r.bias_in_weights and bias is not None:
        w = w + bias.to(w.dtype)[ids]
    return w


def _reduce(w: Tensor, r: Routing) -> Tensor:
    if r.norm == Norm.SUM:
        return w.sum(-1, keepdim=True)
    if r.norm == Norm.MAX:
        return w.amax(-1, keepdim=True)
    return torch.linalg.vector_norm(w, ord=r.norm_p, dim=-1, keepdim=True)


def _guarded(d: Tensor, r: Routing) -> Tensor:
    return (d.clamp(min=r.norm_clamp) if r.norm_clamp else d) + r.norm_eps


def backward(
    grad: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, r: Routing, needs: list[bool]
) -> list[Tensor]:
    """Gradients of what `needs` flags among (logits, bias, expert_scale), in that order; ids are as `forward` gave them."""
    acc = torch.promote_types(r.score_dtype, torch.float32)
    score = Score(r.score)
    wide = logits.to(acc)
    raw = wide if r.score_over_selected else apply_score(score, wide)
    picked = raw.gather(-1, ids)
    w = apply_score(score, picked) if r.score_over_selected else picked
    scored = w
    if r.bias_in_weights and bias is not None:
        w = w + bias.to(acc)[ids]
    g = grad.to(acc)
    out: list[Tensor | None] = [None, None, None]
    if expert_scale is not None:
        if needs[2]:
            out[2] = _per_expert(g * _normalised(w, r) * r.scale, ids, expert_scale)
        g = g * expert_scale.to(acc)[ids]
    g = _normalise_backward(g * r.scale, w, r)
    if needs[1] and bias is not None:
        out[1] = _per_expert(g, ids, bias) if r.bias_in_weights else torch.zeros_like(bias)
    if needs[0]:
        if r.score_over_selected:
            g = _score_backward(score, g, picked, scored)
        full = torch.zeros_like(wide).scatter_add(-1, ids, g)
        out[0] = (full if r.score_over_selected else _score_backward(score, full, wide, raw)).to(logits.dtype)
    return [t for t in out if t is not None]


def _per_expert(g: Tensor, ids: Tensor, like: Tensor) -> Tensor:
    """Σ over tokens and slots of g [T, k] by expert -> the shape and dtype of `like` [E]."""
    return torch.zeros(like.shape, dtype=g.dtype, device=g.device).scatter_add(0, ids.reshape(-1), g.reshape(-1)).to(like.dtype)


def _normalised(w: Tensor, r: Routing) -> Tensor:
    return w if r.norm == Norm.NONE else w / _guarded(_reduce(w, r), r)


def _normalise_backward(g: Tensor, w: Tensor, r: Routing) -> Tensor:
    """Gradient of w / guard(reduce(w)) with respect to w [T, k]."""
    if r.norm == Norm.NONE:
        return g
    d = _reduce(w, r)
    safe = _guarded(d, r)
    grad_d = -((g * w).sum(-1, keepdim=True) / safe) / safe  # safe * safe may be 0
    if r.norm_clamp:
        grad_d = grad_d * (d >= r.norm_clamp)
    return g / safe + grad_d * _reduce_slope(w, d, r)


def _reduce_slope(w: Tensor, d: Tensor, r: Routing) -> Tensor:
    """d reduce(w) / d w, [T, k]; ties of a maximum share it evenly, as torch has it."""
    if r.norm == Norm.SUM:
        return torch.ones_like(w)
    if r.norm == Norm.MAX or math.isinf(r.norm_p):
        top = (w if r.norm == Norm.MAX else w.abs()) == d
        sign = 1.0 if r.norm == Norm.MAX else w.sign()
        return top * sign / top.sum(-1, keepdim=True)
    ratio = torch.where(d == 0, 0.0, w.abs() / d)
    return w.sign() * ratio ** (r.norm_p - 1)


def _score_backward(score: Score, g: Tensor, x: Tensor, s: Tensor) -> Tensor:
    """Gradient of s = score(x) over the last dim."""
    if score is Score.SOFTMAX:
        return s * (g - (g * s).sum(-1, keepdim=True))
    if score is Score.SIGMOID:
        return g * s * (1 - s)
    if score is Score.SQRT_SOFTPLUS:
        return g * x.sigmoid() / (2 * s)
    if score is Score.SOFTPLUS:
        return g * x.sigmoid()
    if score is Score.EXP:
        return g * s
    if score is Score.TANH:
        return g * (1 - s * s)
    if score is Score.RELU:
        return g * (x > 0)
    return g
