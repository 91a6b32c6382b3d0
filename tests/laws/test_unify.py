"""unify({e: f_e}, v) is one term F with F[v := e] = f_e for every e, atoms inside another atom's index included; or a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import moe_compile.passes.terms as T
from moe_compile.passes.terms.term import Term
from moe_compile.passes.terms.unify import unify

E = 4


@pytest.fixture(autouse=True)
def own_terms():
    T.reset()
    yield
    T.reset()


def read(name: str, *idx: Term | int) -> Term:
    return T.atom(name, tuple(T.const(i) if isinstance(i, int) else i for i in idx))


def chosen(t: Term) -> Term:
    """Atoms of a list of parameters, read at a number: that parameter's."""
    for x in T.walk(t):
        if x.op == "a" and isinstance(x.args[0], tuple) and T.is_c(x.args[1][0]):
            nodes, (e, *rest) = x.args
            return chosen(T.subst(t, {x: T.atom(nodes[e.args[0]], tuple(rest))}))
    return t


def m() -> Term:
    return T.named("m", 8)


SAME: dict[str, Callable[[int], Term]] = {
    "stacks": lambda e: read("W", e, read("G", e, m())),
    "lists": lambda e: read(f"W{e}", read(f"G{e}", m())),
    "an index for all": lambda e: read("W", e, read("G", m())),
    "a list of weights, a stack of indices": lambda e: read(f"W{e}", read("G", e, m())),
    "an index of an index": lambda e: read("W", e, read("G", e, read("P", e, m()))),
    "a sum of reads": lambda e: T.mul(read("W", e, m()), read("S", e, read("G", e, m()))),
}
OTHER: dict[str, Callable[[int], Term]] = {
    "the index of another expert": lambda e: read("W", e, read("G", 3 * e % E, m())),
    "the weights of another expert": lambda e: read("W", 3 * e % E, read("G", e, m())),
    "one index from another tensor": lambda e: read("W", e, read("G" if e else "H", e, m())),
    "one read without an index": lambda e: read("W", e, read("G", e, m()) if e else m()),
}


@pytest.mark.parametrize("name", SAME)
def test_the_term_of_all_is_each_ones(name: str) -> None:
    v = T.named("expert", E)
    one = unify({e: SAME[name](e) for e in range(E)}, v)
    assert isinstance(one, Term), one
    for e in range(E):
        assert chosen(T.subst(one, {v: T.const(e)})) is SAME[name](e)


@pytest.mark.parametrize("name", OTHER)
def test_near_misses_have_a_reason(name: str) -> None:
    assert isinstance(unify({e: OTHER[name](e) for e in range(E)}, T.named("expert", E)), str)
