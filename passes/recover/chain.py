"""Experts that are a chain of products and maps of rows (norms, residuals, a third matrix), read from the last stage to the first.

A stage's term at feature h is a map over its products Σ_m W[e,h,m] F(m), and F is the term of the stage before. A number of the rows that
came in may stand outside of the sum, r Σ_m W F(m) = Σ_m W (r F(m)): it goes to where it was computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy as sp
import torch.fx as fx

from ...ir import Form
from ...ir import chain as ir
from ...ir.scalar import G
from .. import terms as T
from ..aten.element import dtype_of, shape_of
from ..terms import Term
from . import adapters
from .forms import tidy
from .linear import Linear
from .match import Param
from .rows import NO_CHAIN, Cause, No, data_dependent, factors, outer_atoms, reads
from .stages import Read, Stage, Tokens, matrix_of, products

_MOST = 8  # stages
_FEW = 5  # vectors


def _telling(reason: str) -> No:
    """Why experts are no chain, where that says more than why they are no two products."""
    return No(reason, cause=Cause.TELLING)


@dataclass
class Chained:
    """A chain as it was read: its parts of the IR, the atom x[t, m] that it reads, the routing weight."""

    chain: ir.Chain
    operands: list[Param]
    tokens: Term
    weight: Term
    stacked: bool

    def fields(self) -> dict[str, Any]:
        """Of `Experts`, beside those of any block."""
        first = next(s.width for s in self.chain.stages if s.matrices)
        return {"intermediate": first, "form": Form.SINGLE, "activation": G, "stacked": self.stacked, "chain": self.chain}


def holds_rows_of_experts(weight: Term, expert: Term, tokens: Iterable[Term]) -> bool:
    """Whether what was taken for a routing weight is a number of the experts' own rows, as a norm's is."""
    xs = {x.args[0] for x in tokens}
    return next(products(weight, expert), None) is not None or any(_of_rows(s, xs) for s in T.walk(weight) if s.op == "sum")


def _of_rows(s: Term, xs: set[Any]) -> bool:
    """Whether a sum runs over the features of tokens and over nothing else."""
    v = s.args[0]
    inside = [a for a in outer_atoms(s.args[1]) if T.uses(a, v)]
    return bool(inside) and all(a.args[0] in xs for a in inside)


def read_chain(body: Term, h: Term, expert: Term) -> Chained:
    """body = w(t, e) · f_e(x[t])[h]. Raises No where f is no chain."""
    tokens = _tokens(body, expert)
    ours = [f for f in factors(body) if T.uses(f, h) or holds_rows_of_experts(f, expert, [tokens.atom])]
    weight = T.mul(*(f for f in factors(body) if f not in ours))
    stages: list[Stage] = []
    maps: list[sp.Expr] = []
    term, out = T.mul(*ours), h
    while not (term.op == "a" and tokens.reads(term, out)):
        stage = Stage(term, out, expert, tokens)
        expr, moved = _without_scalars(stage, stage.read(term))
        stages.append(stage)
        maps.append(expr)
        if not stage.linears:
            break
        if len(set(stage.inputs)) > 1 or len(stages) > _MOST:
            raise _different(term, out, expert)
        term, out = T.mul(stage.inputs[0], *moved), stage.at
    return _assembled(stages[::-1], [tidy(m) for m in maps[::-1]], expert, tokens, weight)


def _different(term: Term, out: Term, expert: Term) -> No:
    """Why a stage's products read different rows."""
    if any(adapters.read(s, out, expert) is not None for s, _ in products(term, expert, out)):
        return _telling(
            "low-rank pairs (LoRA) in experts with norms, residuals or more than two products: merge the adapter into the weights"
        )
    return No(NO_CHAIN)


def holds_statistics(body: Term, expert: Term) -> bool:
    """Whether numbers of whole rows of an expert are in its function: then it is no two products."""
    sums = (s for s in T.walk(body) if s.op == "sum" and matrix_of(s.args[1], s.args[0], expert) is None)
    return any(next(products(s.args[1], expert), None) is not None for s in sums)


def _tokens(body: Term, expert: Term) -> Tokens:
    """What the first products contract with their weights."""
    found: dict[Term, None] = {}
    for s, w in products(body, expert):
        m = s.args[0]
        at = T.named("m", m.args[1])
        for a in outer_atoms(s.args[1]):
            if a is not w and T.uses(a, m) and a.args[1][-1] is m and not T.uses(a, expert) and len(a.args[1]) > 1:
                found[T.subst(a, {m: at})] = None
    rows = [a for a in found if any(v.args[0] == "t" for i in a.args[1] for v in i.atoms)]
    if len(rows) == 1:  # of several, the others may be vectors
        found = dict.fromkeys(rows)
    if len(found) != 1:
        raise No("an expert's products read more than one tensor of tokens" if found else "no product of an expert reads the tokens")
    (atom,) = found
    return Tokens(atom, atom.args[1][-1])


def _without_scalars(stage: Stage, expr: sp.Expr) -> tuple[sp.Expr, list[Term]]:
    """The map without numbers of the rows that came in, and what multiplies those rows instead."""
    moved: list[Term] = []
    for w, term in stage.scalars.items():
        if w not in expr.free_symbols:
            continue
        if any(data_dependent(i) for a in outer_atoms(term) for i in a.args[1]):
            raise _telling(f"a routing value enters an expert's function{reads(term)}")
        powers = _powers(expr, w, {ir.product(i) for i in range(len(stage.linears))})
        for p in powers:
            out = _scaled_inputs(expr, w, p, len(stage.linears))
            if w not in out.free_symbols:
                expr = out
                moved.append(T.power(term, int(p) if p.is_Integer else float(p)))
                break
        else:
            if any(x.op == "ite" for x in T.walk(term)):
                raise No(f"an expert's rows are masked by a condition{reads(term)}")
            if _chosen_by_ids(term):
                raise _telling(
                    f"the rows of some experts are masked by their ids (a factor {term}): no expert's function has such a factor"
                )
            raise _telling(f"a number of a whole row (a mean, a norm, a gate) enters another product's rows than its own{reads(term)}")
    return expr, moved


def _chosen_by_ids(term: Term) -> bool:
    """Whether a number hangs on which expert a row has, and on nothing that the row holds."""
    return not outer_atoms(term) and any(x.op in ("lt", "eq", "not") for x in T.walk(term))


def _powers(expr: sp.Expr, w: sp.Symbol, ys: set[sp.Symbol]) -> list[sp.Expr]:
    """With which powers of w products are multiplied."""
    out: dict[sp.Expr, None] = {}
    for place in (*expr.atoms(sp.Mul), expr):
        powers = place.as_powers_dict()
        degree = sum(e for b, e in powers.items() if b in ys)
        if w in powers and degree:
            out[powers[w] / degree] = None
    return list(out)


def _scaled_inputs(expr: sp.Expr, w: sp.Symbol, p: sp.Expr, count: int) -> sp.Expr:
    """The map over y / w^p in place of y."""
    fresh = {ir.product(i): sp.Symbol(f"v{i}", real=True) for i in range(count)}
    out = expr.subs({y: v / w**p for y, v in fresh.items()}, simultaneous=True)
    for over in (ir.mean, ir.total):
        out = out.replace(over, lambda e, over=over: _linear(over, e, w))
    out = sp.powsimp(sp.expand_power_base(out))
    return out.subs({v: y for y, v in fresh.items()}, simultaneous=True)


def _linear(over: Any, e: sp.Expr, w: sp.Symbol) -> sp.Expr:
    """mean(w^p f) = w^p mean(f)."""
    factor, rest = sp.factor_terms(e).as_independent(*(e.free_symbols - {w}), as_Add=False)
    return factor * over(rest)


# ---- the IR --------------------------------------------------------------------------------------------------------------


@dataclass
class _Operands:
    """Parameters in the order in which stages name them."""

    expert: Term
    kinds: list[ir.Kind] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    known: dict[Any, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return int(self.expert.args[1])

    def matrix(self, lin: Linear) -> ir.Matrix:
        nodes = lin.weight if isinstance(lin.weight, tuple) else (lin.weight,)
        if any(not dtype_of(n).is_floating_point or dtype_of(n).itemsize < 2 for n in nodes) or lin.grid or lin.words:
            raise No("the weights of a chain of more than two products, or with a norm, are no plain floats")
        if ("matrix", lin.weight) not in self.known:
            listed = isinstance(lin.weight, tuple)
            shape = shape_of(nodes[0]) if listed else shape_of(nodes[0])[-2:]
            if lin.flat:
                shape = (shape[0] // self.count, *shape[1:])
            view = (self.count, *shape) if lin.flat else None
            if not listed and not lin.flat and (len(shape_of(nodes[0])) != 3 or shape_of(nodes[0])[0] < self.count):
                raise No("an expert weight is no stack of matrices")
            self._add(("matrix", lin.weight), ir.Kind.LISTED if listed else ir.Kind.STACKED, [Param(n, view) for n in nodes])
        return ir.Matrix(self.known["matrix", lin.weight], lin.stride, lin.offset, lin.transposed)

    def vector(self, v: Read) -> ir.Vector:
        if ("vector", v.node) not in self.known:
            nodes = v.node if isinstance(v.node, tuple) else (v.node,)
            kind = ir.Kind.LISTED if isinstance(v.node, tuple) else ir.Kind.STACKED if v.own else ir.Kind.SHARED
            lead = (self.count,) if kind is ir.Kind.STACKED else ()
            self._add(("vector", v.node), kind, [self._flat(n, lead) for n in nodes])
        return ir.Vector(self.known["vector", v.node], v.stride, v.offset)

    def _flat(self, n: fx.Node, lead: tuple[int, ...]) -> Param:
        """A vector as [n], or [E, n]; one number as [1]."""
        shape = shape_of(n)
        if lead and shape[:1] != lead:
            raise No("a vector of the experts holds another number of experts")
        long = [s for s in shape[len(lead) :] if s != 1]
        if len(long) > 1:
            raise No("a vector of the experts is no vector")
        return Param.shaped(n, (*lead, long[0] if long else 1))

    def _add(self, key: Any, kind: ir.Kind, params: list[Param]) -> None:
        self.known[key] = len(self.kinds)
        self.kinds.append(kind)
        self.params += params


def _ordered(s: Stage, expr: sp.Expr) -> tuple[list[Linear], list[Read], sp.Expr]:
    """Products and vectors in an order that does not depend on how they were written: rows of one weight as they lie, gates first."""
    inside = {y for f in expr.atoms(sp.Function) if f.func not in (ir.mean, ir.total) for y in f.free_symbols}
    count = len(s.linears)
    halves = len({lin.weight for lin in s.linears}) == 1

    def place(i: int) -> Any:
        return (s.linears[i].offset if halves else ir.product(i) not in inside, i)

    order = sorted(range(count), key=place)
    expr = expr.subs({ir.product(i): ir.product(order.index(i)) for i in range(count)}, simultaneous=True)
    ways = itertools.permutations(range(len(s.vectors))) if len(s.vectors) < _FEW else [tuple(range(len(s.vectors)))]
    named = [(way, expr.subs({ir.vector(i): ir.vector(way.index(i)) for i in way}, simultaneous=True)) for way in ways]
    way, expr = min(named, key=lambda one: str(one[1]))
    return [s.linears[i] for i in order], [s.vectors[i] for i in way], expr


def _assembled(stages: list[Stage], maps: list[sp.Expr], expert: Term, tokens: Tokens, weight: Term) -> Chained:
    held = _Operands(expert)
    out = []
    for s, m in zip(stages, maps, strict=True):
        if not isinstance(s.width, int):
            raise No("the expert's inner size is not a fixed number")
        linears, vectors, m = _ordered(s, m)
        matrices = tuple(held.matrix(lin) for lin in linears)
        out.append(ir.Stage(s.width, matrices, tuple(held.vector(v) for v in vectors), m))
    if not any(s.matrices for s in out):
        raise No("no product of an expert reads the tokens")
    if sum(bool(s.matrices) for s in out) < 2:
        raise No("an expert has one product only")
    listed = ir.Kind.LISTED in held.kinds
    return Chained(ir.Chain(tuple(out), tuple(held.kinds)), held.params, tokens.atom, weight, not listed)
