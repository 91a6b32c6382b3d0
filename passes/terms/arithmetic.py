"""Arithmetic and logic of terms: sums, products, powers, functions, truth values, each in one normal form."""

from __future__ import annotations

from typing import Any

import sympy as sp

from .term import Term, const, is_c, mk, table


def _is_num(v: Any) -> bool:
    return isinstance(v, (int, float, sp.Expr)) and not isinstance(v, str)


def add(*ts: Term) -> Term:
    total: Any = 0
    rest: dict[Term, Any] = {}
    stack = list(ts)
    while stack:
        t = stack.pop()
        if t.op == "add":
            stack.extend(t.args)
        elif t.op == "c" and _is_num(t.args[0]):
            total = exact_sum(total, t.args[0])
        else:
            k, body = coefficient(t)
            rest[body] = rest.get(body, 0) + k
    _whole_division(rest)
    for b in rest:  # x + (0 where c, else -inf) is x where c, else -inf
        if b.op == "ite" and rest[b] == 1 and is_c(b.args[1], 0) and is_c(b.args[2], -float("inf")):
            others = [scaled(k, x) for x, k in rest.items() if x is not b]
            return ite(b.args[0], add(const(total), *others), b.args[2])
    out = [scaled(k, b) for b, k in rest.items() if k != 0]
    if total != 0 or not out:
        out.append(const(total))
    if len(out) == 1:
        return out[0]
    return mk("add", *sorted(out, key=lambda x: x.serial))


def exact_sum(a: Any, b: Any) -> Any:
    """a + b without rounding: 2 + 1e-20 must not become 2."""
    if isinstance(a, float) != isinstance(b, float) and 0 in (a, b) or not (isinstance(a, float) or isinstance(b, float)):
        return a + b
    if any(isinstance(x, float) and abs(x) == float("inf") for x in (a, b)):
        return float(a) + float(b)
    return sp.nsimplify(a, rational=True) + sp.nsimplify(b, rational=True)


def _whole_division(rest: dict[Term, Any]) -> None:
    """n (x // n) + x % n = x."""
    for m in [b for b in rest if b.op == "mod"]:
        q = table.get(("fdiv", *m.args))
        k = rest.get(m)
        if q is None or q not in rest or k is None or not same_size(rest[q], k * m.args[1].args[0]):
            continue
        del rest[q], rest[m]
        x = m.args[0]
        for part in x.args if x.op == "add" else (x,):
            c, body = coefficient(part)
            rest[body] = rest.get(body, 0) + k * c


def same_size(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, sp.Expr) or isinstance(b, sp.Expr)) and sp.expand(a - b) == 0


def coefficient(t: Term) -> tuple[Any, Term]:
    """t = number * term."""
    if t.op == "mul" and t.args[0].op == "c":
        rest = t.args[1:]
        return t.args[0].args[0], rest[0] if len(rest) == 1 else mk("mul", *rest)
    return 1, t


def scaled(k: Any, t: Term) -> Term:
    if k == 1:
        return t
    return mul(const(k), t)


def mul(*ts: Term) -> Term:
    k: Any = 1
    powers: dict[Term, Any] = {}
    stack = list(ts)
    while stack:
        t = stack.pop()
        if t.op == "mul":
            stack.extend(t.args)
        elif t.op == "c" and _is_num(t.args[0]):
            k = k * t.args[0]
        elif t.op == "pow":
            powers[t.args[0]] = powers.get(t.args[0], 0) + t.args[1]
        else:
            powers[t] = powers.get(t, 0) + 1
    if k == 0:
        return const(0)
    _exp_over_one_plus_exp(powers)
    _any_of_summed(powers)
    out = []
    for b, e in powers.items():
        if e == 0:
            continue
        out.append(b if e == 1 or b.op in ("eq", "not", "any", "lt") else mk("pow", b, e))
    if not out:
        return const(k)
    if len(out) == 1 and out[0].op == "add" and k != 1 and isinstance(k, (int, sp.Expr)):
        return add(*(mul(const(k), a) for a in out[0].args))  # indices: n * (a + b)
    out.sort(key=lambda x: x.serial)
    if k != 1:
        out.insert(0, const(k))
    return out[0] if len(out) == 1 else mk("mul", *out)


def _exp_over_one_plus_exp(powers: dict[Term, Any]) -> None:
    """exp(x) · sigmoid(-x) = sigmoid(x)."""
    for b in [b for b in powers if b.op == "fn" and b.args[0] == "exp" and powers[b] == 1]:
        x = b.args[1][0]
        other = table.get(("fn", "sigmoid", (mul(const(-1), x),), ()))
        if other is not None and powers.get(other) == 1:
            del powers[b], powers[other]
            s = fn("sigmoid", x)
            powers[s] = powers.get(s, 0) + 1


def _any_of_summed(powers: dict[Term, Any]) -> None:
    """(any_j c_j) · Σ_j c_j g_j = Σ_j c_j g_j."""
    for a in [b for b in powers if b.op == "any"]:
        if any(b.op == "sum" and powers[b] == 1 and _counts(b, a) for b in powers):
            del powers[a]


def _counts(total: Term, a: Term) -> bool:
    from .rebuild import subst

    (v, body), (u, cond) = total.args, a.args
    if v.args[1] != u.args[1]:
        return False
    here = subst(cond, {u: v})
    own = body.args if body.op == "mul" else (body,)
    return all(c in own for c in (here.args if here.op == "mul" else (here,)))


def power(b: Term, e: Any) -> Term:
    if e == 1:
        return b
    if e == 0:
        return const(1)
    if b.op == "c" and _is_num(b.args[0]) and not (b.args[0] == 0 and e < 0):
        return const(b.args[0] ** e)
    if b.op == "mul" and e == int(e):
        return mul(*(power(f, e) for f in b.args))
    if b.op == "pow" and e == int(e):
        return power(b.args[0], b.args[1] * e)
    if e == -1:
        x = _one_plus_exp(b)
        if x is not None:
            return fn("sigmoid", mul(const(-1), x))
    return mk("pow", b, e)


def _one_plus_exp(b: Term) -> Term | None:
    """x of 1 + exp(x): 1 / (1 + exp(x)) is sigmoid(-x)."""
    if b.op == "add" and len(b.args) == 2:
        for one, other in (b.args, b.args[::-1]):
            if is_c(one, 1) and other.op == "fn" and other.args[0] == "exp":
                return other.args[1][0]
    return None


def fn(name: str, *args: Term, consts: tuple[Any, ...] = ()) -> Term:
    """A pointwise function; spellings that are products or powers are written as such."""
    (x, *_) = args
    if name == "silu":
        return mul(x, fn("sigmoid", x))
    if name == "neg":
        return mul(const(-1), x)
    if name == "reciprocal":
        return power(x, -1)
    if name == "sqrt":
        return power(x, 0.5)
    if name == "rsqrt":
        return power(x, -0.5)
    if name == "square":
        return power(x, 2)
    return mk("fn", name, args, consts)


def eq(a: Term, b: Term) -> Term:
    if a is b:
        return const(1)
    if a.op == "c" and b.op == "c":
        return const(a.args[0] == b.args[0])
    for p, q in ((a, b), (b, a)):  # a truth value compared with a number
        if p.op in ("eq", "any", "not", "lt") and q.op == "c":
            return p if q.args[0] == 1 else not_(p) if q.args[0] == 0 else const(0)
        if is_c(q, 0) and p.op == "sum" and is_truth(_unbound(p)):
            return not_(_any_of(p))
    a, b = _without_shift(a, b)
    lo, hi = sorted((a, b), key=lambda x: x.serial)
    return mk("eq", lo, hi)


def _without_shift(a: Term, b: Term) -> tuple[Term, Term]:
    """c + x = c + y as x = y."""
    numbers = [[x for x in t.args if x.op == "c"] if t.op == "add" else [] for t in (a, b)]
    if not numbers[0] or numbers[0] != numbers[1]:
        return a, b
    x, y = (add(*(x for x in t.args if x.op != "c")) for t in (a, b))
    return x, y


def _unbound(t: Term) -> Term:
    while t.op == "sum":
        t = t.args[1]
    return t


def _any_of(t: Term) -> Term:
    """A count of true values as "is any of them true"."""
    from .rebuild import reduce_

    return reduce_("any", t.args[0], _any_of(t.args[1])) if t.op == "sum" else t


def lt(a: Term, b: Term) -> Term:
    if a.op == "c" and b.op == "c":
        return const(a.args[0] < b.args[0])
    if b.op == "c" and isinstance(b.args[0], int):
        from .index import upper

        top = upper(a)  # an index is never negative
        if top is not None and (top < b.args[0] or b.args[0] <= 0):
            return const(b.args[0] > 0)
    return mk("lt", a, b)


def not_(a: Term) -> Term:
    if a.op == "c":
        return const(not a.args[0])
    return a.args[0] if a.op == "not" else mk("not", a)


def ite(c: Term, a: Term, b: Term) -> Term:
    if c.op == "c":
        return a if c.args[0] else b
    if c.op == "not":
        return ite(c.args[0], b, a)
    if a is b:
        return a
    if is_truth(c) and is_c(b, 0):
        return mul(c, a)
    if is_truth(c) and is_c(a, 0) and is_c(b, 1):
        return not_(c)
    return mk("ite", c, a, b)


def is_truth(t: Term) -> bool:
    """Whether a term is 0 or 1 by construction."""
    if t.op in ("eq", "lt", "not", "any"):
        return True
    if t.op == "c":
        return t.args[0] in (0, 1)
    if t.op == "mul":
        return all(is_truth(a) for a in t.args)
    return t.op == "ite" and is_truth(t.args[1]) and is_truth(t.args[2])
