"""How rows are rounded before a product, where a model does that: W8A8.

q = round(x / max(s, floor)),   s = max|x| / largest over each group of a row,   the product reads q · s

Static rows are divided by a number that is none of theirs: s is a constant, or an operand, and q is kept within limits first.

With smooth scales k (SmoothQuant), a number of each input channel, x k (or x / k) stands in the place of x: 1 / k is in the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .stored import ALL, Scale


@dataclass(frozen=True)
class Rows:
    """What a model does to the rows that go into a product.

    bits, dtype: of what they are rounded to: int8 (whole numbers up to 127), or a float of one byte, whose largest number is that of its
    type. group: inputs that share a scale, `ALL` for a row's. floor: the least that is divided by; 0: no such limit, and a group of zeros
    is 0 / 0, which is no number (in int8: 0). power: s is rounded up to a power of two. floored: whether the product has
    max(s, floor), and not s. smooth: whether there are smooth scales, and what they do; they are operands of the experts.
    static: s is `step`, or where that is 0 an operand in the place of smooth scales, one number or one of each expert. low, top: what
    x / s is kept within before it is rounded; both 0: it is not, and a float of one byte does what torch's cast does.
    """

    bits: int
    dtype: torch.dtype
    group: int = ALL
    floor: float = 0.0
    power: bool = False
    floored: bool = True
    smooth: Scale = Scale.NONE
    static: bool = False
    step: float = 0.0
    low: float = 0.0
    top: float = 0.0

    def __post_init__(self) -> None:
        """A plain number, as an op has it, is taken too."""
        object.__setattr__(self, "smooth", Scale(self.smooth))

    @property
    def largest(self) -> float:
        """The number that the largest of a group becomes."""
        return float(torch.finfo(self.dtype).max) if self.dtype.is_floating_point else float(2 ** (self.bits - 1) - 1)

    def scales(self, most: Tensor) -> tuple[Tensor, Tensor]:
        """What a group whose largest number is `most` is divided by, and what its codes are multiplied by."""
        s = most / self.largest
        least = s.clamp(min=self.floor) if self.floor else s
        if self.power:
            s = least = torch.exp2(torch.ceil(torch.log2(least)))
        return least, least if self.floored else s

    def codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [N, K] -> q [N, groups, group] and what it is multiplied by [N, groups, 1], both in the type of the rows."""
        x = rows.unflatten(-1, (-1, self.group or rows.shape[-1]))
        least, s = self.scales(x.abs().amax(-1, keepdim=True))
        if self.dtype.is_floating_point:
            q = (x / least).to(self.dtype).to(rows.dtype)
        else:
            q = (x / torch.where(least == 0, 1.0, least)).round()
        return q, s

    def _static(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        """rows [N, K] by a number that is none of theirs: `step`, or scales [1] or [N, 1]."""
        s = self.step if scales is None else scales.to(rows.dtype)
        q = rows / s
        q = q.clamp(self.low, self.top) if self.low or self.top else q
        return (q.to(self.dtype).to(rows.dtype) if self.dtype.is_floating_point else q.round()) * s

    def smoothed(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        """rows [N, K] with their smooth scales [K] or [N, K], in their own type."""
        if not self.smooth or scales is None:
            return rows
        k = scales.to(rows.dtype)
        return rows / k if self.smooth == Scale.DIVIDES else rows * k

    def rounded(self, rows: Tensor, scales: Tensor | None = None) -> Tensor:
        """rows [N, K] as the product reads them, in their own type; `scales`: smooth ones, or the number of static rows.

        Raises RuntimeError where groups do not divide K.
        """
        if self.static:
            return self._static(rows, scales)
        q, s = self.codes(self.smoothed(rows, scales))
        return (q * s).flatten(-2)
