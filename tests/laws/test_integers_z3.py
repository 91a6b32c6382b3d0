"""The rules of division and remainder, proved for all whole numbers by z3 where it is installed.

A rule is given random left sides with numbers as sizes. z3 shows that what it makes of them is equal for every value of the variables in
their ranges, and for every value that a read may have.
"""

from __future__ import annotations

from typing import Any

import pytest
import samples
from random_terms import Source

import moe_compile.passes.terms as T
from moe_compile.passes.terms.index import INDEX
from moe_compile.passes.terms.logic import LOGIC

z3 = pytest.importorskip("z3")
RULES = [*INDEX, *(r for r in LOGIC if r.name in ("never equal", "equal quotient", "certainly ordered", "equal shifts"))]
PROOFS = 12


class Reading:
    """Terms of whole numbers as z3 expressions; what is read is any number in its range."""

    def __init__(self) -> None:
        self.memo: dict[T.Term, Any] = {}
        self.known: list[Any] = []

    def __call__(self, t: T.Term) -> Any:
        if t not in self.memo:
            self.memo[t] = self.read(t)
        return self.memo[t]

    def read(self, t: T.Term) -> Any:
        op, a = t.op, t.args
        if op == "c":
            return z3.IntVal(int(a[0]))
        if op == "add":
            return z3.Sum(*map(self, a))
        if op == "mul":
            return z3.Product(*map(self, a))
        if op in ("fdiv", "mod"):
            x, n = map(self, a)
            return x / n if op == "fdiv" else x % n  # z3 rounds down for positive divisors
        if op in ("eq", "lt", "not"):
            x = [self(y) for y in a]
            return z3.If(x[0] == x[1] if op == "eq" else x[0] < x[1] if op == "lt" else x[0] == 0, 1, 0)
        if op == "ite":
            return z3.If(self(a[0]) != 0, self(a[1]), self(a[2]))
        return self.any_number(t)

    def any_number(self, t: T.Term) -> Any:
        x = z3.Int(f"x{len(self.memo)}_{t.serial}")
        never_negative, n = T.facts().range(t)
        self.known += [x >= 0] * never_negative + ([x < int(n)] if n is not None else [])
        return x


def numeric(t: T.Term) -> bool:
    """Whether all numbers and sizes are plain and whole."""
    numbers = [x.args[-1] for x in T.walk(t) if x.op in ("c", "v")]
    return all(isinstance(n, int) for n in numbers) and all(x.args[1].args[0] > 0 for x in T.walk(t) if x.op in ("fdiv", "mod"))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_for_all_numbers(rule: T.Rule):
    T.reset()
    proved = 0
    for seed in range(2000):
        t = samples.SAMPLES[rule.name](Source(seed))
        made = rule.fire(t, T.Rewriter(T.NORMAL, T.facts()).facts) if t.op in rule.heads and numeric(t) else None
        if made is None or not numeric(made):
            continue
        read = Reading()
        left, right = read(t), read(made)
        solver = z3.Solver()
        solver.set("timeout", 2_000)
        solver.add(*read.known, left != right)
        found = solver.check()
        assert found != z3.sat, f"{t} is not {made} for {solver.model()}"
        proved += found == z3.unsat
        if proved == PROOFS:
            return
    assert proved >= PROOFS // 2, f"{proved} proofs"
