"""The terms of one compilation: their normal forms, the facts known of them. The constructors that other rooms use build normal forms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import arithmetic as ring
from . import budget, orders
from .facts import Facts
from .functions import FUNCTIONS
from .index import INDEX
from .logic import LOGIC
from .ops import BINDERS, OPS
from .orders import ORDERS
from .reductions import REDUCTIONS
from .rewrite import Rewriter
from .rules import Trace
from .sums import SUMS
from .term import Term, children, const, mk, table, walk
from .zeros import ZEROS

NORMAL = LOGIC + FUNCTIONS + INDEX + ORDERS + REDUCTIONS + SUMS + ZEROS

_facts = Facts()
_rewriter = Rewriter(NORMAL, _facts)


def reset() -> None:
    """Forget all terms (once a compilation; terms of different compilations must not meet)."""
    global _facts, _rewriter
    table.clear()
    budget.reset()
    _facts = Facts()
    _rewriter = Rewriter(NORMAL, _facts, _rewriter.trace)


def facts() -> Facts:
    """What is known of the terms of this compilation."""
    return _facts


@contextmanager
def tracing(keep: int = 0) -> Iterator[Trace]:
    """Note which rules fire, and the first `keep` rewrites."""
    before, _rewriter.trace = _rewriter.trace, Trace(keep)
    trace = _rewriter.trace
    try:
        yield trace
    finally:
        _rewriter.trace = before


def normal(t: Term) -> Term:
    return _rewriter.normal(t)


def subst(t: Term, mapping: dict[Term, Term]) -> Term:
    """Replace terms (usually variables) everywhere, simplifying on the way."""
    return _rewriter.subst(t, mapping)


def rebuild(t: Term, f: Any) -> Term:
    """Build t again with f applied to its direct subterms, simplifying on the way."""
    return _rewriter.rebuild(t, f)


def canonical(t: Term) -> Term:
    """Bound variables renamed by height: terms that differ only in their names become one object."""
    memo: dict[Term, tuple[Term, int]] = {}
    for x in walk(t):
        height = max((memo[c][1] for c in children(x)), default=0)
        if x.op in BINDERS:
            height += 1
            new = mk("v", f"#{height}", x.args[0].args[1])
            renamed = mk(x.op, new, subst(memo[x.args[1]][0], {x.args[0]: new}))
            memo[x] = (_rewriter.known.setdefault(renamed, renamed), height)
        else:
            memo[x] = (x, 0) if OPS[x.op].leaf else (rebuild(x, lambda c: memo[c][0]), height)
    return memo[t][0]


# ---- constructors ------------------------------------------------------------------------------------------------------


def add(*ts: Term) -> Term:
    return normal(ring.add(*ts))


def mul(*ts: Term) -> Term:
    return normal(ring.mul(*ts))


def power(b: Term, e: Any) -> Term:
    return normal(ring.power(b, e))


def fn(name: str, *args: Term, consts: tuple[Any, ...] = ()) -> Term:
    """A pointwise function; spellings that are products or powers are written as such."""
    return normal(mk("fn", name, args, consts))


def eq(a: Term, b: Term) -> Term:
    return normal(ring.eq(a, b))


def lt(a: Term, b: Term) -> Term:
    return normal(mk("lt", a, b))


def not_(a: Term) -> Term:
    return normal(mk("not", a))


def ite(c: Term, a: Term, b: Term) -> Term:
    return normal(mk("ite", c, a, b))


def fdiv(t: Term, n: Any) -> Term:
    return normal(mk("fdiv", t, const(n)))


def mod(t: Term, n: Any) -> Term:
    return normal(mk("mod", t, const(n)))


def reduce_(op: str, v: Term, body: Term) -> Term:
    return normal(mk(op, v, body))


def perm(sort: Any, key: Term, p: Term) -> Term:
    """perm[p]: which unsorted position stands at sorted position p."""
    return normal(mk("perm", sort, key, p))


def inv(sort: Any, key: Term, q: Term) -> Term:
    """inv[q]: at which sorted position the unsorted position q stands."""
    return normal(mk("inv", sort, key, q))


def sv(key: Term, p: Term) -> Term:
    """The p-th smallest value of the key; at inv[q] it is the key at q."""
    return normal(mk("sv", key, p))


def at_key(key: Term, q: Term) -> Term:
    """The key of position q."""
    return normal(orders.at_key(key, q))


# ---- questions ---------------------------------------------------------------------------------------------------------


def extent(t: Term) -> Any:
    """Exclusive upper bound of an index term, or None."""
    return _facts.extent(t)


def upper(t: Term) -> int | None:
    """Largest value of a non-negative integer index term, when it is a plain number."""
    return _facts.upper(t)


def never_negative(t: Term) -> bool:
    """Whether a term is at least 0 for certain."""
    return _facts.range(t)[0]
