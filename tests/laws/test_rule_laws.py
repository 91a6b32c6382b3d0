"""Every rule has a test of its own law: what it makes of a term has that term's value, also just beside its left side."""

from __future__ import annotations

import pytest
import samples
from random_terms import Source, difference

import moe_compile.passes.terms as T

ALL = list(T.NORMAL + T.EXPERT_WEIGHTS)
SOURCES = 300


@pytest.fixture(autouse=True)
def own_terms():
    T.reset()
    yield
    T.reset()


def test_every_rule_has_a_test_of_its_own():
    names = [r.name for r in ALL]
    assert len(set(names)) == len(names)
    assert set(names) == set(samples.SAMPLES), "rules without samples, or samples without a rule"
    assert all(r.law and r.heads for r in ALL)


@pytest.mark.parametrize("rule", ALL, ids=lambda r: r.name)
def test_law(rule: T.Rule):
    fired = missed = counted = 0
    for seed in range(SOURCES):
        if seed % 50 == 0:
            T.reset()
        source = Source(seed, symbolic=seed % 3 == 0)
        source.facts = T.facts()
        t = samples.SAMPLES[rule.name](source)
        made = rule.fire(t, T.Rewriter(T.NORMAL, T.facts()).facts) if t.op in rule.heads else None
        if made is None:
            missed += 1
            continue
        fired += 1
        values, problem = difference(t, made, source, 6, seed)
        counted += values
        assert not problem, f"{rule.name}: {rule.law}\n{problem}"
    assert fired >= SOURCES // 20 and counted >= SOURCES // 10, f"fired {fired} times, compared {counted} values"
    assert missed, "no sample misses the rule"
