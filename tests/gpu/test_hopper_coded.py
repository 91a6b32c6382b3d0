"""The warp-specialised kernel for weights in few bits, on a Hopper GPU, against the IR's float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from calls import DEVICE

from moe_compile import ir, ops
from moe_compile.ir import scalar
from moe_compile.ir.operands import Operands
from moe_compile.lowering.triton import coded

F8, BF16 = torch.float8_e4m3fn, torch.bfloat16
on_hopper = pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX4 = ir.Stored(4, torch.uint8, True, 1, 32, 2, (0, 1), values=(*_HALF, *(-v for v in _HALF)), exponents=True)
BLOCKS = ir.Stored(8, F8, True, 128, 128)
TILE = coded.Tile(128, 128, 64, 4, 3, 8, hopper=True)
EXPERTS, SLOTS = 5, 2


def meaning(how: ir.Stored, hidden: int, inter: int, form: ir.Form = ir.Form.CONCAT, **rest: Any) -> ir.Experts:
    return ir.Experts(EXPERTS, hidden, inter, hidden, form, scalar.SWIGLU, dtype=BF16, up_stored=how, down_stored=how, **rest)


CASES = {
    "blocks": meaning(BLOCKS, 256, 384),
    "one scale a matrix": meaning(replace(BLOCKS, rows=0, columns=0), 128, 128),
    "blocks across gate and up, ragged depth and columns": meaning(BLOCKS, 272, 208),
    "interleaved": meaning(BLOCKS, 256, 256, ir.Form.INTERLEAVED, up_bias=True, down_bias=True),
    "weight on the input": meaning(BLOCKS, 256, 128, weight_on_input=True),
    "mxfp4": meaning(MX4, 192, 256),
    "mxfp4, interleaved, biases": meaning(MX4, 320, 288, ir.Form.INTERLEAVED, up_bias=True, down_bias=True),
    "mxfp4 by bits": meaning(replace(MX4, exponents=ir.stored.Exponent.BITS), 128, 128),
}


def codes_of(how: ir.Stored, rows: int, columns: int) -> Tensor:
    """Any code but those that are no number."""
    if how.axis:
        return torch.randint(0, 256, (EXPERTS, rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    bits = torch.randint(0, 256, (EXPERTS, rows, columns), dtype=torch.uint8, device=DEVICE)
    return torch.where(bits & 0x7F == 0x7F, 0, bits).view(F8)


def scales_of(how: ir.Stored, rows: int, columns: int) -> Tensor:
    shape = (EXPERTS, *how.scales_of((rows, columns)))
    if how.exponents:
        return torch.randint(115, 122, shape, dtype=torch.uint8, device=DEVICE)
    return (torch.rand(shape, device=DEVICE) + 0.3) / 2000


def tensors(e: ir.Experts, tokens: int) -> dict[str, Any]:
    how, shapes = e.up_stored, ((2 * e.intermediate, e.hidden), (e.hidden, e.intermediate))
    assert how is not None
    up, down = (codes_of(how, *s) for s in shapes)
    biases = [[torch.randn(EXPERTS, s[0], device=DEVICE).to(BF16)] if e.up_bias else [] for s in shapes]
    x = torch.randn(tokens, e.hidden, device=DEVICE).to(BF16)
    ids = torch.randint(0, EXPERTS - 1, (tokens, SLOTS), device=DEVICE)  # the last expert has no rows
    ids[0, 0] = -1
    held = {"up": [up], "down": [down], "up_bias": biases[0], "down_bias": biases[1]}
    held |= {"up_scale": [scales_of(how, *shapes[0])], "down_scale": [scales_of(how, *shapes[1])]}
    return {"x": x, "ids": ids, "weights": torch.rand(tokens, SLOTS, device=DEVICE).to(BF16), **held}


def run(e: ir.Experts, t: dict[str, Any]) -> Tensor:
    p = Operands.named(**{n: ts for n, ts in t.items() if n not in ("x", "ids", "weights")})
    c = coded.operands(t["x"], t["ids"], t["weights"], p, None, *ops.storage_of(ops.experts_args(e)))
    assert c is not None and coded.hopper_coded_calls.fits(c.x, c.up), "not for this kernel"
    out = torch.full((t["x"].shape[0], c.down.at.n), float("nan"), device=DEVICE, dtype=BF16)
    return coded._grouped(c, out, coded.Choice(TILE, TILE))


@on_hopper
@pytest.mark.parametrize("tokens", [1, 70, 700])
@pytest.mark.parametrize("name", CASES)
def test_the_oracle(name: str, tokens: int) -> None:
    """Within what rounding weights, hidden layer and result to bf16 once each costs."""
    e = CASES[name]
    t = tensors(e, tokens)
    want, got = e.evaluate(**t), run(e, t).double()
    assert float((got - want).norm() / want.norm()) <= 6e-3
    assert torch.equal(run(e, t), got.to(BF16)), "another result the second time"


@on_hopper
def test_a_code_that_is_no_number() -> None:
    """Every product with its row of the matrix is NaN, and no other."""
    e = replace(CASES["blocks"])
    t = tensors(e, 40)
    t["down"][0].view(torch.uint8)[1, 17, 5] = 0xFF
    got = run(e, t).isnan()
    hit = (t["ids"] == 1).any(1)
    assert got[hit, 17].all() and int(got.sum()) == int(hit.sum())


@on_hopper
def test_large_scales() -> None:
    """No step between a code and its number overflows: scales of 2^20."""
    e = CASES["blocks"]
    t = tensors(e, 64)
    t["up_scale"][0] *= 2.0**20
    t["down_scale"][0] *= 2.0**-20
    t["x"] *= 2.0**-20
    want = e.evaluate(**t)
    assert float((run(e, t).double() - want).norm() / want.norm()) <= 6e-3
