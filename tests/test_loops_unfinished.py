"""Frames of a module whose `__init__` is at work: it has no table of submodules yet. Verdict: they compile, and nothing is read of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from small import Block, H, T
from torch import Tensor, nn

from moe_compile.loops import flags


class Late(Block):
    """It computes before `nn.Module.__init__` has run, and breaks the graph there, which makes its `__init__` a frame of its own."""

    def __init__(self) -> None:
        mean = torch.ones(2).mean()
        torch._dynamo.graph_break()
        first = self.scaled(mean)
        super().__init__()
        self.first = first

    def scaled(self, x: Tensor) -> Tensor:
        return F.relu(x) + 1.0

    def expert(self, x: Tensor, e: int) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up[e])), self.down[e])

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.loop(x, ids, w)


def test_a_module_without_submodules_yet_is_looked_at() -> None:
    unfinished = Late.__new__(Late)
    assert "_modules" not in vars(unfinished)
    assert flags.whole_blocks([unfinished]) == frozenset()
    assert not flags.wanted(Late.scaled.__code__, {}, [unfinished])


def test_a_finished_one_beside_it_is_still_read() -> None:
    """Near miss: the loop of the module that is whole is found."""
    whole = Late()
    assert flags.wanted(Late.forward.__code__, {}, [Late.__new__(Late), whole])
    assert flags.whole_blocks([Late.__new__(Late), whole]) == flags.whole_blocks([whole])


def test_a_module_made_in_a_compiled_function() -> None:
    def run(x: Tensor) -> Tensor:
        block: nn.Module = Late()
        return x * block.first

    x = torch.randn(T, H)
    torch.testing.assert_close(torch.compile(run, backend="moe_fused", options={"inner": "aot_eager"})(x), run(x))
