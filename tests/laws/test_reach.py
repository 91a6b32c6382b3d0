"""How far codes of rows at the edge of a step move a result: numbers computed in another order stay within it, another scale does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_compile import ir
from moe_compile.ir import Rows
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import Operands
from moe_compile.ir.reach import reach, steps
from moe_compile.loops import confirm

E, H, I, T, G = 4, 32, 16, 400, 8
F8 = torch.float8_e4m3fn
GROUPS = Rows(8, F8, G, 1e-12 / 448)
KINDS = {
    "groups": GROUPS,
    "powers of two": replace(GROUPS, power=True),
    "whole rows, no floor": Rows(8, F8),
    "e5m2": Rows(8, torch.float8_e5m2, G, 1e-6),
    "int8, the floor in the quotient alone": Rows(8, torch.int8, G, 2e-3, floored=False),
    "static": Rows(8, F8, static=True, step=0.02, low=-448.0, top=448.0),
    "static int8": Rows(8, torch.int8, static=True, step=0.02, low=-128.0, top=127.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("near", [2e-5, 2**-7])
def test_rows_that_are_off_by_so_much_stay_within_their_steps(kind: str, near: float) -> None:
    """And most numbers of float32 are at no edge at all."""
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, generator=gen, dtype=torch.float64)
    x[:, :G] = (x[:, :G] * 8).round() / 8  # many at an edge
    far = steps(KINDS[kind], x, near * x.abs())
    before = KINDS[kind].rounded(x)
    for _ in range(8):
        at = x * (1 + near * (2 * torch.rand(x.shape, generator=gen, dtype=x.dtype) - 1))
        off = (KINDS[kind].rounded(at) - before).abs()
        assert bool((off <= far + 2.1 * near * before.abs()).all())
    assert near > 1e-3 or float((far == 0).double().mean()) > 0.85


def experts(rows: Rows, down: Rows | None) -> tuple[ir.Experts, Operands[Tensor]]:
    gen = torch.Generator().manual_seed(2)
    e = ir.Experts(E, H, I, H, ir.Form.CONCAT, act.SWIGLU, up_rows=rows, down_rows=down)
    return e, Operands(up=(torch.randn(E, 2 * I, H, generator=gen) / 4,), down=(torch.randn(E, H, I, generator=gen) / 4,))


def routed() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(3)
    ids = torch.rand(T, E, generator=gen).topk(2).indices
    return torch.randn(T, H, generator=gen), ids, torch.rand(T, 2, generator=gen)


class _Once(Rows):
    """Rows whose first group in one row of an expert has another scale by 3 %: one row in two hundred."""

    def codes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        q, s = super().codes(rows)
        s = s.clone()
        s[0, 0] *= 1.03
        return q, s


@pytest.mark.parametrize("down", [None, GROUPS], ids=["up alone", "both"])
def test_float32_is_within_reach_and_another_scale_in_one_row_is_not(down: Rows | None) -> None:
    e, p = experts(GROUPS, down)
    x, ids, w = routed()
    exact, single = (e.run(x, ids, w, p, None, t).double() for t in (torch.float64, torch.float32))
    far = reach(e, x, ids, w, p, 2e-5)
    ends = [exact - far, exact + far]
    assert confirm._agree(exact, single, 2e-5, ends)
    near = replace(e, up_rows=_Once(**vars(GROUPS)))
    other = near.run(x, ids, w, p, None, torch.float64)
    rows = ((other - exact).abs().amax(-1) > 2e-5 * exact.abs().amax(-1)).sum()
    assert 1 <= rows <= E and bool(((other - exact).abs().amax(-1) <= 0.1 * exact.abs().amax(-1)).all())  # what one in a hundred might be
    assert not confirm._agree(exact, other, 2e-5, ends)


def test_what_is_infinite_agrees_with_nothing():
    """An infinite row, or an infinite bound, would let any number pass: both are refused."""
    a, far = torch.ones(2, 4, dtype=torch.float64), torch.full((2, 4), float("inf"), dtype=torch.float64)
    assert confirm._agree(a, a, 1e-5, [a])
    assert not confirm._agree(a, far, 1e-5)
    assert not confirm._agree(a, 5 * a, 1e-5, [far])
