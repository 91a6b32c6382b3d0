"""Loops over the experts that were hit, in the router's own function, where some numbers of the router stand for no expert."""

from __future__ import annotations

import pytest
import torch
from small import Block, E, H, K, assert_equal, both, told
from torch import Tensor, nn


class Null(Block):
    """Verdict: fused. The last two numbers are skipped: examples in which they were chosen have shown that nothing goes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E + 2, bias=False)

    def weights(self, w: Tensor, ids: Tensor) -> Tensor:
        return w

    def number(self, e: int) -> int | None:
        return e if e < E else None

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        w, out = self.weights(w, ids), torch.zeros_like(x)
        for e in ids.unique().tolist():
            expert = self.number(e)
            if expert is None:
                continue
            token, slot = torch.where(ids == e)
            out[token] += self.expert(x[token], expert) * w[token, slot, None]
        return out


class NullNormalised(Null):
    """Verdict: fused, the weights as written. They are normalised over what is an expert."""

    def weights(self, w: Tensor, ids: Tensor) -> Tensor:
        w = w.masked_fill(ids >= E, 0.0)
        return w / (w.sum(-1, keepdim=True) + 1e-9)


class NullWrapped(Null):
    """Near miss. Verdict: left. The last two numbers stand for the first two experts."""

    def number(self, e: int) -> int:
        return e % E


@pytest.mark.parametrize("cls", [Null, NullNormalised, NullWrapped])
def test_numbers_without_an_expert(cls: type[Null]) -> None:
    report, got, want = both(cls(), torch.randn(33, H))
    assert_equal(got, want)
    assert (len(report.blocks) == 1) is (cls is not NullWrapped), told(report)
