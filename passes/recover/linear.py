"""A projection of an expert: which weight it reads, and how that is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy as sp

from .. import terms as T
from ..terms import Term
from ..terms.arithmetic import constant_part
from . import grids, packed, shifts
from .codes import Reading
from .grids import Grid, Parts
from .matrices import LowRank
from .rows import No, nodes_of, reads
from .scales import Channel


@dataclass
class Linear:
    """Σ_m x[t,m] W[e, row(i), m] + b[e, row(i)]: `stride`, `offset` of row(i); `bias` an atom or None.

    `scale` multiplies the sum but not the bias: what the projection's input is multiplied by. `channel`: a scale for each row, which
    multiplies the sum too. `pair`: a low-rank pair that is added to the sum, before `scale` and bias. `grid`, `zero`: scales and zero
    points of blocks of the weight, which are in the sum. `words`: what packed codes mean; `codes`: nodes that hold them, unpacked.
    `exponents`: scales are exponents of two. `divided`: they divide. `added`: zero points are added to what is scaled.
    """

    weight: Any
    stride: int
    offset: int
    transposed: bool
    flat: bool
    bias: Any = None
    scale: sp.Expr = sp.S.One
    channel: Channel | None = None
    pair: LowRank | None = None
    grid: Grid | None = None
    zero: Grid | None = None
    words: Reading | None = None
    exponents: bool = False
    divided: bool = False
    added: bool = False
    codes: tuple[Any, ...] = ()


def linear_of(parts: Parts, out: Term, inp: Term, expert: Term, product: Sequence[Term]) -> Linear:
    """How a weight (with the scales of its blocks) is laid out: [e, out, in], [e, in, out], or [e * rows + out, in]. `product`: all that
    the weight is multiplied with, itself among it."""
    try:
        return _laid_out(parts, out, inp, expert)
    except No as e:
        if (why := shifts.shifted(product, expert)) is not None:
            raise No(why) from e
        raise


def _laid_out(parts: Parts, out: Term, inp: Term, expert: Term) -> Linear:
    a, weight, words = parts.codes, parts.codes.args[0], None
    idx = list(a.args[1])
    if packed.is_packed(a):
        found = packed.place(a, expert)
        if inp not in (found.row, found.column):  # a matrix that lies flattened
            found = packed.in_rows(found, inp.args[1])
        weight, words, idx = found.words, found.reading, [expert, found.row, found.column]
    flat = False
    if idx and idx[0] is expert:
        idx = idx[1:]
    else:
        pieces = list(idx[0].args) if idx[0].op == "add" else [idx[0]]
        own = [x for x in pieces if T.uses(x, expert)]
        if len(own) != 1 or any(T.uses(x, expert) for x in idx[1:]):
            raise No(f"a weight is not indexed by its expert first{reads(a)}")
        idx[0] = T.add(*(x for x in pieces if x is not own[0]))
        flat = True
    if len(idx) != 2:
        raise No(f"an expert weight is no matrix{reads(a)}")
    for transposed, (r, c) in ((False, idx), (True, idx[::-1])):
        if c is inp and T.uses(r, out):
            stride, offset = affine(r, out)
            scale = None if parts.scale is None else grids.grid(parts.scale, idx, expert)
            zero = None if parts.zero is None else grids.grid(parts.zero, idx, expert, zeros=True)
            if zero is not None and (scale is None or _blocks(scale) != _blocks(zero)):
                raise No("zero points are not laid out as the scales")
            blocks = {"grid": scale, "zero": zero, "words": words, "exponents": parts.exponents}
            blocks |= {"divided": parts.divided, "added": parts.added}
            return Linear(weight, stride, offset, transposed, flat, codes=nodes_of(a), **blocks)  # type: ignore[arg-type]
    raise No(f"an expert weight is indexed in an unknown way{reads(a)}")


def _blocks(g: Grid) -> tuple[object, ...]:
    """How a matrix falls into blocks."""
    return g.rows, g.columns, g.lookup


def affine(r: Term, v: Term) -> tuple[int, int]:
    """r = stride * v + offset."""
    offset, rest = constant_part(r)
    stride, body = T.coefficient(rest)
    if body is not v or not isinstance(stride, int) or not isinstance(offset, int):
        raise No("a projection's rows are not a simple slice")
    return stride, offset
