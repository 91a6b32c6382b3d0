"""Pointwise functions: spellings that are products or powers are written as such, the logistic function in all its forms."""

from __future__ import annotations

from collections.abc import Callable

from .arithmetic import add, mul, power
from .facts import Facts
from .rules import Rule, Rules, rule
from .term import Term, const, is_c, mk


def fn(name: str, *args: Term) -> Term:
    return mk("fn", name, args, ())


def _spelling(name: str, law: str, meaning: Callable[[Term], Term]) -> Rule:
    """A function that is said in terms of others."""

    def fire(t: Term, facts: Facts) -> Term | None:
        return meaning(t.args[1][0]) if t.args[0] == name else None

    return Rule(name, law, ("fn",), fire)


SPELLINGS = Rules(
    (
        _spelling("silu", "silu(x) = x · sigmoid(x)", lambda x: mul(x, fn("sigmoid", x))),
        _spelling("neg", "neg(x) = -1 · x", lambda x: mul(const(-1), x)),
        _spelling("reciprocal", "reciprocal(x) = x^-1", lambda x: power(x, -1)),
        _spelling("sqrt", "sqrt(x) = x^0.5", lambda x: power(x, 0.5)),
        _spelling("rsqrt", "rsqrt(x) = x^-0.5", lambda x: power(x, -0.5)),
        _spelling("square", "square(x) = x^2", lambda x: power(x, 2)),
        _spelling("log1p", "log1p(x) = log(1 + x)", lambda x: fn("log", add(const(1), x))),
        _spelling("expm1", "expm1(x) = exp(x) - 1", lambda x: add(fn("exp", x), const(-1))),
        _spelling("log_sigmoid", "log_sigmoid(x) = log(sigmoid(x))", lambda x: fn("log", fn("sigmoid", x))),
    )
)


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


FUNCTIONS = SPELLINGS + Rules((_logistic, _exp_times_logistic))
