"""Low-rank pairs beside projections, in plain torch: y = W x + s b (a x), never W + s b a.

With t = a x and the gradient g of y:  d/db = s gᵀ t,  d/da = s (g b)ᵀ x,  d/dx = g W + s (g b) a. A pair may be of a wider type than the
rows, as adapters in float32 beside weights in bfloat16: its products are computed in the wider one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.operands import Operands
from ...ir.records import Layout


@dataclass(frozen=True)
class Pairs:
    """The pairs of a projection by expert: a[e] [r, in], b[e] [out, r]."""

    scale: float
    a: Sequence[Tensor]
    b: Sequence[Tensor]

    @classmethod
    def of(cls, layout: Layout, p: Operands[Tensor], name: str, part: int) -> Pairs | None:
        """Those of a part of `up`, or of `down`; None where it has none."""
        scale = layout.pair(name, part)
        place = layout.pairs_before(name, part)
        return cls(scale, *(layout.by_expert(getattr(p, f"{name}_{which}"), place) for which in "ab")) if scale else None

    def add_result(self, e: int, out: Tensor, rows: Tensor) -> None:
        """out += s (x aᵀ) bᵀ"""
        accumulate(out, _product(rows, self.a[e].t()), self.b[e].t(), self.scale)

    def backward(self, e: int, grad: Tensor, rows: Tensor, of_rows: Tensor | None, of_a: Tensor | None, of_b: Tensor | None) -> None:
        """of_rows += s (g b) a,  of_a = s (g b)ᵀ x,  of_b = s gᵀ (x aᵀ), where somebody asks."""
        a = self.a[e]
        if of_b is not None:
            store(of_b, grad.t(), _product(rows, a.t()), self.scale)
        if of_a is None and of_rows is None:
            return
        low = _product(grad, self.b[e])
        if of_a is not None:
            store(of_a, low.t(), rows, self.scale)
        if of_rows is not None:
            accumulate(of_rows, low, a, self.scale)


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
