"""How weights lie in memory: codes of few bits, a scale for each block of them, and what a code stands for.

    w[i, j] = value(code[i, j]) · s[i // rows, j // columns]

i and j count rows and columns of a matrix as it is stored, [out, in] or [in, out]. A scale for each output channel is a block of
(1, all) of them, one for the whole matrix a block of (all, all), DeepSeek's FP8 (128, 128), MXFP8 (1, 32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALL = 0  # rows (or columns) of a block: as many as there are


@dataclass(frozen=True)
class Stored:
    """A projection's weights in memory.

    bits: of a code. dtype: what codes lie in; a code's value is the number that it is. scaled: whether there are scales. rows, columns: of
    the matrix as stored, that share a scale; `ALL` for as many as there are. Codes are [.., R, C]. Scales are [.., R / rows] where columns
    are `ALL` (one number: [.., 1]), [.., C / columns] where rows are, else [.., R / rows, C / columns], each rounded up.
    """

    bits: int
    dtype: torch.dtype
    scaled: bool = True
    rows: int = ALL
    columns: int = ALL

    @property
    def grid(self) -> bool:
        """Whether scales have both dims."""
        return self.rows != ALL and self.columns != ALL

    def scales_of(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """The shape of one matrix's scales, for a matrix of `shape` as stored."""
        r, c = (1 if b == ALL else -(-n // b) for n, b in zip(shape, (self.rows, self.columns), strict=True))
        return (r, c) if self.grid else (max(r, c),)

    def matrix(self, code: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """codes [.., R, C], scales as above -> the weights [.., R, C] in `dtype`, multiplied in it."""
        value = code.to(dtype)
        if not self.scaled or scale is None:
            return value
        s = scale.to(dtype)
        if not self.grid:
            s = s.unsqueeze(-2 if self.columns != ALL else -1)
        return times(value, s, max(self.rows, 1), max(self.columns, 1))


def times(value: Tensor, s: Tensor, rows: int, columns: int) -> Tensor:
    """value[.., i, j] · s[.., i // rows, j // columns]; a dim of s of size 1 is for all."""
    *_, r, c = value.shape
    own = [b if n > 1 else size for b, n, size in zip((rows, columns), s.shape[-2:], (r, c), strict=True)]
    if r % own[0] or c % own[1]:
        for d, b, size in ((-2, own[0], r), (-1, own[1], c)):
            s = s.repeat_interleave(b, d).narrow(d, 0, size)
        return value * s
    blocks = value.unflatten(-1, (-1, own[1])).unflatten(-3, (-1, own[0]))
    return (blocks * s[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)
