"""Sizes that coincide, and sizes that probes make small: what is recovered does not depend on them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile.passes.prove import engine

EXPERTS, K, WIDTH = 40, 2, 96


class Gathered(nn.Module):
    """Softmax routing with a selection bias [1, E], as Ernie writes it; weights gathered by id; gate and up side by side or alternating."""

    def __init__(self, alternating: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Parameter(torch.randn(EXPERTS, WIDTH) * WIDTH**-0.5)
        self.bias = nn.Parameter(torch.randn(1, EXPERTS) * 0.1) if bias else None
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * WIDTH**-0.5)
        self.alternating = alternating

    def forward(self, x: Tensor) -> Tensor:
        scores = F.softmax(F.linear(x.float(), self.router.float()), dim=1, dtype=torch.float)
        ids = torch.topk(scores if self.bias is None else scores + self.bias.squeeze(), K, dim=-1)[1]
        w = torch.gather(scores, -1, ids)
        w = (w / w.sum(-1, keepdim=True)).to(x.dtype)
        h = torch.einsum("tkoi,ti->tko", self.up[ids], x)
        g, u = (h[..., ::2], h[..., 1::2]) if self.alternating else h.chunk(2, -1)
        return (torch.einsum("tkoi,tki->tko", self.down[ids], F.silu(g) * u) * w[..., None]).sum(1)


def check(block: Gathered, tokens: int) -> None:
    """Fused, and as eager computes it."""
    torch._dynamo.reset()
    engine.forget()
    x = torch.randn(tokens, WIDTH)
    with torch.no_grad():
        got = torch.compile(block, backend="moe_fused", dynamic=False, options={"inner": "eager"})(x)
        torch.testing.assert_close(got, block(x), rtol=1e-4, atol=1e-5)
    report = moe_compile.last_report()
    assert report is not None and len(report.blocks) == 1, [r.reason for r in report.rejected] if report else None


@pytest.mark.parametrize("tokens", [1, 2, EXPERTS, WIDTH])
def test_numbers_of_tokens(tokens: int) -> None:
    """One token: the bias [1, E] has the shape of the logits. As many tokens as experts, or as a width."""
    check(Gathered(), tokens)


@pytest.mark.parametrize("bias", [False, True])
def test_alternating_columns_get_small(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice that begins at 1 with step 2 keeps that when its dimension gets small: at the graph's own sizes this is too much work."""
    monkeypatch.setattr(engine, "WORK", 5_000_000)
    check(Gathered(alternating=True, bias=bias), 48)
