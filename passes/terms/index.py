"""Flattened indices: integer division and remainder (both round down, the divisor is positive)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .arithmetic import add, coefficient, constant_part, mul, scaled
from .facts import Facts
from .numbers import common_factor, exact_div, is_number, same_size
from .rules import Rules, rule
from .term import Term, addends, const, mk


def split_by(t: Term, n: Any) -> tuple[Term, Term]:
    """t = n * q + r, taking into q every addend whose coefficient n divides."""
    q: list[Term] = []
    r: list[Term] = []
    for part in addends(t):
        k, body = (part.args[0], const(1)) if part.op == "c" else coefficient(part)
        quotient = exact_div(k, n)
        if quotient is not None:
            q.append(scaled(quotient, body))
        elif part.op == "c" and isinstance(k, int) and isinstance(n, int) and not 0 <= k < n:
            q.append(const(k // n))
            r.append(const(k % n))
        else:
            r.append(part)
    return add(*q), add(*r)


def _divisor(t: Term) -> Any:
    n = t.args[1].args[0]
    return None if isinstance(n, (int, float)) and n <= 0 or isinstance(n, str) else n


@rule("x // 1 = x,  x mod 1 = 0", "fdiv", "mod")
def _by_one(t: Term, facts: Facts) -> Term | None:
    if not same_size(t.args[1].args[0], 1):
        return None
    return t.args[0] if t.op == "fdiv" else const(0)


@rule("(n q + r) // n = q + r // n,  (n q + r) mod n = r mod n", "fdiv", "mod")
def _whole_multiples(t: Term, facts: Facts) -> Term | None:
    n = _divisor(t)
    if n is None:
        return None
    q, r = split_by(t.args[0], n)
    if r is t.args[0]:
        return None
    rest = mk(t.op, r, t.args[1])
    return add(q, rest) if t.op == "fdiv" else rest


@rule("x // n = 0,  x mod n = x   where 0 <= x < n for certain", "fdiv", "mod")
def _below_divisor(t: Term, facts: Facts) -> Term | None:
    n = _divisor(t)
    if n is None or not facts.below(t.args[0], n):
        return None
    return const(0) if t.op == "fdiv" else t.args[0]


@rule("(x // m) // n = x // (m n)", "fdiv")
def _quotient_of_quotient(t: Term, facts: Facts) -> Term | None:
    x, n = t.args[0], _divisor(t)
    if x.op != "fdiv" or n is None or _divisor(x) is None:
        return None
    return mk("fdiv", x.args[0], const(_divisor(x) * n))


@rule("(x mod (k n)) // n = (x // n) mod k", "fdiv")
def _quotient_of_remainder(t: Term, facts: Facts) -> Term | None:
    x, n = t.args[0], _divisor(t)
    k = exact_div(_divisor(x), n) if x.op == "mod" and n is not None and _divisor(x) is not None else None
    return None if k is None else mk("mod", mk("fdiv", x.args[0], t.args[1]), const(k))


@rule("(x mod (k n) + y) mod n = (x + y) mod n", "mod")
def _remainder_of_remainder(t: Term, facts: Facts) -> Term | None:
    n = _divisor(t)
    parts = [coefficient(x) for x in addends(t.args[0])]
    inner = [b for _, b in parts if b.op == "mod" and n is not None and _divisor(b) is not None and exact_div(_divisor(b), n) is not None]
    if not inner:
        return None
    return mk("mod", add(*(mul(const(k), b.args[0] if b in inner else b) for k, b in parts)), t.args[1])


@rule("(k a + s) // (k m) = a // m,  (k a + s) mod (k m) = k (a mod m) + s   where 0 <= s < k", "fdiv", "mod")
def _common_factor(t: Term, facts: Facts) -> Term | None:
    n = _divisor(t)
    for k in () if n is None else _common_factors(t.args[0], n):
        a, s = split_by(t.args[0], k)
        if facts.below(s, k):
            rest = mk(t.op, a, const(exact_div(n, k)))
            return rest if t.op == "fdiv" else add(mul(const(k), rest), s)
    return None


def _common_factors(t: Term, n: Any) -> Iterator[Any]:
    """What n has in common with the coefficients of t."""
    coefficients = {coefficient(part)[0] for part in addends(t) if part.op != "c"} - {1}
    seen: list[Any] = [1]
    for c in coefficients:
        k = common_factor(c, n)
        if k not in seen:
            seen.append(k)
            yield k


@rule("k n (x // n) + k (x mod n) = k x,  k n ((x // n) mod m) + k (x mod n) = k (x mod (n m))", "add")
def _quotient_and_remainder(t: Term, facts: Facts) -> Term | None:
    parts = [coefficient(x) for x in t.args]
    remainders = [(k, b) for k, b in parts if b.op == "mod" and _divisor(b) is not None]
    others = [(k, b) for k, b in parts if b.op in ("fdiv", "mod")]
    for k, r in remainders if len(others) > 1 else ():
        x, n = r.args
        q = facts.normal(mk("fdiv", x, n))
        for c, b in others:
            m = b.args[1] if b.op == "mod" and b.args[0] is q else None
            if b is r or b is not q and m is None or not same_size(c, k * n.args[0]):
                continue
            whole = x if m is None else mk("mod", x, const(n.args[0] * m.args[0]))
            return add(mul(const(k), whole), *(scaled(*p) for p in parts if p[1] is not r and p[1] is not b))
    return None


@rule("[k a + s < k m] = [a < m]   where 0 <= s < k", "lt")
def _ordered_multiples(t: Term, facts: Facts) -> Term | None:
    x, limit = t.args
    n = limit.args[0] if limit.op == "c" else None
    for k in () if n is None else _common_factors(x, n):
        a, s = split_by(x, k)
        if facts.below(s, k):
            return mk("lt", a, const(exact_div(n, k)))
    return None


@rule("[x + k < n] = [x < n - k]   where k is a number", "lt")
def _ordered_shifts(t: Term, facts: Facts) -> Term | None:
    k, x = constant_part(t.args[0])
    n = t.args[1].args[0] if t.args[1].op == "c" else None
    if not is_number(n) or not is_number(k) or k == 0 or x is t.args[0] or isinstance(k, float) or isinstance(n, float):
        return None
    return mk("lt", x, const(n - k))


INDEX = Rules.of(vars())
