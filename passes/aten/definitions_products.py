"""What an element of each reduction and matrix product is. Each rule is its op's definition."""

from __future__ import annotations

import math
from typing import Any

import torch.fx as fx

from .. import terms as T
from ..terms import Term
from .definitions_pointwise import clamp_between
from .element import Args, Idx, Opaque, Puller, dtype_of, normal_dim, replace, rule, shape_of, truth
from .names import op_name

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


rule("sum")(lambda p, n, a, idx: _reduce(p, n, a, idx, "sum"))
rule("amax")(lambda p, n, a, idx: _reduce(p, n, a, idx, "max"))
rule("amin")(lambda p, n, a, idx: _reduce(p, n, a, idx, "min"))
rule("any")(lambda p, n, a, idx: _reduce(p, n, a, idx, "any", truth))
rule("logsumexp")(lambda p, n, a, idx: T.fn("log", _reduce(p, n, a, idx, "sum", lambda t: T.fn("exp", t))))


@rule("mean")
def _mean(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    _, variables = reduced(n, a.dim, getattr(a, "keepdim", False), idx, "s")
    t = _reduce(p, n, a, idx, "sum")
    for v in variables:
        if not isinstance(v.args[1], int):
            raise Opaque("mean over a dynamic dim")
        t = T.mul(t, T.power(T.const(v.args[1]), -1))
    return t


@rule("max", "min")
def _max(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if hasattr(a, "other"):
        return clamp_between(p, n, a, idx)
    return _reduce(p, n, a, idx, op_name(n))


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


rule("matmul", "mm", "bmm", "mv", "dot")(lambda p, n, a, idx: _mm(p, n.args[0], n.args[1], idx))


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
