"""A number on every expert's output inside of a loop: the weights times it are what the experts are combined with."""

from __future__ import annotations

import copy

import pytest
import torch
from captured import Counter, H, Loop, compiled
from torch import Tensor

from moe_compile.report import collecting


class Numbered(Loop):
    """A number on every expert's output, as `routed_scaling_factor` where it stands in the loop."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.factor = of, 0.3

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            factor = self.factor if self.of == "all" or e % 2 else 1.0
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None] * factor)
        return out


@pytest.mark.parametrize(("of", "captured"), [("all", 1), ("every other", 0)])
def test_a_number_on_every_output(of: str, captured: int) -> None:
    """Verdict: fused, with c w as weights: w = (c w) / c. Near miss: a number on every other expert's output."""
    m, x, counter = Numbered(of).double(), torch.randn(7, H, dtype=torch.float64), Counter()
    twin = copy.deepcopy(m)
    with collecting() as report:
        got, want = compiled(m, counter)(x), twin(x)
    assert counter.ops == captured and bool(report.rejected) == (not captured), str(report)
    for y in (got, want):
        y.square().sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(m.gate.weight.grad, twin.gate.weight.grad)
    torch.testing.assert_close(m.down.grad, twin.down.grad)
