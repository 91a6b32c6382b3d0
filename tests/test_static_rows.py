"""Rows that are divided by constants before they are rounded: which numbers stand in a product's sum and which beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from small import Block, E, assert_equal, both
from torch import Tensor

F8 = torch.float8_e4m3fn


class Scaled(Block):
    """x [T, H]; weights in float8 times one constant, products by `_scaled_mm`."""

    def __init__(self) -> None:
        super().__init__()
        up, down = self.up.repeat(1, 2, 1), self.down.repeat(1, 1, 2)  # a product wants sixteen
        del self.up, self.down
        self.register_buffer("up", (up.detach() * 100).to(F8))
        self.register_buffer("down", (down.detach() * 100).to(F8))

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        by = torch.tensor(0.01)
        q = (x / by).clamp(-448, 448).to(F8)
        return torch._scaled_mm(q, w.t(), scale_a=by, scale_b=torch.tensor(0.013), out_dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        full = torch.zeros(len(x), E).scatter(1, ids, w)
        return sum(self.product(F.silu(self.product(x, self.up[e])), self.down[e]) * full[:, e, None] for e in range(E))


def test_numbers_of_the_rounded_activation_stay_with_it() -> None:
    """silu(0.013 g) is 0.013 g sigmoid(..): that number is rounded with it, and another 0.013 is the down projection's."""
    report, got, want = both(Scaled(), torch.randn(9, 16), validate=False)
    (block,) = report.blocks
    assert block.ir.experts.up_rows.step == 0.01
    assert_equal(got, want)
