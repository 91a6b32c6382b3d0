"""The ops of `moe_compile.ops` on CUDA: their plain arguments read, the kernels called."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import routing
from ..generic import Layout
from . import route as kernels
from . import router, shared
from .backward import backward
from .experts import forward


def _layout(args: tuple[Any, ...]) -> Layout:
    act_ops, act_consts, *rest = args
    return Layout(tuple(act_ops), tuple(act_consts), *rest)


def route(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any, behind: bool = False) -> tuple[Tensor, Tensor]:
    r = routing.Routing(*gating)
    if kernels.can_route(r, logits.shape[1]) is not None:
        return routing.forward(logits, bias, expert_scale, r)
    return kernels.forward(logits, bias, expert_scale, r, behind)


def route_linear(x: Tensor, weight: Tensor, weight_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return route(router.product(x, weight, weight_bias), *rest, behind=router.fits(x, weight, weight_bias))


def route_bwd(grad: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *rest: Any) -> list[Tensor]:
    *gating, needs = rest
    r = routing.Routing(*gating)
    backward = kernels.backward if kernels.can_route(r, logits.shape[1]) is None else routing.backward
    return backward(grad, ids, logits, bias, expert_scale, r, needs)


def experts(*args: Any) -> Tensor:
    return forward(*args[:8], _layout(args[8:]), save=False)[0]


def experts_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return forward(*args[:8], _layout(args[8:]), save=True)


def experts_bwd(*args: Any) -> list[Tensor]:
    return backward(*args[:9], _layout(args[9:-1]), args[-1])


def experts_shared(*args: Any) -> Tensor | None:
    """None where the operands are beyond the kernels."""
    return shared.experts_shared(args[:8], _layout(args[8:17]), args[17:])
