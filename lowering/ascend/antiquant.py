"""Weights in few bits under rows of floats: which stored forms npu_grouped_matmul takes (`antiquant_*`), as a table of laws.

The op computes x (q + offset) · scale with whole numbers q of 8 bits, or of 4 (eight in an int32). As in `law`, a row says what it cannot
express and the first with nothing to say is taken. Limits: aclnnGroupedMatmulV4 of CANN, "伪量化场景" (weights quantised alone).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...ir import Stored
from ...ir.stored import Scale, Zero
from ...ir.text import stored_text
from . import schemas

NIBBLES = 8  # whole numbers of 4 bits in an int32, the first in the lowest bits
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Problem:
    """One projection: how it is stored, [in, out] or not (`transposed`), its sizes, the rows' dtype, the family of the device.

    float8_rows: the model rounds each block of a row's inputs to float8 before the product, by the blocks of the weights.
    """

    stored: Stored
    transposed: bool
    inner: int
    out: int
    dtype: torch.dtype
    device: str = ""
    float8_rows: bool = False

    def blocks(self) -> tuple[int, int]:
        """Inputs and outputs that share a scale."""
        s = self.stored
        inner, out = (s.rows, s.columns) if self.transposed else (s.columns, s.rows)
        return inner or self.inner, out or self.out

    def values(self) -> tuple[float, float] | None:
        """The least and the largest whole number that codes stand for; None where some are none."""
        s = self.stored
        if s.tabled or s.shifted or (s.dtype.is_floating_point and not s.values):
            return None
        if s.values:
            return (min(s.values), max(s.values)) if all(v == int(v) for v in s.values) else None
        low, high = (0, 2**s.bits - 1) if s.axis else (torch.iinfo(s.dtype).min, torch.iinfo(s.dtype).max)
        return (low + s.offset, high + s.offset) if s.offset == int(s.offset) else None

    def shift(self, bits: int) -> float:
        """What is taken from the whole numbers to have them within `bits`; the offset gives it back."""
        low, high = self.values() or (0, 0)
        least = -(2 ** (bits - 1))
        return 0.0 if low >= least and high < -least else low - least


Check = Callable[[Problem], str | None]


class Evidence(enum.Enum):
    """What a law is known from."""

    RUN = "emulated, and converted by the wheel"
    DECLARED = "the wheel declares the ops, the documents say what they do"
    DOCUMENT = "the documents say it"


@dataclass(frozen=True)
class Row:
    """One form of weights. bits: of the op's codes. needs: ops beside the product (`schemas.RAISED`) that round its rows.

    Where nothing but a declaration or a document is known (`evidence`) of how rows in float8 lie, nothing is emitted.
    """

    name: str
    bits: int
    calls: str
    holds: str
    checks: tuple[Check, ...]
    evidence: Evidence = Evidence.RUN
    needs: tuple[str, ...] = ()

    def unknown(self) -> str | None:
        """Why nothing is emitted for rows in float8."""
        if (op := schemas.lacking(self.needs)) is not None:
            return f"{op} is not among torch_npu's ops here"
        return None if self.evidence is Evidence.RUN else "known from documents only, no calls are emitted"

    @property
    def told(self) -> str:
        """The calls, for the report."""
        return self.calls if self.evidence is Evidence.RUN else f"{self.calls}, unverified: known from documents only"

    def refuses(self, p: Problem) -> tuple[int, str] | None:
        """The first objection and how many checks it came behind, or None."""
        return next(((i, why) for i, c in enumerate(self.checks) if (why := c(p)) is not None), None)


def _halves(p: Problem) -> str | None:
    return None if p.dtype in (torch.float16, torch.bfloat16) else f"rows of {p.dtype}: npu_grouped_matmul takes them with fp16 and bf16"


def _whole(p: Problem) -> str | None:
    return None if p.values() is not None else "codes stand for no whole numbers, and npu_grouped_matmul takes int8 and int4"


def _multiplied(p: Problem) -> str | None:
    if p.stored.scaled == Scale.DIVIDES:
        return "scales divide, npu_grouped_matmul multiplies by them"
    if p.stored.indexed:
        return "an index says which group an input is in, npu_grouped_matmul takes groups that lie side by side"
    if p.stored.second:
        return "weights have second scales, npu_grouped_matmul takes one"
    if p.stored.zeroed == Zero.ADDED:
        return "zero points are added behind the scales, npu_grouped_matmul takes them off the codes"
    return "zero points lie several in a word, npu_grouped_matmul takes them one by one" if p.stored.zero_order else None


def _plain_scales(p: Problem) -> str | None:
    return "scales are exponents (MX): A2 and A3 have int8 and int4 only" if p.stored.exponents else None


def _within(bits: int) -> Check:
    def check(p: Problem) -> str | None:
        low, high = p.values() or (0, 0)
        return None if high - low < 2**bits else f"codes stand for {low:g} to {high:g}, more than {bits} bits hold"

    return check


_within_8, _within_4 = _within(8), _within(4)


def _by_channel(p: Problem) -> str | None:
    return None if p.blocks()[0] >= p.inner else "npu_grouped_matmul takes int8 with a scale for each output channel"


def _float8_by_channel(p: Problem) -> str | None:
    return None if p.blocks()[0] >= p.inner else "the 950 takes float8 under rows of floats with a scale for each output channel only"


def _square_blocks(p: Problem) -> str | None:
    return None if p.blocks() == (128, 128) else "the 950 takes blocks of 128 x 128"


def _mx(p: Problem) -> str | None:
    mx = p.stored.exponents and p.blocks() == (32, 1)
    return None if mx else "scales are no exponents of 32 inputs (MX)"


def _mx_codes(p: Problem) -> str | None:
    e2m1 = p.stored.bits == 4 and sorted(set(map(abs, p.stored.values))) == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    return None if e2m1 or p.stored.dtype in _FLOAT8 else "codes are neither float8 nor e2m1"


def _rows_too(p: Problem) -> str | None:
    return None if p.float8_rows else "the 950 multiplies these with rows in float8, another function than rows of floats"


def _by_group(p: Problem) -> str | None:
    inner, _ = p.blocks()
    return None if p.inner % inner == 0 else f"{p.inner} inputs do not fall into groups of {inner}"


def _symmetric(p: Problem) -> str | None:
    if p.stored.zeroed or p.shift(4):
        return "groups of inputs have zero points: npu_grouped_matmul takes them for whole output channels only"
    return None


def _eights(p: Problem) -> str | None:
    return f"{p.out} outputs: eight of 4 bits lie in a word" if p.out % NIBBLES else None


def _no_310(p: Problem) -> str | None:
    return "Ascend 310P takes fp16 weights only" if p.device == "310P" else None


def _no_950(p: Problem) -> str | None:
    return "Ascend 950 takes int4 with a scale for each output channel only" if p.device == "950" else None


def _float8(p: Problem) -> str | None:
    return None if p.stored.dtype in _FLOAT8 and p.stored.plain else "codes are no float8"


def _only_950(p: Problem) -> str | None:
    return None if p.device == "950" else "A2 and A3 have int8 and int4 only"


_ALWAYS: tuple[Check, ...] = (_halves, _no_310, _multiplied)
_COMMON: tuple[Check, ...] = (*_ALWAYS, _plain_scales)
# of rows that come equally far the last is the one whose objection is told
FORMS: tuple[Row, ...] = (
    Row(
        "float8 in blocks",
        0,
        "grouped_matmul (float8 blocks × rows in float8)",
        "Σ over blocks of 128 inputs of (Σ q x) · s of the row's block · s of the weight's, as G-B of the documents",
        (*_COMMON, _float8, _only_950, _square_blocks, _rows_too),
        evidence=Evidence.DECLARED,
        needs=("npu_dynamic_block_quant", "npu_swiglu_group_quant"),
    ),
    Row(
        "MX",
        0,
        "grouped_matmul (MX × MX rows)",
        "the same over blocks of 32 inputs with powers of two; float8 under float8, e2m1 under e2m1",
        (*_ALWAYS, _mx, _mx_codes, _only_950, _rows_too),
        evidence=Evidence.DECLARED,
        needs=("npu_dynamic_mx_quant", "npu_swiglu_mx_quant"),
    ),
    Row(
        "float8 by channel",
        0,
        "grouped_matmul (float8 × scale)",
        "q · s with a scale for each output channel, no offset, the codes as they are",
        (*_COMMON, _float8, _only_950, _float8_by_channel),
        evidence=Evidence.DOCUMENT,
    ),
    Row(
        "4 bits by channel",
        4,
        "grouped_matmul (int4 × scale)",
        "(q - z) · s with a scale and a zero point for each output channel: the offset is the shift into 4 bits less z",
        (*_COMMON, _whole, _within_4, _by_channel, _eights),
    ),
    Row(
        "8 bits by channel",
        8,
        "grouped_matmul (int8 × scale)",
        "(q - z) · s with a scale and a zero point for each output channel: the offset is the shift into 8 bits less z",
        (*_COMMON, _whole, _within_8, _by_channel),
    ),
    Row(
        "4 bits by group",
        4,
        "grouped_matmul (int4 × scale of groups)",
        "q · s with a scale for each group of inputs and each output channel: whole numbers in -8 .. 7 need no offset",
        (*_COMMON, _whole, _within_4, _by_group, _symmetric, _eights, _no_950),
    ),
)


def choose(p: Problem) -> Row | None:
    """The row that is taken."""
    return next((row for row in FORMS if row.refuses(p) is None), None)


def why_not(p: Problem) -> str | None:
    """Why no row takes a projection, or None: what the row that came furthest objects to."""
    refused = [row.refuses(p) for row in FORMS]
    if None in refused:
        return None
    furthest = max(r[0] for r in refused if r)
    why = [r[1] for r in refused if r and r[0] == furthest][-1]
    return f"expert weights stored as {stored_text(p.stored)}: {why}"


def int8_by_channel(p: Problem) -> str | None:
    """Why the chain of int8 products (rows rounded too) cannot take the bytes as they are, or None."""
    if p.stored.dtype is torch.int8 and p.stored.plain and p.blocks()[0] >= p.inner:
        return None
    return f"weights stored as {stored_text(p.stored)}: its products take int8 with a scale for each output channel"


# ---- codes, scales and offsets as operands -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coding:
    """How a projection's tensors become the op's operands: [E, in, out], scales and offsets [E, out] or [E, groups, out]."""

    problem: Problem
    bits: int

    @classmethod
    def of(cls, p: Problem) -> Coding:
        row = choose(p)
        assert row is not None
        return cls(p, row.bits)

    @property
    def out_in(self) -> bool:
        """Whether the memory lies as [E, out, in]: the 950 takes float8 under rows of floats no other way."""
        return self.bits == 0

    def codes(self, words: Tensor) -> Tensor:
        """Words as stored [E, ., .] -> int8 (float8) [E, in, out], or int32 [E, in, out / 8]."""
        p = self.problem
        if p.stored.plain and self.bits != 4:
            return words if p.transposed else words.transpose(-1, -2)
        if isinstance(words, FakeTensor):
            return self._repacked(words)
        return torch.stack([self._repacked(w) for w in words])  # floats of one expert at a time: of all they would be eight times the words

    def _repacked(self, words: Tensor) -> Tensor:
        s, p = self.problem.stored, self.problem
        q = (s.value(s.unpacked(words), None, torch.float32) - p.shift(self.bits)).to(torch.int8)
        q = q if p.transposed else q.transpose(-1, -2)
        return packed(q) if self.bits == 4 else q

    def factors(self, scale: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The scales; ones where there are none. `like`: of their device, [E, ...]."""
        if scale is None:
            return torch.ones(like.shape[0], self.problem.out, dtype=dtype, device=like.device)
        return self._spread(scale).to(dtype)

    def offsets(self, zero: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
        """shift - z, of the scales' shape."""
        shift = self.problem.shift(self.bits)
        if zero is None:
            inner = self.problem.inner // self.problem.blocks()[0]
            groups = () if inner <= 1 else (inner,)
            return torch.full((like.shape[0], *groups, self.problem.out), shift, dtype=dtype, device=like.device)
        return (shift - self._spread(zero).float()).to(dtype)

    def _spread(self, t: Tensor) -> Tensor:
        """Scales as stored -> [E, out] or [E, groups, out]: outputs that share one get it each."""
        p = self.problem
        if p.stored.grid and not p.transposed:
            t = t.transpose(-1, -2)
        share = p.blocks()[1]
        if t.shape[-1] == 1:
            t = t.expand(*t.shape[:-1], p.out)
        elif share > 1:
            t = t.repeat_interleave(share, -1)[..., : p.out]
        return t[..., 0, :] if p.stored.grid and t.shape[-2] == 1 else t


def packed(q: Tensor) -> Tensor:
    """Whole numbers -8 .. 7, [..., N] in int8 -> [..., N / 8] in int32, the first of eight in the lowest bits."""
    bits = (q.to(torch.int32) & 15).unflatten(-1, (-1, NIBBLES))
    word = bits[..., 0]
    for i in range(1, NIBBLES):
        word = word | (bits[..., i] << (4 * i))
    return word.contiguous()


def unpacked(words: Tensor) -> Tensor:
    """The inverse of `packed`."""
    nibbles = torch.stack([(words >> (4 * i)) & 15 for i in range(NIBBLES)], -1).flatten(-2)
    return ((nibbles ^ 8) - 8).to(torch.int8)
