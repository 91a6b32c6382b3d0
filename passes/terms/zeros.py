"""Masks made of numbers: what a condition [x ≠ 0] says of a product that is 0 with x anyhow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .arithmetic import mul
from .budget import step
from .facts import Facts
from .ops import BINDERS, OPS
from .rules import Rules, rule
from .term import Term, factors, is_c, let


@rule("[x ≠ 0] y = y,  [0 < x] y = y   where x is a sum of [ids = e] and positive factors, each of which is one of y's", "mul")
def _zero_anyhow(t: Term, facts: Facts) -> Term | None:
    """Where f(x) is no number, 0 · f(x) is none either: x may be 0 in such places only where no slot chose the expert, so that f is not
    asked there, or where it underflows. Nor is a gradient lost then."""
    for c in t.args:
        x = _asked(c)
        if x is None or not facts.chosen_only(x):
            continue
        rest = [g for g in t.args if g is not c]
        if all(any(alike(f, g, facts) for g in _bases(rest)) for f in _bases(factors(x))):
            return mul(*rest)
    return None


def _asked(c: Term) -> Term | None:
    """x of [x ≠ 0] and of [0 < x]."""
    if c.op == "lt" and is_c(c.args[0], 0):
        return c.args[1]
    if c.op == "not" and c.args[0].op == "eq":
        for zero, x in (c.args[0].args, c.args[0].args[::-1]):
            if is_c(zero, 0):
                return x
    return None


def _bases(fs: Iterable[Term]) -> Iterator[Term]:
    """What is 0 where a product is: its factors, without numbers and what it is divided by."""
    for f in fs:
        if f.op == "pow":
            if f.args[1] > 0:
                yield f.args[0]
        elif f.op != "c":
            yield f


def alike(a: Term, b: Term, facts: Facts) -> bool:
    """Whether two terms differ in the names of bound variables only."""
    step()
    if a is b:
        return True
    if a.op != b.op or len(a.parts) != len(b.parts) or a.atoms != b.atoms:
        return False
    if a.op in BINDERS:
        v, w = a.args[0], b.args[0]
        return v.args[1] == w.args[1] and alike(a.args[1], facts.normal(let(b.args[1], {w: v})), facts)
    if OPS[a.op].opaque or OPS[a.op].data(a.args) != OPS[b.op].data(b.args):
        return False
    if not OPS[a.op].commutative:
        return all(alike(x, y, facts) for x, y in zip(a.parts, b.parts, strict=True))
    left = [y for y in b.parts if y not in a.parts]
    for x in (x for x in a.parts if x not in b.parts):
        found = next((y for y in left if alike(x, y, facts)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


ZEROS = Rules.of(vars())
