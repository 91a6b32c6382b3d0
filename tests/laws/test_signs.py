"""What is said to be positive is, for numbers of both signs; a neighbour of each that need not be is not said to be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moe_compile.passes.aten.signs import is_positive

POSITIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda x, m: x.softmax(-1),
    "product": lambda x, m: torch.sigmoid(x) * 2.5,
    "normalised": lambda x, m: x.exp() / x.exp().sum(-1, keepdim=True),
    "sum": lambda x, m: torch.sigmoid(x) + x.softmax(-1),
}
NOT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "number below zero": lambda x, m: torch.sigmoid(x) * -2.5,
    "alpha below zero": lambda x, m: torch.add(torch.sigmoid(x), x.softmax(-1), alpha=-3),
    "rounded quotient": lambda x, m: torch.div(x.softmax(-1), torch.sigmoid(x), rounding_mode="floor"),
    "difference": lambda x, m: torch.sigmoid(x) - x.softmax(-1),
    "raw": lambda x, m: x * torch.sigmoid(x),
    "masked before": lambda x, m: x.masked_fill(m, -torch.inf).softmax(-1),
    "masked behind": lambda x, m: torch.where(m, 0.0, torch.sigmoid(x)),
}


def said(f: Callable[[Tensor, Tensor], Tensor]) -> bool:
    graph = make_fx(f)(torch.randn(3, 6), torch.zeros(3, 6, dtype=torch.bool)).graph
    return is_positive(next(n for n in graph.nodes if n.op == "output").args[0])


def smallest(f: Callable[[Tensor, Tensor], Tensor]) -> float:
    g = torch.Generator().manual_seed(0)
    return float(f(torch.randn(50, 6, generator=g) * 3, torch.rand(50, 6, generator=g) < 0.2).min())


@pytest.mark.parametrize("name", POSITIVE)
def test_positive(name: str) -> None:
    assert said(POSITIVE[name]) and smallest(POSITIVE[name]) > 0


@pytest.mark.parametrize("name", NOT)
def test_not_positive(name: str) -> None:
    assert not said(NOT[name]) and smallest(NOT[name]) <= 0


def test_every_node_is_looked_at_once() -> None:
    """x * x, 23 times: 2^23 ways down, to numbers that are positive, to any, and to such as a condition makes -inf."""

    def squared(x: Tensor) -> Tensor:
        for _ in range(23):
            x = x * x
        return x

    assert said(lambda x, m: squared(torch.sigmoid(x)))
    assert said(lambda x, m: squared(x).softmax(-1))
    assert not said(lambda x, m: squared(x.masked_fill(m, -torch.inf)).softmax(-1))
