"""Low-rank pairs beside an expert's projections (LoRA): W x + s b (a x).

As a term the pair is  c Σ_r b[e, row, r] Σ_m a[e, r, m] x[m],  or  c Σ_m x[m] Σ_r b[e, row, r] a[e, r, m]  where the model adds it to the
weight. It belongs to the projection in the same sum that gives the same rows; s is c over that projection's own factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp

from ...ir import Form
from .. import terms as T
from ..terms import Term
from .linear import Linear
from .matrices import LowRank, matrices
from .rows import No, factors

MORE = "a projection has more than one low-rank pair (LoRA) at once: merge all but one adapter into the weight"
APART = "a low-rank pair (LoRA) stands beside no single projection"
OTHER_INPUT = "a low-rank pair (LoRA) reads another input than its projection, as with dropout in training"
OTHER_ROWS = "a low-rank pair (LoRA) gives other rows than its projection"
NO_NUMBER = "the scale of a low-rank pair (LoRA) is no number"


@dataclass(frozen=True)
class Pair:
    """A pair as it was read: its matrices, r, m, what depends on m (its input), and what multiplies it."""

    a: Term
    b: Term
    r: Term
    m: Term
    out: Term
    expert: Term
    input: tuple[Term, ...]
    others: tuple[Term, ...]

    def tokens(self) -> Term:
        """The atom x[t, m] that it reads."""
        if len(self.input) != 1 or self.input[0].op != "a":
            raise No(OTHER_INPUT)
        return T.subst(self.input[0], {self.m: T.named("m", self.m.args[1])})

    def beside(self, lin: Linear, scale: sp.Expr) -> LowRank:
        """As the pair of a projection, `scale` times it."""
        if not scale.is_number or not scale.is_real or scale == 0:
            raise No(NO_NUMBER)
        a = matrices(self.a, self.expert, self.r, self.m)
        b = matrices(self.b, self.expert, self.out, self.r)
        if (a.stride, a.offset) != (1, 0) or (b.stride, b.offset) != (lin.stride, lin.offset):
            raise No(OTHER_ROWS)
        if a.listed != b.listed or a.listed != isinstance(lin.weight, tuple):
            raise No("a low-rank pair (LoRA) is not stored as its projection's weights are: some are stacked and some are not")
        return LowRank(float(scale), a, b)


def read(part: Term, out: Term, expert: Term) -> Pair | None:
    """An addend as a low-rank pair with rows `out`; None where it is none."""
    outer = [f for f in factors(part) if f.op == "sum" and T.uses(f, out)]
    if len(outer) != 1:
        return None
    v, body = outer[0].args
    inner = [f for f in factors(body) if f.op == "sum" and T.uses(f, v)]
    for s in inner:
        u, below = s.args
        fs = [f for f in (*factors(part), *factors(body), *factors(below)) if f is not outer[0] and f is not s]
        matrices = [f for f in fs if f.op == "a" and len(f.args[1]) > 1 and T.uses(f, expert)]
        found = _pair_of(matrices, fs, (v, u), out, expert)
        if found is not None:
            return found
    return None


def _pair_of(matrices: list[Term], fs: list[Term], bound: tuple[Term, Term], out: Term, expert: Term) -> Pair | None:
    for r, m in (bound, bound[::-1]):
        a = [f for f in matrices if T.uses(f, r) and T.uses(f, m) and not T.uses(f, out)]
        b = [f for f in matrices if T.uses(f, r) and T.uses(f, out) and not T.uses(f, m)]
        rest = [f for f in fs if f not in a and f not in b]
        if len(a) == len(b) == 1 and not any(T.uses(f, r) or T.uses(f, out) for f in rest):
            given = tuple(f for f in rest if T.uses(f, m))
            return Pair(a[0], b[0], r, m, out, expert, given, tuple(f for f in rest if f not in given))
    return None


def beside_others(total: Term, out: Term, expert: Term) -> dict[Term, Pair]:
    """The addends of a sum that are pairs beside projections; where all of them look like pairs, they are two layers instead."""
    parts = total.args if total.op == "add" else ()
    pairs = {a: pair for a in parts if (pair := read(a, out, expert)) is not None}
    others = [a for a in parts if a not in pairs and any(f.op == "sum" and T.uses(f, out) for f in factors(a))]
    return pairs if others else {}


def why_no_pair(part: Term, out: Term, expert: Term) -> str | None:
    """What is wrong with an addend that holds a pair and is none itself."""
    both = [f for f in factors(part) if f.op == "add" and beside_others(f, out, expert)]
    if both and any(f.op == "a" and T.uses(f, expert) for f in factors(part)):
        return "a scale multiplies a projection together with its low-rank pair (LoRA): it is no scale of the weight alone"
    inside = any(read(x, out, expert) is not None for x in T.walk(part) if x.op == "sum")
    return "a low-rank pair (LoRA) has a bias of its own: merge the adapter, or leave its bias out" if inside else None


def only(pairs: Mapping[Term, Pair]) -> Pair | None:
    """Raises No where there are several."""
    if len(pairs) > 1:
        raise No(MORE)
    return next(iter(pairs.values()), None)


def beside(pair: Pair, down: Linear, scale: Term, rest: Term, i: Term) -> LowRank:
    """The pair of a down projection scale · Σ_i down[e, h, i] rest(i), where it reads the same rest(i)."""
    ours, number = _apart(rest, i)
    theirs, own = _apart(T.mul(*pair.input), pair.m)
    if T.canonical(T.subst(theirs, {pair.m: i})) is not T.canonical(ours):
        raise No(OTHER_INPUT)
    ratio = T.mul(own, *pair.others, T.power(T.mul(number, scale), -1))
    if ratio.op != "c":
        raise No(NO_NUMBER)
    return pair.beside(down, sp.sympify(ratio.args[0]))


def _apart(t: Term, v: Term) -> tuple[Term, Term]:
    """(what depends on v, what does not) of a product."""
    return T.mul(*(f for f in factors(t) if T.uses(f, v))), T.mul(*(f for f in factors(t) if not T.uses(f, v)))


def scales(ups: Sequence[Linear], down: Linear, form: Form) -> dict[str, Any]:
    """The numbers of the projections' pairs, by their names in the IR; 0 where there is none."""
    up, *second = (0.0 if x.pair is None else x.pair.scale for x in ups)
    return {
        "up_pair": up,
        "second_pair": second[0] if form is Form.SEPARATE else 0.0,
        "down_pair": 0.0 if down.pair is None else down.pair.scale,
    }


def check(ups: Sequence[Linear], down: Linear, form: Form) -> None:
    """Gate and up in one weight have one pair; raises No for pairs that no op takes."""
    if form in (Form.CONCAT, Form.INTERLEAVED) and len({_of_all_rows(x.pair) for x in ups}) != 1:
        raise No("a low-rank pair (LoRA) stands beside a part of a weight")


def _of_all_rows(pair: LowRank | None) -> LowRank | None:
    return None if pair is None else replace(pair, b=replace(pair.b, stride=1, offset=0))
