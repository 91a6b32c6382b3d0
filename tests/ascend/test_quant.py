"""W8A8: what is quantised, what is not and why, and numbers against the oracle with tolerances that the 8 bits explain."""

from __future__ import annotations

import pytest
import torch
from ascend_blocks import ENTRIES, Seen, compiled, first, zoo
from torch import nn

import moe_compile
from moe_compile.ir import Form
from moe_compile.lowering.ascend import calls, quant, schemas
from moe_compile.lowering.ascend.weights import Store

schemas.ensure()


def block(name: str, implementation: str = "default", **changes: int) -> nn.Module:
    """An entry's block with an intermediate size that the op takes."""
    entry = ENTRIES[name]
    sized = zoo.dataclasses.replace(entry, kwargs={**entry.kwargs, "moe_intermediate_size": 64, **changes})
    return next(m for m in sized.build(implementation).modules() if hasattr(m, "experts") and not isinstance(m, nn.ModuleList))


def layout(**changes: object) -> calls.generic.Layout:
    from moe_compile.ir import scalar as act

    ops, consts = act.encode(act.SWIGLU)
    plain = dict(form=int(Form.CONCAT), num_experts=4, stacked=True, up_transposed=True, down_transposed=True, weight_on_input=False)
    return calls.generic.Layout(tuple(ops), tuple(consts), **{**plain, "num_identity": 0, **changes})  # type: ignore[arg-type]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["afmoe", "qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_a_block_in_int8(name: str, dtype: torch.dtype) -> None:
    """Weights and rows of 8 bits: half a step of 1/127 of the largest value, about 1 % of the norm; 3 % is allowed."""
    module, exact = block(name).to(dtype), block(name, "eager").to(dtype).double()
    x = torch.randn(2, 16, zoo.HIDDEN).to(dtype)
    expected = first(exact(x.double()))
    with Seen() as seen:
        out = first(compiled(module, quantize="w8a8")(x))
    assert seen.calls()[1:] == [
        "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_dequant_swiglu_quant", "npu_grouped_matmul", "npu_moe_finalize_routing",
    ]  # fmt: skip
    assert error(out, expected) <= 0.03
    assert error(out, expected) > error(first(module(x)), expected), "int8 was not used"


def test_the_chain_is_the_arithmetic_it_claims() -> None:
    """Against the same quantisation written down in float64: only roundings at the edge of a step may differ."""
    t, e, k, h, i = 24, 4, 2, 32, 64
    x, up, down = torch.randn(t, h, dtype=torch.bfloat16), torch.randn(e, h, 2 * i), torch.randn(e, i, h)
    ids = torch.stack([torch.randperm(e)[:k] for _ in range(t)]).int()
    scales = quant.channel_scale(up), quant.channel_scale(down).to(torch.bfloat16)
    q = quant.Quantised(quant.to_int8(up, scales[0]), scales[0], quant.to_int8(down, scales[1]), scales[1])
    rows, index, w = quant.experts_rows(x, ids, torch.rand(t, k), q, layout())
    out = calls.combine(rows, index, w, [])
    expected = torch.zeros(t, h, dtype=torch.float64)
    for n in range(t):
        s = x[n].double().abs().max() / 127
        xq = (x[n].double() / s).round()
        for j in range(k):
            m = int(ids[n, j])
            g, u = (xq @ q.up[m].double() * scales[0][m].double() * s).chunk(2)
            y = torch.nn.functional.silu(g) * u
            ys = y.abs().max() / 127
            expected[n] += w[n, j].double() * ((y / ys).round() @ q.down[m].double()) * scales[1][m].double() * ys
    assert error(out, expected) <= 0.005


@torch.no_grad()
def test_expert_weights_take_a_quarter_less_memory_than_half(store: Store) -> None:
    module, x = block("qwen3_moe").to(torch.bfloat16), torch.randn(2, 4, zoo.HIDDEN, dtype=torch.bfloat16)
    compiled(module, quantize="w8a8")(x)
    half = sum(p.numel() * 2 for p in module.experts.parameters())
    assert half / 2 < store.copied < 0.75 * half


@pytest.mark.parametrize(("change", "inner", "biases", "dtype", "reason"), [
    ({}, 64, False, torch.bfloat16, None),
    ({"form": int(Form.SEPARATE)}, 64, False, torch.bfloat16, "SwiGLU of"),
    ({}, 24, False, torch.bfloat16, "multiple of 64"),
    ({}, 10560, False, torch.bfloat16, "10496 at most"),
    ({}, 64, True, torch.bfloat16, "biases"),
    ({}, 64, False, torch.float32, "fp16 or bf16"),
    ({"weight_on_input": True}, 64, False, torch.float16, "input"),
])  # fmt: skip
def test_what_cannot_be_quantised(change: dict, inner: int, biases: bool, dtype: torch.dtype, reason: str | None) -> None:
    told = quant.refuses(layout(**change), inner, biases, dtype)
    assert told is None if reason is None else reason in str(told)


@torch.no_grad()
def test_a_block_that_does_not_fit_stays_as_it_is_and_the_report_says_so() -> None:
    module, x = block("afmoe", moe_intermediate_size=24).to(torch.bfloat16), torch.randn(2, 5, zoo.HIDDEN, dtype=torch.bfloat16)
    out = first(compiled(module, quantize="w8a8")(x))
    assert error(out, first(module(x))) <= 0.02
    assert any("not quantised" in n and "multiple of 64" in n for n in moe_compile.last_report().notes)


def test_zero_weights_and_rows_are_no_trouble() -> None:
    weight = torch.zeros(2, 8, 4)
    scale = quant.channel_scale(weight)
    assert not quant.to_int8(weight, scale).any()
    q, s = torch.ops.npu.npu_dynamic_quant(torch.zeros(3, 8, dtype=torch.bfloat16))
    assert not q.any() and not s.any()
