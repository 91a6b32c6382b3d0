"""The rewrites with which experts and routing are read off a normal form: each has the value it says, under what it says."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
import torch.fx as fx
from evaluate import evaluate, same_value
from random_terms import RandomWorld, Source, difference

import moe_compile.passes.terms as T
from moe_compile.passes.recover.addends import Part, given, rolled, scaled_input
from moe_compile.passes.recover.groups import keeps_all
from moe_compile.passes.recover.identity import among, numbered
from moe_compile.passes.recover.routing import at_best, risen, roll_slots
from moe_compile.passes.terms.arithmetic import build

SEEDS = range(60)


@pytest.fixture(autouse=True)
def own_terms():
    T.reset()
    yield
    T.reset()


def routed(s: Source, k: int, extent: int = 4) -> tuple[T.Term, T.Term, T.Term]:
    """A token, a slot and the id there."""
    t, j = s.var(3, "t"), s.var(k, "j")
    return t, j, T.mk("topk", s.choice(3, k, extent=extent), (t, j))


@pytest.mark.parametrize("seed", SEEDS)
def test_scaled_input(seed: int):
    s = Source(seed)
    k, experts = s.r.randint(1, 3), s.r.randint(2, 5)
    t, j, ids = routed(s, k)
    if s.chance(0.3):  # ids that may repeat
        ids = T.normal(T.mk("fdiv", ids, T.const(2)))
    e, m = s.var(experts, "e"), s.var(2, "m")
    gate = T.mk("sum", j, build("mul", build("eq", ids, e), T.atom(s.tensor(3, k), (t, j))))
    x = build("mul", gate, T.atom(s.tensor(3, 2), (t, m)))
    up = T.mk("sum", m, build("mul", x, T.atom(s.weight(experts, 2), (e, m))))
    inner = s.one_of(
        lambda: build("mul", up, T.mk("fn", "sigmoid", (up,), ())),
        lambda: up,
        lambda: build("mul", up, up),
        lambda: T.mk("fn", "exp", (up,), ()),
    )
    before = T.normal(T.mk("sum", e, build("mul", inner, T.atom(s.weight(experts), (e,)))))
    made = scaled_input(before)
    if made is not None:
        assert difference(before, made, s, 40, seed) == (40, "")


def test_scaled_input_is_met():
    def made(fold: bool) -> T.Term | None:
        s = Source(1)
        t, j, ids = routed(s, 2)
        ids = T.normal(T.mk("fdiv", ids, T.const(2))) if fold else ids
        e = s.var(4, "e")
        x = T.reduce_("sum", j, T.mul(T.eq(ids, e), T.atom(s.tensor(3, 2), (t, j))))
        y = T.mul(x, T.atom(s.weight(4), (e,)))
        return scaled_input(T.reduce_("sum", e, T.mul(y, y, T.fn("sigmoid", y))))

    assert made(fold=False) is not None
    assert made(fold=True) is None, "two slots may have one id: F(a + b) is not F(a) + F(b)"


@pytest.mark.parametrize("seed", SEEDS)
def test_known_ids(seed: int):
    """`given` where the id is e, `among` where it is one of some experts."""
    s = Source(seed)
    t, j, ids = routed(s, 2, extent=5)
    tests = [build("eq", ids, T.const(c)) for c in range(5)] + [T.mk("lt", ids, T.const(c)) for c in range(5)]
    before = T.normal(build("mul", *s.r.choices(tests, k=2), s.value([t, j], 1)))
    before = T.normal(T.mk("ite", s.r.choice(tests), before, s.value([t, j], 1)))
    experts = s.r.sample(range(5), s.r.randint(1, 3))
    made = {e: given(before, ids, e) for e in experts}
    both = among(before, ids, experts)
    for i in range(40):
        world = s.world(i)
        values = world.bind(before, i) | {t: i % 3, j: i % 2}
        e, want = evaluate(ids, world, values), evaluate(before, world, values)
        if e in experts and want is not None:
            assert same_value(evaluate(made[e], world, values), want)
            assert same_value(evaluate(both, world, values), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_slots_that_are_written_out(seed: int):
    """f(slot 0) + ... + f(slot k-1) as a sum over the slots."""
    s = Source(seed)
    k = s.r.randint(2, 3)
    t, j, ids = routed(s, k)
    chosen = ids.args[0]
    form = T.normal(
        build("mul", T.atom(s.tensor(4), (ids,)), s.r.choice((T.const(2), T.atom(s.tensor(4), (ids,)), T.atom(s.tensor(3), (t,)))))
    )
    slots = [T.subst(form, {j: T.const(c)}) for c in range(k)]
    rest = T.normal(s.value([t], 1))
    before = T.add(*(slots if s.chance(0.8) else slots[1:]), rest)
    assert not difference(before, roll_slots(before, chosen, (t,), k), s, 20, seed)[1]

    parts = [Part(None, x, None) for x in slots]
    made = rolled(parts)
    assert len(made) == 1
    (slot,) = (v for v in made[0].body.atoms if v.args[0] == "slot")
    assert not difference(T.add(*slots), T.reduce_("sum", slot, made[0].body), s, 20, seed)[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_identity_experts(seed: int):
    """One weight a token as a part for each id that it holds for."""
    s = Source(seed)
    t, h = T.named("t", 3), T.named("h", 2)
    ids = T.mk("topk", s.choice(3, 1, extent=5), (t, T.const(0)))
    tests = [
        T.lt(ids, T.const(3)),
        T.not_(T.lt(ids, T.const(3))),
        T.not_(T.eq(ids, T.const(4))),
        T.eq(ids, T.const(1)),
        T.lt(ids, T.const(2)),
    ]
    body = T.mul(s.r.choice(tests), s.r.choice(tests), T.atom(s.tensor(3, 2), (t, h)), T.atom(s.tensor(3), (t,)))
    found = numbered(body)
    if found is not None:
        whole = T.add(*(T.mul(T.eq(found[0], T.const(e)), y) for e, y in found[1].items()))
        assert not difference(body, whole, s, 30, seed)[1]


@pytest.mark.parametrize("score", ["exp", "sigmoid", "softmax", "none"])
@pytest.mark.parametrize("value", ["exp", "sigmoid", "plain", "falling"])
def test_the_largest_value_is_the_first_choices(score: str, value: str):
    """max_v f(v) is f at the first choice of a top-k, where f and what is chosen by rise with one x; with -x it is left."""
    experts = 5
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = torch.empty(3, experts)
    choice = graph.call_function(torch.ops.aten.topk.default, (source, 2))
    s = Source(0)
    table = s.tensor(3, experts)
    t, e, v = s.var(3, "t"), s.var(experts, "e"), s.var(experts, "v")
    x = T.atom(table, (t, e))
    total = T.reduce_("sum", v, T.fn("exp", T.subst(x, {e: v})))
    criterion = {"exp": T.fn("exp", x), "sigmoid": T.fn("sigmoid", x), "none": x, "softmax": T.mul(T.fn("exp", x), T.power(total, -1))}[
        score
    ]
    f = {"exp": T.fn("exp", x), "sigmoid": T.mul(T.const(3), T.fn("sigmoid", x)), "plain": x, "falling": T.mul(T.const(-1), x)}[value]
    chosen = T.mk("topk", choice, (t, T.const(0)))
    weight = T.canonical(T.reduce_("max", v, T.subst(f, {e: v})))
    made = at_best(weight, T.canonical(criterion), e, chosen)
    assert (made is weight) is (value == "falling")
    assert risen(criterion, e) is x

    class Routed(RandomWorld):
        def chosen(self, node, at):
            scores = [evaluate(criterion, self, {t: at[0], e: i}) for i in range(experts)]
            return sorted(range(experts), key=scores.__getitem__, reverse=True)[at[1]]

        def element(self, node, at):
            return random.Random(f"{self.seed} {at}").random() * 4 - 2

    for seed in range(20):
        world = Routed(SimpleNamespace(facts=T.facts(), rows={}), seed)
        assert same_value(evaluate(weight, world, {t: seed % 3}), evaluate(made, world, {t: seed % 3}))


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (3, 3), (3, 2), (3, 1)])
def test_groups_that_are_all_kept(groups: int, kept: int):
    """∃ j < kept: topk(x)[j] = v, of every v, if and only if as many are kept as there are."""
    x = torch.randn(50, groups)
    always = bool((x.topk(kept).indices[..., None] == torch.arange(groups)).any(1).all())
    graph = fx.Graph()
    given = graph.placeholder("x")
    chosen = graph.call_function(torch.ops.aten.topk.default, (given, kept))
    given.meta["val"], chosen.meta["val"] = x, x.topk(kept)
    j, e, t = T.named("j", kept), T.named("e", 4 * groups), T.named("t", 50)
    group = T.fdiv(e, T.const(4)) if groups > 1 else T.const(0)
    slots = (t, j) if kept > 1 else (t, T.const(0))
    hit = T.eq(T.mk("topk", chosen, slots), group)
    cond = T.mk("any", j, hit) if kept > 1 else hit
    assert keeps_all(cond, e) == always == (kept == groups)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_group_of_a_true_element(seed: int):
    """nz(m, row, 0) = e where Σ_{f<e} n[f] <= row < Σ_{f<=e} n[f], with n[f] = Σ_i m[f, i]: `definitions_select._group_at`."""
    r = random.Random(seed)
    shape = [r.randint(1, 5) for _ in range(r.randint(2, 3))]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < r.choice((0.0, 0.3, 1.0))
    counts = mask.flatten(1).sum(1)
    assert torch.equal(torch.where(mask)[0], torch.repeat_interleave(torch.arange(shape[0]), counts))
