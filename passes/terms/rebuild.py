"""Rebuilding terms: substitution, sorted orders, reductions, one name for equal bound variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .arithmetic import add, eq, fn, ite, lt, mul, not_, power
from .index import below, fdiv, mod
from .term import BINDERS, Term, children, const, mk, step, uses, walk


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
    if op == "rank":
        return mk("rank", a[0], f(a[1]), f(a[2]))
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
            step()
        return y

    return go(t)


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
