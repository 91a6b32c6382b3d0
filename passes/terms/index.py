"""Flattened indices: what is certainly below a bound, integer division and remainder."""

from __future__ import annotations

from typing import Any

import sympy as sp

from .arithmetic import add, coefficient, same_size, scaled
from .term import Term, const, is_c, mk


def below(t: Term, n: Any) -> bool:
    """Whether 0 <= t < n is certain."""
    if t.op == "c":
        return isinstance(t.args[0], int) and isinstance(n, int) and 0 <= t.args[0] < n
    if isinstance(n, int):
        top = upper(t)
        return top is not None and top < n
    if t.op == "v":
        return same_size(t.args[1], n)
    if t.op == "nz":
        return same_size(t.args[0].shape[t.args[2]], n)
    # symbolic bound: leading part r*m with m | n, rest below m
    for part in t.args if t.op == "add" else (t,):
        k, body = coefficient(part)
        if body.op in ("v", "perm", "inv", "nz") and part is t and same_size(k, 1):
            return same_size(extent(body), n)
        if body.op in ("v", "nz") and same_size(sp.sympify(extent(body)) * k, n):
            return below(add(t, scaled(-1, part)), k) if t.op == "add" else True
    return False


def extent(t: Term) -> Any:
    """Exclusive upper bound of an index term, or None."""
    if t.op == "v":
        return t.args[1]
    if t.op == "nz":
        return t.args[0].shape[t.args[2]]
    if t.op in ("perm", "inv"):
        return t.args[0].meta.get("extent")
    if t.op == "topk" or t.op == "a" and not isinstance(t.args[0], tuple):
        return t.args[0].meta.get("moe_extent")
    return None


def upper(t: Term) -> int | None:
    """Largest value of a non-negative integer index term, when it is a plain number."""
    if t.op == "c":
        return t.args[0] if isinstance(t.args[0], int) and t.args[0] >= 0 else None
    if t.op in ("v", "nz", "topk", "perm", "inv", "a"):
        n = extent(t)
        return int(n) - 1 if isinstance(n, (int, sp.Integer)) else None
    if t.op == "sv":
        return upper(t.args[0])
    if t.op == "mod" and is_c(t.args[1]) and isinstance(t.args[1].args[0], int):
        return t.args[1].args[0] - 1
    if t.op == "fdiv" and isinstance(t.args[1].args[0], int):
        u = upper(t.args[0])
        return None if u is None else u // t.args[1].args[0]
    if t.op in ("add", "mul"):
        out = 0 if t.op == "add" else 1
        for a in t.args:
            u = upper(a)
            if u is None:
                return None
            out = out + u if t.op == "add" else out * u
        return out
    return _upper_of_either(*t.args) if t.op == "ite" else None


def _upper_of_either(condition: Term, a: Term, b: Term) -> int | None:
    """Largest value of `a if condition else b`; x is below its largest value where it is said not to equal it."""
    first, second = upper(a), upper(b)
    if first is None or second is None:
        return None
    if condition.op == "eq" and any(x is b and is_c(c, second) for x, c in (condition.args, condition.args[::-1])):
        second -= 1
    return max(first, second)


def split_by(t: Term, n: Any) -> tuple[Term, Term]:
    """t = n * q + r, taking into q every addend whose coefficient n divides."""
    q: list[Term] = []
    r: list[Term] = []
    for part in t.args if t.op == "add" else (t,):
        k, body = (part.args[0], None) if part.op == "c" else coefficient(part)
        quotient = exact_div(k, n)
        if quotient is None:
            if body is None and isinstance(k, int) and isinstance(n, int) and k >= n > 0:
                q.append(const(k // n))
                r.append(const(k % n))
            else:
                r.append(part)
        else:
            q.append(const(quotient) if body is None else scaled(quotient, body))
    return add(*q) if q else const(0), add(*r) if r else const(0)


def exact_div(k: Any, n: Any) -> Any:
    if isinstance(k, int) and isinstance(n, int):
        return k // n if n and k % n == 0 else None
    if k == 0:
        return 0
    ratio = sp.cancel(sp.sympify(k) / sp.sympify(n))
    if ratio.is_integer and ratio.as_numer_denom()[1] == 1:
        return int(ratio) if ratio.is_Integer else ratio
    return None


def fdiv(t: Term, n: Any) -> Term:
    if same_size(n, 1):
        return t
    q, r = split_by(t, n)
    if below(r, n):
        return q
    if t.op == "fdiv":
        return fdiv(t.args[0], t.args[1].args[0] * n)
    return mk("fdiv", t, const(n)) if is_c(q, 0) else add(q, mk("fdiv", r, const(n)))


def mod(t: Term, n: Any) -> Term:
    if same_size(n, 1):
        return const(0)
    _, r = split_by(t, n)
    return r if below(r, n) else mk("mod", r, const(n))
