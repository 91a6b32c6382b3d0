"""Low-rank pairs beside an expert's projections (LoRA): W x + s b (a x).

As a term the pair is  c Σ_r b[e, row, r] Σ_m a[e, r, m] x[m],  or  c Σ_m x[m] Σ_r b[e, row, r] a[e, r, m]  where the model adds it to the
weight. It belongs to the projection in the same sum that gives the same rows; s is c over that projection's own factor.
Several of them are one of their ranks' sum (`ir.operands.Join`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from ...ir import Form
from ...ir.operands import Join
from .. import terms as T
from ..aten.names import op_name
from ..terms import Term
from .linear import Linear
from .match import Param
from .matrices import LowRank, matrices
from .rows import Cause, No, factors, nodes_of, parted

DORA = "rows of a weight are divided by a norm that is computed from it (DoRA, weight norm): make them one weight before the product"
APART = "a low-rank pair (LoRA) stands beside no single projection"
OTHER_INPUT = "a low-rank pair (LoRA) reads another input than its projection, as with dropout in training"
OTHER_ROWS = "a low-rank pair (LoRA) gives other rows than its projection"
_NORMS, _NEAR = ("linalg_vector_norm", "norm"), 8
NO_NUMBER = "the scale of a low-rank pair (LoRA) is no number"


class NoPair(No):
    """What is wrong with low-rank pairs: then that is the cause, whatever else there is."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, cause=Cause.PAIR)


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
            raise NoPair(OTHER_INPUT)
        return T.subst(self.input[0], {self.m: T.named("m", self.m.args[1])})

    def beside(self, lin: Linear, scale: sp.Expr) -> LowRank:
        """As the pair of a projection, `scale` times it."""
        if not scale.is_number or not scale.is_real or scale == 0:
            raise NoPair(NO_NUMBER)
        a = matrices(self.a, self.expert, self.r, self.m)
        b = matrices(self.b, self.expert, self.out, self.r)
        if (a.stride, a.offset) != (1, 0) or (b.stride, b.offset) != (lin.stride, lin.offset):
            raise NoPair(OTHER_ROWS)
        if a.listed != b.listed or a.listed != isinstance(lin.weight, tuple):
            raise NoPair("a low-rank pair (LoRA) is not stored as its projection's weights are: some are stacked and some are not")
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


def normed(body: Term, t: Term, expert: Term) -> bool:
    """Whether something is divided by a norm of an expert's weight: one that is looked into, or that a tensor of the graph holds."""
    own = [x for x in T.walk(body) if T.uses(x, expert) and not T.uses(x, t)]
    return any(x.op == "pow" and any(f.op == "sum" for f in T.walk(x)) for x in own) or any(_is_normed(x) for x in own if x.op == "a")


def _is_normed(a: Term) -> bool:
    n = nodes_of(a)[0]
    for _ in range(_NEAR):  # the norm, and what divides by it
        if not isinstance(n, fx.Node) or n.op != "call_function":
            return False
        if op_name(n) in _NORMS:
            return True
        operands = n.args[1:] if op_name(n) == "div" else n.args
        if not operands:  # a value whose making is not read
            return False
        n = operands[0]
    return False


def why_no_pair(part: Term, out: Term, expert: Term) -> NoPair | None:
    """What is wrong with an addend that holds a pair and is none itself."""
    both = [f for f in factors(part) if f.op == "add" and beside_others(f, out, expert)]
    if both and any(f.op == "a" and T.uses(f, expert) for f in factors(part)):
        return NoPair("a scale multiplies a projection together with its low-rank pair (LoRA): it is no scale of the weight alone")
    inside = any(read(x, out, expert) is not None for x in T.walk(part) if x.op == "sum")
    return NoPair("a low-rank pair (LoRA) has a bias of its own: merge the adapter, or leave its bias out") if inside else None


def added(pairs: Sequence[LowRank]) -> LowRank | None:
    """The pairs of one projection, the largest scale first, then by their matrices' names: the same order wherever they stand."""
    first, *more = sorted(pairs, key=lambda p: (-abs(p.scale), p.scale, str(p.a.nodes))) or (None,)
    return first and replace(first, more=tuple(more))


def beside(pairs: Mapping[Term, Pair], down: Linear, scale: Term, rest: Term, i: Term) -> LowRank | None:
    """The pairs of a down projection scale · Σ_i down[e, h, i] rest(i), where they read the same rest(i)."""
    return added([_beside(pair, down, scale, rest, i) for pair in pairs.values()])


def _beside(pair: Pair, down: Linear, scale: Term, rest: Term, i: Term) -> LowRank:
    ours, number = parted(rest, i)
    theirs, own = parted(T.mul(*pair.input), pair.m)
    if T.canonical(T.subst(theirs, {pair.m: i})) is not T.canonical(ours):
        raise NoPair(OTHER_INPUT)
    ratio = T.mul(own, *pair.others, T.power(T.mul(number, scale), -1))
    if ratio.op != "c":
        raise NoPair(NO_NUMBER)
    return pair.beside(down, sp.sympify(ratio.args[0]))


def scales(ups: Sequence[Linear], down: Linear, form: Form) -> dict[str, Any]:
    """The numbers of the projections' pairs, by their names in the IR; 0 where there is none."""
    up, *second = (0.0 if x.pair is None else x.pair.scale for x in ups)
    return {
        "up_pair": up,
        "second_pair": second[0] if form is Form.SEPARATE else 0.0,
        "down_pair": 0.0 if down.pair is None else down.pair.scale,
    }


def check(ups: Sequence[Linear], form: Form) -> None:
    """Gate and up in one weight have one pair; raises No for pairs that no op takes."""
    if form in (Form.CONCAT, Form.INTERLEAVED) and any(_of_all_rows(x.pair) != _of_all_rows(ups[0].pair) for x in ups):
        raise NoPair("a low-rank pair (LoRA) stands beside a part of a weight")


def _of_all_rows(pair: LowRank | None) -> list[LowRank]:
    return [] if pair is None else [replace(p, b=replace(p.b, stride=1, offset=0), more=()) for p in pair.all]


def join(ups: Sequence[Linear], down: Linear, count: int) -> Join | None:
    """How the pairs of each projection are put together; None where none has several. `ups`: as they are stored."""
    up, low = ([tuple(p.scale / x.pair.scale for p in x.pair.all) for x in xs if x.pair is not None] for xs in (ups, [down]))
    if all(len(numbers) == 1 for numbers in (*up, *low)):
        return None
    return Join(tuple(up), tuple(low), count if isinstance(down.weight, tuple) else 1)


def operands(ups: Sequence[Linear], down: Linear, width: int, sizes: tuple[int, int, int]) -> dict[str, list[Param]]:
    """The matrices of all pairs, by their names. `width`: rows of an up projection as it is stored; sizes: (in, inner, out)."""
    hidden, inner, out = sizes
    up = [p for x in ups if x.pair is not None for p in x.pair.all]
    low = [] if down.pair is None else down.pair.all
    return {
        "up_a": [q for p in up for q in p.a.params(columns=hidden)],
        "up_b": [q for p in up for q in p.b.params(rows=width)],
        "down_a": [q for p in low for q in p.a.params(columns=inner)],
        "down_b": [q for p in low for q in p.b.params(rows=out)],
    }


# ---- one base for all experts, each with an adapter of its own on it:  W x + s b[e] (a[e] x) -----------------------------------

# The op takes a matrix for each expert; they may all be the same one, read where it lies. It is so taken only where nothing is to be
# learned of it: a gradient would be made once for each expert.


def of_each(body: Term, t: Term, expert: Term) -> Term:
    """The term with W[out, in] and bias[out] beside low-rank pairs read as those of `expert`, of as many as there are."""
    count = expert.args[1]
    found: dict[Term, Term] = {}
    for total in [x for x in T.walk(body) if x.op == "add" and T.uses(x, expert)]:
        for out in total.atoms - {t, expert}:
            pairs = [a for a in total.args if (pair := read(a, out, expert)) is not None and isinstance(pair.a.args[0], tuple)]
            for part in total.args if pairs else ():
                atoms = [f for f in (part, *_inside(part, out)) if f.op == "a" and _is_common(f, out, t, expert)]
                found |= {a: T.atom((a.args[0],) * count, (expert, *a.args[1])) for a in atoms}
    return T.canonical(T.subst(body, found)) if found else body


def _inside(part: Term, out: Term) -> list[Term]:
    return [g for f in factors(part) if f.op == "sum" and T.uses(f, out) for g in factors(f.args[1])]


def _is_common(a: Term, out: Term, t: Term, expert: Term) -> bool:
    """Whether an atom is a frozen parameter of no expert."""
    return T.uses(a, out) and not T.uses(a, t) and not T.uses(a, expert) and _is_frozen(a.args[0])


def _is_frozen(n: Any) -> bool:
    given = getattr(n, "op", "") in ("placeholder", "get_attr")
    return given and not (torch.is_grad_enabled() and n.meta.get("trained", n.meta["val"].requires_grad))
