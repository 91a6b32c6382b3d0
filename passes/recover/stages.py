"""One stage of an expert that is a chain (`ir.Chain`): a term at a feature as a map over products, vectors and the token's row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy as sp

from ...ir import chain as ir
from ...ir import scalar
from .. import terms as T
from ..terms import Term
from . import grids
from .bridge import Bridge
from .linear import Linear, affine, linear_of
from .rows import No, data_dependent, factors, outer_atoms, reads

_NEAR = 1e-9


@dataclass(frozen=True)
class Read:
    """A vector: elements offset + stride · h of a parameter, or one number (stride 0); whether it is each expert's own."""

    node: Any
    stride: int
    offset: int
    own: bool


@dataclass(frozen=True)
class Tokens:
    """The experts' input: the atom x[t, m] with m = `at`."""

    atom: Term
    at: Term

    @property
    def width(self) -> Any:
        return self.at.args[1]

    def reads(self, a: Term, v: Term) -> bool:
        """Whether an atom is the input at feature v."""
        return T.subst(self.atom, {self.at: v}) is a


def matrix_of(inner: Term, m: Term, expert: Term, out: Term | None = None) -> Term | None:
    """The weight of the expert's own that a sum over m contracts, with rows `out` (any, where it is not said)."""
    found = [f for f in factors(inner) if f.op == "a" and T.uses(f, expert) and T.uses(f, m) and _is_matrix(f, m, expert)]
    found = [f for f in found if out is None or T.uses(f, out)]
    return found[0] if len(found) == 1 else None


def _is_matrix(a: Term, m: Term, expert: Term) -> bool:
    return any(i.atoms - {m, expert} for i in a.args[1])


def products(x: Term, expert: Term, out: Term | None = None) -> Iterator[tuple[Term, Term]]:
    """(sum, weight) of the products of an expert inside a term, those with rows `out` where that is said."""
    for s in T.walk(x):
        if s.op == "sum" and (out is None or T.uses(s, out)) and (w := matrix_of(s.args[1], s.args[0], expert, out)) is not None:
            yield s, w


class Stage(Bridge):
    """Reads a stage at feature `out`. `own`: its products as terms at `out`; `scalars`: numbers of the rows that came in."""

    def __init__(self, term: Term, out: Term, expert: Term, tokens: Tokens) -> None:
        self.out, self.expert, self.tokens, self.width = out, expert, tokens, out.args[1]
        self.own = {T.canonical(s): None for s, _ in products(term, expert, out)}
        self.residual = self.width == tokens.width and any(x.op == "a" and tokens.reads(x, out) for x in outer_atoms(term))
        self.linears: list[Linear] = []
        self.inputs: list[Term] = []
        self.at = out  # the feature of the rows that products contract
        self.symbols: dict[Term, sp.Expr] = {}
        self.vectors: list[Read] = []
        self.scalars: dict[sp.Symbol, Term] = {}
        self.memo: dict[Term, sp.Expr] = {}

    def read(self, x: Term) -> sp.Expr:
        if x not in self.memo:
            self.memo[x] = self._read(x)
        return self.memo[x]

    def _read(self, x: Term) -> sp.Expr:
        if x.op != "c" and not T.uses(x, self.out):
            return self._same_for_all(x)
        return self.arithmetic(x, self.read)

    def number(self, v: Any) -> sp.Expr:
        return sp.sympify(v)

    def failure(self, name: str) -> Exception:
        return No(f"no activation is known that uses {name}")

    def leaf(self, x: Term) -> sp.Expr:
        if x.op == "sum":
            return self._product(x)
        if x.op == "a" and self.tokens.reads(x, self.out):
            return ir.ROW
        if self._is_parameter(x):
            return self._vector(x)
        raise No(f"an expert's function holds {x.op if x.op != 'a' else 'a tensor that is no parameter of its own'}{reads(x)}")

    # ---- at a feature ----------------------------------------------------------------------------------------------------

    def _product(self, s: Term) -> sp.Expr:
        """Σ_m W[e, out, m] F(m): the product as a symbol."""
        key = T.canonical(s)
        if key in self.symbols:
            return self.symbols[key]
        m, inner = s.args
        w = matrix_of(inner, m, self.expert, self.out)
        rest = [f for f in factors(inner) if f is not w]
        if any(f.op == "a" and T.uses(f, m) and T.uses(f, self.out) and not T.uses(f, self.expert) for f in rest):
            raise No(f"all experts have one and the same weight in a product{reads(s)}: a weight must be each expert's own")
        if w is None and next(products(inner, self.expert), None) is not None:
            raise No(f"numbers of parts of a row (a norm over groups of features) stand inside the expert{reads(s)}")
        if w is None or any(T.uses(f, self.out) for f in rest):
            raise No(f"an expert's function holds a product that does not read one weight of its own{reads(s)}")
        lin = linear_of(grids.Parts((w,), w), self.out, m, self.expert, (w,))
        self.at = T.named("m", m.args[1])
        self.inputs.append(T.canonical(T.subst(T.mul(*rest), {m: self.at})))
        self.linears.append(lin)
        self.symbols[key] = ir.product(len(self.linears) - 1)
        return self.symbols[key]

    def _is_parameter(self, x: Term) -> bool:
        """Whether an element is the same for all tokens."""
        free = {v for i in x.args[1] for v in i.atoms} if x.op == "a" else set()
        known = x.op == "a" and x.args[0] is not self.tokens.atom.args[0] and not any(data_dependent(i) for i in x.args[1])
        return known and free <= {self.out, self.expert}

    def _vector(self, a: Term) -> sp.Expr:
        """p[e, h], p[h], or one number p[e] or p of a parameter."""
        index = [i for i in a.args[1] if i is not self.expert and not T.is_c(i, 0)]
        if len(index) > 1 or any(T.uses(i, self.expert) for i in index):
            raise No(f"an expert's function reads a parameter in an unknown way{reads(a)}")
        stride, offset = affine(index[0], self.out) if index else (0, 0)
        found = Read(a.args[0], stride, offset, T.uses(a, self.expert))
        if found not in self.vectors:
            self.vectors.append(found)
        return ir.vector(self.vectors.index(found))

    # ---- the same for all features ---------------------------------------------------------------------------------------

    def _same_for_all(self, x: Term) -> sp.Expr:
        if self._is_parameter(x):
            return self._vector(x)
        if x.op == "mul":
            return self._with_mean(x)
        if x.op == "pow":
            return self.arithmetic(x, self.read)
        if not self._of_this_stage(x):
            return self._scalar(x)
        return self._reduction(x) if x.op in ("sum", "max", "min", "prod") else self.arithmetic(x, self.read)

    def _with_mean(self, x: Term) -> sp.Expr:
        """c Σ_v f(v) with |c| = 1 / |v| as a mean; c (Σ_v f(v) + Σ_v g(v)) as one, of f + g."""
        number, rest = T.coefficient(x)
        sums = [f for f in factors(rest) if f.op == "sum" and self._of_this_stage(f)]
        whole = number * self.width if isinstance(self.width, int) else 0
        if abs(abs(whole) - 1) > _NEAR or rest.op != "add" and len(sums) != 1:
            return self.arithmetic(x, self.read)
        if rest.op == "add":
            return _one_mean([self._same_for_all(T.mul(T.const(number), a)) for a in rest.args])
        others = [self.read(f) for f in factors(rest) if f is not sums[0]]
        return sp.Mul(sp.Integer(round(whole)), ir.mean(self._summed(sums[0])), *others)

    def _reduction(self, x: Term) -> sp.Expr:
        if x.op != "sum":
            raise No(f"an expert's function holds a {x.op} over features{reads(x)}")
        return ir.total(self._summed(x))

    def _summed(self, x: Term) -> sp.Expr:
        """f of Σ_v f(v), at the feature. A softmax is none: it is only safe from overflow as the op that it was written as."""
        f = self.read(self._at_feature(x))
        if f.has(sp.exp, scalar.exp2):
            raise No(f"a softmax over features stands inside the expert: activations must work on each number by itself{reads(x)}")
        return f

    def _at_feature(self, s: Term) -> Term:
        v, body = s.args
        return T.canonical(T.subst(body, {v: self.out}))

    def _of_this_stage(self, x: Term) -> bool:
        """Whether it is computed from this stage's own row."""
        over = (s for s in T.walk(x) if s.op in ("sum", "max", "min", "prod") and s.args[0].args[1] == self.width)
        return any(self._of_own_row(self._at_feature(s)) for s in over if matrix_of(s.args[1], s.args[0], self.expert) is None)

    def _of_own_row(self, body: Term) -> bool:
        """Whether what is summed over features is made of this stage's products, of vectors, or of the token where the map reads it."""
        if any(T.canonical(y) in self.own for y, _ in products(body, self.expert, self.out)):
            return True
        atoms = outer_atoms(body)
        of_tokens = any(self.tokens.reads(y, self.out) for y in atoms) and (self.residual or not self.own)
        return of_tokens or all(map(self._is_parameter, atoms))

    def _scalar(self, x: Term) -> sp.Symbol:
        for symbol, term in self.scalars.items():
            if term is x:
                return symbol
        symbol = sp.Symbol(f"w{len(self.scalars)}", positive=True)
        self.scalars[symbol] = x
        return symbol


def _one_mean(parts: list[sp.Expr]) -> sp.Expr:
    """c mean(f) + d mean(g) = mean(c f + d g)   where c and d are numbers"""
    means = [(c, m.args[0]) for c, m in (e.as_coeff_Mul() for e in parts) if m.func is ir.mean]
    rest = [e for e in parts if e.as_coeff_Mul()[1].func is not ir.mean]
    sign = -1 if means and all(c < 0 for c, _ in means) else 1
    return sp.Add(sign * ir.mean(sp.Add(*(sign * c * f for c, f in means))) if means else sp.S.Zero, *rest)
