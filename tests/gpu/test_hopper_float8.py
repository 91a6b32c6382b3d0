"""The warp-specialised kernel that multiplies float8 rows by float8 weights, on a Hopper GPU, against the IR's float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_hopper_coded import BF16, BLOCKS, EXPERTS, F8, meaning, on_hopper, scales_of, tensors

pytest.importorskip("triton")

from calls import DEVICE

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import CODED, Operands
from moe_compile.lowering.triton import coded, hopper_float8_calls, rounding
from moe_compile.lowering.triton.coded_tiles import FLOAT8

GROUPS = ir.Rows(8, F8, 128, floor=1e-12)
ROWS = {
    "groups of 128": GROUPS,
    "whole rows, no floor": ir.Rows(8, F8),
    "floor not in the product": ir.Rows(8, F8, 128, floor=0.02, floored=False),
}


def rounding_both(e: ir.Experts, how: ir.Rows) -> ir.Experts:
    return replace(e, up_rows=how, down_rows=how)


CASES = {
    **{name: rounding_both(meaning(BLOCKS, 256, 384), how) for name, how in ROWS.items()},
    "groups of 256, a scale a matrix": rounding_both(meaning(replace(BLOCKS, rows=0, columns=0), 256, 256), replace(GROUPS, group=256)),
    "blocks of 256": rounding_both(meaning(replace(BLOCKS, rows=256, columns=256), 512, 256), GROUPS),
    "ragged depth and columns": rounding_both(meaning(replace(BLOCKS, rows=0), 272, 208), ir.Rows(8, F8)),
    "biases, weight after": rounding_both(meaning(BLOCKS, 256, 256, up_bias=True, down_bias=True), GROUPS),
    "one projection": rounding_both(replace(meaning(BLOCKS, 256, 128, ir.Form.SINGLE), activation=act.relu(act.G) ** 2), GROUPS),
}


AS_THEY_ARE = {
    "blocks": meaning(BLOCKS, 256, 384),
    "one scale a matrix": meaning(replace(BLOCKS, rows=0, columns=0), 128, 128),
    "ragged columns": meaning(replace(BLOCKS, rows=0, columns=128), 384, 384),
    "weight on the input, biases": meaning(BLOCKS, 256, 128, weight_on_input=True, up_bias=True, down_bias=True),
}


def run(e: ir.Experts, t: dict[str, Any]) -> torch.Tensor:
    p = Operands.named(**{n: ts for n, ts in t.items() if n not in ("x", "ids", "weights")})
    c = coded.operands(t["x"], t["ids"], t["weights"], p, None, *ops.storage_of(ops.experts_args(e)))
    assert c is not None and all(hopper_float8_calls.fits(c.x, w, how) for w, how in zip((c.up, c.down), c.rows)), "not for this kernel"
    out = torch.full((t["x"].shape[0], c.down.at.n), float("nan"), device=DEVICE, dtype=BF16)
    return coded._grouped(c, out, coded.Choice(FLOAT8, FLOAT8))


@on_hopper
@pytest.mark.parametrize("tokens", [1, 70, 700])
@pytest.mark.parametrize("name", CASES)
def test_the_oracle(name: str, tokens: int) -> None:
    """Hidden rows that come close to the edge of a step may take the other code: so do those of torch."""
    e = CASES[name]
    t = tensors(e, tokens)
    if e.form is ir.Form.SINGLE:
        t["up"], t["up_scale"] = ([t["up"][0][:, : e.intermediate].contiguous()], [scales_of(BLOCKS, e.intermediate, e.hidden)])
    want, got = e.evaluate(**t), run(e, t).double()
    assert float((got - want).norm() / want.norm()) <= 2.5e-2
    assert torch.equal(run(e, t), got.to(BF16)), "another result the second time"


@on_hopper
@pytest.mark.parametrize("tokens", [1, 70, 700])
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_rows_in_two_parts(name: str, tokens: int) -> None:
    """No more than rounding the hidden layer and the result to bf16 costs."""
    e = AS_THEY_ARE[name]
    t = tensors(e, tokens)
    t["x"] *= torch.logspace(-3, 3, e.hidden, device=DEVICE).to(BF16)
    want, got = e.evaluate(**t), run(e, t).double()
    assert float((got - want).norm() / want.norm()) <= 4e-3
    assert torch.equal(run(e, t), got.to(BF16)), "another result the second time"


def test_two_parts_are_the_row() -> None:
    """Exact within 2^-9 of a block's largest number; below, off by 2^-17 of it at most. A block with an infinity is no number."""
    x = (torch.randn(9, 256, device=DEVICE) * torch.logspace(-7, 7, 256, device=DEVICE)).to(BF16)
    x[3], x[4, :128], x[5, 7], x[6, 200] = 0.0, 1e-38, float("nan"), -float("inf")
    codes, scales = rounding.in_two(x)
    parts = codes.view(F8).float().view(9, 2, 2, 128)
    got, want = (parts.sum(2) * scales[..., None]).cpu(), x.cpu().float().view(9, 2, 128)
    largest = want.abs().amax(-1, keepdim=True)
    near = want.abs() > largest * 2**-9
    assert got[5, 0, 7].isnan() and got[6, 1].isnan().all() and int(got.isnan().sum()) == 1 + 128
    rows = [i for i in range(9) if i not in (4, 5, 6)]
    assert torch.equal(got[rows][near[rows]], want[rows][near[rows]])
    assert bool(((got - want).abs() <= largest * 2**-17)[rows].all()) and float(got[4, 0].abs().max()) <= 2e-38


@on_hopper
def test_the_product() -> None:
    """Of rows that are codes: no more than the rounding of the result and of the hidden layer, and the sums are fp32's."""
    e = replace(CASES["groups of 128"], down_rows=None)
    e = replace(e, down_stored=replace(BLOCKS))
    t = tensors(e, 300)
    p = Operands.named(**{n: ts for n, ts in t.items() if n not in ("x", "ids", "weights")})
    c = coded.operands(t["x"], t["ids"], t["weights"], p, None, *ops.storage_of(ops.experts_args(e)))
    assert c is not None
    out = torch.empty(300, c.down.at.n, device=DEVICE, dtype=BF16)
    got, want = coded._grouped(c, out, coded.Choice(FLOAT8, replace(FLOAT8, float8=False))).double(), e.evaluate(**t)
    assert float((got - want).norm() / want.norm()) <= 6e-3


@on_hopper
def test_what_is_no_number() -> None:
    """A NaN code spoils the products with its row of the matrix, and no other; a NaN in a token spoils that token."""
    e = CASES["groups of 128"]
    t = tensors(e, 40)
    t["down"][0].view(torch.uint8)[1, 17, 5] = 0xFF
    t["x"][7, 3] = float("nan")
    got = run(e, t).isnan()
    hit = (t["ids"] == 1).any(1)
    known = (t["ids"][7] >= 0).any()
    assert got[hit, 17].all() and bool(got[7].all()) == bool(known)
    got[7] = False
    hit[7] = False
    assert int(got.sum()) == int(hit.sum())


@on_hopper
@pytest.mark.parametrize("e", [CASES["groups of 128"], AS_THEY_ARE["blocks"]], ids=["rounded", "in two parts"])
def test_the_op(e: ir.Experts) -> None:
    """By its plan, with the tiles that the rule chooses, on other rows each time."""
    plain = ops.experts_args(e)
    for _ in range(3):
        t = tensors(e, 150)
        p = Operands.named(**{n: ts for n, ts in t.items() if n not in ("x", "ids", "weights")})
        got = torch.ops.moe_compile.experts_stored(t["x"], t["ids"], t["weights"], *p.lists(CODED), None, *plain)
        want = e.evaluate(**t)
        assert float((got.double() - want).norm() / want.norm()) <= (2.5e-2 if e.up_rows else 4e-3)
        c = coded.operands(t["x"], t["ids"], t["weights"], p, None, *ops.storage_of(plain))
        assert c is not None and coded.choose(c) == coded.Choice(FLOAT8, FLOAT8)


def test_codes_and_scales() -> None:
    """What the product reads is the record's: code times scale."""
    x = torch.randn(9, 256, device=DEVICE) * torch.logspace(-2, 1, 256, device=DEVICE)
    x[4, :128] = 0.0
    for how in ROWS.values():
        codes, scales = rounding.coded(x, how)
        floats = codes.view(F8).float().unflatten(1, (scales.shape[1], -1)) * scales[..., None]
        torch.testing.assert_close(floats.flatten(1).cpu(), how.rounded(x.cpu()), rtol=3e-7, atol=0, equal_nan=True)


def test_what_does_not_fit() -> None:
    """Groups that cut a step, scales of powers of two, int8."""
    e = CASES["groups of 128"]
    t = tensors(e, 4)
    p = Operands.named(**{n: ts for n, ts in t.items() if n not in ("x", "ids", "weights")})
    c = coded.operands(t["x"], t["ids"], t["weights"], p, None, *ops.storage_of(ops.experts_args(e)))
    assert c is not None and c.layout.num_experts == EXPERTS
    for how in (ir.Rows(8, F8, 64), ir.Rows(8, torch.int8)):
        assert not hopper_float8_calls.fits(c.x, c.up, how)
    assert not hopper_float8_calls.fits(c.x.half(), c.up, None), "fp16 has eleven digits"
