"""Sums over the blocks of a range, written one by one, as one sum over the range: products that a model computes block by block."""

from __future__ import annotations

from collections.abc import Sequence

from .session import canonical, fdiv, mod, mul, reduce_, subst
from .term import Term, const, factors, named, uses, var, walk
from .unify import unify


def joined(parts: Sequence[Term]) -> Term | None:
    """Σ_b a(b) Σ_{v<n} f(b, v) = Σ_{u<kn} a(u // n) f(u // n, u mod n)   where that reads places of the range alone, none within a block.

    `parts`: one for each of k blocks, in their order. None where they are no blocks of one range.
    """
    opened = [x for t in parts if (x := _opened(t)) is not None]
    if len(opened) < max(len(parts), 2):
        return None
    n, bodies = opened[0][0], [body for _, body in opened]
    if any(other != n for other, _ in opened) or not _follows(bodies[0], bodies[1], n):
        return None
    block, u = var(len(parts), "b"), var(len(parts) * n, "u")
    one = unify({b: canonical(t) for b, t in enumerate(bodies)}, block)
    if isinstance(one, str):
        return None
    whole = subst(one, {block: fdiv(u, n), _within(n): mod(u, n)})
    return None if any(x.op == "mod" and x.args[0] is u for x in walk(whole)) else reduce_("sum", u, whole)


def _within(n: int) -> Term:
    """The place within a block."""
    return named("#within", n)


def _opened(t: Term) -> tuple[int, Term] | None:
    """(n, a f(v)) of a Σ_{v<n} f(v); None of another term."""
    sums = [f for f in factors(t) if f.op == "sum"]
    if len(sums) != 1 or not isinstance(n := sums[0].args[0].args[1], int):
        return None
    v, body = sums[0].args
    return n, mul(*(f for f in factors(t) if f is not sums[0]), subst(body, {v: _within(n)}))


def _follows(first: Term, second: Term, n: int) -> bool:
    """Whether a tensor that one term reads at v the other reads at n + v: looked at before all else, since most sums are no blocks."""
    read = {(f.args[0], i) for f in factors(first) if f.op == "a" for i in f.args[1] if i is _within(n)}
    later = {f.args[0] for f in factors(second) if f.op == "a" and any(_is_behind(i, n) for i in f.args[1])}
    return any(node in later for node, _ in read)


def _is_behind(i: Term, n: int) -> bool:
    return i.op == "add" and uses(i, _within(n)) and set(i.args) == {const(n), _within(n)}
