"""The value of a term: what every law is tested against.

Whole numbers and fractions are exact, other numbers are floats. Some terms have no value (`None`): a tensor read beyond its range, a
division by zero, the logarithm of a negative number, a comparison of floats that nearly tie. Such a value may stand where it does not
count: in a product with 0, in the case of an `ite` that is not taken, in an `any` with a true element. A law says that its right side has
the value of its left side wherever that has one. A left side has none either where it asks something of a term without value, unless that
stands beside a condition that is 0 (`strict`): no program does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import sympy as sp
import torch

from moe_compile.passes.terms.arithmetic import TRUTHS
from moe_compile.passes.terms.facts import Facts
from moe_compile.passes.terms.orders import Q
from moe_compile.passes.terms.term import Term, const

Value = Any  # a number, or None
_NEAR = 1e-7


@dataclass
class World:
    """`read(node, index)`: a tensor's element, None beyond its range. `choose(node, index)`: what a top-k chose.

    `sizes`: symbols of sizes, and names of numbers of rows that data tell, with their values. `facts`: axioms that hold here.
    """

    read: Callable[[Any, tuple[int, ...]], Value]
    choose: Callable[[Any, tuple[int, ...]], Value] = lambda node, idx: None
    sizes: Mapping[Any, int] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    strict: bool = False
    places: dict[Any, list[tuple[int, ...]]] = field(default_factory=dict)  # the true elements of masks met so far
    _sizes: dict[Any, Value] = field(default_factory=dict)

    def size(self, s: Any) -> Value:
        if isinstance(s, sp.Expr):
            if s not in self._sizes:
                n = sp.sympify(s).subs({k: v for k, v in self.sizes.items() if isinstance(k, sp.Symbol)})
                self._sizes[s] = int(n) if n.is_Integer else Fraction(int(n.p), int(n.q)) if n.is_Rational else float(n)
            return self._sizes[s]
        return self.sizes.get(s) if isinstance(s, str) else s


Bound = dict[Term, Value]


class _Undecided(Exception):
    """A comparison that has no value."""


def evaluate(t: Term, world: World, given: Mapping[Term, Value] | None = None, strict: bool = False) -> Value:
    """The value of t where the free variables (or other terms) in `given` have those values; None where it has none."""
    world.strict = strict
    try:
        return _value(t, world, dict(given or {}))
    except _Undecided:
        return None


def _value(t: Term, world: World, bound: Bound) -> Value:
    return bound[t] if t in bound else VALUES[t.op](world, bound, *t.args)


def same_value(a: Value, b: Value) -> bool:
    """Whether two values are one, but for the rounding of floats."""
    if a is None or b is None or isinstance(a, (int, Fraction)) and isinstance(b, (int, Fraction)):
        return a == b
    return a == b or math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)


# ---- ops whose value follows from those of their subterms --------------------------------------------------------------

Rule = Callable[..., Value]  # (world, bound, *args of the term)


def _of_values(f: Callable[..., Value]) -> Rule:
    """f(values of the subterms, *data); no value where a subterm has none, or f."""

    def value(world: World, bound: Bound, *args: Any) -> Value:
        xs = []
        for a in args:
            x = _value(a, world, bound) if isinstance(a, Term) else a
            if x is None:
                return None
            xs.append(x)
        try:
            out = f(*xs)
        except (OverflowError, ValueError, ZeroDivisionError):
            return None
        return None if out != out else out

    return value


def _number(world: World, bound: Bound, c: Any) -> Value:
    return None if c == "nan" else world.size(c)


def _indexed(read: Callable[[World, Any, tuple[int, ...]], Value]) -> Rule:
    def value(world: World, bound: Bound, node: Any, idx: tuple[Term, ...]) -> Value:
        at = tuple(_value(i, world, bound) for i in idx)
        return None if None in at else read(world, node, at)

    return value


def _read(world: World, node: Any, at: tuple[int, ...]) -> Value:
    shape = world.facts.zero_beyond.get(node)
    beyond = shape is not None and any(not 0 <= i < world.size(s) for i, s in zip(at, shape))
    return 0 if beyond else world.read(node, at)


def _pow(x: Value, e: Any) -> Value:
    if x == 0 and e < 0 or x < 0 and e != int(e):
        return None
    return Fraction(x) ** int(e) if isinstance(x, (int, Fraction)) and e == int(e) else float(x) ** e


def _fn(world: World, bound: Bound, name: str, args: tuple[Term, ...], consts: tuple[Any, ...]) -> Value:
    return FUNCTIONS[name](world, bound, *args, *consts)


def _to_small(name: str) -> Callable[[Value], Value]:
    """A number as the nearest of a float type of one byte."""
    dtype = getattr(torch, name)
    return lambda x: float(torch.tensor(float(x), dtype=torch.float32).to(dtype).float())


def _sigmoid(x: Value) -> Value:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


FUNCTIONS: dict[str, Rule] = {
    name: _of_values(f)  # type: ignore[arg-type]
    for name, f in {
        "sigmoid": _sigmoid,
        "exp": math.exp,
        "log": lambda x: math.log(x) if x else -math.inf,
        "tanh": math.tanh,
        "erf": math.erf,
        "relu": lambda x: max(x, 0),
        "abs": abs,
        "softplus": lambda x: math.log1p(math.exp(x)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "round": round,
        "ceil": math.ceil,
        "log2": math.log2,
        **{name: _to_small(name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")},
        **dict.fromkeys(("clamp", "hardtanh", "maximum"), lambda x, lo, hi: min(max(x, lo), hi)),
        "log1p": lambda x: math.log1p(x) if x != -1 else -math.inf,
        "expm1": math.expm1,
    }.items()
}


# ---- truth -------------------------------------------------------------------------------------------------------------


def _compared(f: Callable[[Value, Value], bool]) -> Rule:
    """A comparison; of floats that nearly tie it has no value."""

    def value(world: World, bound: Bound, a: Term, b: Term) -> Value:
        x, y = _value(a, world, bound), _value(b, world, bound)
        if x is not None and y is not None:
            exact = x == y or not (isinstance(x, float) or isinstance(y, float))
            if exact or not math.isclose(x, y, rel_tol=_NEAR, abs_tol=_NEAR):
                return int(f(x, y))
        if world.strict:
            raise _Undecided
        return None

    return value


def _ite(world: World, bound: Bound, c: Term, a: Term, b: Term) -> Value:
    x = _value(c, world, bound)
    return None if x is None else _value(a if x else b, world, bound)


def _mul(world: World, bound: Bound, *ts: Term) -> Value:
    conditions = [_value(t, world, bound) for t in ts if t.op in TRUTHS] if world.strict else []
    return 0 if 0 in conditions else _product([_value(t, world, bound) for t in ts])


def _product(xs: Iterable[Value]) -> Value:
    out: Value = 1
    for x in xs:
        if x == 0:
            return 0
        out = None if x is None or out is None else out * x
    return out


# ---- reductions and substitution ---------------------------------------------------------------------------------------


def _reduction(f: Callable[[list[Value]], Value], partial: bool = False) -> Rule:
    """f(values of the body); `partial`: f knows what to do with elements that have none."""

    def value(world: World, bound: Bound, v: Term, body: Term) -> Value:
        n = world.size(v.args[1])
        xs = [] if n is None else [_value(body, world, {**bound, v: i}) for i in range(n)]
        return None if n is None or None in xs and not partial else f(xs)

    return value


def _any(xs: list[Value]) -> Value:
    return 1 if any(xs) else None if None in xs else 0


def _let(world: World, bound: Bound, body: Term, keys: tuple[Term, ...], values: tuple[Term, ...]) -> Value:
    return _value(body, world, {**bound, **{k: _value(v, world, bound) for k, v in zip(keys, values)}})


# ---- sorted orders and masks -------------------------------------------------------------------------------------------


def _keys(world: World, key: Term) -> list[Value]:
    """The sort key at every position; nothing where one of them has no value."""
    q = next((v for v in key.atoms if v.args[0] == Q), None)
    keys = [] if q is None else [_value(key, world, {q: i}) for i in range(world.size(q.args[1]))]
    return [] if None in keys else keys


def _element(xs: list[Any], i: Value) -> Any:
    return xs[int(i)] if i is not None and i == int(i) and 0 <= i < len(xs) else None


def _order(world: World, key: Term) -> list[int]:
    keys = _keys(world, key)
    return sorted(range(len(keys)), key=keys.__getitem__)


def _perm(world: World, bound: Bound, sort: Any, key: Term, p: Term) -> Value:
    return _element(_order(world, key), _value(p, world, bound))


def _inv(world: World, bound: Bound, sort: Any, key: Term, q: Term) -> Value:
    order, at = _order(world, key), _value(q, world, bound)
    return order.index(at) if at in order else None


def _sv(world: World, bound: Bound, key: Term, p: Term) -> Value:
    return _element(sorted(_keys(world, key)), _value(p, world, bound))


def _rank(world: World, bound: Bound, key: Term, q: Term, e: Term) -> Value:
    keys, at, wanted = _keys(world, key), _value(q, world, bound), _value(e, world, bound)
    return None if _element(keys, at) is None or wanted is None else keys[: at + 1].count(wanted)


def places_of(mask: Any, world: World) -> list[tuple[int, ...]]:
    """Where a mask is true, in row-major order."""
    if mask not in world.places:
        spots = itertools.product(*(range(world.size(s)) for s in mask.shape))
        world.places[mask] = [at for at in spots if _value(mask.at(tuple(map(const, at))), world, {})]
    return world.places[mask]


def _nz(world: World, bound: Bound, mask: Any, row: Term, d: int) -> Value:
    at = _element(places_of(mask, world), _value(row, world, bound))
    return None if at is None else at[d]


VALUES: dict[str, Rule] = {
    "c": _number,
    "v": lambda world, bound, name, size: None,  # a variable that nothing is known of
    "a": _indexed(_read),
    "topk": _indexed(lambda world, node, at: world.choose(node, at)),
    "add": _of_values(lambda *xs: sum(xs)),
    "mul": _mul,
    "pow": _of_values(_pow),
    "fn": _fn,
    "eq": _compared(lambda x, y: x == y),
    "lt": _compared(lambda x, y: x < y),
    "not": _of_values(lambda x: int(not x)),
    "ite": _ite,
    "sum": _reduction(lambda xs: None if math.isnan(total := sum(xs)) else total),
    "max": _reduction(lambda xs: max(xs, default=None)),
    "min": _reduction(lambda xs: min(xs, default=None)),
    "prod": _reduction(_product, partial=True),
    "any": _reduction(_any, partial=True),
    "fdiv": _of_values(lambda x, n: x // n if n > 0 else None),
    "mod": _of_values(lambda x, n: x % n if n > 0 else None),
    "perm": _perm,
    "inv": _inv,
    "sv": _sv,
    "rank": _rank,
    "nz": _nz,
    "let": _let,
}
