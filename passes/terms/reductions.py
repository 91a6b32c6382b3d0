"""max, min and any over an index variable."""

from __future__ import annotations

from .arithmetic import mul
from .facts import Facts
from .logic import is_truth
from .rules import Rules, rule
from .term import Term, const, factors, let, uses


def is_slot(t: Term, v: Term) -> bool:
    """Whether t is the choice in slot v of a top-k."""
    return t.op == "topk" and bool(t.args[1]) and t.args[1][-1] is v


def same_choice(a: Term, b: Term, v: Term, facts: Facts) -> bool:
    """a is the choice in slot v, b one of the same top-k's choices: they are equal in just one slot, b's own."""
    if not is_slot(a, v) or b.op != "topk" or a.args[0] is not b.args[0]:
        return False
    return a.args[1][:-1] == b.args[1][:-1] and facts.below(b.args[1][-1], v.args[1])


@rule("max_v c = min_v c = any_v c = c   where v is not in c", "max", "min", "any")
def _of_one_value(t: Term, facts: Facts) -> Term | None:
    return None if uses(t.args[1], t.args[0]) else t.args[1]


@rule("any_v [v = a] c(v) = [0 <= a < |v|] c(a)   where c is a truth value", "any")
def _any_hits(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    for f in factors(body):
        if f.op != "eq":
            continue
        for a, b in (f.args, f.args[::-1]):
            rest = mul(*(g for g in factors(body) if g is not f))
            if a is v and not uses(b, v) and is_truth(rest):
                return mul(*facts.inside(b, v.args[1]), let(rest, {v: b}))
    return None


@rule("any_v [choice(v) = choice(s)] = 1   in one top-k, 0 <= s < |v| for certain", "any")
def _any_slot_is_itself(t: Term, facts: Facts) -> Term | None:
    v, body = t.args
    if body.op == "eq" and any(same_choice(a, b, v, facts) for a, b in (body.args, body.args[::-1])):
        return const(1)
    return None


REDUCTIONS = Rules.of(vars())
