"""Weights in few bits in the CPU's kernels: every scheme against the float64 oracle, few rows and panels of many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_stored import CONCAT, INT4, MX4, tensors
from torch import Tensor

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import CODED
from moe_compile.lowering.cpu import coded, stored

WIDE = replace(CONCAT, hidden=72, intermediate=40, out_features=72)
F8 = torch.float8_e4m3fn
SCHEMES = {
    "blocks": ir.Stored(8, F8, rows=16, columns=32),
    "blocks of a type by table": ir.Stored(8, torch.float8_e4m3fnuz, rows=5, columns=24),
    "channels": ir.Stored(8, torch.int8, rows=1),
    "bytes, zero points": ir.Stored(8, torch.int8, True, rows=1, columns=8, zeroed=ir.stored.Zero.PLAIN),
    "mxfp4": replace(MX4, columns=8),
    "mxfp4 by bits": replace(MX4, columns=16, order=(1, 0), exponents=ir.stored.Exponent.BITS),
    "int4, any order, zero points": replace(INT4, columns=8),
    "a table": ir.Stored(4, torch.uint8, rows=1, columns=8, axis=2, order=(1, 0), tabled=True),
}


def call(e: ir.Experts, t: dict[str, Any]) -> Tensor | None:
    x, ids, weights, p, (add,) = ops.bundled([*t.values()], CODED)
    return coded.forward(x, ids, weights, p, add, *ops.storage_of(ops.experts_args(e)))


def operands(e: ir.Experts, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(tokens)
    t = {k: [x.detach() for x in v] if isinstance(v, list) else v.detach() for k, v in tensors(e).items()}
    t |= {"x": torch.randn(tokens, e.hidden, generator=g), "add": torch.randn(tokens, e.out_features, generator=g)}
    t |= {"ids": torch.randint(-1, e.num_experts + 1, (tokens, 2), generator=g), "weights": torch.rand(tokens, 2, generator=g)}
    halved = {"x", "add", "up_bias", "down_bias"}
    return {k: [x.to(dtype) for x in v] if k in halved and isinstance(v, list) else v.to(dtype) if k in halved else v for k, v in t.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("how", SCHEMES.values(), ids=SCHEMES)
def test_every_scheme(how: ir.Stored, dtype: torch.dtype, tolerance: float) -> None:
    """Stacks, lists and interleaved rows; one row of an expert and whole panels."""
    for form, tokens in ((ir.Form.CONCAT, 5), (ir.Form.INTERLEAVED, 70), (ir.Form.SEPARATE, 5)):
        stacked = form is not ir.Form.SEPARATE
        e = replace(WIDE, form=form, stacked=stacked, up_stored=how, down_stored=how, up_bias=True, down_bias=True, dtype=dtype)
        t = operands(e, tokens, dtype)
        got, want = call(e, t), e.evaluate(**t)
        assert got is not None and float((got.double() - want).norm() / want.norm()) <= tolerance


@pytest.mark.parametrize("name", ["bytes, zero points", "int4, any order, zero points"])
def test_rows_past_a_panel(name: str) -> None:
    """20 rows of an expert in bf16: sums of a panel's numbers are not those of the four rows behind it, block by block of the output."""
    how = replace(SCHEMES[name], columns=64)
    e = replace(WIDE, hidden=256, intermediate=192, out_features=256, up_stored=how, down_stored=how, dtype=torch.bfloat16)
    t = operands(e, 20, torch.bfloat16)
    t["ids"] = torch.tensor([[0, -1]]).expand(20, 2).contiguous()
    got, want = call(e, t), e.evaluate(**t)
    assert got is not None and float((got.double() - want).norm() / want.norm()) <= 6e-3


def test_every_code() -> None:
    """All bytes of e4m3 that are numbers."""
    how = ir.Stored(8, F8, rows=1, columns=32)
    e = ir.Experts(1, 256, 256, 256, ir.Form.SINGLE, act.silu(act.G), up_stored=how, down_stored=how)
    t = operands(e, 3, torch.float32)
    every = torch.arange(256, dtype=torch.uint8)
    every[[0x7F, 0xFF]] = 0
    t["up"] = [every.expand(1, 256, 256).contiguous().view(F8)]
    got, want = call(e, t), e.evaluate(**t)
    assert got is not None and float((got.double() - want).norm() / want.norm()) <= 1e-6


def test_near_misses() -> None:
    """Scales that divide, packed zero points' order, transposed codes: left to `stored`, which is right about them."""
    for how in (replace(SCHEMES["blocks"], scaled=ir.stored.Scale.DIVIDES), replace(SCHEMES["mxfp4"], axis=1)):
        e = replace(WIDE, hidden=72, up_stored=how, down_stored=how)
        assert call(e, operands(e, 5, torch.float32)) is None


def test_sums_are_not_rounded_between_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in turns, bf16: as near as all at once."""
    monkeypatch.setattr(coded, "forward", lambda *args: None)
    monkeypatch.setattr(stored, "CHUNK", 1)
    how = SCHEMES["blocks"]
    e = replace(WIDE, num_experts=8, up_stored=how, down_stored=how, dtype=torch.bfloat16)
    t = operands(e, 6, torch.bfloat16)
    x, ids, weights, p, (add,) = ops.bundled([*t.values()], CODED)
    got, want = stored.forward(x, ids, weights, p, add, *ops.storage_of(ops.experts_args(e))), e.evaluate(**t)
    assert float((got.double() - want).norm() / want.norm()) <= 2e-3


def test_operands_that_were_seen_before() -> None:
    """Other tokens and other values in the same parameters."""
    e = replace(WIDE, up_stored=SCHEMES["channels"], down_stored=SCHEMES["channels"], dtype=torch.float32)
    t = operands(e, 5, torch.float32)
    for tokens in (5, 2, 7):
        other = operands(e, tokens, torch.float32)
        t |= {k: other[k] for k in ("x", "ids", "weights", "add")}
        t["up"][0].bitwise_xor_(1)
        got, want = torch.ops.moe_compile.experts_stored(*t.values(), *ops.experts_args(e)), e.evaluate(**t)
        assert float((got.double() - want).norm() / want.norm()) <= 1e-6
