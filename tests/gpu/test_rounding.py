"""Rows rounded on the way into a product: the kernel's are those of the IR's record, and the experts' are the oracle's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_stored import CONCAT

pytest.importorskip("triton")

from calls import DEVICE
from test_few_bits import SCHEMES, WAYS, on_device

from moe_compile import ir, ops
from moe_compile.ir.operands import CODED
from moe_compile.lowering.triton import coded, rounding

F8 = torch.float8_e4m3fn
ROWS = {
    "e4m3, groups": ir.Rows(8, F8, 16, floor=1e-10),
    "e4m3, whole rows, no floor": ir.Rows(8, F8),
    "e4m3, floor not in the product": ir.Rows(8, F8, 32, floor=0.5, floored=False),
    "int8": ir.Rows(8, torch.int8),
    "int8, groups of 48": ir.Rows(8, torch.int8, 48, floor=1e-6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ROWS.values(), ids=ROWS)
def test_the_record(how: ir.Rows, dtype: torch.dtype) -> None:
    """The same codes and scales, of groups that differ a thousandfold, of zeros, and of what is no number."""
    x = torch.randn(37, 96, device=DEVICE) * torch.logspace(-2, 1, 96, device=DEVICE)
    x[3], x[5, 7] = 0.0, float("nan")
    x = x.to(dtype)
    want = how.rounded(x.float()).to(dtype)
    assert rounding.fits(how, 96)
    cut = DEVICE == "cpu" and dtype is torch.bfloat16  # the interpreter's bf16 is cut, not rounded
    torch.testing.assert_close(rounding.rounded(x, how), want, rtol=2**-7 if cut else 0, atol=0, equal_nan=True)


def test_what_is_left_to_torch() -> None:
    """Scales of powers of two, e5m2, groups that do not divide a row."""
    for how in (ir.Rows(8, F8, power=True), ir.Rows(8, torch.float8_e5m2), ir.Rows(8, F8, 40)):
        assert not rounding.fits(how, 96)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("rows", [(ROWS["e4m3, groups"], ROWS["e4m3, groups"]), (None, ROWS["int8"])], ids=["both", "down only"])
def test_the_oracle(rows: tuple[ir.Rows | None, ir.Rows], way: coded.Choice) -> None:
    """In fp32 the experts are float64's on the same codes: hidden rows that come close to the edge of a step may take the other one."""
    how = SCHEMES["blocks"]
    e = replace(CONCAT, hidden=32, intermediate=16, out_features=32, up_stored=how, down_stored=how, up_rows=rows[0], down_rows=rows[1])
    t = on_device(e)
    x, ids, weights, p, (add,) = ops.bundled([*t.values()], CODED)
    got = coded.forward(x, ids, weights, p, add, *ops.storage_of(ops.experts_args(e)), way)
    want = e.evaluate(**t)
    assert got is not None and float((got.double() - want).norm() / want.norm()) <= 1e-3
