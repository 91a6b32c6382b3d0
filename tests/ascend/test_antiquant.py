"""Weights in few bits under rows of floats: the table of laws, what is emitted, and numbers against float64."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ascend_blocks import Seen, compiled
from torch import Tensor

import moe_compile
from moe_compile.ir import Experts, Form, MoeBlock, Rows, Stored
from moe_compile.ir import scalar as act
from moe_compile.ir.stored import Scale
from moe_compile.lowering.ascend import antiquant, capability, device, register, schemas, weights

sys.path.insert(0, str(Path(__file__).parent.parent))
from catalogue import packed, stored

register.ensure()
INT4 = Stored(4, torch.int32, True, 1, 32, 2, tuple(range(8)), offset=-8.0)  # compressed-tensors
INT8, E4M3 = Stored(8, torch.int8, True, 1), torch.float8_e4m3fn
MXFP4 = dataclasses.replace(packed.MXFP4, columns=32)
BLOCKS, MX, FLOAT8, BY_CHANNEL, BYTES, BY_GROUP = antiquant.FORMS


def problem(how: Stored, **changes: Any) -> antiquant.Problem:
    return dataclasses.replace(antiquant.Problem(how, False, 64, 48, torch.bfloat16), **changes)


def but(how: Stored, **changes: Any) -> Stored:
    return dataclasses.replace(how, **changes)


# how weights are stored, what else is so, the row that takes them or what is told
CASES: list[tuple[Stored, dict[str, Any], antiquant.Row | str]] = [
    (INT8, {}, BYTES),
    (but(INT8, zeroed=True), {}, BYTES),
    (but(INT8, dtype=torch.uint8, zeroed=True), {}, BYTES),
    (but(INT8, rows=0), {}, BYTES),
    (but(INT8, rows=4), {}, BYTES),
    (but(INT8, rows=0, columns=1), {"transposed": True}, BYTES),
    (but(INT8, columns=32), {}, "int8 with a scale for each output channel"),
    (INT8, {"transposed": True}, "int8 with a scale for each output channel"),
    (INT8, {"dtype": torch.float32}, "fp16 and bf16"),
    (INT8, {"device": "310P"}, "310P"),
    (INT4, {}, BY_GROUP),
    (INT4, {"device": "A3"}, BY_GROUP),
    (INT4, {"device": "950"}, "scale for each output channel only"),
    (but(INT4, offset=0.0, zeroed=True), {}, "zero points"),
    (but(INT4, offset=-7.0), {}, "zero points"),
    (but(INT4, columns=24), {}, "groups of 24"),
    (INT4, {"out": 44}, "eight of 4 bits"),
    (but(INT8, scaled=Scale.DIVIDES), {}, "scales divide"),
    (but(INT4, columns=0, zeroed=True, zero_order=tuple(range(8))), {}, "several in a word"),
    (but(INT4, columns=0), {}, BY_CHANNEL),
    (but(INT4, columns=0, offset=0.0, zeroed=True), {}, BY_CHANNEL),
    (but(INT4, columns=0, offset=0.0, zeroed=True), {"device": "950"}, BY_CHANNEL),
    (but(INT4, columns=0), {"out": 44}, BYTES),
    (but(INT4, offset=0.0, values=(*range(8), *range(-8, 0))), {}, BY_GROUP),
    (but(INT4, offset=0.0, tabled=True), {}, "no whole numbers"),
    (but(MXFP4, exponents=False), {}, "no whole numbers"),
    (MXFP4, {}, "A2 and A3 have int8 and int4 only"),
    (MXFP4, {"device": "950"}, "rows in float8, another function"),
    (MXFP4, {"device": "950", "float8_rows": True}, MX),
    (but(MXFP4, columns=16), {"device": "950", "float8_rows": True}, "MX"),
    (Stored(8, E4M3, rows=128, columns=128), {"inner": 256}, "A2 and A3 have int8 and int4 only"),
    (Stored(8, E4M3, rows=128, columns=128), {"inner": 256, "device": "950"}, "rows in float8, another function"),
    (Stored(8, E4M3, rows=128, columns=128), {"inner": 256, "device": "950", "float8_rows": True}, BLOCKS),
    (Stored(8, E4M3, rows=128, columns=128), {"inner": 256, "device": "A3", "float8_rows": True}, "A2 and A3 have int8 and int4 only"),
    (Stored(8, E4M3, rows=64, columns=128), {"inner": 256, "device": "950", "float8_rows": True}, "each output channel only"),
    (Stored(8, E4M3, rows=1, columns=32, exponents=True), {"device": "950", "float8_rows": True}, MX),
    (Stored(8, E4M3, rows=1), {}, "A2 and A3 have int8 and int4 only"),
    (Stored(8, E4M3, rows=1), {"device": "950"}, FLOAT8),
]  # fmt: skip


@pytest.mark.parametrize(("how", "changes", "expected"), CASES, ids=range(len(CASES)))
def test_each_row_takes_what_it_can_express(how: Stored, changes: dict[str, Any], expected: antiquant.Row | str) -> None:
    p = problem(how, **changes)
    why = antiquant.why_not(p)
    if isinstance(expected, str):
        assert antiquant.choose(p) is None and why is not None and expected in why
    else:
        assert antiquant.choose(p) is expected and why is None


@pytest.mark.parametrize(("family", "lacks", "told"), [
    ("A3", None, "A2 and A3 have int8 and int4 only"),
    ("950", None, "known from documents only"),
    ("950", "npu_dynamic_block_quant", "npu_dynamic_block_quant is not among"),
])  # fmt: skip
def test_blocks_of_float8_under_rows_in_float8(family: str, lacks: str | None, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' FP8Experts: the 950 has the product, and nothing emits it."""
    monkeypatch.setattr(schemas, "_declared", lambda name: name != lacks)
    monkeypatch.setattr(device, "family", lambda: family)
    blocks, rows = Stored(8, E4M3, rows=128, columns=128), Rows(8, E4M3, group=128)
    experts = Experts(4, 256, 256, 256, Form.CONCAT, act.SWIGLU, dtype=torch.bfloat16, up_stored=blocks, down_stored=blocks, up_rows=rows,
                      down_rows=rows)  # fmt: skip
    assert told in str(capability.refuses(MoeBlock(None, experts)))


def test_the_report_says_what_only_documents_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float8 under rows of floats, on the 950; near: int8, which is emulated and converted."""
    monkeypatch.setattr(device, "family", lambda: "950")
    for dtype, marked in ((E4M3, True), (torch.int8, False)):
        how = Stored(8, dtype, rows=1)
        experts = Experts(4, 256, 256, 256, Form.CONCAT, act.SWIGLU, dtype=torch.bfloat16, up_stored=how, down_stored=how)
        assert ("unverified: known from documents only" in capability.says(MoeBlock(None, experts))) == marked


def test_what_only_documents_say_is_marked() -> None:
    known = {row.name: row.evidence for row in antiquant.FORMS if row.evidence is not antiquant.Evidence.RUN}
    assert known == {
        "float8 in blocks": antiquant.Evidence.DECLARED, "MX": antiquant.Evidence.DECLARED, "float8 by channel": antiquant.Evidence.DOCUMENT
    }  # fmt: skip
    assert all(bool(row.needs) == (row.evidence is antiquant.Evidence.DECLARED) for row in antiquant.FORMS)
    assert all(name in schemas.RAISED for row in antiquant.FORMS for name in row.needs)


@pytest.mark.parametrize(("how", "transposed"), [
    (INT4, False), (but(INT4, columns=0), False), (but(INT4, columns=0, offset=0.0, zeroed=True), False), (INT8, False),
    (but(INT8, zeroed=True), False), (but(INT8, dtype=torch.uint8, zeroed=True), False), (but(INT8, rows=4), False),
    (but(INT8, rows=0), False),
    (but(INT8, rows=0, columns=1), True), (but(INT4, rows=32, columns=1, axis=1), True), (but(INT4, rows=2), False),
    (but(INT4, offset=0.0, values=(*range(8), *range(-8, 0)), order=(0, 4, 1, 5, 2, 6, 3, 7)), False),
])  # fmt: skip
def test_codes_scales_and_offsets_are_the_weights_they_stand_for(how: Stored, transposed: bool) -> None:
    """(q + offset) · scale as the op computes it is `Stored.matrix`, to the last bit where scales are powers of two."""
    e, k, n = 3, 64, 48
    shape = (k, n) if transposed else (n, k)
    per_word = max(1, len(how.order))
    words = tuple(d // (per_word if how.axis == i + 1 else 1) for i, d in enumerate(shape))
    info = torch.iinfo(how.dtype)
    code = torch.randint(info.min, info.max + 1, (e, *words)).to(how.dtype)
    scale = torch.exp2(torch.randint(-3, 3, (e, *how.scales_of(shape))).float())
    zero = torch.randint(0, 16, scale.shape).float() if how.zeroed else None
    want = how.matrix(code, scale, torch.float32, zero)
    p = problem(how, transposed=transposed)
    coding = antiquant.Coding.of(p)
    q, s, o = coding.codes(code), coding.factors(scale, code, torch.bfloat16), coding.offsets(zero, code, torch.bfloat16)
    assert s.shape == o.shape and (q.dtype is torch.int32) == (coding.bits == 4)
    counts = torch.tensor([k, k, k])
    eye = torch.eye(k, dtype=torch.bfloat16).repeat(e, 1)
    (got,) = torch.ops.npu.npu_grouped_matmul(
        [eye], [q.contiguous()], antiquant_scale=[s], antiquant_offset=[o], group_list=counts, split_item=3, group_type=0, group_list_type=1
    )
    assert torch.equal(got.float().view(e, k, n), want if transposed else want.transpose(1, 2))


@pytest.mark.parametrize("transposed", [False, True])
def test_float8_lies_as_the_950_wants_it(transposed: bool) -> None:
    """[E, out, in] in memory; a model that has it so costs nothing, int8 is the other way round."""
    channel = dict(rows=0, columns=1) if transposed else dict(rows=1, columns=0)
    for how in (Stored(8, E4M3, **channel), Stored(8, torch.int8, **channel)):
        p = problem(how, transposed=transposed, device="950")
        recipe = weights.Recipe((weights.Source(0),), 3, True, False, p.dtype, "codes", antiquant.Coding.of(p))
        code = torch.zeros((3, 64, 48) if transposed else (3, 48, 64), dtype=how.dtype)
        packed = recipe.pack([code])
        out_in = how.dtype == E4M3
        assert packed.shape == (3, 64, 48) and (packed.transpose(1, 2) if out_in else packed).is_contiguous()
        assert recipe.is_free([code]) == (transposed != out_in)


def test_packing_is_undone() -> None:
    q = torch.randint(-8, 8, (2, 3, 16)).to(torch.int8)
    words = antiquant.packed(q)
    assert words.shape == (2, 3, 2) and torch.equal(antiquant.unpacked(words), q)
    assert int(antiquant.packed(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]]).to(torch.int8))[0, 0]) == 1, "the first lies lowest"


# ---- blocks ----------------------------------------------------------------------------------------------------------------


class HalfRows(packed.Int4Offset):
    """Rows and scales in bf16, weights made in it."""

    dtype = torch.bfloat16
    made_in = torch.bfloat16

    def scales(self, *shape: int) -> Tensor:
        return super().scales(*shape).bfloat16()

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return super().floats(q, s).to(self.made_in)


class ByChannel(HalfRows):
    """A scale for each output channel, two codes a byte."""

    how = Stored(4, torch.uint8, True, 1, 0, 2, (0, 1), offset=-8.0)

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        codes = torch.stack([q.int() & 15, q.int() >> 4], -1).flatten(-2)
        return ((codes - 8).float() * s[:, None]).to(self.made_in)


class HalfBlocks(stored.BlocksRepeated):
    """float8 in blocks, made into bf16: near ByChannel, no whole numbers."""

    dtype = torch.bfloat16

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return super().floats(q, s).bfloat16()


class HalfMx(packed.Mxfp4Table):
    """FP4 with exponents, made into bf16."""

    dtype = torch.bfloat16

    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return super().floats(q, s).bfloat16()


def compared(cls: type[Any]) -> tuple[Seen, float, float]:
    """What was lowered, our error and eager's, as shares of the norm of the result in float64."""
    torch.manual_seed(0)
    module = cls().to(torch.bfloat16)
    (x,) = module.example_inputs()
    with torch.no_grad():
        with Seen() as seen:
            ours = compiled(module, inner="eager")(x)
        eager = module(x)
        module.made_in = torch.float64
        for p in (module.gate, module.bias):
            p.data = p.data.double()
        exact = module(x.double())
    return seen, *(float((t.double() - exact).norm() / exact.norm()) for t in (ours, eager))


@pytest.mark.parametrize(("cls", "groups"), [(HalfRows, 4), (ByChannel, 0)])
def test_int4_weights_under_rows_of_floats(cls: type[Any], groups: int) -> None:
    """Codes go in as eight to a word, scales by group or channel: no further from float64 than 1.25 x eager; nothing is made on a step."""
    seen, ours, eager = compared(cls)
    (block,) = moe_compile.last_report().blocks
    assert "int4 × scale" in block.lowering and ours <= 1.25 * eager
    nodes = [n for n in seen.lowered[0].module.graph.nodes if "npu_grouped_matmul" in str(n.target)]
    for n in nodes:
        (weight,), (scale,), (offset,) = n.args[1], n.kwargs["antiquant_scale"], n.kwargs["antiquant_offset"]
        assert weight.op == scale.op == offset.op == "placeholder"
        assert weight.meta["example_value"].dtype == torch.int32
        assert scale.meta["example_value"].ndim == offset.meta["example_value"].ndim == (3 if groups else 2)
    assert len(nodes) == 2


@pytest.mark.parametrize(("cls", "reason"), [(HalfBlocks, "A2 and A3 have int8 and int4 only"), (HalfMx, "MX")])
def test_what_the_device_has_not_is_told_and_the_model_runs_as_written(cls: type[Any], reason: str) -> None:
    module = cls().to(torch.bfloat16)
    (x,) = module.example_inputs()
    with torch.no_grad():
        torch.testing.assert_close(compiled(module, inner="eager")(x), module(x), rtol=0.02, atol=0.02)
    assert any(reason in r.reason for r in moe_compile.last_report().rejected)


def test_the_family_of_the_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a 910 takes a 950 does not, and plans that are kept of one are not for the other."""
    compared(HalfRows)
    assert len(moe_compile.last_report().blocks) == 1
    torch._dynamo.reset()
    monkeypatch.setattr(device, "family", lambda: "950")
    _, ours, eager = compared(HalfRows)
    assert ours <= 1.25 * eager
    assert any("Ascend 950 takes int4" in r.reason for r in moe_compile.last_report().rejected)
