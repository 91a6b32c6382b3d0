"""The ops of experts with low-rank pairs by plans: operands in one row, the rest decides which plan it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...ir.operands import ADAPTED, Operands
from ...ir.records import AdaptedLayout
from ...ops.records import adapted_of, bundled
from . import adapted
from .experts import precision
from .launch import plans, warm


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
    found: tuple[Tensor, Tensor] = plans.call(*_described(x, ids, weights, p, add, layout))
    return found


def _described(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: AdaptedLayout) -> Any:
    return _forward, _how(layout, x, p), (x, ids, weights, add, *p)


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
    found: list[Tensor] = plans.call(*_described_backward(grad, pre, x, ids, weights, p, layout, needs))
    return found


def _described_backward(grad: Tensor, pre: Tensor, x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], *how: Any) -> Any:
    layout, needs = how
    return _backward, _how(layout, x, p, needs), (grad, pre, x, ids, weights, *p)


def _backward(how: How, tensors: list[Any]) -> list[Tensor]:
    grad, pre, x, ids, weights, *flat = tensors
    return adapted.backward(grad, pre, x, ids, weights, _bundle(how, flat), how.layout, how.needs)


def compile_ahead(name: str, args: Sequence[Any]) -> None:
    """Begin to compile the kernels of an op whose (fake) operands are known."""
    if name.endswith("_bwd"):
        grad, pre, *rest = args
        x, ids, weights, p, (*plain, needs) = bundled(rest, ADAPTED)
        warm.start(*_described_backward(grad, pre, x, ids, weights, p, adapted_of(plain), needs))
    else:
        x, ids, weights, p, (add, *plain) = bundled(args, ADAPTED)
        warm.start(*_described(x, ids, weights, p, add, adapted_of(plain)))
