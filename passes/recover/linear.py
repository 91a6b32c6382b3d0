"""A projection of an expert: which weight it reads, and how that is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp

from .. import terms as T
from ..terms import Term
from ..terms.arithmetic import constant_part
from .matrices import LowRank
from .rows import No, reads
from .scales import Channel


@dataclass
class Linear:
    """Σ_m x[t,m] W[e, row(i), m] + b[e, row(i)]: `stride`, `offset` of row(i); `bias` an atom or None.

    `scale` multiplies the sum but not the bias: what the projection's input is multiplied by. `channel`: a scale for each row, which
    multiplies the sum too. `pair`: a low-rank pair that is added to the sum, before `scale` and bias.
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


def linear_of(a: Term, out: Term, inp: Term, expert: Term) -> Linear:
    """How a weight atom is laid out, from its index: [e, out, in], [e, in, out], or [e * rows + out, in]."""
    idx = list(a.args[1])
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
            return Linear(a.args[0], stride, offset, transposed, flat)
    raise No(f"an expert weight is indexed in an unknown way{reads(a)}")


def affine(r: Term, v: Term) -> tuple[int, int]:
    """r = stride * v + offset."""
    offset, rest = constant_part(r)
    stride, body = T.coefficient(rest)
    if body is not v or not isinstance(stride, int) or not isinstance(offset, int):
        raise No("a projection's rows are not a simple slice")
    return stride, offset
