"""What an element of each pointwise op, reduction and matrix product is. Each rule is its op's definition."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from ...ir.scalar import FUNCTIONS
from .. import terms as T
from ..terms import Term
from .element import Opaque, Puller, call_args, dtype_of, fixed_number, normal_dim, replace, rule, shape_of, size_of, truth
from .names import op_name

Idx = tuple[Term, ...]
Args = SimpleNamespace

# ---- pointwise ---------------------------------------------------------------------------------------------------------


@rule("add", "sub", "rsub")
def _add(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    parts: list[Term] = []
    name = op_name(n)
    node: Any = n
    while (
        isinstance(node, fx.Node)
        and op_name(node) == name == "add"
        and (node is n or shape_of(node) == shape_of(n))
        and not (node is not n and p.stop(node))
    ):
        args = call_args(node)
        parts.append(T.mul(T.const(args.alpha), p.broadcast(args.other, idx)))
        node = node.args[0]
    if node is not n and name == "add":
        return T.add(p.broadcast(node, idx), *parts)
    x, y = p.broadcast(n.args[0], idx), p.broadcast(a.other, idx)
    if name == "rsub":
        x, y = y, x
    return T.add(x, T.mul(T.const(-a.alpha), y))


@rule("mul", "multiply")
def _mul(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return T.mul(p.broadcast(n.args[0], idx), p.broadcast(a.other, idx))


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


def _unary(name: str) -> Any:
    def f(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
        return T.fn(name, p.at(n.args[0], idx))

    return f


for _f in FUNCTIONS:
    rule(*_f.aten, *((_f.name,) if _f.plain else ()))(_unary(_f.name))

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
}
for _names, _spelling in _SPELLED.items():
    rule(*_names)(lambda p, n, a, idx, f=_spelling: f(p.at(n.args[0], idx)))


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

    As functions all spellings are one; at a limit clamp's slope is 1, maximum's is 1/2, hardtanh's and relu's 0.
    """
    lo, hi = -math.inf if lo is None else lo, math.inf if hi is None else hi
    top = T.upper(x)
    if lo == -math.inf and hi == math.inf or top is not None and lo <= 0 and top <= hi:
        return x
    if torch.is_grad_enabled():
        return T.fn(name, x, consts=(float(lo), float(hi)))
    return T.fn("relu", x) if (lo, hi) == (0, math.inf) else T.fn("clamp", x, consts=(float(lo), float(hi)))


@rule("maximum", "minimum")
def _maximum(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    x, y = p.broadcast(n.args[0], idx), p.broadcast(a.other, idx)
    if x.op == "c":
        x, y = y, x
    if y.op != "c":
        raise Opaque("maximum of two tensors")
    lo, hi = (None, y.args[0]) if op_name(n) in ("minimum", "min") else (y.args[0], None)
    return clamp_term(x, lo, hi, "maximum")


@rule("eq", "ne", "not_equal")
def _eq(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    t = T.eq(p.broadcast(n.args[0], idx), p.broadcast(a.other, idx))
    return t if op_name(n) == "eq" else T.not_(t)


@rule("lt", "gt", "le", "ge", "less", "greater", "greater_equal", "less_equal")
def _compare(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    x, y = p.broadcast(n.args[0], idx), p.broadcast(a.other, idx)
    name = {"less": "lt", "greater": "gt", "greater_equal": "ge", "less_equal": "le"}.get(op_name(n), op_name(n))
    if name in ("gt", "le"):
        t = _less(y, x)
        return t if name == "gt" else T.not_(t)
    t = _less(x, y)
    return t if name == "lt" else T.not_(t)


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


@rule("logical_not", "bitwise_not", "__invert__")
def _not(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if dtype_of(n) is not torch.bool:
        raise Opaque("a bitwise not of integers")
    return T.not_(p.at(n.args[0], idx))


@rule("logical_and", "bitwise_and", "__and__")
def _and(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if dtype_of(n) is not torch.bool:
        raise Opaque("a bitwise and of integers")
    return T.mul(p.broadcast(n.args[0], idx), p.broadcast(a.other, idx))


@rule("logical_or", "bitwise_or", "__or__")
def _or(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if dtype_of(n) is not torch.bool:
        raise Opaque("a bitwise or of integers")
    return T.not_(T.mul(T.not_(p.broadcast(n.args[0], idx)), T.not_(p.broadcast(a.other, idx))))


@rule("masked_fill")
def _masked_fill(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    v = p.broadcast(a.value, idx) if isinstance(a.value, fx.Node) else T.const(a.value)
    return T.ite(p.broadcast(a.mask, idx), v, p.broadcast(n.args[0], idx))


# ---- reductions --------------------------------------------------------------------------------------------------------


def reduced(n: fx.Node, dims: Any, keepdim: bool, idx: Idx, name: str) -> tuple[Idx, list[Term]]:
    """(index into the source, reduction variables) of a reduction over `dims` of args[0]."""
    src: Any = n.args[0]
    shape = shape_of(src)
    rank = len(shape)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        dims = range(rank)
    which = {normal_dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    variables, full = [], []
    rest = iter(idx)
    for d, s in enumerate(shape):
        if d in which:
            if keepdim:
                next(rest)
            variables.append(T.var(s, name))
            full.append(variables[-1])
        else:
            full.append(next(rest))
    return tuple(full), variables


def _reduce(p: Puller, n: fx.Node, a: Args, idx: Idx, op: str, f: Any = lambda t: t) -> Term:
    full, variables = reduced(n, getattr(a, "dim", None), getattr(a, "keepdim", False), idx, op[0])
    t = f(p.at(n.args[0], full))
    for v in reversed(variables):
        t = T.reduce_(op, v, t)
    return t


@rule("sum")
def _sum(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return _reduce(p, n, a, idx, "sum")


@rule("mean")
def _mean(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    _, variables = reduced(n, a.dim, getattr(a, "keepdim", False), idx, "s")
    t = _reduce(p, n, a, idx, "sum")
    for v in variables:
        t = T.mul(t, T.power(T.const(v.args[1]), -1)) if isinstance(v.args[1], int) else _opaque("mean over a dynamic dim")
    return t


def _opaque(reason: str) -> Any:
    raise Opaque(reason)


@rule("amax")
def _amax(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return _reduce(p, n, a, idx, "max")


@rule("amin")
def _amin(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return _reduce(p, n, a, idx, "min")


@rule("max", "min")
def _max(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if hasattr(a, "other"):
        return _maximum(p, n, a, idx)
    return _reduce(p, n, a, idx, op_name(n))


@rule("any")
def _any(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return _reduce(p, n, a, idx, "any", truth)


@rule("logsumexp")
def _logsumexp(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return T.fn("log", _reduce(p, n, a, idx, "sum", lambda t: T.fn("exp", t)))


@rule("softmax", "_softmax")
def _softmax(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    top, bottom = _exps(p, n, a, idx)
    return T.mul(top, T.power(bottom, -1))


@rule("log_softmax", "_log_softmax")
def _log_softmax(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    _, bottom = _exps(p, n, a, idx)
    return T.add(p.at(n.args[0], idx), T.mul(T.const(-1), T.fn("log", bottom)))


def _exps(p: Puller, n: fx.Node, a: Args, idx: Idx) -> tuple[Term, Term]:
    src: Any = n.args[0]
    d = normal_dim(a.dim, len(idx))
    v = T.var(shape_of(src)[d], "e")
    top = T.fn("exp", p.at(src, idx))
    p.dtypes.setdefault(top, dtype_of(n))
    return top, T.reduce_("sum", v, T.fn("exp", p.at(src, replace(idx, d, v))))


@rule("linalg_vector_norm", "norm")
def _norm(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    order = getattr(a, "ord", getattr(a, "p", 2))
    order = 2 if order is None else order
    if order == math.inf:
        return _reduce(p, n, a, idx, "max", lambda t: T.fn("abs", t))
    if not isinstance(order, (int, float)) or order <= 0:
        raise Opaque("an unusual norm")
    body = (lambda t: T.power(t, 2)) if order == 2 else (lambda t: T.power(T.fn("abs", t), order))
    return T.power(_reduce(p, n, a, idx, "sum", body), 1 / order)


# ---- matmuls -----------------------------------------------------------------------------------------------------------


@rule("linear")
def _linear(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    m = T.var(shape_of(a.weight)[1], "m")
    t = T.reduce_("sum", m, T.mul(p.at(a.input, (*idx[:-1], m)), p.at(a.weight, (idx[-1], m))))
    return t if a.bias is None else T.add(t, p.at(a.bias, (idx[-1],)))


@rule("matmul", "mm", "bmm", "mv", "dot")
def _matmul(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return _mm(p, n.args[0], n.args[1], idx)


def _mm(p: Puller, x: Any, y: Any, idx: Idx) -> Term:
    sx, sy = shape_of(x), shape_of(y)
    m = T.var(sx[-1], "m")
    cols = (idx[-1],) if len(sy) > 1 else ()
    lead = idx[: len(idx) - len(cols)]
    rows = (lead[-1],) if len(sx) > 1 else ()
    batch = lead[: len(lead) - len(rows)]

    def sub(shape: tuple[Any, ...]) -> Idx:
        own = batch[len(batch) - (len(shape) - 2) :] if len(shape) > 2 else ()
        return tuple(T.const(0) if s == 1 else b for s, b in zip(shape, own, strict=False))

    return T.reduce_("sum", m, T.mul(p.at(x, (*sub(sx), *rows, m)), p.at(y, (*sub(sy), m, *cols))))


@rule("addmm", "baddbmm", "addbmm")
def _addmm(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    x, y = (a.mat1, a.mat2) if hasattr(a, "mat1") else (a.batch1, a.batch2)
    if op_name(n) == "addbmm":
        raise Opaque("addbmm")
    return T.add(T.mul(T.const(a.beta), p.broadcast(n.args[0], idx)), T.mul(T.const(a.alpha), _mm(p, x, y, idx)))


@rule("einsum")
def _einsum(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    eqn = a.equation.replace(" ", "")
    if "." in eqn:
        raise Opaque("an einsum with an ellipsis")
    lhs, _, rhs = eqn.partition("->")
    inputs = lhs.split(",")
    if "->" not in eqn:
        rhs = "".join(sorted(c for c in set(lhs) - {","} if lhs.count(c) == 1))
    where = dict(zip(rhs, idx, strict=True))
    variables = []
    for labels, x in zip(inputs, a.tensors, strict=True):
        for c, s in zip(labels, shape_of(x), strict=True):
            if c not in where:
                where[c] = T.var(s, c)
                variables.append(where[c])
    t = T.mul(*(p.at(x, tuple(where[c] for c in labels)) for labels, x in zip(inputs, a.tensors, strict=True)))
    for v in reversed(variables):
        t = T.reduce_("sum", v, t)
    return t
