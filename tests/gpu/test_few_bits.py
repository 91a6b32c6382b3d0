"""Experts in few bits on CUDA: every code, every block, the workspace by either way, against the IR's float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_stored import CONCAT, E2M1, INT4, MEANINGS, MX4, tensors
from torch import Tensor

pytest.importorskip("triton")

from calls import DEVICE

from moe_compile import ir, ops
from moe_compile.ir.operands import CODED
from moe_compile.lowering import target as target_of
from moe_compile.lowering.triton import coded, stored, stored_kernels

F8 = (torch.float8_e4m3fn, torch.float8_e5m2)
E8 = torch.float8_e8m0fnu


@pytest.mark.parametrize("dtype", [torch.int8, *F8], ids=str)
def test_every_code(dtype: torch.dtype) -> None:
    """All 256 bytes, not-a-numbers and infinities among them, are what torch says they are."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 16, 16).view(dtype)
    out = torch.empty(1, 16, 16, device=DEVICE)
    stored_kernels.dequantise(codes, None, ir.Stored(8, dtype, scaled=False), torch.tensor([0], device=DEVICE), out)
    torch.testing.assert_close(out, codes.float(), rtol=0, atol=0, equal_nan=True)


def test_every_power_of_two() -> None:
    """All 256 bytes of e8m0 as scales of one row each."""
    scales = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(1, 256).view(E8)
    codes, out = torch.ones(1, 256, 2, dtype=torch.int8, device=DEVICE), torch.empty(1, 256, 2, device=DEVICE)
    stored_kernels.dequantise(codes, scales, ir.Stored(8, torch.int8, rows=1), torch.tensor([0], device=DEVICE), out)
    torch.testing.assert_close(out[..., 0], scales.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("block", [(0, 0), (1, 0), (0, 1), (16, 16), (1, 32), (7, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["one matrix", "a stack"])
def test_blocks(block: tuple[int, int], lead: tuple[int, ...]) -> None:
    """Any block, ragged ones too, of matrices with strides; an expert that is not wanted is left alone."""
    how = ir.Stored(8, F8[0], True, *block)
    codes = (torch.randn(*lead, 150, 40, device=DEVICE) * 20).to(F8[0]).transpose(-2, -1)
    scales = torch.rand(*lead, *how.scales_of((40, 150)), device=DEVICE) + 0.3
    wanted = [2, -1, 0] if lead else [0]
    out = torch.full((len(wanted), 40, 150), 7.0, device=DEVICE)
    stored_kernels.dequantise(codes, scales, how, torch.tensor(wanted, device=DEVICE), out)
    for n, e in enumerate(wanted):
        q, s = (codes[e], scales[e]) if lead else (codes, scales)
        want = torch.full_like(out[n], 7.0) if e < 0 else how.matrix(q, s, torch.float32)
        torch.testing.assert_close(out[n], want, rtol=1e-6, atol=0)


def on_device(e: ir.Experts) -> dict[str, Any]:
    return {k: [x.detach().to(DEVICE) for x in v] if isinstance(v, list) else v.detach().to(DEVICE) for k, v in tensors(e).items()}


def call(e: ir.Experts, t: dict[str, Any]) -> Tensor:
    x, ids, weights, p, (add,) = ops.bundled([*t.values()], CODED)
    return stored.forward(x, ids, weights, p, add, *ops.storage_of(ops.experts_args(e)))


@pytest.mark.parametrize("few", [0, 32], ids=["in turn", "few tokens"])
@pytest.mark.parametrize("name", [n for n, e in MEANINGS.items() if not e.num_identity])
def test_the_oracle(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 within 1e-5 of float64, whoever holds the matrices; ids of no expert count nothing."""
    monkeypatch.setattr(stored, "FEW", few)
    monkeypatch.setattr(stored, "CHUNK", 3)  # of four experts
    e = MEANINGS[name]
    t = on_device(e)
    t["ids"][0, 0], t["ids"][1, 1] = -1, e.num_experts
    want = e.evaluate(**t)
    got = call(e, t)
    assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())


def test_no_floats_of_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace never holds more matrices than there are turns for, however many experts there are."""
    made: list[int] = []
    right = stored._dequantise

    def counted(*args: Any) -> None:
        made.append(args[-1].shape[0])
        right(*args)

    monkeypatch.setattr(stored, "_dequantise", counted)
    e = replace(MEANINGS["blocks"], num_experts=40)
    t = on_device(e)
    t["ids"] = torch.arange(40, device=DEVICE).view(5, 8)
    t["weights"] = torch.rand(5, 8, device=DEVICE)
    call(e, t)
    assert made and max(made) <= stored.CHUNK


def test_what_cuda_takes() -> None:
    """Any codes, rows rounded or not; identity experts and float weights with scales have their own reasons."""
    cuda, blocks = target_of("cuda"), replace(MEANINGS["blocks"], dtype=torch.bfloat16)
    assert cuda.reason(ir.MoeBlock(None, blocks)) is None
    assert "float8_e4m3fn × scale of 2 × 2" in cuda.says(ir.MoeBlock(None, blocks))
    other = replace(blocks, up_stored=ir.Stored(32, torch.float32, rows=1))
    rows = ir.Rows(8, torch.float8_e4m3fn, 2)
    rounded, identity = replace(blocks, up_rows=rows, down_rows=rows), replace(blocks, num_identity=1)
    assert cuda.reason(ir.MoeBlock(None, rounded)) is None and "rows in float8_e4m3fn by 2" in cuda.says(ir.MoeBlock(None, rounded))
    for e, why in ((other, "float expert weights"), (identity, "identity")):
        assert why in str(cuda.reason(ir.MoeBlock(None, e)))


NATURAL = tuple(range(8))
WIDE = replace(CONCAT, hidden=32, intermediate=16, out_features=32)
SCHEMES = {
    "blocks": ir.Stored(8, F8[0], rows=16, columns=16),
    "blocks of e5m2": ir.Stored(8, F8[1], rows=5, columns=16),
    "channels": ir.Stored(8, torch.int8, rows=1),
    "groups": ir.Stored(8, torch.int8, rows=1, columns=8),
    "mxfp4": replace(MX4, columns=8),
    "mxfp4 by bits, high halves first": replace(MX4, columns=16, order=(1, 0), exponents=ir.stored.Exponent.BITS),
    "int4": replace(INT4, columns=8, order=NATURAL, zeroed=ir.stored.Zero.NONE),
    "int4, zero points": replace(INT4, columns=8, order=NATURAL),
    "a table": ir.Stored(4, torch.uint8, rows=1, columns=8, axis=2, order=(1, 0), tabled=True),
}
TILE = coded.Tile(16, 16, 16, 4, 1) if DEVICE == "cpu" else coded.Tile(16, 64, 32, 4, 2)
WAYS = {"grouped": coded.Choice(TILE, TILE), "few tokens": coded.Choice(TILE, TILE, (coded.Vector(16, 16, 4), coded.Vector(16, 16, 4)))}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", SCHEMES)
def test_decoded_in_the_loop(name: str, way: coded.Choice) -> None:
    """fp32 within 1e-5 of float64 for every scheme, from stacks, interleaved rows and lists; ids of no expert count nothing."""
    forms = (ir.Form.CONCAT, ir.Form.INTERLEAVED, ir.Form.SEPARATE)
    form, how = forms[list(SCHEMES).index(name) % 3], SCHEMES[name]
    e = replace(WIDE, form=form, stacked=form is not ir.Form.SEPARATE, up_stored=how, down_stored=how, up_bias=True, down_bias=True)
    t = on_device(e)
    t["ids"][0, 0], t["ids"][1, 1] = -1, e.num_experts
    x, ids, weights, p, (add,) = ops.bundled([*t.values()], CODED)
    got = coded.forward(x, ids, weights, p, add, *ops.storage_of(ops.experts_args(e)), way)
    want = e.evaluate(**t)
    assert got is not None and float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())


REFUSED = {
    "words along the outputs": replace(MX4, columns=8, axis=1),
    "another order of words": replace(INT4, columns=8),
    "another table": replace(MX4, columns=8, values=(*E2M1, *E2M1)),
    "scales that divide": replace(SCHEMES["blocks"], scaled=ir.stored.Scale.DIVIDES),
}


@pytest.mark.parametrize("how", REFUSED.values(), ids=REFUSED)
def test_what_is_left_to_the_workspace(how: ir.Stored) -> None:
    """Codes that no loop decodes are refused, never read in another way."""
    e = replace(WIDE, hidden=32, up_stored=how, down_stored=how)
    x, ids, weights, p, (add,) = ops.bundled([*on_device(e).values()], CODED)
    assert coded.forward(x, ids, weights, p, add, *ops.storage_of(ops.experts_args(e))) is None


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_one_expert(way: coded.Choice) -> None:
    """All rows to one expert, as a shared expert's are: a gate for each row, or 1."""
    e = replace(WIDE, num_experts=1, up_stored=SCHEMES["blocks"], down_stored=SCHEMES["blocks"])
    t = on_device(e)
    t["ids"], t["weights"] = torch.zeros_like(t["ids"][:, :1]), t["weights"][:, :1].contiguous()
    x, ids, weights, p, (add,) = ops.bundled([*t.values()], CODED)
    got, want = coded.forward(x, ids, weights, p, add, *ops.storage_of(ops.experts_args(e)), way), e.evaluate(**t)
    assert got is not None and float((got.double() - want).abs().max()) <= 1e-5 * float(want.abs().max())
