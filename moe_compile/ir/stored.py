"""How weights lie in memory: codes of few bits, a scale for each block of them, and what a code stands for.

    w[i, j] = (value(code[i, j]) - z[i // rows, j // columns]) · s[i // rows, j // columns] · r[i // second_rows, j // second_columns]

Zero points that are added stand behind the scale: (value(code) · s + z) · r.
i and j count rows and columns of a matrix as it is stored, [out, in] or [in, out]. A scale for each output channel is a block of
(1, all) of them, one for the whole matrix a block of (all, all), FP8 in blocks (128, 128), MXFP4 (1, 32). NVFP4 has scales of (1, 16),
each a float8, and a second scale r for the whole matrix, which multiplies or divides. Where blocks are looked up (GPTQ's g_idx), g[i]
stands in the place of i // rows, or g[j] in that of j // columns.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
ALL = 0  # rows (or columns) of a block: as many as there are


class Scale(enum.IntEnum):
    """What scales do to what they belong to."""

    NONE = 0  # there are none
    TIMES = 1
    DIVIDES = 2


class Exponent(enum.IntEnum):
    """What scales are, where they are bytes b."""

    NONE = 0  # numbers
    VALUE = 1  # 2^(b - 127)
    BITS = 2  # the same put together as bits of a float32, so that 0 is 0 (and 255 infinite)


class Zero(enum.IntEnum):
    """How zero points lie."""

    NONE = 0  # there are none
    PLAIN = 1  # as scales do
    ROWS = 2  # as codes of as many bits, several in a word, the words along rows
    COLUMNS = 3
    ADDED = 4  # as scales do, and are added to what is scaled: value · s + z


@dataclass(frozen=True)
class Stored:
    """A projection's weights in memory.

    bits: of a code. dtype: what codes lie in. scaled: whether there are scales, and what they do. rows, columns: of the matrix as stored,
    that share a scale; `ALL` for as many as there are. Codes are [.., R, C]. Scales are [.., R / rows] where columns are `ALL` (one
    number: [.., 1]), [.., C / columns] where rows are, else [.., R / rows, C / columns], each rounded up.
    axis: along which several codes lie in one word, 1 for rows, 2 for columns (R or C of the words is less by that), 0 for none; order:
    the place of each of them in its word, counted from the lowest bits. A code's value is the number that it is, and `offset`; or what
    `values` has for it; or, `tabled`, what a table [2^bits] that the op is given has for it. zeroed: whether there are zero points z,
    laid out as scales, and how they lie, or that they are added behind the scale. exponents: scales are bytes that stand for powers of
    two. zero_order: of packed zero points, as `order`; zero_offset is added to each, and where `zero_wraps` taken modulo 2^bits. second:
    whether there are second scales, and what they do; second_rows, second_columns: of the matrix as stored that share one. They are laid
    out as scales that are no grid. indexed: along which dim an index says the block of each row (1) or column (2), 0 for none: there are
    `groups` of them, rows (columns) is 1 then, and scales are a grid. The index [R] (or [C]) is one for all experts or each expert's own;
    numbers below zero count from the last block. shifted: by how many bits each code of a word is shifted is said by a list that the op
    is given, and `order` counts its numbers (`zero_order` those of a list for the zero points).
    """

    bits: int
    dtype: torch.dtype
    scaled: Scale = Scale.TIMES
    rows: int = ALL
    columns: int = ALL
    axis: int = 0
    order: tuple[int, ...] = ()
    offset: float = 0.0
    values: tuple[float, ...] = ()
    tabled: bool = False
    zeroed: Zero = Zero.NONE
    exponents: Exponent = Exponent.NONE
    zero_order: tuple[int, ...] = ()
    zero_offset: float = 0.0
    second: Scale = Scale.NONE
    second_rows: int = ALL
    second_columns: int = ALL
    indexed: int = 0
    groups: int = 0
    zero_wraps: bool = False
    shifted: bool = False

    def __post_init__(self) -> None:
        """Plain numbers, as an op has them, are taken too."""
        for name, kind in (("scaled", Scale), ("second", Scale), ("zeroed", Zero), ("exponents", Exponent)):
            object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def grid(self) -> bool:
        """Whether scales have both dims."""
        return self.rows != ALL and self.columns != ALL

    @property
    def plain(self) -> bool:
        """Whether a code lies alone and is the number that it stands for."""
        coded = self.axis or self.offset or self.values or self.tabled or self.indexed
        return not (coded or self.zeroed or self.exponents or self.scaled == Scale.DIVIDES or self.second)

    def shape(self, words: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of codes in a matrix of words."""
        r, c = words
        return r * (len(self.order) if self.axis == 1 else 1), c * (len(self.order) if self.axis == 2 else 1)

    def scales_of(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """The shape of one matrix's scales, for a matrix of codes of `shape` as stored."""
        r, c = (self.groups if self.indexed == d else n for d, n in enumerate(shape, 1))
        return _blocks((r, c), self.rows, self.columns)

    def seconds_of(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """As `scales_of`, of second scales."""
        return _blocks(shape, self.second_rows, self.second_columns)

    def matrix(
        self,
        code: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
        zero: Tensor | None = None,
        table: Tensor | None = None,
        second: Tensor | None = None,
        group: Tensor | None = None,
        shifts: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        """codes [.., R, C], scales (and zero points) as above -> the weights [.., R, C] in `dtype`, computed in it.

        group: the index of blocks [R] (or [C]), or [.., R] where each matrix has its own. shifts: of codes and of zero points.
        Raises IndexError or RuntimeError on a number
        of no block, where the device does.
        """
        w = self._once(code, scale, dtype, zero, table, group, shifts)
        if second is None:
            return w
        r = second.to(dtype).unsqueeze(-2 if self.second_columns != ALL else -1)
        r = 1 / r if self.second == Scale.DIVIDES else r
        return times(w, r, max(self.second_rows, 1), max(self.second_columns, 1))

    def _once(
        self,
        code: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
        zero: Tensor | None,
        table: Tensor | None,
        group: Tensor | None,
        shifts: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """The weights without their second scales."""
        value = self.value(self.unpacked(code, shifts[0]), table, dtype)
        if not self.scaled or scale is None:
            return value
        s = self.factor(scale, dtype)
        if not self.grid:
            lone = -2 if self.columns != ALL else -1
            s, zero = s.unsqueeze(lone), None if zero is None else zero.unsqueeze(lone)
        rows, columns = max(self.rows, 1), max(self.columns, 1)
        z = None if zero is None else self.zeros(zero, dtype, shifts[1])
        if group is not None:
            s, z = (None if t is None else looked_up(t, group, self.indexed - 3) for t in (s, z))
            assert s is not None
        spread = None if z is None else times(torch.ones_like(value), z, rows, columns)
        if spread is not None and self.zeroed != Zero.ADDED:
            value, spread = value - spread, None
        w = times(value, s, rows, columns)
        return w if spread is None else w + spread

    def shifts_of(self, tables: Sequence[Tensor], i: int) -> tuple[Tensor | None, Tensor | None]:
        """By how much the i-th tensor of codes and its zero points are shifted, of lists for all codes and then for all zero points."""
        if not self.shifted:
            return None, None
        return tables[i], tables[len(tables) // 2 + i] if self.zero_order else None

    def factor(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """What weights are multiplied by, laid out as the scales."""
        s = scale.to(dtype)
        if self.exponents:
            power = torch.exp2(s - 127)
            s = torch.where(scale == 0, 0.0, power) if self.exponents == Exponent.BITS else power
        return 1 / s if self.scaled == Scale.DIVIDES else s

    def zeros(self, zero: Tensor, dtype: torch.dtype, shift: Tensor | None = None) -> Tensor:
        """Zero points, laid out as the scales."""
        if self.zeroed in (Zero.PLAIN, Zero.ADDED):
            return zero.to(dtype)
        packed = Stored(self.bits, zero.dtype, axis=int(self.zeroed) - 1, order=self.zero_order)
        z = packed.unpacked(zero, shift).to(dtype) + self.zero_offset
        return z % (1 << self.bits) if self.zero_wraps else z

    def unpacked(self, words: Tensor, shift: Tensor | None = None) -> Tensor:
        """The codes of words, as whole numbers where several lie in one; `shift`: where `order` counts its numbers."""
        if not self.axis:
            return words
        mask, wide = (1 << self.bits) - 1, words.to(torch.int32)
        by = None if shift is None else shift.flatten().to(torch.int32)
        codes = [(wide >> (self.bits * place if by is None else by[place])) & mask for place in self.order]
        return torch.stack(codes, -1).flatten(-2, -1) if self.axis == 2 else torch.stack(codes, -2).flatten(-3, -2)

    def value(self, code: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What codes stand for."""
        if self.values:
            return _looked_up(torch.tensor(self.values, dtype=dtype, device=code.device), code)
        if table is not None:
            return _looked_up(table.to(dtype), code)
        if code.is_cpu and code.dtype in _BYTES and type(code) in (Tensor, torch.nn.Parameter):  # a cast takes five times as long
            return _looked_up(torch.arange(256, dtype=torch.uint8).view(code.dtype).to(dtype), code.view(torch.uint8))
        return code.to(dtype) + self.offset if self.offset else code.to(dtype)


def _blocks(shape: tuple[int, int], rows: int, columns: int) -> tuple[int, ...]:
    """The shape of what blocks of a matrix have one number of each."""
    r, c = (1 if b == ALL else -(-n // b) for n, b in zip(shape, (rows, columns), strict=True))
    return (r, c) if ALL not in (rows, columns) else (max(r, c),)


def looked_up(blocks: Tensor, group: Tensor, dim: int) -> Tensor:
    """blocks[.., g[i], :] (or, along the last dim, blocks[.., g[j]]); one index for all matrices, or one for each."""
    count = blocks.shape[dim]
    own = torch.where(group < 0, group + count, group).long()
    if own.ndim == 1:
        return blocks.index_select(dim, own)
    own = own.unsqueeze(-1 if dim == -2 else -2)
    return blocks.gather(dim, own.expand(*(n if d != own.ndim + dim else own.shape[dim] for d, n in enumerate(blocks.shape))))


def _looked_up(table: Tensor, code: Tensor) -> Tensor:
    """table[code]."""
    return table.index_select(0, code.flatten().int()).view(code.shape)


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
