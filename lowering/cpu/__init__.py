"""The CPU target: C++ kernels that group tokens by expert, built at first use; plain torch for what they do not take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...ops import bundled, layout_of, routing_of
from ...ops.anywhere import with_copies
from ..target import Target
from . import experts, frozen, native, route, stored, told


def _route(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any) -> tuple[Tensor, Tensor]:
    return route.forward(logits, bias, expert_scale, routing_of(*gating))


def _experts(*args: Any) -> Tensor:
    x, ids, weights, p, (add, *plain) = bundled(args)
    return experts.forward(x, ids, weights, p, add, layout_of(plain), save=False)[0]


def _experts_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    x, ids, weights, p, (add, *plain) = bundled(args)
    return experts.forward(x, ids, weights, p, add, layout_of(plain), save=True)


def _experts_bwd(grad: Tensor, pre: Tensor, *args: Any) -> list[Tensor]:
    x, ids, weights, p, (*plain, needs) = bundled(args)
    return experts.backward(grad, pre, x, ids, weights, p, layout_of(plain), needs)


def _rearrange(model: nn.Module, training: bool, weight_format: str) -> dict[str, int]:
    return {} if training else frozen.freeze(model)


native.define(_experts)
TARGET = Target(
    name="cpu",
    devices=("cpu",),
    refuses=experts.refuses,
    says=told.says,
    dispatch_key="CPU",
    kernels={  # and `experts`: `native`
        "route": _route,
        "experts_fwd": with_copies(_experts_fwd),
        "experts_bwd": _experts_bwd,
        "experts_stored": stored.experts_stored,
    },
    prepare=experts.prepare,
    rearrange=_rearrange,
    lacks=told.lacks,
    remarks=told.remarks,
    missing=told.missing,
    decodes=told.decodes,
    casts=True,
    coded=True,  # weights in few bits are made floats, those of touched experts alone
    chained=True,  # in plain torch: a product for each expert that is hit, maps of whole rows in between
)
