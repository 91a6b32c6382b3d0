"""`experts_stored`: experts whose weights are codes with scales, against the IR's oracle; and who runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import catalogue
import pytest
import torch
from catalogue import check
from torch import Tensor
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.stored import Exponent, Scale, Zero
from moe_compile.ir.text import experts_text
from moe_compile.lowering import target as target_of
from moe_compile.passes.rewrite import activations
from moe_compile.passes.rewrite import planner as rewrite
from moe_compile.report import collecting

CHANNELS, COLUMNS = ir.Stored(8, torch.int8, rows=1), ir.Stored(8, torch.int8, columns=1)
BLOCKS, RAGGED = ir.Stored(8, torch.float8_e4m3fn, rows=2, columns=2), ir.Stored(8, torch.float8_e5m2, rows=5, columns=3)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX4 = ir.Stored(4, torch.uint8, True, 1, 4, 2, (0, 1), values=(*E2M1, *(-v for v in E2M1)), exponents=Exponent.VALUE)
INT4 = ir.Stored(4, torch.int32, True, 1, 4, 2, (0, 4, 1, 5, 2, 6, 3, 7), offset=-8.0, zeroed=Zero.PLAIN)
AWQ = ir.Stored(4, torch.int32, True, 4, 1, 2, INT4.order, zeroed=Zero.COLUMNS, zero_order=INT4.order, zero_offset=1.0)
ROWS = ir.Stored(4, torch.uint8, True, 4, 1, 1, (1, 0), tabled=True)
BY_INDEX = replace(AWQ, rows=1, indexed=1, groups=3)
SHIFTED = replace(AWQ, shifted=True, zero_wraps=True)
ALONG_INPUTS = replace(CHANNELS, columns=1, indexed=2, groups=3)
CONCAT = ir.Experts(4, 8, 6, 8, ir.Form.CONCAT, act.SWIGLU, up_stored=CHANNELS, down_stored=CHANNELS)
MEANINGS = {
    "stacked": CONCAT,
    "lists of gates and ups, biases": replace(CONCAT, form=ir.Form.SEPARATE, stacked=False, up_bias=True, down_bias=True),
    "transposed, interleaved": replace(
        CONCAT, form=ir.Form.INTERLEAVED, up_transposed=True, down_transposed=True, up_stored=COLUMNS, down_stored=COLUMNS
    ),
    "down alone": replace(CONCAT, up_stored=ir.Stored(8, torch.int8, scaled=False), num_identity=1),
    "one number an expert": replace(CONCAT, up_stored=ir.Stored(8, torch.int8), down_stored=ir.Stored(8, torch.int8)),
    "blocks": replace(CONCAT, up_stored=BLOCKS, down_stored=BLOCKS),
    "ragged blocks, transposed": replace(CONCAT, up_stored=RAGGED, down_stored=RAGGED, up_transposed=True, down_transposed=True),
    "groups of inputs, lists": replace(
        CONCAT,
        form=ir.Form.SEPARATE,
        stacked=False,
        up_stored=replace(BLOCKS, rows=1, columns=4),
        down_stored=replace(BLOCKS, rows=1, columns=3),
    ),
    "floats beside codes": replace(CONCAT, down_stored=None),
    "two codes a byte, values, exponents": replace(CONCAT, up_stored=MX4, down_stored=replace(MX4, columns=3)),
    "eight codes a word, an offset, zero points": replace(
        CONCAT, hidden=16, intermediate=8, out_features=16, up_stored=INT4, down_stored=INT4
    ),
    "eight codes a word, zero points that are added": replace(
        CONCAT,
        hidden=16,
        intermediate=8,
        out_features=16,
        up_stored=replace(INT4, zeroed=Zero.ADDED),
        down_stored=replace(INT4, zeroed=Zero.ADDED),
    ),
    "words along rows, a table, transposed": replace(
        CONCAT, intermediate=8, up_transposed=True, down_transposed=True, up_stored=ROWS, down_stored=ROWS
    ),
    "eight codes a word, packed zero points": replace(
        CONCAT, hidden=16, intermediate=8, out_features=16, up_transposed=True, down_transposed=True, up_stored=AWQ, down_stored=AWQ
    ),
    "groups by an index": replace(
        CONCAT,
        hidden=16,
        intermediate=8,
        out_features=16,
        up_transposed=True,
        down_transposed=True,
        up_stored=BY_INDEX,
        down_stored=BY_INDEX,
    ),
    "groups of inputs by an index of each, lists": replace(
        CONCAT, form=ir.Form.SEPARATE, stacked=False, up_stored=ALONG_INPUTS, down_stored=ALONG_INPUTS
    ),
    "shifts of each, zero points that wrap, lists": replace(
        CONCAT,
        hidden=16,
        intermediate=8,
        out_features=16,
        form=ir.Form.SEPARATE,
        stacked=False,
        up_transposed=True,
        down_transposed=True,
        up_stored=SHIFTED,
        down_stored=SHIFTED,
    ),
    "blocks that divide": replace(
        CONCAT, up_stored=replace(BLOCKS, scaled=Scale.DIVIDES), down_stored=replace(BLOCKS, scaled=Scale.DIVIDES)
    ),
    "bits of exponents": replace(
        CONCAT, up_stored=replace(MX4, exponents=Exponent.BITS), down_stored=replace(MX4, columns=3, exponents=Exponent.BITS)
    ),
    "two scales, of a matrix and of channels": replace(
        CONCAT, up_stored=replace(BLOCKS, second=Scale.TIMES), down_stored=replace(BLOCKS, second=Scale.DIVIDES, second_rows=1)
    ),
    "weight on input": replace(CONCAT, weight_on_input=True),
}


def tensors(e: ir.Experts) -> dict[str, Any]:
    """Operands of a call."""
    gen = torch.Generator().manual_seed(0)
    parts = 2 if e.form is ir.Form.SEPARATE else 1
    rows = e.intermediate * (2 if e.form in (ir.Form.CONCAT, ir.Form.INTERLEAVED) else 1)

    def many(make: Any, parts: int, *shape: int) -> list[Tensor]:
        return [make(e.num_experts, *shape) for _ in range(parts)] if e.stacked else [make(*shape) for _ in range(parts * e.num_experts)]

    def words(how: ir.Stored, shape: tuple[int, ...]) -> tuple[int, ...]:
        per = len(how.order)
        return (*shape[:-2], shape[-2] // (per if how.axis == 1 else 1), shape[-1] // (per if how.axis == 2 else 1))

    def of_scales(how: ir.Stored | None, parts: int, shape: tuple[int, int]) -> list[Tensor]:
        if how is None or not how.scaled:
            return []
        return many(exponents if how.exponents else scale, parts, *how.scales_of(shape))

    def of_zeros(how: ir.Stored | None, parts: int, shape: tuple[int, int]) -> list[Tensor]:
        if how is None or not how.zeroed:
            return []
        r, c = how.scales_of(shape)
        return many(leaf, parts, r, c) if how.zeroed in (Zero.PLAIN, Zero.ADDED) else many(packed, parts, r, c // len(how.zero_order))

    def of_seconds(how: ir.Stored | None, parts: int, shape: tuple[int, int]) -> list[Tensor]:
        return many(second, parts, *how.seconds_of(shape)) if how is not None and how.second else []

    def second(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=gen) + 0.5).requires_grad_()

    def of_groups(how: ir.Stored | None, parts: int, shape: tuple[int, int]) -> list[Tensor]:
        """One for all beside stacks; some count from the last block."""
        if how is None or not how.indexed:
            return []
        return [
            torch.randint(-3, 3, (shape[how.indexed - 1],), generator=gen) for _ in range(parts if e.stacked else parts * e.num_experts)
        ]

    def of_table(how: ir.Stored | None, parts: int) -> list[Tensor]:
        if how is not None and how.shifted:
            count = (2 if how.zero_order else 1) * parts * (1 if e.stacked else e.num_experts)
            return [torch.randint(0, 25, (1, len(how.order)), generator=gen).int() for _ in range(count)]
        return [torch.randn(2**how.bits, generator=gen)] if how is not None and how.tabled else []

    def of_smooth(how: ir.Rows | None, inner: int) -> list[Tensor]:
        """Times: of each expert; divides: one set for all."""
        if how is not None and how.static and not how.step:
            return many(second, 1, 1)
        if how is None or not how.smooth:
            return []
        return many(second, 1, inner) if how.smooth == Scale.TIMES else [second(inner)]

    def packed(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=gen).int()

    def exponents(*shape: int) -> Tensor:
        some = torch.randint(120, 125, shape, generator=gen)
        return torch.where(torch.rand(shape, generator=gen) < 0.1, 0, some).to(torch.uint8)

    def codes(how: ir.Stored | None) -> Any:
        if how is None:
            return leaf
        if how.dtype in (torch.uint8, torch.int32):
            low, high = torch.iinfo(how.dtype).min, torch.iinfo(how.dtype).max
            return lambda *shape: torch.randint(low, high + 1, words(how, shape), generator=gen).to(how.dtype)
        if how.dtype is torch.int8:
            return lambda *shape: torch.randint(-127, 128, shape, generator=gen).to(torch.int8)
        return lambda *shape: (torch.randn(*shape, generator=gen) * 50).to(how.dtype)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).requires_grad_()

    def scale(*shape: int) -> Tensor:
        return ((torch.rand(*shape, generator=gen) + 0.1) / 100).requires_grad_()

    def matrix(out: int, inner: int, transposed: bool) -> tuple[int, int]:
        return (inner, out) if transposed else (out, inner)

    up, down = matrix(rows, e.hidden, e.up_transposed), matrix(e.out_features, e.intermediate, e.down_transposed)
    return {
        "x": leaf(5, e.hidden),
        "ids": torch.randint(0, e.num_experts + e.num_identity, (5, 2), generator=gen),
        "weights": torch.rand(5, 2, generator=gen).requires_grad_(),
        "up": many(codes(e.up_stored), parts, *up),
        "down": many(codes(e.down_stored), 1, *down),
        "up_bias": many(leaf, parts, rows) if e.up_bias else [],
        "down_bias": many(leaf, 1, e.out_features) if e.down_bias else [],
        "up_scale": of_scales(e.up_stored, parts, up),
        "down_scale": of_scales(e.down_stored, 1, down),
        "up_zero": of_zeros(e.up_stored, parts, up),
        "down_zero": of_zeros(e.down_stored, 1, down),
        "up_table": of_table(e.up_stored, parts),
        "down_table": of_table(e.down_stored, 1),
        "up_second": of_seconds(e.up_stored, parts, up),
        "down_second": of_seconds(e.down_stored, 1, down),
        "up_group": of_groups(e.up_stored, parts, up),
        "down_group": of_groups(e.down_stored, 1, down),
        "up_smooth": of_smooth(e.up_rows, e.hidden),
        "down_smooth": of_smooth(e.down_rows, e.intermediate),
        "add": leaf(5, e.out_features),
    }


def call(e: ir.Experts, t: dict[str, Any]) -> Tensor:
    return torch.ops.moe_compile.experts_stored(*t.values(), *ops.experts_args(e))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert float((got.double() - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("e", MEANINGS.values(), ids=MEANINGS.keys())
def test_the_op_is_the_oracle_and_so_are_its_gradients(e: ir.Experts) -> None:
    """fp32 within 1e-5 of float64; gradients to tokens, routing weights, scales, biases."""
    t = tensors(e)
    with torch.no_grad():
        close(call(e, t), e.evaluate(**t))
    every = [x for v in t.values() for x in (v if isinstance(v, list) else [v])]
    leaves = [x for x in every if x.requires_grad]
    got, want = call(e, t), e.evaluate(**t)
    close(got, want)
    grad = torch.randn_like(want)
    both = (torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True) for out in (got, want))
    for mine, theirs, leaf in zip(*both, leaves, strict=True):
        close(mine, torch.zeros_like(leaf) if theirs is None else theirs, 2e-5)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("smooth", Scale)
def test_rounded_rows_are_the_oracles_and_have_no_gradient(smooth: Scale, stacked: bool) -> None:
    """In float64, where no sum comes close to the edge of a step; a row of zeros stays one."""
    rows = ir.Rows(8, torch.int8, floor=1e-6, smooth=smooth)
    e = replace(CONCAT, up_rows=rows, down_rows=rows, stacked=stacked)
    t = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in tensors(e).items()}
    t["x"] = t["x"].detach().index_fill(0, torch.tensor([1]), 0.0)
    with torch.no_grad():
        close(call(e, t), e.evaluate(**t), 1e-12)
        assert not torch.allclose(call(e, t), call(replace(e, up_rows=None, down_rows=None), t), rtol=1e-4)
    with pytest.raises(NotImplementedError, match="rounded rows"):
        call(e, {**t, "x": t["x"].requires_grad_()})


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_static_rows_are_the_oracles_and_have_no_gradient(dtype: torch.dtype, stacked: bool) -> None:
    """Divided by an operand of each expert before the up projection, by a constant before the down projection; both saturate."""
    given = ir.Rows(8, dtype, static=True, low=-1.0, top=1.0)
    e = replace(CONCAT, up_rows=given, down_rows=replace(given, step=0.25), stacked=stacked)
    t = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in tensors(e).items()}
    with torch.no_grad():
        close(call(e, t), e.evaluate(**t), 1e-12)
        for other in (replace(given, low=0.0, top=0.0), replace(given, top=2.0)):
            assert not torch.allclose(call(e, t), call(replace(e, up_rows=other), t), rtol=1e-4)
    assert "torch" in target_of("cuda").says(ir.MoeBlock(None, replace(e, dtype=torch.bfloat16)))
    assert "by a calibrated number" in experts_text(e)
    assert target_of("ascend").reason(ir.MoeBlock(None, replace(e, dtype=torch.bfloat16)))
    with pytest.raises(NotImplementedError, match="rounded rows"):
        call(e, {**t, "x": t["x"].requires_grad_()})


def test_smooth_scales_run_in_plain_torch_and_that_is_told() -> None:
    rows = ir.Rows(8, torch.int8, floor=1e-6, smooth=Scale.TIMES)
    block = ir.MoeBlock(None, replace(CONCAT, up_rows=rows, down_rows=rows))
    for target in ("cpu", "cuda"):
        assert target_of(target).reason(block) is None
        assert "torch" in target_of(target).says(block) and "rows in int8, smoothed" in target_of(target).says(block)


def test_smooth_scales_stand_where_they_are_told() -> None:
    """x k instead of x and W / k instead of W: the product is the same but for the steps, which k makes other ones."""
    rows = ir.Rows(8, torch.int8, smooth=Scale.TIMES)
    x, k = torch.randn(3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.5
    assert torch.equal(rows.rounded(x, k), replace(rows, smooth=Scale.NONE).rounded(x * k))
    assert torch.equal(replace(rows, smooth=Scale.DIVIDES).rounded(x, k), replace(rows, smooth=Scale.NONE).rounded(x / k))
    assert not torch.allclose(rows.rounded(x, k) / k, replace(rows, smooth=Scale.NONE).rounded(x))


@pytest.mark.parametrize("name", ["stacked", "lists of gates and ups, biases"])
def test_opcheck(name: str) -> None:
    opcheck(torch.ops.moe_compile.experts_stored.default, (*tensors(MEANINGS[name]).values(), *ops.experts_args(MEANINGS[name])))


def test_half_precision_and_autocast() -> None:
    """Weights are rounded once, after the scale: no worse than making them floats in bf16."""
    t = tensors(CONCAT)
    exact = CONCAT.evaluate(**t)
    with torch.no_grad():
        half = call(CONCAT, {**t, "x": t["x"].bfloat16(), "add": t["add"].bfloat16()})
        with torch.autocast("cpu", torch.bfloat16):
            cast = call(CONCAT, t)
    assert half.dtype == cast.dtype == torch.bfloat16
    close(half, exact, 0.02)
    close(cast, exact, 0.02)


def test_a_parameter_with_fewer_experts_is_an_error() -> None:
    t = tensors(CONCAT)
    with pytest.raises(ValueError, match="fewer experts"), torch.no_grad():
        call(CONCAT, {**t, "down_scale": [t["down_scale"][0][:3]]})


def test_what_is_said_of_codes_that_no_kernel_decodes() -> None:
    """NVFP4, scales that divide, packed zero points and indexes become floats in torch, and the report says so; blocks do not."""
    for name in (
        "two scales, of a matrix and of channels",
        "blocks that divide",
        "eight codes a word, packed zero points",
        "groups by an index",
    ):
        for target in ("cpu", "cuda"):
            assert "floats made" in target_of(target).says(ir.MoeBlock(None, replace(MEANINGS[name], dtype=torch.bfloat16))), (name, target)
    for name in ("blocks", "stacked"):
        for target in ("cpu", "cuda"):
            assert "weights " in target_of(target).says(ir.MoeBlock(None, replace(MEANINGS[name], dtype=torch.bfloat16))), (name, target)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"up_pair": 0.5}, "low-rank pairs"),
        ({"up_rows": ir.Rows(8, torch.int8)}, "rounds them itself"),
        ({"up_stored": None, "down_stored": None}, "floats"),
    ],
)
def test_rows_that_the_option_leaves_are_told(more: dict[str, Any], why: str) -> None:
    block = ir.MoeBlock(None, replace(CONCAT, **more))
    with torch.no_grad():
        found, told = activations.requested(block, "fp8", target_of("cpu"))
        assert found is block and why in told and activations.requested(block, "model", target_of("cpu")) == (block, "")


def test_a_group_that_is_none_is_an_error_as_in_eager_code() -> None:
    e = MEANINGS["groups by an index"]
    t = tensors(e)
    assert all(target_of(name).reason(ir.MoeBlock(None, replace(e, dtype=torch.bfloat16))) is None for name in ("cpu", "cuda"))
    assert "index" in str(target_of("ascend").reason(ir.MoeBlock(None, replace(e, dtype=torch.bfloat16))))
    with pytest.raises(IndexError), torch.no_grad():
        call(e, {**t, "up_group": [torch.full_like(t["up_group"][0], 3)]})


def test_who_lowers_them() -> None:
    """The CPU, CUDA and, in channels of int8, Ascend. Float weights with scales have no kernel anywhere."""
    block, half = ir.MoeBlock(None, CONCAT), ir.MoeBlock(None, replace(CONCAT, dtype=torch.bfloat16))
    assert target_of("cpu").reason(block) is None and "int8" in target_of("cpu").says(block)
    assert target_of("ascend").reason(half) is None
    assert target_of("cuda").reason(half) is None and "int8 × scale" in target_of("cuda").says(half)
    assert "fp16 and bf16" in str(target_of("ascend").reason(block))
    scaled = replace(CHANNELS, bits=32, dtype=torch.float32)
    floats = ir.MoeBlock(None, replace(CONCAT, up_stored=scaled, down_stored=scaled, dtype=torch.bfloat16))
    assert all(target_of(name).reason(floats) for name in ("cpu", "cuda", "ascend"))
    blocks = ir.MoeBlock(None, replace(MEANINGS["blocks"], dtype=torch.bfloat16))
    assert target_of("cpu").reason(blocks) is None and "float8_e4m3fn × scale of 2 × 2" in str(target_of("ascend").reason(blocks))
    assert "int8 × scale" in experts_text(CONCAT)
    assert "int8 × scale (down)" in experts_text(MEANINGS["down alone"])


def test_scales_of_another_projection_in_the_emitted_op_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The IR is right, an operand of the op is not: the block stays as written, where it is not read by example instead."""
    right = rewrite.Planner._experts
    monkeypatch.setattr("moe_compile.loops.flags.check", lambda gm, missed: None)

    def wrong(self: Any, b: Any) -> Any:
        plan = right(self, b)
        return replace(plan, operands=replace(plan.operands, down_scale=plan.operands.up_scale))  # both [E, 16] in the catalogue

    monkeypatch.setattr(rewrite.Planner, "_experts", wrong)
    model = catalogue.build(catalogue.entries()["Int8Batched"]).eval()
    with torch.no_grad(), collecting() as report, torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend="moe_fused", options=check.OPTIONS)(*model.example_inputs(9))
    assert not report.blocks and any("the emitted operations" in r.reason for r in report.rejected), report.rejected


class Halves(TwoTensor):
    """A parameter that holds others, as torchao's do."""

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Halves:
        return Halves(inner["a"], inner["b"])


def test_a_wrapper_subclass_has_a_reason_of_its_own() -> None:
    """What it holds is its own business: the block stays as written, and nothing fails inside of the compiler."""
    model = catalogue.build(catalogue.entries()["DenseBmm"]).eval()
    for name in ("up", "down"):
        w = getattr(model, name).detach()
        setattr(model, name, torch.nn.Parameter(Halves(w, w.clone()), requires_grad=False))
    x = model.example_inputs(9)
    with torch.no_grad(), collecting() as report:
        got, want = torch.compile(model, backend="moe_fused", options=check.OPTIONS)(*x), model(*x)
        torch.testing.assert_close(got.a, want.a)
    assert not report.blocks and [r.code for r in report.rejected] == ["subclass"] and "Halves" in report.rejected[0].reason
