"""What the rewriter makes of a random term has that term's value, and is done: no rule fires on it again."""

from __future__ import annotations

import random

import fuzz
import pytest
from evaluate import VALUES, evaluate
from random_terms import Source, difference

import moe_compile.passes.terms as T
from moe_compile.passes.terms import arithmetic as ring
from moe_compile.passes.terms.ops import OPS


@pytest.fixture(autouse=True)
def own_terms():
    T.reset()
    yield
    T.reset()


def test_every_op_has_a_value():
    assert set(VALUES) == set(OPS)


@pytest.mark.parametrize("part", range(4))
def test_normal_forms_have_the_values_of_their_terms(part: int):
    """25,000 evaluations each; `make fuzz N=1000000` for more."""
    problem = fuzz.wrong(25_000, 1_000_000 * part)
    assert not problem, problem


def test_a_wrong_rule_is_found():
    """The net holds: one of the rules without its condition is noticed at once."""
    careless = T.Rule("one hot", "Σ_v [v = a] f(v) = f(a)", ("sum",), _careless)
    rules = T.Rules([careless, *(r for r in T.NORMAL if r.name != "one hot")])
    for seed in range(2_000):
        source, t = fuzz.term(seed)
        if difference(t, T.rewrite(t, rules, T.facts()), source, 6, seed)[1]:
            return
    raise AssertionError("not found in 2,000 terms")


def _careless(t: T.Term, facts: T.Facts) -> T.Term | None:
    v, body = t.args
    for f in body.args if body.op == "mul" else (body,):
        if f.op == "eq" and v in f.args:
            (a,) = (x for x in f.args if x is not v)
            if not T.uses(a, v):
                return T.let(ring.mul(*(g for g in (body.args if body.op == "mul" else (body,)) if g is not f)), {v: a})
    return None


@pytest.mark.parametrize("seed", range(60))
def test_normal_forms_are_done(seed: int):
    """Rewriting once more changes nothing, and renaming bound variables changes no value."""
    source, t = fuzz.term(seed)
    made = T.normal(t)
    again = T.rewrite(made, T.NORMAL, T.facts())
    assert T.canonical(again) is T.canonical(made)
    assert not difference(t, T.canonical(made), source, 6, seed)[1]


@pytest.mark.parametrize("seed", range(40))
def test_substitution(seed: int):
    """t with v replaced by a, evaluated, is t evaluated at a's value."""
    source = Source(seed, symbolic=seed % 3 == 0)
    v, u = source.var(), source.var()
    t, a = source.value([v, u], 3), source.index([u], 2)
    made = T.subst(T.normal(t), {v: T.normal(a)})
    assert not difference(T.let(t, {v: a}), made, source, 24, seed)[1]


@pytest.mark.parametrize("seed", range(200))
def test_the_ring_constructors(seed: int):
    """add, mul and power hold the laws of a ring: what they make has the value of what they were given."""
    r, source = random.Random(seed), Source(seed, symbolic=seed % 3 == 0)
    vs = [source.var(), source.var()]
    parts = [source.value(vs, 1) for _ in range(r.randint(1, 3))]
    parts += r.choices(parts, k=2) + [T.const(source.number())]
    power = r.choice((-2, -1, 0.5, 2, 3))
    for made, bare in (
        (ring.add(*parts), T.mk("add", *parts)),
        (ring.mul(*parts), T.mk("mul", *parts)),
        (ring.power(ring.mul(*parts), power), T.mk("pow", T.mk("mul", *parts), power)),
        (ring.add(*(ring.scaled(*ring.coefficient(p)) for p in parts)), T.mk("add", *parts)),
        (ring.add(T.const(ring.constant_part(parts[0])[0]), ring.constant_part(parts[0])[1]), parts[0]),
    ):
        assert not difference(bare, made, source, 8, seed)[1]


@pytest.mark.parametrize("seed", range(300))
def test_ranges(seed: int):
    """What is certain of a term's range is true of its values."""
    source = Source(seed, symbolic=seed % 3 == 0)
    t = T.normal(source.index([source.var(), source.var()], 3))
    never_negative, n = T.facts().range(t)
    for i in range(12):
        world = source.world(i)
        x = evaluate(t, world, world.bind(t, i), strict=True)
        if x is not None:
            assert not never_negative or x >= 0, (t, x)
            assert n is None or 0 <= x < world.size(n), (t, x, n)


def test_numbers_beyond_a_sum_are_never_met():
    """Three sums that came out wrong: a number, a remainder and a case that the sum does not reach."""
    w = "w"
    v, u = T.var(2), T.var(4)
    assert T.reduce_("sum", v, T.mul(T.eq(v, T.const(5)), T.atom(w, (v,)))) is T.const(0)
    assert T.reduce_("sum", v, T.ite(T.eq(v, T.const(3)), T.const(5), T.const(1))) is T.const(2)
    three = T.reduce_("sum", u, T.mul(T.eq(T.mod(u, 3), T.const(0)), T.atom(w, (u,))))
    world = {0: 2, 1: 3, 2: 5, 3: 7}
    from evaluate import World

    assert evaluate(three, World(lambda node, at: world.get(at[0]))) == 9
