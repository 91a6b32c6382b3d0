"""The ops under autograd: where a gradient is asked for, others run in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.families import EXPERTS, EXPERTS_ADAPTED, EXPERTS_CHAINED, Family
from ..ir.operands import ADAPTED, STORED_ADAPTED
from . import anywhere
from .gradients import Coded, Experts, Route
from .records import bundled, stored_adapted_of
from .schemas import below, library


def _needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _with_backward(family: Family) -> Callable[..., Tensor]:
    """The op of a family, or its `_fwd` and `_bwd` where a gradient is asked for."""

    def call(*args: Any) -> Tensor:
        if torch.is_grad_enabled():
            x, ids, weights, p, (add, *plain) = bundled(args, family.names)
            if _needs_grad([x, weights, add, *p]):
                places = p.map(lambda _: None)
                return Experts.apply(family, places, plain, x, ids, weights, add, *p)  # type: ignore[no-any-return, no-untyped-call]
        return below(family.op, *args)  # type: ignore[no-any-return]

    return call


def _stored_adapted(*args: Any) -> Tensor:
    """The op, or its like with a gradient: to all but what is stored, or where that is asked for too as floats."""
    x, ids, weights, p, (add, *plain) = bundled(args, STORED_ADAPTED)
    if not _needs_grad([x, weights, add, *p]):
        return below("experts_stored_adapted", *args)  # type: ignore[no-any-return]
    held = [t for name, ts in p.by_name().items() if name not in ADAPTED for t in ts]
    if _needs_grad(held) or any(stored_adapted_of(plain)[1].rows()):
        return anywhere.adapted_as_floats(*args)
    return Coded.apply(p.map(lambda _: None), plain, x, ids, weights, add, *p)  # type: ignore[no-any-return, no-untyped-call]


experts = _with_backward(EXPERTS)


def _route_autograd(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any) -> tuple[Tensor, Tensor]:
    if _needs_grad([logits, bias, expert_scale]):
        return Route.apply(list(gating), logits, bias, expert_scale)  # type: ignore[no-any-return, no-untyped-call]
    return below("route", logits, bias, expert_scale, *gating)  # type: ignore[no-any-return]


def _or_differentiable(name: str, differentiable: Callable[..., Any]) -> Callable[..., Any]:
    """The op, or differentiable ops in its place where a gradient is asked for."""

    def call(*args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if _needs_grad(tensors):
            return differentiable(*args)
        return below(name, *args)

    return call


for _name, _run in (
    ("experts", experts),
    ("experts_adapted", _with_backward(EXPERTS_ADAPTED)),
    ("experts_stored_adapted", _stored_adapted),
    ("experts_chained", _with_backward(EXPERTS_CHAINED)),
    ("experts_shared", _or_differentiable("experts_shared", anywhere.experts_shared)),
    ("experts_stored", _or_differentiable("experts_stored", anywhere.experts_as_floats)),
    ("experts_stored_shared", _or_differentiable("experts_stored_shared", anywhere.experts_stored_shared)),
    ("route", _route_autograd),
    ("route_linear", _or_differentiable("route_linear", anywhere.route_linear)),
):
    library.impl(_name, _run, "Autograd")
