"""Sums, products and powers in the normal form of a ring: flat, numbers folded, like terms collected, in one order.

a + b = b + a,  (a + b) + c = a + b + c,  k a + l a = (k + l) a,  a^p a^q = a^(p+q),  k (a + b) = k a + k b for a number k.
0 · x = 0 for every x, also one that is not finite: a row that no expert owns contributes nothing. A truth value is its own square.

These constructors know no rules: `build` makes any term, the rewriter brings it to normal form.
"""

from __future__ import annotations

from typing import Any

import sympy as sp

from .numbers import exact_sum, is_number
from .term import Term, addends, const, let, mk

TRUTHS = ("eq", "lt", "not", "any")


def build(op: str, *args: Any) -> Term:
    """The term with these arguments."""
    f = _BUILD.get(op)
    return mk(op, *args) if f is None else f(*args)


def add(*ts: Term) -> Term:
    total: Any = 0
    rest: dict[Term, Any] = {}
    stack = list(ts)
    while stack:
        t = stack.pop()
        if t.op == "add":
            stack.extend(t.args)
        elif t.op == "c" and is_number(t.args[0]):
            total = exact_sum(total, t.args[0])
        else:
            k, body = coefficient(t)
            rest[body] = rest.get(body, 0) + k
    out = [scaled(k, b) for b, k in rest.items() if k != 0]
    if total != 0 or not out:
        out.append(const(total))
    if len(out) == 1:
        return out[0]
    return mk("add", *sorted(out, key=_order))


def _order(t: Term) -> int:
    return t.serial


def coefficient(t: Term) -> tuple[Any, Term]:
    """t = number * term."""
    if t.op == "mul" and t.args[0].op == "c":
        rest = t.args[1:]
        return t.args[0].args[0], rest[0] if len(rest) == 1 else mk("mul", *rest)
    return 1, t


def scaled(k: Any, t: Term) -> Term:
    return t if k == 1 else mul(const(k), t)


def constant_part(t: Term) -> tuple[Any, Term]:
    """t = number + rest."""
    if t.op == "c":
        return t.args[0], const(0)
    numbers = [a for a in addends(t) if a.op == "c"]
    return (numbers[0].args[0], add(*(a for a in t.args if a.op != "c"))) if numbers else (0, t)


def mul(*ts: Term) -> Term:
    k: Any = 1
    powers: dict[Term, Any] = {}
    stack = list(ts)
    while stack:
        t = stack.pop()
        if t.op == "mul":
            stack.extend(t.args)
        elif t.op == "c" and is_number(t.args[0]):
            k = 0 if k == 0 or t.args[0] == 0 else k * t.args[0]
        elif t.op == "pow":
            powers[t.args[0]] = powers.get(t.args[0], 0) + t.args[1]
        else:
            powers[t] = powers.get(t, 0) + 1
    if k == 0:
        return const(0)
    out = [b if e == 1 or e > 0 and b.op in TRUTHS else mk("pow", b, e) for b, e in powers.items() if e != 0]
    if not out:
        return const(k)
    if len(out) == 1 and out[0].op == "add" and k != 1 and isinstance(k, (int, sp.Expr)):
        return add(*(mul(const(k), a) for a in out[0].args))
    out.sort(key=_order)
    if k != 1:
        out.insert(0, const(k))
    return out[0] if len(out) == 1 else mk("mul", *out)


def power(b: Term, e: Any) -> Term:
    """b to the power of a number."""
    if e == 1:
        return b
    if e == 0:
        return const(1)
    whole = e == int(e)
    if b.op == "c" and (folded := _number_power(b.args[0], e, whole)) is not None:
        return const(folded)
    if b.op == "mul" and whole:
        return mul(*(power(f, e) for f in b.args))
    if b.op == "pow" and whole:
        return power(b.args[0], b.args[1] * e)
    return mk("pow", b, e)


def _number_power(b: Any, e: Any, whole: bool) -> Any:
    """b ** e where that is a number, else None."""
    if not is_number(b) or b == 0 and e < 0 or not whole and isinstance(b, (int, float)) and b < 0:
        return None
    try:
        return b**e
    except OverflowError:
        return None


def eq(a: Term, b: Term) -> Term:
    return mk("eq", a, b) if a.serial <= b.serial else mk("eq", b, a)


_BUILD: dict[str, Any] = {
    "add": add,
    "mul": mul,
    "pow": power,
    "eq": eq,
    "let": lambda body, keys, values: let(body, dict(zip(keys, values))),
}
