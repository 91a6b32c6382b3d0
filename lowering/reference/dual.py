"""Activation programs with their derivatives carried along, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...ir import scalar as act

Dual = tuple[Tensor, Tensor | None, Tensor | None]  # value, d/dg, d/du; None is a derivative of zero
_Carried = tuple[Tensor, Tensor | float | None, Tensor | float | None]  # as `Dual`; a number is one derivative for all elements


def run_dual(ops: Sequence[int], consts: Sequence[float], g: Tensor, u: Tensor | None) -> Dual:
    """A postfix activation program with its two derivatives carried along: (value, d/dg, d/du)."""
    stack: list[_Carried] = []
    const = iter(consts)
    for op in ops:
        if op == act.OP_G:
            stack.append((g, 1.0, None))
        elif op == act.OP_U:
            assert u is not None
            stack.append((u, None, 1.0))
        elif op == act.OP_CONST:
            stack.append((torch.full_like(g, next(const)), None, None))
        elif op == act.OP_ADD:
            (b, bg, bu), (a, ag, au) = stack.pop(), stack.pop()
            stack.append((a + b, _sum(ag, bg), _sum(au, bu)))
        elif op == act.OP_MUL:
            (b, bg, bu), (a, ag, au) = stack.pop(), stack.pop()
            stack.append((a * b, _sum(_times(ag, b), _times(bg, a)), _sum(_times(au, b), _times(bu, a))))
        elif op == act.OP_DIV:
            (b, bg, bu), (a, ag, au) = stack.pop(), stack.pop()
            v = a / b
            stack.append((v, *(_over(_sum(x, _times(y, -v)), b) for x, y in ((ag, bg), (au, bu)))))
        elif op == act.OP_POW:
            p = next(const)
            v, vg, vu = stack.pop()
            slope = p * v ** (p - 1)
            stack.append((v**p, _times(vg, slope), _times(vu, slope)))
        elif op == act.OP_CLAMP:
            lo, hi = next(const), next(const)
            v, vg, vu = stack.pop()
            inside = (v >= lo) & (v <= hi) if act.LIMITS_PASS else (v > lo) & (v < hi)
            slope = inside.to(v.dtype)
            stack.append((v.clamp(lo, hi), _times(vg, slope), _times(vu, slope)))
        else:
            v, vg, vu = stack.pop()
            value = act.FUNCTIONS[op - act.OP_UNARY].torch(v)
            slope = SLOPES[op - act.OP_UNARY](v, value)
            stack.append((value, _times(vg, slope), _times(vu, slope)))
    value, by_g, by_u = stack[-1]
    return value, _whole(by_g, value), _whole(by_u, value)


def _whole(d: Tensor | float | None, like: Tensor) -> Tensor | None:
    return torch.full_like(like, d) if isinstance(d, float) else d


def _sum(a: Tensor | float | None, b: Tensor | float | None) -> Tensor | float | None:
    return b if a is None else a if b is None else a + b


def _over(a: Tensor | float | None, b: Tensor) -> Tensor | float | None:
    return None if a is None else a / b


def _times(a: Tensor | float | None, b: Tensor) -> Tensor | float | None:
    return None if a is None else b if isinstance(a, float) and a == 1.0 else a * b


def _gelu_tanh_slope(v: Tensor, _: Tensor) -> Tensor:
    c, q = 0.7978845608028654, 0.044715
    t = torch.tanh(c * (v + q * v**3))
    return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * c * (1 + 3 * q * v * v)


# in the order of scalar.FUNCTIONS: the slope from (argument, value)
SLOPES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda _, s: s * (1 - s),  # sigmoid
    lambda _, s: 1 - s * s,  # tanh
    lambda _, s: s,  # exp
    lambda v, _: 1 / v,  # log
    lambda v, _: 1.1283791670955126 * torch.exp(-v * v),  # erf
    lambda v, _: (v > 0).to(v.dtype),  # relu
    lambda v, _: torch.sigmoid(v),  # softplus
    _gelu_tanh_slope,
    lambda v, _: torch.sign(v),  # abs
    lambda v, _: 1 / (1 + v),  # log1p
    lambda _, s: s + 1,  # expm1
    lambda _, s: 0.6931471805599453 * s,  # exp2
]
