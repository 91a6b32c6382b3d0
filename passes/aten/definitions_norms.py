"""What an element of each norm over the last dim is, and of variances. Each rule is its op's definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from .. import terms as T
from ..terms import Term
from .definitions_products import reduced
from .definitions_views import TUPLES
from .element import Args, Idx, Opaque, Puller, call_args, dtype_of, rule, shape_of


def _mean(size: Any, f: Callable[[Term], Term], less: Any = 0) -> Term:
    """Σ_v f(v) / (size - less)."""
    if not isinstance(size, int) or size <= less:
        raise Opaque("a norm over a dynamic dim")
    v = T.var(size, "s")
    return T.mul(T.const(1 / (size - less)), T.reduce_("sum", v, f(v)))


def _centred(p: Puller, x: fx.Node, lead: Idx, size: Any) -> Callable[[Term], Term]:
    mean = _mean(size, lambda v: p.at(x, (*lead, v)))
    return lambda i: T.add(p.at(x, (*lead, i)), T.mul(T.const(-1), mean))


def _last(a: Args) -> tuple[fx.Node, Any]:
    """A norm's input, and the size of its last dim, which must be all that it is over."""
    if len(a.normalized_shape) != 1:
        raise Opaque("a norm over several dims")
    return a.input, shape_of(a.input)[-1]


@rule("layer_norm")
def _layer_norm(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """(x - mean) / sqrt(var + eps) · weight + bias"""
    (x, size), at = _last(a), idx[-1:]
    centred = _centred(p, x, idx[:-1], size)
    var = _mean(size, lambda v: T.power(centred(v), 2))
    out = T.mul(centred(idx[-1]), T.power(T.add(var, T.const(a.eps)), -0.5), *([] if a.weight is None else [p.at(a.weight, at)]))
    return out if a.bias is None else T.add(out, p.at(a.bias, at))


@rule("rms_norm")
def _rms_norm(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """x / sqrt(mean(x²) + eps) · weight"""
    x, size = _last(a)
    eps = a.eps
    if eps is None:
        if dtype_of(x).itemsize < 4:
            raise Opaque("the guard of a norm in half precision is torch's own")
        eps = torch.finfo(dtype_of(x)).eps
    square = _mean(size, lambda v: T.power(p.at(x, (*idx[:-1], v)), 2))
    return T.mul(p.at(x, idx), T.power(T.add(square, T.const(eps)), -0.5), *([] if a.weight is None else [p.at(a.weight, idx[-1:])]))


def _first_of(f: Any) -> Any:
    """The rule of an op whose first result is the norm."""

    def first(p: Puller, src: fx.Node, i: int, n: fx.Node, idx: Idx) -> Term:
        if i != 0:
            raise Opaque("the statistics of a norm")
        return f(p, src, call_args(src), idx)  # type: ignore[no-any-return]

    return first


TUPLES["native_layer_norm"] = _first_of(_layer_norm)
TUPLES["_fused_rms_norm"] = _first_of(_rms_norm)


@rule("var")
def _var(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """Σ (x - mean)² / (n - correction) over one dim"""
    x: Any = n.args[0]
    full, variables = reduced(n, getattr(a, "dim", None), getattr(a, "keepdim", False), idx, "s")
    if len(variables) != 1:
        raise Opaque("a variance over several dims")
    (v,) = variables
    correction = getattr(a, "correction", None)
    less = int(getattr(a, "unbiased", True)) if correction is None else correction
    mean = _mean(v.args[1], lambda u: p.at(x, tuple(u if i is v else i for i in full)))

    def square(u: Term) -> Term:
        return T.power(T.add(p.at(x, tuple(u if i is v else i for i in full)), T.mul(T.const(-1), mean)), 2)

    return _mean(v.args[1], square, less)


rule("std")(lambda p, n, a, idx: T.power(_var(p, n, a, idx), 0.5))
