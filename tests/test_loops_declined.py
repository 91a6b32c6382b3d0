"""A reading that was declined speaks for its own module alone: a good one of the same classes is read before it and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from moe_compile.loops import capture, declined

E, K, H, I = 4, 2, 16, 8


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    capture.pending()
    yield
    torch._dynamo.reset()
    capture.pending()


class Good(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, I, bias=False), nn.Linear(I, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))  # type: ignore[no-any-return]


class Bad(Good):
    """Its rows are mixed with each other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)).cumsum(0))  # type: ignore[no-any-return]


class Scaled(Bad):
    """One that differs from the others by a number, which its code reads."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Scaled.made += 1
        self.scale = float(Scaled.made)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Block(nn.Module):
    """Every expert in turn: nothing here depends on data but sizes."""

    def __init__(self, experts: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E, bias=False), nn.ModuleList(experts() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * w[t, j, None])
        return out


class Skipping(Block):
    """Dynamo gives up on the function for the branch in its loop, and never looks at its code again."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            if t.numel() == 0:
                continue
            out.index_add_(0, t, self.experts[e](x[t]) * w[t, j, None])
        return out


class Hit(Block):
    """The router is a graph of its own, and the loop over the experts that were hit comes after it."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.dispatch(x, ids, w)

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.experts[e](x[t]) * w[t, j, None])
        return out


def _fused(model: nn.Module, *, times: int = 2) -> int:
    """How many calls of the fused op the compiled model makes, whose outputs are the model's."""
    x = torch.randn(9, H)
    compiled = torch.compile(model, backend="moe_fused", options={"inner": "eager"})
    for _ in range(times):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        compiled(x)
    return sum(e.name == "moe_compile::experts" for e in seen.events())


@pytest.mark.parametrize("block", [Block, Skipping, Hit])
@pytest.mark.parametrize("order", [(Bad, Good, Bad, Good), (Good, Bad, Good)])
@torch.no_grad()
def test_a_declined_block_hides_no_good_one(block: type[Block], order: Sequence[type[Good]]) -> None:
    for experts in order:
        assert _fused(nn.Sequential(block(experts))) == (experts is Good)
    if len(order) > 3:  # the other order is a part of this one
        torch._dynamo.reset()
        assert _fused(nn.Sequential(*map(block, order))) == order.count(Good)


@torch.no_grad()
def test_of_more_kinds_than_are_kept_apart_what_was_fused_goes_on() -> None:
    """The code is given up for all after some versions; a block that was compiled before that runs as it was compiled."""
    layers = [Good, *[Scaled] * declined.MOST, Good, Scaled, Good]
    assert _fused(nn.Sequential(*map(Skipping, layers))) == 3


@pytest.mark.parametrize(("block", "layers", "frames"), [(Block, 3, 1), (Skipping, 9, 5), (Hit, 9, 9)])
@torch.no_grad()
def test_equal_layers_that_are_declined_share_their_code(block: type[Block], layers: int, frames: int) -> None:
    """More layers than Dynamo compiles one function for, where each is a frame of its own."""
    torch.manual_seed(0)
    counters.clear()
    assert _fused(nn.Sequential(*(block(Bad) for _ in range(layers))), times=1) == 0
    assert counters["frames"]["total"] <= frames
