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
        return cls(scale, *layout.pair_of(p, name, part, e)) if scale else cls(0.0)

    def result(self, base: Tensor, rows: Tensor) -> Tensor:
        """W x + s b (a x), for base = W x."""
        if self.a is None or self.b is None:
            return base
        return _plus(base, _product(rows, self.a.t()), self.b.t(), self.scale)

    def input_gradient(self, base: Tensor, grad: Tensor) -> Tensor:
        """g W + s (g b) a, for base = g W."""
        if self.a is None or self.b is None:
            return base
        return _plus(base, _product(grad, self.b), self.a, self.scale)

    def store(self, out: tuple[Tensor | None, Tensor | None], grad: Tensor, rows: Tensor) -> None:
        """The gradients of a and b into `out`, where somebody asks."""
        of_a, of_b = out
        if self.a is None or self.b is None:
            return
        if of_a is not None:
            of_a.copy_(_product(_product(grad, self.b).t(), rows) * self.scale)
        if of_b is not None:
            of_b.copy_(_product(grad.t(), _product(rows, self.a.t())) * self.scale)


def _product(x: Tensor, y: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, y.dtype)
    return x.to(wide) @ y.to(wide)


def _plus(base: Tensor, x: Tensor, y: Tensor, scale: float) -> Tensor:
    """base + scale · x y, in base's type."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), base.dtype)
    return torch.addmm(base.to(wide), x.to(wide), y.to(wide), alpha=scale).to(base.dtype)
