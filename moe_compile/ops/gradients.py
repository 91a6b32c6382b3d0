"""Gradients of the ops: what is kept for them, and which op computes them.

What backward needs of small tensors that a training step may write meanwhile (a selection bias, logits or weights that the caller was
given) are copies that the forward ops return. A gradient that is to have one itself is plain torch's (`twice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..ir.codec import record_of
from ..ir.families import EXPERTS_CHAINED, Family
from ..ir.operands import ADAPTED, STORED_ADAPTED, Operands
from ..lowering.reference import stored, twice
from .records import routing_of, stored_adapted_of
from .schemas import IN_WEIGHTS, below

_TENSORS_FROM = 7  # where the parameters stand among the arguments of `Experts`


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
        reads_x = _reads_tokens(family, places, layout, ctx.needs_input_grad)
        ctx.save_for_backward(pre, kept_ids, kept_weights, *([x] if reads_x else []), *flat)
        ctx.family, ctx.places, ctx.layout, ctx.width = family, places, layout, x.shape[1]
        ctx.given = _Given(weights) if reads_x else _Given(weights, x)
        ctx.add_dtype = None if add is None else add.dtype
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, ids, weights, *flat = ctx.saved_tensors
        _, _, _, need_x, _, need_w, need_add, *need_flat = ctx.needs_input_grad
        # what stands in for tokens that no gradient reads has their shape and no values
        x = flat.pop(0) if len(flat) > len(need_flat) else pre.new_empty(grad.shape[0], ctx.width)
        needs = [need_x, need_w, *need_flat]
        found: list[Tensor | None] = [None] * len(needs)
        if torch.is_grad_enabled():
            w, x = (*ctx.given.tensors(), x)[:2]
            places, layout = ctx.places, record_of(ctx.family.records[0], ctx.layout)

            def again(x: Tensor, w: Tensor, *flat: Tensor) -> Tensor:
                return twice.experts(x, ids, w, places.filled(flat), layout)

            found = twice.gradients(again, [x, w, *flat], needs, grad)
        elif any(needs):
            lists = ctx.places.filled(flat).lists(ctx.family.names)
            given = iter(below(f"{ctx.family.op}_bwd", grad, pre, x, ids, weights, *lists, *ctx.layout, needs))
            found = [next(given) if n else None for n in needs]
        return None, None, None, found[0], None, found[1], grad.to(ctx.add_dtype) if need_add else None, *found[2:]


def _reads_tokens(family: Family, places: Operands[None], layout: Sequence[Any], needs: Sequence[bool]) -> bool:
    """Whether a gradient that is asked for reads the tokens: those of what multiplies them, and of weights that stand on them."""
    *_, need_w, _ = needs[:_TENSORS_FROM]
    if family is EXPERTS_CHAINED:  # computes the rows again
        return True
    asked: Operands[bool] = places.filled(needs[_TENSORS_FROM:])
    record: Any = record_of(family.records[0], layout)
    on_tokens = record.weight_on_input or record.num_identity
    return any((*asked.up, *asked.up_a, *asked.up_b)) or bool(need_w and on_tokens)


class Coded(torch.autograd.Function):
    """`experts_stored_adapted` with a gradient to rows, routing weights, biases and low-rank pairs, none to what is stored.

    Nothing of the size of the weights is kept: codes become floats in the backward pass once more, a call at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, places: Operands[None], plain: list[Any], x: Tensor, ids: Tensor, weights: Tensor, add: Tensor | None, *flat: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, ids.clone(), weights.clone(), *flat)
        ctx.places, ctx.plain, ctx.add_dtype = places, plain, None if add is None else add.dtype
        out = below("experts_stored_adapted", x, ids, weights, *places.filled(flat).lists(STORED_ADAPTED), add, *plain)
        return out  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, ids, weights, *flat = ctx.saved_tensors
        _, _, need_x, _, need_w, need_add, *need_flat = ctx.needs_input_grad
        p, asked = ctx.places.filled(flat), ctx.places.filled(need_flat)
        layout, storage = stored_adapted_of(ctx.plain)
        floats = stored.as_floats(p, storage, x.dtype)
        lists, plain = floats.lists(ADAPTED), ctx.plain[: len(fields(layout))]
        needs = [need_x, need_w, *(n for name in ADAPTED for n in getattr(asked, name))]
        _, pre, kept_ids, kept_weights = below("experts_adapted_fwd", x, ids, weights, *lists, None, *plain)
        given = iter(below("experts_adapted_bwd", grad, pre, x, kept_ids, kept_weights, *lists, *plain, needs))
        of_x, of_w, *rest = [next(given) if n else None for n in needs]
        found = floats.filled(rest)
        of_flat = [g for name, ts in p.by_name().items() for g in (getattr(found, name) if name in ADAPTED else [None] * len(ts))]
        return None, None, of_x, None, of_w, grad.to(ctx.add_dtype) if need_add else None, *of_flat


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
