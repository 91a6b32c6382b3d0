"""Pointwise functions: of numbers, of values that are chosen or scattered; the logistic function in all its forms."""

from __future__ import annotations

from ...ir.scalar import BY_NAME
from .arithmetic import mul
from .facts import Facts
from .numbers import is_number
from .reductions import is_slot
from .rules import Rules, rule
from .term import Term, const, factors, is_c, mk, uses


def fn(name: str, *args: Term, consts: tuple[object, ...] = ()) -> Term:
    return mk("fn", name, args, consts)


def _plain(t: Term) -> bool:
    """Whether a term is a number that a function can be worked out for."""
    return t.op == "c" and is_number(t.args[0]) and not getattr(t.args[0], "free_symbols", ())


@rule("f(2) is a number", "fn")
def _function_of_a_number(t: Term, facts: Facts) -> Term | None:
    name, args, _ = t.args
    return const(BY_NAME[name].number(float(args[0].args[0]))) if name in BY_NAME and _plain(args[0]) else None


@rule("f(ite(any_j c_j, Σ_j c_j g_j, k)) = ite(any_j c_j, Σ_j c_j f(g_j), f(k))   where k is a number and at most one c_j holds", "fn")
def _function_of_the_scattered(t: Term, facts: Facts) -> Term | None:
    """sigmoid(scatter(-∞, v)) is scatter(0, sigmoid(v))."""
    name, args, consts = t.args
    x = args[0]
    if x.op != "ite" or not _plain(x.args[2]) or x.args[0].op != "any" or x.args[1].op != "sum":
        return None
    j, body = x.args[1].args
    hits = [f for f in factors(body) if f.op == "eq" and any(is_slot(a, j) and not uses(b, j) for a, b in (f.args, f.args[::-1]))]
    v, condition = x.args[0].args
    if len(hits) != 1 or v.args[1] != j.args[1] or facts.normal(mk("let", condition, (v,), (j,))) is not hits[0]:
        return None
    rest = fn(name, mul(*(g for g in factors(body) if g is not hits[0])), consts=consts)
    return mk("ite", x.args[0], mk("sum", j, mul(hits[0], rest)), fn(name, x.args[2], consts=consts))


@rule("f(ite(c, x, k)) = ite(c, f(x), f(k))   where k is a number", "fn")
def _function_of_a_choice(t: Term, facts: Facts) -> Term | None:
    name, (x, *_), consts = t.args
    if name not in BY_NAME or x.op != "ite" or not _plain(x.args[2]):
        return None
    return mk("ite", x.args[0], fn(name, x.args[1], consts=consts), fn(name, x.args[2], consts=consts))


@rule("(1 + exp(x))^-1 = sigmoid(-x)", "pow")
def _logistic(t: Term, facts: Facts) -> Term | None:
    b, e = t.args
    if e == -1 and b.op == "add" and len(b.args) == 2:
        for one, other in (b.args, b.args[::-1]):
            if is_c(one, 1) and other.op == "fn" and other.args[0] == "exp":
                return fn("sigmoid", mul(const(-1), other.args[1][0]))
    return None


@rule("exp(x) · sigmoid(-x) = sigmoid(x)", "mul")
def _exp_times_logistic(t: Term, facts: Facts) -> Term | None:
    functions = [f for f in t.args if f.op == "fn"]
    for e in functions if len(functions) > 1 else ():
        if e.args[0] != "exp":
            continue
        turned = fn("sigmoid", mul(const(-1), e.args[1][0]))
        if turned in functions:
            return mul(fn("sigmoid", e.args[1][0]), *(f for f in t.args if f is not e and f is not turned))
    return None


FUNCTIONS = Rules.of(vars())
