"""Routing as algebra: terms of the router become sympy expressions in which spelling disappears.

Symbols: l the logit of the expert at hand, b its selection bias, c its scale. A reduction over all experts or over the
selected k is a symbol of its own, kept in a table with what it reduces; whatever does not depend on the expert is pulled
out of it. So softmax, top-k, renormalise becomes exp(l)/Z_E / (Z_K/Z_E) = exp(l)/Z_K, the same as top-k, softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch.fx as fx

from ...ir import scalar as act
from .. import terms as T
from ..aten.element import shape_of
from ..terms import Term
from .bridge import Bridge
from .rows import reads

L, B, C = sp.symbols("l b c", real=True)
S = sp.Symbol("s", positive=True)
PER_EXPERT = (L, B, C, S)

_SAID = {
    "ite": "a condition",
    "not": "a comparison",
    "lt": "a comparison (lt)",
    "eq": "a comparison (eq)",
    "rank": "a place in a queue",
    "a": "another tensor",
}


class Unknown(Exception):
    """An expression that is no routing algebra; the message says what was met."""


@dataclass(frozen=True)
class Reduction:
    """kind: sum, max or min; over: E (all experts) or K (the selected ones)."""

    kind: str
    over: str
    body: sp.Expr


class Reductions:
    """The table of reduction symbols."""

    def __init__(self, k: int, num_experts: int) -> None:
        self.size = {"K": k, "E": num_experts}
        self.by_symbol: dict[sp.Symbol, Reduction] = {}
        self.by_key: dict[Reduction, sp.Symbol] = {}

    def make(self, kind: str, over: str, body: sp.Expr) -> sp.Expr:
        """The reduction of `body`, factors that are equal for all experts pulled out."""
        body = sp.powsimp(sp.expand_power_base(sp.expand_power_exp(body)))
        if kind == "sum" and (split := sp.expand(body, multinomial=False)).is_Add:
            return sp.Add(*(self.make(kind, over, part) for part in split.args))
        outside, inside = body.as_independent(*PER_EXPERT, as_Add=False)
        if kind != "sum" and not outside.is_positive:
            outside, inside = sp.Integer(1), body
        if inside == 1:
            return outside * (self.size[over] if kind == "sum" else 1)
        key = Reduction(kind, over, inside)
        if key not in self.by_key:
            positive = True if inside.is_positive else None
            symbol = sp.Symbol(f"Z{len(self.by_key)}", positive=positive, real=True)
            self.by_key[key] = symbol
            self.by_symbol[symbol] = key
        return outside * self.by_key[key]

    def replace(self, expr: sp.Expr, f: Any, keep: tuple[sp.Symbol, ...] = ()) -> sp.Expr:
        """Apply `f` to an expression, and to what its reductions reduce (those in `keep` excepted)."""
        out = f(expr)
        for z in sorted((expr.free_symbols & set(self.by_symbol)) - set(keep), key=str):
            r = self.by_symbol[z]
            body = self.replace(r.body, f, keep)
            if body != r.body:
                out = out.subs(z, self.make(r.kind, r.over, body))
        return out


class Translator(Bridge):
    """Terms of one router to sympy. `logits` is the node whose elements are l; `chosen(v)` the expert in slot v."""

    def __init__(self, logits: fx.Node, t: Term, chosen: Any, k: int, num_experts: int) -> None:
        self.logits, self.t, self.chosen = logits, t, chosen
        self.reductions = Reductions(k, num_experts)
        self.tables: dict[fx.Node, sp.Symbol] = {}
        self.memo: dict[tuple[Term, Term], sp.Expr] = {}

    def __call__(self, x: Term, at: Term) -> sp.Expr:
        """`at`: the term that indexes the expert at hand."""
        key = (x, at)
        out = self.memo.get(key)
        if out is None:
            out = self.memo[key] = self._translate(x, at)
        return out

    def _translate(self, x: Term, at: Term) -> sp.Expr:
        if x.op == "a":
            return self._atom(x, at)
        if x.op in ("sum", "max", "min"):
            v, body = x.args
            over, inner = self._domain(v, body)
            return self.reductions.make(x.op, over, self(body, inner))
        return self.arithmetic(x, lambda y: self(y, at))

    def number(self, v: Any) -> sp.Expr:
        if isinstance(v, str):
            raise Unknown("NaN")
        return super().number(v)

    def function(self, name: str, x: sp.Expr, consts: tuple[Any, ...]) -> sp.Expr:
        return canonical_function(name, x, consts)

    def leaf(self, x: Term) -> sp.Expr:
        raise Unknown(f"{_SAID.get(x.op, x.op)} in the router{reads(x)}")

    def failure(self, name: str) -> Exception:
        return Unknown(f"{name} in the router")

    def _domain(self, v: Term, body: Term) -> tuple[str, Term]:
        slot = self.chosen(v)
        for y in T.walk(body):
            if y.op == "a" and y.args[1] and y.args[1][-1] is v:
                if v.args[1] != self.reductions.size["E"]:
                    raise Unknown("a reduction over a part of the experts")
                return "E", v
            if y.op == "a" and y.args[1] and y.args[1][-1] is slot:
                if v.args[1] != self.reductions.size["K"]:
                    raise Unknown("a reduction over a part of the selected experts")
                return "K", slot
        raise Unknown(f"the weights of a token depend on a reduction over something else than experts, such as other tokens{reads(body)}")

    def _atom(self, x: Term, at: Term) -> sp.Expr:
        node, idx = x.args
        if idx and idx[-1] is at:
            if node is self.logits:
                return L
            one = isinstance(node, fx.Node)  # a tuple: a tensor for each expert
            if one and all(T.is_c(i, 0) for i in idx[:-1]) and all(s == 1 for s in shape_of(node)[:-1]):
                return self.tables.setdefault(node, sp.Symbol(f"table{len(self.tables)}", real=True))
        raise Unknown(f"the router works with something else than its logits{reads(x)}")


def canonical_function(name: str, x: sp.Expr, consts: tuple[Any, ...] = ()) -> sp.Expr:
    """A function of an expression in the one spelling that the router's algebra compares by.

    exp(-softplus(-x)) = σ(x), σ(-x) = 1 - σ(x), tanh(x) = 2 σ(2x) - 1, log(1 + exp(x)) = log1p(exp(x)) = softplus(x). `stable` undoes
    what would cost digits when it is computed.
    """
    if name == "exp":
        return _exponential(sp.expand(x))
    if name == "sigmoid":
        return 1 - act.sigmoid(-x) if x.could_extract_minus_sign() else act.sigmoid(x)
    if name == "tanh":
        return sp.expand(2 * canonical_function("sigmoid", 2 * x) - 1)
    if name in ("log", "log1p"):
        for e in x.atoms(sp.exp):
            if x == (1 + e if name == "log" else e):
                return act.softplus(e.args[0])
    if name == "relu" and x.is_positive:
        return x
    if name == "maximum" and 0 not in consts:  # a sum of scores is never just its least divisor
        name = "clamp"
    return act.call(name, x, consts)


def _exponential(x: sp.Expr) -> sp.Expr:
    """exp(x), where exp(softplus(y)) = 1 + exp(y), and its inverse is σ(-y)."""
    factors = []
    for part in sp.Add.make_args(x):
        k, f = part.as_coeff_Mul()
        if isinstance(f, act.softplus) and k.is_Integer:
            once = canonical_function("sigmoid", -f.args[0]) if k < 0 else 1 + sp.exp(f.args[0])
            factors.append(once ** abs(k))
        else:
            factors.append(sp.exp(part))
    return sp.Mul(*factors)


def stable(e: sp.Expr) -> sp.Expr:
    """e for evaluation: 1 - σ(x) = σ(-x) and 2 σ(x) - 1 = tanh(x / 2), which lose no digits where σ(x) is near 1 or 1/2."""
    if not e.args:
        return e
    e = e.func(*(stable(a) for a in e.args))
    if not e.is_Add:
        return e
    c, rest = e.as_coeff_Add()
    for part in sp.Add.make_args(rest) if c != 0 else ():
        k, f = part.as_coeff_Mul()
        if isinstance(f, act.sigmoid) and c in (-k, -k / 2):
            (x,) = f.args
            return rest - part + (c * act.sigmoid(-x) if c == -k else k / 2 * sp.tanh(x / 2))
    return e


def loses_digits(e: sp.Expr, s: sp.Symbol) -> bool:
    """Whether 1 - s is in an expression of a score that is at most 1: digits that s, rounded to 1, does not have any more."""
    sums = [a.as_coeff_Add() for a in e.atoms(sp.Add)]
    return any(c != 0 and any(p.as_coeff_Mul() == (-c, s) for p in sp.Add.make_args(r)) for c, r in sums)


def show_expr(e: sp.Expr, reductions: Reductions) -> str:
    """Readable text of an expression, reductions written out (for rejections)."""
    out = e
    for z, r in reversed(list(reductions.by_symbol.items())):
        if z in out.free_symbols:
            out = out.subs(z, sp.Function(f"{r.kind}{r.over}")(r.body))
    return str(out)
