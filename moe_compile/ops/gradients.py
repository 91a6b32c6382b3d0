"""Gradients of the ops: what is kept for them, and which op computes them.

What backward needs of small tensors that a training step may write meanwhile (a selection bias, logits or weights that the caller was
given) are copies that the forward ops return. A gradient that is to have one itself is plain torch's (`twice`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ir.codec import record_of
from ..ir.families import Family
from ..ir.operands import Operands
from ..lowering.reference import twice
from .records import routing_of
from .schemas import IN_WEIGHTS, below


class Experts(torch.autograd.Function):
    """`experts` with a gradient. Tensors of lists come one by one, because autograd only sees direct arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        family: Family,
        places: Operands[None],
        layout: list[Any],
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        add: Tensor | None,
        *flat: Tensor,
    ) -> Tensor:
        lists = places.filled(flat).lists(family.names)
        out, pre, kept_ids, kept_weights = below(f"{family.op}_fwd", x, ids, weights, *lists, add, *layout)
        ctx.save_for_backward(pre, x, kept_ids, kept_weights, *flat)
        ctx.family, ctx.places, ctx.layout, ctx.given = family, places, layout, _Given(weights)
        ctx.add_dtype = None if add is None else add.dtype
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, x, ids, weights, *flat = ctx.saved_tensors
        _, _, _, need_x, _, need_w, need_add, *need_flat = ctx.needs_input_grad
        needs = [need_x, need_w, *need_flat]
        found: list[Tensor | None] = [None] * len(needs)
        if torch.is_grad_enabled():
            (w,) = ctx.given.tensors()
            places, layout = ctx.places, record_of(ctx.family.records[0], ctx.layout)

            def again(x: Tensor, w: Tensor, *flat: Tensor) -> Tensor:
                return twice.experts(x, ids, w, places.filled(flat), layout)

            found = twice.gradients(again, [x, w, *flat], needs, grad)
        elif any(needs):
            lists = ctx.places.filled(flat).lists(ctx.family.names)
            given = iter(below(f"{ctx.family.op}_bwd", grad, pre, x, ids, weights, *lists, *ctx.layout, needs))
            found = [next(given) if n else None for n in needs]
        return None, None, None, found[0], None, found[1], grad.to(ctx.add_dtype) if need_add else None, *found[2:]


class Route(torch.autograd.Function):
    """`route` with a gradient to logits, to a bias that enters the weights, and to the per-expert scale."""

    @staticmethod
    def forward(ctx: Any, gating: list[Any], logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        weights, ids, *kept = below("route_fwd", logits, bias, expert_scale, *gating)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(*kept)
        bias = bias if gating[IN_WEIGHTS] else None  # one that only selects has no gradient
        ctx.gating, ctx.given, ctx.has = gating, _Given(logits, bias, expert_scale), (bias is not None, expert_scale is not None)
        return weights, ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        logits, ids, *tables = ctx.saved_tensors
        bias, scale = (t if there else None for t, there in zip(tables, ctx.has, strict=True))
        needs = [ctx.needs_input_grad[1], *(n and there for n, there in zip(ctx.needs_input_grad[2:], ctx.has, strict=True))]
        found: list[Tensor | None] = [None] * 3
        if torch.is_grad_enabled():
            plain = routing_of(*ctx.gating)
            found = twice.gradients(lambda l, b, c: twice.route(l, ids, b, c, plain), ctx.given.tensors(), needs, grad)
        elif any(needs):
            given = iter(below("route_bwd", grad, ids, logits, bias, scale, *ctx.gating, needs))
            found = [next(given) if n else None for n in needs]
        return None, *found


class _Given:
    """Arguments as they were given, for a gradient that is to have one itself; a copy would not be tied to what they come from."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors = tensors
        self._versions = [None if t is None or t.is_inference() else t._version for t in tensors]

    def tensors(self) -> tuple[Any, ...]:
        if self._versions != [None if t is None or t.is_inference() else t._version for t in self._tensors]:
            raise RuntimeError("a tensor that a second gradient needs has been modified by an inplace operation since the forward pass")
        return self._tensors
