"""Where `index_add_` has no order, a token's rows are added slot by slot: the same sums, forward and backward, bitwise each time."""

from __future__ import annotations

import pytest
import torch

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.lowering.reference import rows

T, E, K, H, I = 9, 5, 3, 12, 8


@pytest.mark.parametrize("identity", [0, 2], ids=["", "identity experts"])
@pytest.mark.parametrize("early", [False, True], ids=["", "weights on the input"])
def test_by_slots(identity: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    e = ir.Experts(E, H, I, H, ir.Form.CONCAT, act.SWIGLU, num_identity=identity, weight_on_input=early)
    x, w = torch.randn(T, H, requires_grad=True), torch.rand(T, K, requires_grad=True)
    ids = torch.randint(-1, E + identity, (T, K))
    up, down = torch.randn(E, 2 * I, H, requires_grad=True), torch.randn(E, H, I, requires_grad=True)
    grad = torch.randn(T, H)

    def run() -> list[torch.Tensor]:
        out = ops.anywhere.experts_fwd(x, ids, w, [up], [down], [], [], None, *ops.experts_args(e))
        back = ops.anywhere.experts_bwd(grad, out[1], x, ids, w, [up], [down], [], [], *ops.experts_args(e), [True] * 4)
        return [out[0], *back]

    with torch.no_grad():
        want = run()
        monkeypatch.setattr(rows, "in_order", lambda device: False)
        got, again = run(), run()
    assert all(map(torch.equal, got, again))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
