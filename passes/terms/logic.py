"""Truth values: comparisons, negation, choice by a condition. Truth is 0 or 1, "and" is a product, "or" is `any`."""

from __future__ import annotations

from .arithmetic import TRUTHS, add, build, eq, mul
from .facts import Facts
from .numbers import differ, is_number, is_plain, positive, same_size
from .rules import Rules, rule
from .term import Term, addends, const, is_c, mk, reached


def is_truth(t: Term) -> bool:
    """Whether a term is 0 or 1 by construction."""
    made = reached(t, lambda x: x.args if x.op == "mul" else x.args[1:] if x.op == "ite" else ())
    return all(x.op in TRUTHS or x.op in ("mul", "ite") or x.op == "c" and x.args[0] in (0, 1) for x in made)


def _both(t: Term) -> tuple[tuple[Term, Term], tuple[Term, Term]]:
    """The two sides of a comparison, either one first."""
    a, b = t.args
    return (a, b), (b, a)


@rule("[a = a] = 1", "eq")
def _equal_to_itself(t: Term, facts: Facts) -> Term | None:
    return const(1) if t.args[0] is t.args[1] else None


@rule("[2 = 3] = 0", "eq")
def _numbers_equal(t: Term, facts: Facts) -> Term | None:
    a, b = t.args
    if a.op != "c" or b.op != "c":
        return None
    return const(0) if differ(a.args[0], b.args[0]) else const(1) if same_size(a.args[0], b.args[0]) else None


@rule("[c = 1] = c,  [c = 0] = not c,  else 0   where c is a truth value", "eq")
def _truth_equal(t: Term, facts: Facts) -> Term | None:
    for p, q in _both(t):
        if p.op in TRUTHS and q.op == "c" and is_plain(q.args[0]):
            return p if q.args[0] == 1 else mk("not", p) if q.args[0] == 0 else const(0)
    return None


@rule("[Σ_v c = 0] = not any_v c   where c is a truth value", "eq")
def _count_is_zero(t: Term, facts: Facts) -> Term | None:
    for p, q in _both(t):
        if p.op == "sum" and is_c(q, 0) and is_truth(_unbound(p)):
            return mk("not", _any_of(p))
    return None


def _unbound(t: Term) -> Term:
    while t.op == "sum":
        t = t.args[1]
    return t


def _any_of(t: Term) -> Term:
    """A count of true values as "is any of them true"."""
    return mk("any", t.args[0], _any_of(t.args[1])) if t.op == "sum" else t


@rule("[k + x = k + y] = [x = y]", "eq")
def _equal_shifts(t: Term, facts: Facts) -> Term | None:
    numbers = [[x for x in addends(side) if x.op == "c"] if side.op == "add" else [] for side in t.args]
    if not numbers[0] or numbers[0] != numbers[1]:
        return None
    x, y = (add(*(x for x in side.args if x.op != "c")) for side in t.args)
    return eq(x, y)


@rule("[a = k] = 0   where 0 <= a < n for certain and k is a number outside", "eq")
def _never_equal(t: Term, facts: Facts) -> Term | None:
    for a, k in _both(t):
        if k.op != "c" or not isinstance(k.args[0], int):
            continue
        n = facts.upper(a)
        if n is not None and not 0 <= k.args[0] <= n or k.args[0] < 0 and facts.range(a)[0]:
            return const(0)
    return None


@rule("[x // n = k] = [n k <= x < n k + n]   where x is read from data", "eq")
def _equal_quotient(t: Term, facts: Facts) -> Term | None:
    for q, k in _both(t):
        if q.op == "fdiv" and is_c(k) and _whole(k.args[0]) and _whole(n := q.args[1].args[0]) and n > 0 and reads(q.args[0]):
            first = n * k.args[0]
            return mul(mk("not", mk("lt", q.args[0], const(first))), mk("lt", q.args[0], const(first + n)))
    return None


def _whole(n: object) -> bool:
    return isinstance(n, int)


def reads(t: Term) -> bool:
    """Whether an index is read from data: a choice, a place in a sorted order or a tensor's element."""
    made = reached(t, lambda x: x.parts if x.op in ("add", "mul", "mod", "fdiv", "ite") else ())
    return any(x.op in ("topk", "a", "sv", "perm", "inv", "nz") for x in made)


@rule("[2 < 3] = 1", "lt")
def _numbers_ordered(t: Term, facts: Facts) -> Term | None:
    a, b = t.args
    if a.op != "c" or b.op != "c" or not is_number(a.args[0]) or not is_number(b.args[0]):
        return None
    less = bool(a.args[0] < b.args[0]) if is_plain(a.args[0]) and is_plain(b.args[0]) else positive(b.args[0] - a.args[0])
    return None if less is None else const(less)


@rule("[a < k] = 1 where 0 <= a < n <= k for certain,  [a < k] = 0 where 0 <= a for certain and k <= 0", "lt")
def _certainly_ordered(t: Term, facts: Facts) -> Term | None:
    a, k = t.args
    if k.op != "c":
        return None
    if facts.below(a, k.args[0]):
        return const(1)
    return const(0) if isinstance(k.args[0], int) and k.args[0] <= 0 and facts.range(a)[0] else None


@rule("[ite(c, a, b) < k] = ite(c, [a < k], [b < k]), [... = k] alike   where both are certain", "eq", "lt")
def _compared_choice(t: Term, facts: Facts) -> Term | None:
    x, k = t.args if t.op == "lt" or t.args[0].op == "ite" else t.args[::-1]
    if x.op != "ite" or k.op != "c":
        return None
    cases = [facts.normal(build(t.op, a, k)) for a in x.args[1:]]
    return mk("ite", x.args[0], *cases) if all(is_c(a) for a in cases) else None


@rule("not k = 1 - k for the numbers 0 and 1", "not")
def _not_a_number(t: Term, facts: Facts) -> Term | None:
    (a,) = t.args
    return const(not a.args[0]) if a.op == "c" else None


@rule("not not c = c", "not")
def _not_twice(t: Term, facts: Facts) -> Term | None:
    (a,) = t.args
    return a.args[0] if a.op == "not" else None


@rule("ite(k, a, b) is a or b for a number k", "ite")
def _known_choice(t: Term, facts: Facts) -> Term | None:
    c, a, b = t.args
    return (a if c.args[0] else b) if c.op == "c" else None


@rule("ite(not c, a, b) = ite(c, b, a)", "ite")
def _turned_choice(t: Term, facts: Facts) -> Term | None:
    c, a, b = t.args
    return mk("ite", c.args[0], b, a) if c.op == "not" else None


@rule("ite(c, a, a) = a", "ite")
def _no_choice(t: Term, facts: Facts) -> Term | None:
    return t.args[1] if t.args[1] is t.args[2] else None


@rule("ite(c, c · a, b) = ite(c, a, b)", "ite")
def _choice_that_is_known(t: Term, facts: Facts) -> Term | None:
    c, a, b = t.args
    if not is_truth(c) or a.op != "mul" or c not in a.args:
        return None
    return mk("ite", c, mul(*(f for f in a.args if f is not c)), b)


@rule("ite(c, a, 0) = c · a", "ite")
def _choice_or_zero(t: Term, facts: Facts) -> Term | None:
    c, a, b = t.args
    return mul(c, a) if is_c(b, 0) and is_truth(c) else None


@rule("ite(c, 0, b) = (not c) · b   where b is no number", "ite")
def _zero_or_choice(t: Term, facts: Facts) -> Term | None:
    c, a, b = t.args
    return mul(mk("not", c), b) if is_c(a, 0) and not is_c(b) and is_truth(c) else None


@rule("ite(c, 0, 1) = not c", "ite")
def _choice_is_a_truth(t: Term, facts: Facts) -> Term | None:
    c, a, b = t.args
    return mk("not", c) if is_c(a, 0) and is_c(b, 1) and is_truth(c) else None


@rule("x + ite(c, 0, -∞) = ite(c, x, -∞)", "add")
def _masked_addend(t: Term, facts: Facts) -> Term | None:
    for f in t.args:
        if f.op == "ite" and is_c(f.args[1], 0) and is_c(f.args[2], -float("inf")):
            return mk("ite", f.args[0], add(*(x for x in t.args if x is not f)), f.args[2])
    return None


LOGIC = Rules.of(vars())
