"""The rewriter: brings a term to normal form by rules, subterms first, each term once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from .arithmetic import build
from .budget import Budget, step
from .facts import Facts
from .ops import OPS
from .rules import Rules, Trace
from .term import Term


class Rewriter:
    """`normal(t)` applies the rules until none fires; what a rule returns is brought to normal form too."""

    def __init__(self, rules: Rules, facts: Facts, trace: Trace | None = None) -> None:
        self.rules, self.trace = rules, trace
        self.facts = facts.seen_by(self.normal)
        self.known: dict[Term, Term] = {}

    def normal(self, t: Term) -> Term:
        known = self.known
        out = known.get(t)
        if out is None:
            step(len(t.args))
            if t.op == "let":
                body, keys, values = t.args
                out = self.subst(body, dict(zip(keys, map(self.normal, values))))
            else:
                out = self._rewritten(self._inside(t))
            known[t] = known[out] = out
        return out

    def _inside(self, t: Term) -> Term:
        """t with its subterms in normal form."""
        op = OPS[t.op]
        if op.leaf:
            return t
        args = op.map(t.args, self.normal)
        return t if args == t.args else build(t.op, *args)

    def _rewritten(self, t: Term) -> Term:
        """The normal form of a term whose subterms are in normal form."""
        if t in self.known:
            return self.known[t]
        for rule in self.rules.by_head.get(t.op, ()):
            out = rule.fire(t, self.facts)
            if out is not None:
                if self.trace is not None:
                    self.trace.note(rule, t, out)
                return self.normal(out)
        return t

    def rebuild(self, t: Term, f: Callable[[Term], Term]) -> Term:
        """The normal form of t with f applied to its direct subterms."""
        op = OPS[t.op]
        return t if op.leaf else self.normal(build(t.op, *op.map(t.args, f)))

    def subst(self, t: Term, mapping: dict[Term, Term]) -> Term:
        """The normal form of t with terms (usually variables) replaced; bound variables are fresh, so capture cannot happen."""
        memo: dict[Term, Term] = dict(mapping)
        keys = frozenset(k for k in mapping if k.op == "v")
        only_variables = len(keys) == len(mapping)

        def go(x: Term) -> Term:
            y = memo.get(x)
            if y is None:
                step(len(x.args))
                y = memo[x] = x if only_variables and keys.isdisjoint(x.atoms) else self.rebuild(x, go)
            return y

        return go(t)


def rewrite(t: Term, rules: Rules, facts: Facts, budget: Budget | None = None, trace: Trace | None = None) -> Term:
    """The normal form of a term. Raises TooLarge when the budget, or the one around this work, is spent."""
    with nullcontext() if budget is None else budget.within():
        return Rewriter(rules, facts, trace).normal(t)
