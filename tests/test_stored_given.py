"""Ids that are given, which gather from floats that the graph makes of all experts' codes: the codes are what is read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.ir import Stored
from moe_compile.report import collecting

E, H, I, K, B = 4, 8, 8, 2, 4
F8 = torch.float8_e4m3fn


class Block(nn.Module):
    """y = Σ_k w_k down[ids_k] act(up[ids_k] x), the stacks being floats made of codes; `floats` says how."""

    def __init__(self, floats: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.floats = floats
        for name, shape in (("up", (2 * I, H)), ("down", (H, I))):
            self.register_buffer(name, (torch.randn(E, *shape) * 20).to(F8))
            self.register_buffer(f"{name}_scale", (torch.rand(E, shape[0] // B, shape[1] // B) + 0.3) / 40)

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        up, down = self.floats(self.up, self.up_scale), self.floats(self.down, self.down_scale)
        g, u = torch.einsum("th,tkoh->tko", x, up[ids]).chunk(2, -1)
        return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, down[ids]) * w[..., None]).sum(1)


def whole(q: Tensor, s: Tensor) -> Tensor:
    return q.float() * s.repeat_interleave(B, 1).repeat_interleave(B, 2)


def stacked(q: Tensor, s: Tensor) -> Tensor:
    return torch.stack([q[e].float() * s[e].repeat_interleave(B, 0).repeat_interleave(B, 1) for e in range(E)])


def of_the_next(q: Tensor, s: Tensor) -> Tensor:
    """Expert e's codes times expert e + 1's scales, but for the last one's."""
    return torch.stack([q[e].float() * s[min(e + 1, 3)].repeat_interleave(B, 0).repeat_interleave(B, 1) for e in range(E)])


@pytest.mark.parametrize(("floats", "read"), [(whole, True), (stacked, True), (of_the_next, False)])
def test_codes_are_read(floats: Callable[[Tensor, Tensor], Tensor], read: bool) -> None:
    torch._dynamo.reset()
    m, x, w = Block(floats), torch.randn(5, H), torch.rand(5, K)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(5)])
    with torch.no_grad(), collecting() as report:
        got, want = torch.compile(m, backend="moe_fused", options={"inner": "eager"})(x, ids, w), m(x, ids, w)
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert [b.ir.experts.up_stored for b in report.blocks] == ([Stored(8, F8, rows=B, columns=B)] if read else []), report.rejected
