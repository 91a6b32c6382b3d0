"""Terms: what one element of a tensor is, as an index-level expression.

A tensor is a function from indices to scalars. Expert loops, sort-based dispatch, grouped and batched matmuls and dense
combines all say `out[t,h] = Σ_j w[t,j] · f(x[t], W[ids[t,j]])`; as terms they become that one expression.

Terms are interned: equal terms are one object, so equality is identity and shared subterms cost once.

    ("c", value)            constant: number or sympy size
    ("v", name, size)       index variable, 0 <= v < size
    ("a", node, idx)        element of a tensor that is not looked into
    ("add"|"mul", *terms)   sorted; numbers folded
    ("pow", base, exponent) exponent a number
    ("fn", name, args, consts)  pointwise function
    ("eq"|"lt", a, b), ("not", a), ("ite", c, a, b)   truth is 0 or 1
    ("sum"|"max"|"min"|"any"|"prod", var, body)       reductions
    ("fdiv"|"mod", a, n)    integer division, for flattened indices
    ("perm"|"inv", sort, key, p), ("sv", key, p)      sorted order: its permutation, the inverse, the sorted value
    ("nz", mask, row, dim)  coordinate `dim` of the row-th true element of a mask
    ("topk", node, idx)     index chosen by a top-k (an expert id)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import sympy as sp

_table: dict[tuple[Any, ...], Term] = {}
_serial = itertools.count()
_fresh = itertools.count()


class Term:
    """An interned expression node; build with the functions below, never directly."""

    __slots__ = ("args", "atoms", "op", "serial")
    op: str
    args: tuple[Any, ...]
    serial: int
    atoms: frozenset[Term]

    def __repr__(self) -> str:
        return show(self)


def reset() -> None:
    """Forget all terms (once a compilation; terms of different compilations must not meet)."""
    _table.clear()
    allow(10_000_000)


class TooLarge(Exception):
    """More distinct terms than any block of experts needs: values depend on each other in too many ways."""


_work = [10_000_000]  # steps left


def allow(steps: int) -> None:
    """Start a piece of work that may take so many steps of rebuilding and walking before it is given up (`TooLarge`)."""
    _work[0] = steps


def _step(n: int = 1) -> None:
    _work[0] -= n
    if _work[0] < 0:
        raise TooLarge("the values around the selection depend on each other in too many ways")


def mk(op: str, *args: Any) -> Term:
    key = (op, *args)
    t = _table.get(key)
    if t is None:
        _step()
        t = object.__new__(Term)
        t.op, t.args, t.serial = op, args, next(_serial)
        free: set[Term] = {t} if op == "v" else set()
        for a in children(t):
            free |= a.atoms
        if op in BINDERS:
            free.discard(args[0])
        t.atoms = frozenset(free)
        _table[key] = t
    return t


BINDERS = ("sum", "max", "min", "any", "prod")


def children(t: Term) -> Iterator[Term]:
    """Direct subterms (a binder's variable is not one)."""
    if t.op in BINDERS:
        yield t.args[1]
        return
    for a in t.args:
        if isinstance(a, Term):
            yield a
        elif isinstance(a, tuple):
            for b in a:
                if isinstance(b, Term):
                    yield b


def const(v: Any) -> Term:
    if isinstance(v, Term):
        return v
    if isinstance(v, bool):
        v = int(v)
    if isinstance(v, sp.Float):
        v = float(v)
    if isinstance(v, float) and v.is_integer() and abs(v) < 2**53:
        v = int(v)
    if isinstance(v, sp.Expr) and v.is_Integer:
        v = int(v)
    # ints and floats that compare equal are one constant; NaN is its own
    return mk("c", v if v == v else "nan")


def is_c(t: Term, v: Any = None) -> bool:
    return t.op == "c" and (v is None or t.args[0] == v)


def var(size: Any, name: str = "i") -> Term:
    return mk("v", f"{name}{next(_fresh)}", size)


def named(name: str, size: Any) -> Term:
    """A variable that is the same wherever the same name and size are asked for."""
    return mk("v", name, size)


def atom(node: Any, idx: tuple[Term, ...]) -> Term:
    return mk("a", node, idx)


def uses(t: Term, v: Term) -> bool:
    return v in t.atoms


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
        q = _table.get(("fdiv", *m.args))
        k = rest.get(m)
        if q is None or q not in rest or k is None or not same_size(rest[q], k * m.args[1].args[0]):
            continue
        del rest[q], rest[m]
        x = m.args[0]
        for part in x.args if x.op == "add" else (x,):
            c, body = coefficient(part)
            rest[body] = rest.get(body, 0) + k * c


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
        other = _table.get(("fn", "sigmoid", (mul(const(-1), x),), ()))
        if other is not None and powers.get(other) == 1:
            del powers[b], powers[other]
            s = fn("sigmoid", x)
            powers[s] = powers.get(s, 0) + 1


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
    if name == "log1p":
        return fn("log", add(const(1), x))
    if name == "expm1":
        return add(fn("exp", x), const(-1))
    if name == "log_sigmoid":
        return fn("log", fn("sigmoid", x))
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
    lo, hi = sorted((a, b), key=lambda x: x.serial)
    return mk("eq", lo, hi)


def _unbound(t: Term) -> Term:
    while t.op == "sum":
        t = t.args[1]
    return t


def _any_of(t: Term) -> Term:
    """A count of true values as "is any of them true"."""
    return reduce_("any", t.args[0], _any_of(t.args[1])) if t.op == "sum" else t


def lt(a: Term, b: Term) -> Term:
    if a.op == "c" and b.op == "c":
        return const(a.args[0] < b.args[0])
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


# ---- flattened indices -------------------------------------------------------------------------------------------------


def same_size(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, sp.Expr) or isinstance(b, sp.Expr)) and sp.expand(a - b) == 0


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
    if t.op == "topk":
        return t.args[0].meta.get("moe_extent")
    return None


def upper(t: Term) -> int | None:
    """Largest value of a non-negative integer index term, when it is a plain number."""
    if t.op == "c":
        return t.args[0] if isinstance(t.args[0], int) and t.args[0] >= 0 else None
    if t.op in ("v", "nz", "topk", "perm", "inv"):
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
    return None


def split_by(t: Term, n: Any) -> tuple[Term, Term]:
    """t = n * q + r, taking into q every addend whose coefficient n divides."""
    q: list[Term] = []
    r: list[Term] = []
    for part in t.args if t.op == "add" else (t,):
        k, body = (part.args[0], None) if part.op == "c" else coefficient(part)
        quotient = exact_div(k, n)
        if quotient is None:
            if body is None and isinstance(k, int) and isinstance(n, int) and k >= n:
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


# ---- substitution ------------------------------------------------------------------------------------------------------


def rebuild(t: Term, f: Callable[[Term], Term]) -> Term:
    """Build t again with f applied to its direct subterms (simplifying on the way)."""
    op, a = t.op, t.args
    if op in ("c", "v"):
        return t
    if op == "a":
        return mk("a", a[0], tuple(f(i) for i in a[1]))
    if op == "topk":
        return mk("topk", a[0], tuple(f(i) for i in a[1]))
    if op == "add":
        return add(*(f(x) for x in a))
    if op == "mul":
        return mul(*(f(x) for x in a))
    if op == "pow":
        return power(f(a[0]), a[1])
    if op == "fn":
        return fn(a[0], *(f(x) for x in a[1]), consts=a[2])
    if op == "eq":
        return eq(f(a[0]), f(a[1]))
    if op == "lt":
        return lt(f(a[0]), f(a[1]))
    if op == "not":
        return not_(f(a[0]))
    if op == "ite":
        return ite(f(a[0]), f(a[1]), f(a[2]))
    if op in BINDERS:
        return reduce_(op, a[0], f(a[1]))
    if op == "fdiv":
        return fdiv(f(a[0]), a[1].args[0])
    if op == "mod":
        return mod(f(a[0]), a[1].args[0])
    if op == "perm":
        return perm(a[0], a[1], f(a[2]))
    if op == "inv":
        return inv(a[0], a[1], f(a[2]))
    if op == "sv":
        return sv(a[0], f(a[1]))
    if op == "nz":
        return mk("nz", a[0], f(a[1]), a[2])
    raise AssertionError(op)


def subst(t: Term, mapping: dict[Term, Term]) -> Term:
    """Replace terms (usually variables) everywhere; bound variables are fresh, so capture cannot happen."""
    memo: dict[Term, Term] = dict(mapping)
    keys = frozenset(k for k in mapping if k.op == "v")
    only_vars = len(keys) == len(mapping)

    def go(x: Term) -> Term:
        y = memo.get(x)
        if y is None:
            y = x if only_vars and not (x.atoms & keys) else rebuild(x, go)
            memo[x] = y
            _step()
        return y

    return go(t)


def walk(t: Term) -> Iterator[Term]:
    """Every distinct subterm, parents after children."""
    seen: set[Term] = set()
    stack: list[tuple[Term, bool]] = [(t, False)]
    while stack:
        x, done = stack.pop()
        if done:
            yield x
        elif x not in seen:
            seen.add(x)
            _step()
            stack.append((x, True))
            stack.extend((c, False) for c in children(x))


Q = "Q"  # the variable name that sort keys are written in


def perm(sort: Any, key: Term, p: Term) -> Term:
    """perm[p]: which unsorted position stands at sorted position p."""
    return p.args[2] if p.op == "inv" and p.args[0] is sort else mk("perm", sort, key, p)


def inv(sort: Any, key: Term, p: Term) -> Term:
    return p.args[2] if p.op == "perm" and p.args[0] is sort else mk("inv", sort, key, p)


def sv(key: Term, p: Term) -> Term:
    """The p-th smallest value of the key; at inv[q] it is the key at q."""
    if p.op == "inv" and p.args[1] is key:
        return at_key(key, p.args[2])
    return mk("sv", key, p)


def at_key(key: Term, q: Term) -> Term:
    bound = next((v for v in key.atoms if v.args[0] == Q), None)
    return key if bound is None else subst(key, {bound: q})


def reduce_(op: str, v: Term, body: Term) -> Term:
    if op == "sum":
        from .sums import sum_over

        return sum_over(v, body)
    if not uses(body, v) and op in ("max", "min", "any"):
        return body
    if op == "any" and body.op == "eq" and any(same_choice(a, b, v) for a, b in (body.args, body.args[::-1])):
        return const(1)
    if op == "any" and body.op == "eq":
        for a, b in (body.args, body.args[::-1]):
            if a is v and not uses(b, v) and below(b, v.args[1]):
                return const(1)
    return mk(op, v, body)


def same_choice(a: Term, b: Term, v: Term) -> bool:
    """a is the choice in slot v, b one of the same top-k's choices: they are equal in just one slot, b's own."""
    if a.op != "topk" or b.op != "topk" or a.args[0] is not b.args[0] or not a.args[1]:
        return False
    return a.args[1][-1] is v and a.args[1][:-1] == b.args[1][:-1] and below(b.args[1][-1], v.args[1])


def canonical(t: Term) -> Term:
    """Bound variables renamed by height: terms that differ only in their names become one object."""
    memo: dict[Term, tuple[Term, int]] = {}
    for x in walk(t):
        height = max((memo[c][1] for c in children(x)), default=0)
        if x.op in BINDERS:
            height += 1
            new = mk("v", f"#{height}", x.args[0].args[1])
            body = subst(memo[x.args[1]][0], {x.args[0]: new})
            memo[x] = (mk(x.op, new, body), height)
        elif x.op in ("c", "v"):
            memo[x] = (x, 0)
        else:
            memo[x] = (rebuild(x, lambda c: memo[c][0]), height)
    return memo[t][0]


def show(t: Term) -> str:
    """For debugging and rejections."""
    op, a = t.op, t.args
    if op == "c":
        return str(a[0])
    if op == "v":
        return str(a[0])
    if op in ("a", "topk"):
        return f"{getattr(a[0], 'name', a[0])}[{', '.join(map(show, a[1]))}]"
    if op in ("add", "mul"):
        return "(" + (" + " if op == "add" else "*").join(map(show, a)) + ")"
    if op == "pow":
        return f"{show(a[0])}^{a[1]}"
    if op == "fn":
        return f"{a[0]}({', '.join(map(show, a[1]))}{', ' + str(a[2]) if a[2] else ''})"
    if op in BINDERS:
        return f"{op}_{show(a[0])}<{a[0].args[1]}>({show(a[1])})"
    if op in ("perm", "inv"):
        return f"{op}({show(a[2])})"
    if op == "sv":
        return f"sorted({show(a[1])})"
    if op == "nz":
        return f"nz({a[0]}, {show(a[1])}, {a[2]})"
    return f"{op}({', '.join(show(x) if isinstance(x, Term) else str(x) for x in a)})"
