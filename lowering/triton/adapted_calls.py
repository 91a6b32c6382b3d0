"""The ops of experts with low-rank pairs by plans: operands in one row, the rest decides which plan it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...ir.operands import ADAPTED, Operands
from ...ir.records import AdaptedLayout
from . import adapted
from .experts import precision
from .launch import plans


class How(NamedTuple):
    """What a plan is for, besides its operands: how many tensors each list has, and which gradients are asked for."""

    layout: AdaptedLayout
    sizes: tuple[int, ...]
    needs: tuple[bool, ...]
    precision: str


def _how(layout: AdaptedLayout, x: Tensor, p: Operands[Tensor], needs: Sequence[bool] = ()) -> How:
    sizes = tuple([len(ts) for ts in p.lists(ADAPTED)])
    return How(layout, sizes, tuple(needs), "".join(dict.fromkeys(precision(t.dtype) for t in (x, *p.up_a, *p.down_a))))


def _bundle(how: How, flat: Sequence[Any]) -> Operands[Any]:
    it = iter(flat)
    return Operands.read([[next(it) for _ in range(size)] for size in how.sizes], ADAPTED)


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: AdaptedLayout
) -> tuple[Tensor, Tensor]:
    """`adapted.forward`."""
    found: tuple[Tensor, Tensor] = plans.call(_forward, _how(layout, x, p), (x, ids, weights, add, *p))
    return found


def _forward(how: How, tensors: list[Any]) -> tuple[Tensor, Tensor]:
    x, ids, weights, add, *flat = tensors
    return adapted.forward(x, ids, weights, _bundle(how, flat), add, how.layout)


def backward(
    grad: Tensor,
    pre: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    p: Operands[Tensor],
    layout: AdaptedLayout,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`adapted.backward`."""
    if grad.dtype != x.dtype or not grad.is_contiguous():
        grad = grad.to(x.dtype).contiguous()
    found: list[Tensor] = plans.call(_backward, _how(layout, x, p, needs), (grad, pre, x, ids, weights, *p))
    return found


def _backward(how: How, tensors: list[Any]) -> list[Tensor]:
    grad, pre, x, ids, weights, *flat = tensors
    return adapted.backward(grad, pre, x, ids, weights, _bundle(how, flat), how.layout, how.needs)
