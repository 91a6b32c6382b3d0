"""What an expert loop calls through functools.partial: the arguments that partial holds are part of the expert."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import Block, H, T, both, told
from torch import Tensor


def scaled(v: Tensor, by: float, *, shift: float = 0.0) -> Tensor:
    return F.silu(v) * by + shift


PARTIALS: dict[str, Callable[[], Any]] = {
    "keyword": lambda: functools.partial(F.gelu, approximate="tanh"),
    "none": lambda: functools.partial(F.gelu),
    "of the user's": lambda: functools.partial(scaled, by=3.0),
    "two keywords": lambda: functools.partial(scaled, by=3.0, shift=0.0),
    "partial of partial": lambda: functools.partial(functools.partial(scaled, by=2.0), by=5.0),
}


class Act(Block):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(self.act(F.linear(x, self.up[e])), self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.loop(x, ids, w)


@pytest.mark.parametrize("name", PARTIALS)
def test_arguments_of_a_partial(name: str) -> None:
    """Verdict: fused, with the arguments that the partial holds. Gelu and its tanh form differ by 1e-4: near misses of each other."""
    report, (got,), _ = both(model := Act(PARTIALS[name]()), x := torch.randn(T, H))
    want = model.double()(x.double())
    assert len(report.blocks) == 1, told(report)
    assert (got.double() - want).abs().max() <= 1e-6 * want.abs().max().clamp(min=1)
