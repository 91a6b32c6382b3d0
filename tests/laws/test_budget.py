"""Work on terms is bounded: a budget of steps, the same on every machine, and a reason when it is spent."""

from __future__ import annotations

import pytest

import moe_compile.passes.terms as T


@pytest.fixture(autouse=True)
def own_terms():
    T.reset()
    yield
    T.reset()


def work(width: int) -> T.Term:
    v = T.var(4)
    return T.add(*(T.mul(T.atom(f"x{i}", (v,)), T.atom(f"y{i}", (v,))) for i in range(width)))


def test_a_spent_budget_says_why():
    with pytest.raises(T.TooLarge, match="too much"), T.Budget(50, "too much").within():
        work(100)
    work(100)  # the budget around it was charged 50 steps, not more


def test_equal_work_costs_equal_steps():
    spent = []
    for _ in range(2):
        T.reset()
        with T.Budget(10_000).within() as b:
            work(50)
        spent.append(10_000 - b.left)
    assert spent[0] == spent[1] > 100


def test_inner_work_is_paid_from_all_budgets_around():
    with T.Budget(10_000).within() as outer:
        with T.Budget(5_000).within() as inner:
            work(50)
        used = 5_000 - inner.left
        assert outer.left == 10_000 - used
    with pytest.raises(T.TooLarge, match="outer"), T.Budget(20, "outer").within(), T.Budget(10_000, "inner").within():
        work(51)


def test_rewriting_with_a_budget():
    v = T.var(4)
    t = T.mk("sum", v, T.mk("add", *(T.mk("mul", T.eq(v, T.const(i)), T.atom(f"x{i}", (v,))) for i in range(4))))
    assert T.rewrite(t, T.NORMAL, T.facts(), T.Budget(10_000)).op == "add"
    with pytest.raises(T.TooLarge):
        T.rewrite(t, T.NORMAL, T.facts(), T.Budget(5))


def test_a_new_compilation_keeps_the_budget_around_it():
    with pytest.raises(T.TooLarge), T.Budget(1_000).within():
        for _ in range(100):
            T.reset()
            work(50)


def test_a_trace_counts_what_fired_and_keeps_the_first_rewrites():
    v = T.var(4)
    with T.tracing(keep=1) as trace:
        T.reduce_("sum", v, T.mul(T.eq(v, T.const(1)), T.atom("x", (v,))))
    assert trace.fired["one hot"] == 1
    assert len(trace.steps) == 1 and trace.steps[0][0] == "one hot" and "x[" in trace.steps[0][1]
    assert "one hot" in str(trace)
    with T.tracing() as outer:
        pass
    assert not outer.fired and T.eq(v, v) is T.const(1)


def test_rules_are_listed_and_composed():
    first = next(iter(T.NORMAL))
    both = T.Rules([first]) + T.EXPERT_WEIGHTS
    assert [r.name for r in both] == [first.name, "beyond the experts"] and len(both) == 2
    assert first.law in str(both)


def test_a_graph_with_more_places_has_more_time():
    """A limit that would do for one block is none for a model of a hundred; a limit inside another is that one."""
    with T.limited(1) as one:
        pass
    with T.limited(94) as many, T.limited() as inside:
        assert inside is many and many.seconds - one.seconds >= 93 * 0.15 * 5
