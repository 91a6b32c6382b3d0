"""A tiny block with its parts as methods, and what comes of compiling one: for tests that change one thing around it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from catalogue.check import OPTIONS, difference_problem
from torch import Tensor, nn

from moe_compile.report import Report, collecting

T, H, I, E, K = 9, 16, 8, 4, 2


class Block(nn.Module):
    """x [T, H] through K of E experts, down silu(up x)."""

    def __init__(self, experts: int = E) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, experts, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(experts, I, H) * 0.3), nn.Parameter(torch.randn(experts, H, I) * 0.3)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = self.router(x).softmax(-1).topk(K)
        return w, ids

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up[e])), self.down[e])

    def gathered(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        h = F.silu(torch.einsum("th,tkih->tki", x, self.up[ids]))
        return (torch.einsum("tki,tkhi->tkh", h, self.down[ids]) * w[..., None]).sum(1)

    def loop(self, x: Tensor, ids: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.zeros_like(x) if out is None else out
        for e in range(len(self.up)):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * w[token, slot, None])
        return out

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        return self.gathered(x, ids, w)


def tensors(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def compiled(module: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="moe_fused", options=OPTIONS | options)


def both(module: nn.Module, *inputs: Tensor, **options: Any) -> tuple[Report, list[Tensor], list[Tensor]]:
    """(report, the compiled module's results, eager's) in inference, each on inputs (and buffers) of its own."""
    twin = copy.deepcopy(module)
    mine, theirs = (copy.deepcopy(inputs) for _ in range(2))
    with torch.no_grad(), collecting() as report:
        got = tensors(compiled(module, **options)(*mine))
        want = tensors(twin(*theirs))
    return report, got, want


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.stride() == b.stride(), (i, a.stride(), b.stride())
        assert not difference_problem(a, b), i


def told(report: Report) -> list[str]:
    return [f"{r.stage}: {r.reason}" for r in report.rejected] + [b.note for b in report.blocks if b.note]
