"""Routing on the CPU: scores by torch, what comes after in one kernel. What that does not take runs in plain torch (`routing`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...ir import BiasOn, Norm, Score
from ...ir import score as apply_score
from ..reference import routing
from ..reference.routing import Routing
from . import build

_I64, _F32, _PTR = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_AFTER_SELECTION = {Score.IDENTITY: 0, Score.SOFTMAX: 1, Score.SIGMOID: 2}  # as in route.cpp
_NORMS = (Norm.NONE, Norm.SUM, Norm.MAX)
_WORTH_A_THREAD = 1 << 14  # scores


class _Gating(ctypes.Structure):
    """Mirror of `struct Gating`."""

    _fields_ = [
        *((n, _I64) for n in ("experts", "k", "score_selected", "bias_in_weights", "groups", "kept", "best", "norm")),
        *((n, _F32) for n in ("fill", "eps", "clamp", "scale")),
    ]


def prepare() -> None:
    """Start building the kernel in the background; returns at once."""
    build.start("route", torch.float32)


def forward(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, r: Routing) -> tuple[Tensor, Tensor]:
    """As `routing.forward`. A token with a NaN score or a tie sends the call to plain torch, whose choice is eager's."""
    sound = logits.ndim == 2 and logits.numel() > 0 and all(t is None or t.shape == logits.shape[1:] for t in (bias, expert_scale))
    function = _kernel(r, logits.shape[1]) if sound and not (r.bias_in_weights and bias is None) else None
    if function is None:
        return routing.forward(logits, bias, expert_scale, r)
    tokens, experts = logits.shape
    wide = logits.to(torch.float32).contiguous()
    raw = wide if r.score_over_selected else apply_score(Score(r.score), wide)
    by = wide if r.bias_on == BiasOn.LOGIT else raw
    added = None if bias is None or r.bias_on == BiasOn.NONE else bias.to(torch.float32).contiguous()
    table = None if expert_scale is None else expert_scale.to(torch.float32).contiguous()
    weights = torch.empty(tokens, r.k, dtype=torch.float32)
    ids = torch.empty(tokens, r.k, dtype=torch.int64)
    threads = 1 if raw.numel() < _WORTH_A_THREAD else torch.get_num_threads()
    failed = function(
        ctypes.byref(_numbers(r, experts)), tokens, threads, by.data_ptr(), raw.data_ptr(), _address(added), _address(table),
        weights.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    if failed:
        return routing.forward(logits, bias, expert_scale, r)
    return weights.to(r.weight_dtype), ids


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


@lru_cache(maxsize=1024)
def _fits(r: Routing, experts: int) -> bool:
    """Whether the kernel computes this gating as `routing.forward` does."""
    scored = not r.score_over_selected or r.score in _AFTER_SELECTION
    added = not r.bias_in_weights or r.bias_on != BiasOn.NONE
    grouped = not r.n_groups or experts % r.n_groups == 0 and r.group_top <= experts // r.n_groups and r.kept_groups <= r.n_groups
    return scored and added and grouped and r.norm in _NORMS and r.score_dtype == torch.float32 and 0 < r.k <= experts


def _kernel(r: Routing, experts: int) -> Callable[..., int] | None:
    library = build.library("route", torch.float32) if _fits(r, experts) else None
    if library is None:
        return None
    function: Any = library.moe_route
    if function.argtypes is None:
        function.argtypes = [_PTR, _I64, _I64, _PTR, _PTR, _PTR, _PTR, _PTR, _PTR]
    return function


@lru_cache(maxsize=1024)
def _numbers(r: Routing, experts: int) -> _Gating:
    after = _AFTER_SELECTION[Score(r.score)] if r.score_over_selected else 0
    groups = r.n_groups, r.kept_groups, r.group_top
    return _Gating(experts, r.k, after, r.bias_in_weights, *groups, r.norm, r.group_fill, r.norm_eps, r.norm_clamp, r.scale)
