"""A device's own experts by hand: ids less the first one's number, those of others put to 0.

Where others' ids become an expert's, their rows stay, weighed with 0. Each spelling with its verdict; near misses beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import Block, assert_equal, both, compiled
from torch import Tensor, nn

from moe_compile.passes import terms as T
from moe_compile.passes.aten.places import least
from moe_compile.report import Report, collecting

ALL, FIRST, N, K, H, I = 8, 4, 4, 2, 16, 8


class Local(nn.Module):
    """A router of 8 experts, of which 4 .. 7 are here; `dispatch` is one of the forms below."""

    def __init__(self, dispatch: Callable[..., Tensor], local: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, ALL, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(N, 2 * I, H) * 0.3), nn.Parameter(torch.randn(N, H, I) * 0.3)
        self.dispatch, self.local = dispatch, local

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K)
        ids, w = self.local(ids, w)
        return self.dispatch(x, ids, w, self.up, self.down)


def act(h: Tensor) -> Tensor:
    g, u = h.chunk(2, -1)
    return F.silu(g) * u


def batched(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    flat = ids.reshape(-1)
    h = act(torch.bmm(up[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1))
    return (torch.bmm(down[flat], h.unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)).view(-1, K, H).sum(1)


def grouped(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor, count: Any = None) -> Tensor:
    """The counts are those of a bincount, of which more may be there than experts."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=N)[:N] if count is None else count(flat)
    ends = counts.cumsum(0).to(torch.int32)
    h = act(F.grouped_mm(x[order // K].bfloat16(), up.bfloat16().mT, offs=ends))
    y = F.grouped_mm(h, down.bfloat16().mT, offs=ends).to(w.dtype) * w.reshape(-1)[order, None]
    return torch.zeros_like(x).index_add(0, order // K, y)


def grouped_backwards(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Left: as many rows are each expert's as the experts have from behind."""
    return grouped(x, ids, w, up, down, lambda flat: torch.bincount(N - 1 - flat, minlength=N)[:N])


def product(ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    mask = (ids >= FIRST) & (ids < FIRST + N)
    return (ids - FIRST) * mask, w * mask.float()


def in_place(ids: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    local, w = ids - FIRST, w.clone()
    foreign = (local < 0) | (local >= N)
    local[foreign] = 0
    w[foreign] = 0
    return local, w


def run(module: nn.Module, f: Any, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    y = f(x)
    return [y, *torch.autograd.grad((y * torch.arange(H)).sum(), (x, *module.parameters()))]


def check(module: nn.Module, x: Tensor, tolerance: float) -> Report:
    with collecting() as report:
        got = run(module, compiled(module, inner="aot_eager"), x)
    wide = copy.deepcopy(module).double()
    for a, b in zip(got, run(wide, wide, x.double()), strict=True):
        assert float((a.detach() - b.detach()).norm() / b.detach().norm()) < tolerance
    return report


@pytest.mark.parametrize(("dispatch", "local", "fused"), [
    (grouped, product, True), (grouped, in_place, True), (batched, in_place, True), (grouped_backwards, product, False),
])  # fmt: skip
def test_own_experts(dispatch: Callable[..., Tensor], local: Callable[..., Any], fused: bool) -> None:
    """The verdict; eager's result and gradients in float64."""
    report = check(Local(dispatch, local), torch.randn(9, H), 1e-5 if dispatch is batched else 2e-2)
    assert len(report.blocks) == fused, str(report)


@pytest.mark.parametrize(("low", "t"), [
    (0, lambda x: T.mul(T.not_(T.lt(x, T.const(4))), T.add(x, T.const(-4)))),
    (-4, lambda x: T.mul(T.lt(x, T.const(4)), T.add(x, T.const(-4)))),
    (None, lambda x: T.mul(T.lt(x, T.const(4)), T.mk("a", "w", ()))),
    (-1, lambda x: T.mul(T.lt(T.const(-1), T.add(x, T.const(-1.7))), T.add(x, T.const(-1.7)))),
    (-1, lambda x: T.mul(T.eq(T.fdiv(T.add(x, T.const(-1)), T.const(-2)), T.const(0)), T.add(x, T.const(-1)))),
])  # fmt: skip
def test_least_of_what_a_condition_multiplies(low: int | None, t: Callable[[T.Term], T.Term]) -> None:
    """[c] · x is 0 or at least what x is where c holds: of numbers with a fraction, of which -0.7 is above -1, no more than that."""
    term = t(T.var(8, "e"))
    assert term.op == "mul" and least(term) == low


class Rounded(Block):
    """Ids with a fraction: 0 less 0.7 is -1 when it is rounded, which is the last expert."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        return self.gathered(x, (ids - 0.7).round().long(), w)


def test_ids_that_are_rounded_below_zero() -> None:
    report, got, want = both(Rounded(), torch.randn(9, H))
    assert len(report.blocks) == 1, str(report)
    assert_equal(got, want)
