"""Numbers and sizes inside terms: plain numbers, or sympy expressions of symbolic sizes."""

from __future__ import annotations

import functools
from typing import Any

import sympy as sp

from .budget import step

_SYMBOLIC = 20  # steps that an operation on symbolic sizes counts for


def is_number(v: Any) -> bool:
    """Whether a constant takes part in arithmetic; NaN and numbers of rows that only data tell are strings."""
    return isinstance(v, (int, float, sp.Expr))


def is_plain(v: Any) -> bool:
    return isinstance(v, (int, float))


def positive(v: sp.Expr) -> bool | None:
    """Whether v > 0, None where that depends on the sizes."""
    step(_SYMBOLIC)
    return sp.expand(v).is_positive


def differ(a: Any, b: Any) -> bool:
    """Whether two numbers are never the same."""
    if is_plain(a) and is_plain(b):
        return a != b
    return is_number(a) and is_number(b) and bool(sp.expand(a - b).is_nonzero)


def exact_sum(a: Any, b: Any) -> Any:
    """a + b without rounding: 2 + 1e-20 must not become 2."""
    if isinstance(a, float) != isinstance(b, float) and 0 in (a, b) or not (isinstance(a, float) or isinstance(b, float)):
        return a + b
    if any(isinstance(x, float) and abs(x) == float("inf") for x in (a, b)):
        return float(a) + float(b)
    step(_SYMBOLIC)
    return _rational(a) + _rational(b)


@functools.lru_cache(1 << 12)
def _rational(v: Any) -> sp.Expr:
    """The simplest exact number that is this one as a float: a search of its own, half a millisecond, for the same few constants."""
    return sp.nsimplify(v, rational=True)


def same_size(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if isinstance(a, sp.Expr) or isinstance(b, sp.Expr):
        if isinstance(a, str) or isinstance(b, str):
            return False
        step(_SYMBOLIC)
        return sp.expand(a - b) == 0
    return False


def exact_div(k: Any, n: Any) -> Any:
    """k / n where that is a whole number for certain, else None."""
    if isinstance(k, int) and isinstance(n, int):
        return k // n if n and k % n == 0 else None
    if isinstance(k, (str, float)) or isinstance(n, (str, float)):
        return None
    if k == 0:
        return 0
    step(_SYMBOLIC)
    ratio = sp.cancel(sp.sympify(k) / sp.sympify(n))
    if ratio.is_integer and ratio.as_numer_denom()[1] == 1:
        return int(ratio) if ratio.is_Integer else ratio
    return None


def common_factor(k: Any, n: Any) -> Any:
    """The greatest common divisor of two sizes."""
    if isinstance(k, (str, float)) or isinstance(n, (str, float)):
        return 1
    step(_SYMBOLIC)
    g = sp.gcd(sp.sympify(k), sp.sympify(n))
    return int(g) if g.is_Integer else g
