"""Low-rank pairs beside projections, in plain torch: y = W x + s b (a x), never W + s b a.

With t = a x and the gradient g of y:  d/db = s gᵀ t,  d/da = s (g b)ᵀ x,  d/dx = g W + s (g b) a. A pair may be of a wider type than the
rows, as adapters in float32 beside weights in bfloat16: its products are computed in the wider one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.operands import Operands
from ...ir.records import Layout


@dataclass(frozen=True)
class Pair:
    """One expert's pair: a [r, in], b [out, r]; `scale` 0 where there is none."""

    scale: float
    a: Tensor | None = None
    b: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, p: Operands[Tensor], name: str, part: int, e: int) -> Pair:
        scale = layout.pair(name, part)
        return cls(scale, *layout.pair_of(p, name, part, e)) if scale else NONE

    def add_result(self, out: Tensor, rows: Tensor) -> None:
        """out += s (x aᵀ) bᵀ"""
        if self.a is not None and self.b is not None:
            accumulate(out, _product(rows, self.a.t()), self.b.t(), self.scale)

    def backward(self, grad: Tensor, rows: Tensor, of_rows: Tensor | None, of: tuple[Tensor | None, Tensor | None]) -> None:
        """of_rows += s (g b) a,  of = s (g b)ᵀ x, s gᵀ (x aᵀ), where somebody asks."""
        of_a, of_b = of
        if self.a is None or self.b is None:
            return
        if of_b is not None:
            store(of_b, grad.t(), _product(rows, self.a.t()), self.scale)
        if of_a is None and of_rows is None:
            return
        low = _product(grad, self.b)
        if of_a is not None:
            store(of_a, low.t(), rows, self.scale)
        if of_rows is not None:
            accumulate(of_rows, low, self.a, self.scale)


NONE = Pair(0.0)


def _product(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype == y.dtype:
        return torch.mm(x, y)
    wide = torch.promote_types(x.dtype, y.dtype)
    return torch.mm(x.to(wide), y.to(wide))


def store(out: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """out = s x y, rounded to out's type."""
    if not x.dtype == y.dtype == out.dtype:
        out.copy_(_product(x, y).mul_(scale))
    elif scale == 1.0:
        torch.mm(x, y, out=out)
    else:
        out.addmm_(x, y, beta=0, alpha=scale)


def accumulate(out: Tensor, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """out += s x y, the sum rounded to out's type once."""
    if x.dtype == y.dtype == out.dtype:
        out.addmm_(x, y, alpha=scale)
    else:
        out.add_(_product(x, y), alpha=scale)
