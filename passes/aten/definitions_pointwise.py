"""What an element of each pointwise op is. Each rule is its op's definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from ...ir.scalar import FUNCTIONS
from .. import terms as T
from ..terms import Term
from ..terms.blocks import joined
from .element import Args, Idx, Opaque, Puller, call_args, dtype_of, fixed_number, normal_dim, replace, rule, shape_of, size_of
from .names import op_name

# ---- pointwise ---------------------------------------------------------------------------------------------------------


@rule("add", "sub", "rsub")
def _add(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if n in p.wholes:
        variables, whole = p.wholes[n]
        return T.subst(whole, dict(zip(variables, idx, strict=True)))
    name = op_name(n)
    if name == "add" and (addends := _addends(p, n)):
        if p.coded and len(addends) > 2 and not _all_places(n, idx) and _read_at_variables(p, n):
            return _add(p, n, a, idx)
        first, *others = (T.mul(T.const(c), p.broadcast(x, idx)) for x, c in addends)
        return _total(p, n, first, others, idx) if p.coded else T.add(first, *others)
    x, y = p.broadcast(n.args[0], idx), p.broadcast(a.other, idx)
    if name == "rsub":
        x, y = y, x
    return T.add(x, T.mul(T.const(-a.alpha), y))


def _addends(p: Puller, n: fx.Node) -> list[tuple[Any, Any]]:
    """(what is added, its factor) of x + c y + d z + ..., in that order."""
    parts: list[tuple[Any, Any]] = []
    node: Any = n
    while isinstance(node, fx.Node) and op_name(node) == "add" and (node is n or shape_of(node) == shape_of(n) and not p.stop(node)):
        args = call_args(node)
        parts.append((args.other, args.alpha))
        node = node.args[0]
    return [(node, 1), *reversed(parts)]


def _total(p: Puller, n: fx.Node, first: Term, others: list[Term], idx: Idx) -> Term:
    """Addends added up; what is a product in blocks of its inputs is one product, and read once, at variables, for all who read it."""
    whole = joined([first, *others] if not T.is_c(first, 0) else others)
    if whole is None:
        rest = joined(others) if not T.is_c(first, 0) else None
        return T.add(first, *others) if rest is None else T.add(first, rest)
    if _all_places(n, idx):
        p.wholes[n] = (idx, whole)
    return whole


def _all_places(n: fx.Node, idx: Idx) -> bool:
    """Whether an index is a variable for each dim, which runs over all of it."""
    whole = (i.op == "v" and T.same_size(i.args[1], size) for i, size in zip(idx, shape_of(n), strict=True))
    return all(whole) and len(set(idx)) == len(idx)


def _read_at_variables(p: Puller, n: fx.Node) -> bool:
    """Whether an element at variables is a product in blocks: looked at once."""
    p.at(n, tuple(T.named(f"place{d}", size) for d, size in enumerate(shape_of(n))))
    return n in p.wholes


@rule("div", "divide", "true_divide", "floor_divide")
def _div(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    x, y = p.broadcast(n.args[0], idx), p.broadcast(a.other, idx)
    mode = "floor" if op_name(n) == "floor_divide" else getattr(a, "rounding_mode", None)
    if mode is None:
        return T.mul(x, T.power(y, -1))
    whole = _is_positive(y) and not dtype_of(n).is_floating_point
    if whole and (mode == "floor" or T.never_negative(x)):
        return T.fdiv(x, y.args[0])
    raise Opaque("a rounding division")


def _is_positive(t: Term) -> bool:
    """Whether a term is a number (or a size) above 0."""
    return t.op == "c" and not isinstance(t.args[0], str) and bool(sp.sympify(t.args[0]).is_positive)


@rule("remainder", "fmod")
def _remainder(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    x, y = p.broadcast(n.args[0], idx), p.broadcast(a.other, idx)
    if not _is_positive(y) or dtype_of(n).is_floating_point:
        raise Opaque("a remainder by a tensor, or of a float")
    if op_name(n) == "fmod" and not T.never_negative(x):
        raise Opaque("a remainder that may be negative")
    return T.mod(x, y.args[0])


@rule("pow", "float_power")
def _pow(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    e = p.broadcast(a.exponent, idx)
    if e.op != "c":
        raise Opaque("a power by a tensor")
    return T.power(p.broadcast(n.args[0], idx), e.args[0])


def _spelled(make: Callable[[Term], Term]) -> Any:
    def f(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
        return make(p.at(n.args[0], idx))

    return f


def _unary(name: str) -> Any:
    return _spelled(lambda x: T.fn(name, x))


for _f in FUNCTIONS:
    rule(*_f.aten, *((_f.name,) if _f.plain else ()))(_unary(_f.name))
for _name in ("ceil", "log2"):
    rule(_name)(_unary(_name))

# spelled with the functions of the table
_SPELLED: dict[tuple[str, ...], Any] = {
    ("neg", "negative"): lambda x: T.mul(T.const(-1), x),
    ("reciprocal",): lambda x: T.power(x, -1),
    ("sqrt",): lambda x: T.power(x, 0.5),
    ("rsqrt",): lambda x: T.power(x, -0.5),
    ("square",): lambda x: T.power(x, 2),
    ("silu",): lambda x: T.mul(x, T.fn("sigmoid", x)),
    ("log_sigmoid", "logsigmoid"): lambda x: T.mul(T.const(-1), T.fn("softplus", T.mul(T.const(-1), x))),
    ("mish",): lambda x: T.mul(x, T.fn("tanh", T.fn("softplus", x))),
    ("hardsigmoid",): lambda x: T.mul(T.const(sp.Rational(1, 6)), clamp_term(T.add(x, T.const(3)), 0, 6, "hardtanh")),
    ("hardswish",): lambda x: T.mul(T.const(sp.Rational(1, 6)), x, clamp_term(T.add(x, T.const(3)), 0, 6, "hardtanh")),
}
for _names, _spelling in _SPELLED.items():
    rule(*_names)(_spelled(_spelling))


def _of_two(make: Callable[[Term, Term], Term], what: str = "") -> Any:
    """The rule of an op of two operands, of one shape once they are broadcast; `what` it is, where it is one of truth values only."""

    def f(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
        if what and dtype_of(n) is not torch.bool:
            raise Opaque(f"a bitwise {what} of integers")
        return make(p.broadcast(n.args[0], idx), p.broadcast(a.other, idx))

    return f


def _less(x: Term, y: Term) -> Term:
    if T.is_c(x, 0) and T.is_truth(y):
        return y
    if T.is_c(x, 0) and y.op == "sum":
        t = T.eq(y, x)  # a count is positive when it is not 0
        if t.op == "not":
            return T.not_(t)
    if T.is_c(y, 1) and (T.is_truth(x)):
        return T.not_(x)
    return T.lt(x, y)


rule("mul", "multiply")(_of_two(T.mul))
rule("ldexp")(_of_two(lambda x, y: T.mul(x, T.fn("exp2", y))))
rule("eq")(_of_two(T.eq))
rule("ne", "not_equal")(_of_two(lambda x, y: T.not_(T.eq(x, y))))
rule("lt", "less")(_of_two(_less))
rule("gt", "greater")(_of_two(lambda x, y: _less(y, x)))
rule("ge", "greater_equal")(_of_two(lambda x, y: T.not_(_less(x, y))))
rule("le", "less_equal")(_of_two(lambda x, y: T.not_(_less(y, x))))
rule("logical_and", "bitwise_and", "__and__")(_of_two(T.mul, "and"))
rule("logical_or", "bitwise_or", "__or__")(_of_two(lambda x, y: T.not_(T.mul(T.not_(x), T.not_(y))), "or"))


@rule("round")
def _round(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if getattr(a, "decimals", 0):
        raise Opaque("rounding to decimals")
    return T.fn("round", p.at(n.args[0], idx))


@rule("gelu")
def _gelu(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    x = p.at(n.args[0], idx)
    if a.approximate == "tanh":
        return T.fn("gelu_tanh", x)
    half = T.mul(T.const(0.5), x)
    return T.mul(half, T.add(T.const(1), T.fn("erf", T.mul(T.const(math.sqrt(0.5)), x))))


@rule("leaky_relu")
def _leaky_relu(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """s x + (1 - s) relu(x), which has leaky_relu's own slope at 0: s."""
    if isinstance(a.negative_slope, fx.Node):
        raise Opaque("a slope that is computed")
    x, s = p.at(n.args[0], idx), sp.nsimplify(a.negative_slope, rational=True)
    return T.add(T.mul(T.const(s), x), T.mul(T.const(1 - s), T.fn("relu", x)))


@rule("softplus")
def _softplus(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if a.beta != 1 or a.threshold != 20:  # above it torch has x itself, less than 1e-8 off
        raise Opaque("softplus with beta or a threshold of its own")
    return T.fn("softplus", p.at(n.args[0], idx))


@rule("glu")
def _glu(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    d = normal_dim(a.dim, len(idx))
    half = shape_of(n)[d]
    return T.mul(p.at(n.args[0], idx), T.fn("sigmoid", p.at(n.args[0], replace(idx, d, T.add(idx[d], T.const(half))))))


@rule("clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "relu6")
def _clamp(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    lo = getattr(a, "min", getattr(a, "min_val", None))
    hi = getattr(a, "max", getattr(a, "max_val", None))
    lo, hi = (size_of(v) if isinstance(v, fx.Node) and fixed_number(v) else v for v in (lo, hi))
    if isinstance(lo, fx.Node) or isinstance(hi, fx.Node):
        raise Opaque("clamp by a tensor")
    lo, hi = (0, 6) if op_name(n) == "relu6" else (lo, hi)
    return clamp_term(p.at(n.args[0], idx), lo, hi, "hardtanh" if op_name(n) in ("hardtanh", "relu6") else "clamp")


def clamp_term(x: Term, lo: Any, hi: Any, name: str = "clamp") -> Term:
    """clamp(x; lo, hi) = x  where lo <= 0 <= x <= hi is certain, as it is of an index that already lies inside.

    As functions all spellings are one; at a limit clamp's slope is 1 (0 from torch 2.14 on), maximum's is 1/2, hardtanh's and relu's 0.
    """
    lo, hi = -math.inf if lo is None else lo, math.inf if hi is None else hi
    top = T.upper(x)
    if lo == -math.inf and hi == math.inf or top is not None and lo <= 0 and top <= hi:
        return x
    if torch.is_grad_enabled():
        return T.fn(name, x, consts=(float(lo), float(hi)))
    return T.fn("relu", x) if (lo, hi) == (0, math.inf) else T.fn("clamp", x, consts=(float(lo), float(hi)))


@rule("maximum", "minimum")
def clamp_between(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    x, y = p.broadcast(n.args[0], idx), p.broadcast(a.other, idx)
    if x.op == "c":
        x, y = y, x
    if y.op != "c":
        raise Opaque("maximum of two tensors")
    lo, hi = (None, y.args[0]) if op_name(n) in ("minimum", "min") else (y.args[0], None)
    return clamp_term(x, lo, hi, "maximum")


@rule("logical_not", "bitwise_not", "__invert__")
def _not(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if dtype_of(n) is not torch.bool:
        raise Opaque("a bitwise not of integers")
    return T.not_(p.at(n.args[0], idx))


@rule("masked_fill")
def _masked_fill(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    v = p.broadcast(a.value, idx) if isinstance(a.value, fx.Node) else T.const(a.value)
    return T.ite(p.broadcast(a.mask, idx), v, p.broadcast(n.args[0], idx))
