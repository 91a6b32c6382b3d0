"""The routing op on CUDA: what the kernels of `route_kernels` cover, and their launches."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...ir import BiasOn, Norm, Score
from ..reference import routing
from ..reference.routing import Routing
from .combine import early_launch
from .host import cdiv, power_of_2
from .launch.tape import empty, launch
from .route_kernels import route_backward_kernel, route_kernel

_SCORE_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_RISING = (Score.IDENTITY, Score.SOFTMAX, Score.SIGMOID, Score.SQRT_SOFTPLUS, Score.SOFTPLUS, Score.EXP, Score.TANH)  # strictly
_MAX_EXPERTS, _MAX_K = 1024, 32
_WARP_WIDTH = 256  # positions of a row that a warp takes as a whole: eight a lane
_FEW_TOKENS = 2048  # up to here a warp per token: what counts is the way of one row through the kernel


def can_route(r: Routing, num_experts: int) -> str | None:
    """None when the kernels cover this routing, else the reason; `lowering.routing` covers everything."""
    if num_experts > _MAX_EXPERTS or r.k > _MAX_K:
        return f"the routing kernel takes up to {_MAX_EXPERTS} experts and {_MAX_K} a token"
    if not 0 < r.k <= num_experts:
        return f"{r.k} of {num_experts} experts a token cannot be chosen"
    if r.score_dtype not in _SCORE_TYPES or not r.weight_dtype.is_floating_point:
        return f"the routing kernel does not compute in {r.score_dtype}"
    if r.norm not in (Norm.NONE, Norm.SUM, Norm.MAX, Norm.PNORM) or (r.norm == Norm.PNORM and not r.norm_p > 0):
        return "the routing kernel does not know this normaliser"
    return _cannot_group(r, num_experts) or _cannot_round(r)


def _cannot_group(r: Routing, num_experts: int) -> str | None:
    if not r.n_groups:
        return None
    size = num_experts // r.n_groups
    if num_experts % r.n_groups or not 0 < r.kept_groups <= r.n_groups or not 0 < r.group_top <= size:
        return "the groups do not divide the experts"
    if power_of_2(r.n_groups) * power_of_2(size) > 2 * _MAX_EXPERTS:
        return "the groups are too many for the routing kernel"
    return None


def _cannot_round(r: Routing) -> str | None:
    """In 16 bits scores often tie: whoever computes them otherwise than torch, by one bit, chooses other experts."""
    if r.score_dtype == torch.float32 or _by_logit(r, True) or r.score_over_selected:
        exact = True
    else:
        exact = r.score in (Score.IDENTITY, Score.RELU) or (r.bias_on == BiasOn.LOGIT)
    if not exact or (r.score_dtype != torch.float32 and r.n_groups and r.group_top > 2):
        return f"experts chosen by scores in {r.score_dtype} follow torch's rounding"
    return None


def _by_logit(r: Routing, biased: bool) -> bool:
    """Whether the order of the logits is the order that experts are chosen by."""
    score_bias = biased and r.bias_on == BiasOn.SCORE
    return not r.n_groups and not score_bias and not r.score_over_selected and r.score in _RISING


def forward(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, r: Routing, behind: bool = False) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> (weights [T, k] in r.weight_dtype, ids [T, k] int64). One launch.

    `behind`: the kernel launched directly before is the one of `router.product`.
    """
    tokens, num_experts = logits.shape
    if can_route(r, num_experts) is not None:
        return routing.forward(logits, bias, expert_scale, r)
    weights = empty(logits, tokens, r.k, dtype=r.weight_dtype)
    ids = empty(logits, tokens, r.k, dtype=torch.int64)
    if not tokens:
        return weights, ids
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    bias = None if bias is None else bias.contiguous()
    biased = bias is not None and r.bias_on != BiasOn.NONE
    size, padded, width = _positions(r, num_experts)
    rows = width <= _WARP_WIDTH
    block, chunks, warps = _tile_of_rows(tokens) if rows else _tile(tokens, width)
    slots = power_of_2(r.k) if not rows else 32 if block == 1 else max(8, power_of_2(r.k))
    pdl = {"launch_pdl": True} if early_launch(logits) else {}
    launch(
        route_kernel, (cdiv(tokens, block),),
        logits, bias, None if expert_scale is None else expert_scale.contiguous(), weights, ids, tokens, logits.stride(0),
        r.group_fill, r.norm_eps, r.norm_clamp, r.scale,
        E=num_experts, EP=width, K=r.k, KP=slots, SCORE=int(r.score), OVER_SELECTED=r.score_over_selected,
        BIAS=int(r.bias_on) if biased else 0, BIAS_IN_WEIGHTS=r.bias_in_weights and bias is not None,
        G=r.n_groups, S=size, SP=padded, KEPT=r.kept_groups, TOP=r.group_top, NORM=int(r.norm), NORM_P=float(r.norm_p),
        SCALED=r.scale != 1.0, EXPERT_SCALE=expert_scale is not None, BY_LOGIT=_by_logit(r, biased),
        DTYPE=_SCORE_TYPES[r.score_dtype], BT=block, CHUNKS=chunks, WIDE=warps == 1, ROWS=rows, PDL=bool(pdl), BEHIND=behind,
        num_warps=warps, **pdl,
    )  # fmt: skip
    return weights, ids


def _positions(r: Routing, num_experts: int) -> tuple[int, int, int]:
    """(experts a group, positions a group, positions a row)."""
    if not r.n_groups:
        return 0, 0, max(32, power_of_2(num_experts))
    size = num_experts // r.n_groups
    padded = power_of_2(size)
    return size, padded, max(32, padded * power_of_2(r.n_groups))


def _tile_of_rows(tokens: int) -> tuple[int, int, int]:
    """As `_tile`, where a warp takes whole rows."""
    return (1, 1, 1) if tokens <= _FEW_TOKENS else (4, 1, 1)


def _tile(tokens: int, width: int) -> tuple[int, int, int]:
    """(tokens a program, loads a row, warps)."""
    if tokens <= _FEW_TOKENS:
        return 1, 1, 1
    chunks = 8 if width >= 1024 else 4 if width >= 64 else 1
    lanes = max(1, width // chunks // 4)  # threads a row: each load takes four neighbours
    return min(64, max(1, 128 // lanes)), chunks, 4


def backward(
    grad: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, r: Routing, needs: list[bool]
) -> list[Tensor]:
    """Gradients of what `needs` flags among (logits, bias, expert_scale), in that order; ids are as `forward` gave them."""
    tokens, num_experts = logits.shape
    if not needs[0] or not tokens or can_route(r, num_experts) is not None:
        return routing.backward(grad, ids, logits, bias, expert_scale, r, needs)
    out = empty(logits, *logits.shape)
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    grad_rows = grad if grad.stride(1) == 1 else grad.contiguous()
    width = max(2, power_of_2(num_experts))
    block = max(1, min(64, 2048 // width))
    launch(
        route_backward_kernel, (cdiv(tokens, block),),
        grad_rows, ids.contiguous(), rows, None if bias is None else bias.contiguous(),
        None if expert_scale is None else expert_scale.contiguous(), out, tokens, rows.stride(0), grad_rows.stride(0),
        r.norm_eps, r.norm_clamp, r.scale,
        E=num_experts, EP=width, K=r.k, KP=power_of_2(r.k), SCORE=int(r.score), OVER_SELECTED=r.score_over_selected,
        BIAS_IN_WEIGHTS=r.bias_in_weights and bias is not None, NORM=int(r.norm), NORM_P=float(r.norm_p),
        EXPERT_SCALE=expert_scale is not None, BT=block, num_warps=4,
    )  # fmt: skip
    rest = routing.backward(grad, ids, logits, bias, expert_scale, r, [False, *needs[1:]]) if any(needs[1:]) else []
    return [out, *rest]
