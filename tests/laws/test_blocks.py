"""Products that are written block by block, added up: one sum over the whole range, and nothing where they are no blocks of one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from evaluate import World, evaluate

from moe_compile.passes import terms as T
from moe_compile.passes.terms import Term
from moe_compile.passes.terms.blocks import joined

N, K = 3, 4  # places of a block, blocks


def world() -> World:
    return World(lambda node, at: math.sin(sum((i + 1) * (n + 2) for n, i in enumerate(at)) + len(node)))


def at(place: Term, block: int) -> Term:
    return T.add(place, T.const(N * block))


def product(block: int, scale: int, weight: Any = None) -> Term:
    """s[b] · max_v |x[N b + v]| · Σ_v x[N b + v] w[N b + v]"""
    v, m = T.var(N), T.var(N)
    largest = T.reduce_("max", m, T.fn("abs", T.atom("x", (at(m, block),))))
    inner = T.mul(T.atom("x", (at(v, block),)), T.atom("w", (at(v, block) if weight is None else weight(v, block),)))
    return T.mul(T.atom("s", (T.const(scale),)), largest, T.reduce_("sum", v, inner))


@pytest.fixture(autouse=True)
def fresh() -> None:
    T.reset()


@pytest.mark.parametrize("blocks", [2, K])
def test_blocks_are_one_sum(blocks: int) -> None:
    """Numbers of a block, and what is taken over a block, go with it."""
    parts = [product(b, b) for b in range(blocks)]
    one = joined(parts)
    assert one is not None and one.op == "sum" and one.args[0].args[1] == blocks * N
    total = sum(float(evaluate(p, world())) for p in parts)  # type: ignore[arg-type]
    assert math.isclose(float(evaluate(one, world())), total, rel_tol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [product(0, 0)],
        lambda: [product(b, 0 if b == 2 else b) for b in range(K)],
        lambda: [product(b, b) for b in (1, 0, 2)],
        lambda: [product(b, b) for b in (0, 2)],
        lambda: [product(b, b, lambda v, b: v) for b in range(K)],
        lambda: [product(0, 0), T.atom("x", (T.const(0),))],
    ],
    ids=["one alone", "another's scale", "another order", "one left out", "one block's weights for all", "no sum"],
)
def test_others_stay_as_they_are(parts: Any) -> None:
    assert joined(parts()) is None
