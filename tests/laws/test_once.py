"""What is made of one value twice, twenty-odd times over, has millions of ways down: each node and each term is looked at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile.passes.terms as T
from moe_compile.passes.aten.places import least
from moe_compile.passes.recover.merged import merged_pairs
from moe_compile.passes.recover.static_rows import is_own_number
from moe_compile.passes.terms.logic import is_truth, reads

TIMES = 23


def often(x, f: Callable):
    for i in range(TIMES):
        x = f(x, i)
    return x


@pytest.fixture(autouse=True)
def own_terms():
    T.reset()
    yield
    T.reset()


def rows(i: int) -> T.Term:
    """An element of a tensor of its own."""
    return T.atom(f"mask{i}", (T.named("t", 5),))


def test_least_index():
    """where(mask, y, 2 y + 1) of ids, and where(z < k, ...) whose conditions say something of what is below them."""
    start = T.named("e", 7)

    def masked(y: T.Term, i: int) -> T.Term:
        return T.mk("ite", T.mk("eq", rows(i), T.const(0)), y, T.add(T.const(1), T.mul(T.const(2), y)))

    def known(y: T.Term, i: int) -> T.Term:
        return T.mk("ite", T.mk("lt", rows(i), T.const(i)), y, T.add(T.const(1), y))

    everything = T.mk("max", T.var(3, "v"), T.add(start, *(rows(i) for i in range(TIMES))))

    assert least(often(start, masked)) == 0
    assert least(often(rows(TIMES), masked)) is None
    assert least(often(rows(TIMES), masked), given=3) == 1
    assert least(often(start, known)) == 0
    assert least(often(everything, known), given=0) is None, "conditions that differ on every way: too many"


def test_truth_values():
    def either(y: T.Term, i: int) -> T.Term:
        return T.mk("ite", rows(i), y, T.mk("mul", y, T.mk("eq", rows(i), T.const(1))))

    assert is_truth(often(T.mk("eq", rows(0), T.const(1)), either))
    assert not is_truth(often(rows(TIMES), either))
    assert reads(often(rows(0), lambda y, i: T.mk("mod", T.mk("add", y, T.mk("fdiv", y, T.const(i))), T.const(9))))
    assert not reads(often(T.named("e", 7), lambda y, i: T.mk("mod", T.mk("add", y, T.mk("fdiv", y, T.const(i))), T.const(9))))


class Merged(nn.Module):
    """w + d, d = s · b a doubled again and again; with `near` one of them is no product."""

    def __init__(self, near: bool):
        super().__init__()
        self.w, self.a, self.b, self.near = (
            nn.Parameter(torch.ones(4, 6)),
            nn.Parameter(torch.ones(2, 6)),
            nn.Parameter(torch.ones(4, 2)),
            near,
        )

    def forward(self, x: Tensor) -> Tensor:
        low = self.b @ self.a * 0.5
        return x @ (self.w + often(torch.tanh(low) if self.near else low, lambda y, i: y + y * 0.5)).T


@pytest.mark.parametrize("near", [False, True])
def test_adapter_that_is_added(near: bool):
    m = Merged(near)
    graph = make_fx(lambda x, *ps: torch.func.functional_call(m, dict(zip(("w", "a", "b"), ps)), x))(torch.ones(3, 6), m.w, m.a, m.b).graph
    assert bool(merged_pairs(graph)) is not near


def test_number_of_its_own():
    def made(x: Tensor, s: Tensor) -> Tensor:
        return x / often(s, lambda y, i: y * (y * 0.5))

    graph = make_fx(made)(torch.ones(3), torch.ones(())).graph
    divided = next(n for n in graph.nodes if n.op == "output").args[0]
    assert is_own_number(divided.args[1]) and not is_own_number(divided)
