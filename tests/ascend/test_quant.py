"""W8A8: what is quantised, what is not and why, and numbers against the oracle with tolerances that the 8 bits explain."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ascend_blocks import ENTRIES, Seen, compiled, first, zoo
from torch import nn

import moe_compile
from moe_compile.ir import Form
from moe_compile.ir import scalar as act
from moe_compile.lowering.ascend import calls, int8, quant, register, schemas
from moe_compile.lowering.ascend.store import Store

register.ensure()


def block(name: str, implementation: str = "default", **changes: int) -> nn.Module:
    """An entry's block with an intermediate size that the op takes."""
    entry = ENTRIES[name]
    sized = zoo.dataclasses.replace(entry, kwargs={**entry.kwargs, "moe_intermediate_size": 256, **changes})
    return next(m for m in sized.build(implementation).modules() if hasattr(m, "experts") and not isinstance(m, nn.ModuleList))


def layout(**changes: object) -> calls.generic.Layout:
    ops, consts = act.encode(act.SWIGLU)
    plain = dict(form=int(Form.CONCAT), num_experts=4, stacked=True, up_transposed=True, down_transposed=True, weight_on_input=False)
    return calls.generic.Layout(tuple(ops), tuple(consts), **{**plain, "num_identity": 0, **changes})  # type: ignore[arg-type]


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# what is emitted for the first product and the activation: intermediate size, weight_format, calls
FIRST = [
    (256, "nd", ["npu_grouped_matmul", "npu_dequant_swiglu_quant"]),
    (256, "nz", ["npu_grouped_matmul_swiglu_quant_v2"]),
    (64, "nd", ["npu_grouped_matmul", "npu_swiglu", "npu_dynamic_quant"]),
    (24, "nz", ["npu_grouped_matmul", "npu_swiglu", "npu_dynamic_quant"]),
]  # fmt: skip


@pytest.mark.parametrize(("inner", "weight_format", "chain"), FIRST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["afmoe", "qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_a_block_in_int8(name: str, dtype: torch.dtype, inner: int, weight_format: str, chain: list[str]) -> None:
    """Weights and rows of 8 bits: half a step of 1/127 of the largest value, about 1 % of the norm; 3 % is allowed."""
    module = block(name, moe_intermediate_size=inner).to(dtype)
    exact = block(name, "eager", moe_intermediate_size=inner).to(dtype).double()
    x = torch.randn(2, 16, zoo.HIDDEN).to(dtype)
    expected = first(exact(x.double()))
    with Seen() as seen:
        out = first(compiled(module, quantize="w8a8", weight_format=weight_format)(x))
    assert seen.calls()[1:] == ["npu_moe_init_routing_v2", *chain, "npu_grouped_matmul", "npu_moe_finalize_routing"]
    assert error(out, expected) <= 0.03
    assert error(out, expected) > error(first(module(x)), expected), "int8 was not used"


@pytest.mark.parametrize("row", [int8.SUMS, int8.FUSED, int8.STEPS], ids=lambda row: row.name)
def test_the_chain_is_the_arithmetic_it_claims(row: int8.Row) -> None:
    """Against the same quantisation written down in float64: only roundings at the edge of a step may differ."""
    t, e, k, h, i = 24, 4, 2, 32, 256
    x, up, down = torch.randn(t, h, dtype=torch.bfloat16), torch.randn(e, h, 2 * i), torch.randn(e, i, h)
    ids = torch.stack([torch.randperm(e)[:k] for _ in range(t)]).int()
    scales = int8.channel_scale(up).to(row.up_scale or torch.bfloat16), int8.channel_scale(down).to(torch.bfloat16)
    q = quant.Quantised([int8.to_int8(up, scales[0])], [scales[0]], int8.to_int8(down, scales[1]), scales[1], row)
    rows, index, w = quant.experts_rows(x, ids, torch.rand(t, k), q, layout())
    out = calls.combine(rows, index, w, [])
    expected = torch.zeros(t, h, dtype=torch.float64)
    for n in range(t):
        s = x[n].double().abs().max() / 127
        xq = (x[n].double() / s).round()
        for j in range(k):
            m = int(ids[n, j])
            g, u = (xq @ q.up[0][m].double() * scales[0][m].double() * s).chunk(2)
            y = torch.nn.functional.silu(g) * u
            ys = y.abs().max() / 127
            expected[n] += w[n, j].double() * ((y / ys).round() @ q.down[m].double()) * scales[1][m].double() * ys
    assert error(out, expected) <= (0.01 if row is int8.STEPS else 0.005)  # step by step the first product is rounded to bf16


@pytest.mark.parametrize("row", [None, int8.SUMS, int8.FUSED, int8.STEPS], ids=lambda row: row.name if row else "bf16")
@torch.no_grad()
def test_one_expert_is_a_list_of_type_0(row: int8.Row | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count of one group is its running sum; type 1 may not have length 1. The rows are those of two experts of which one has none."""
    t, h, i, types = 6, 32, 256, []
    real = calls.call

    def call(name: str, *args: Any, **kwargs: Any) -> Any:
        if "grouped_matmul" in name:
            types.append((kwargs["group_list_type"], len(args[4] if len(args) > 4 else kwargs["group_list"])))
        return real(name, *args, **kwargs)

    monkeypatch.setattr(calls, "call", call)
    monkeypatch.setattr(quant, "call", call)
    x, up, down = torch.randn(t, h, dtype=torch.bfloat16), torch.randn(2, h, 2 * i), torch.randn(2, i, h)
    ids, w, found = torch.zeros(t, 1, dtype=torch.int32), torch.rand(t, 1), []
    for n in (1, 2):
        u, d = up[:n], down[:n]
        if row is None:
            p = calls.Packed([calls.Weight(u.bfloat16())], calls.Weight(d.bfloat16()))
            found.append(calls.experts_rows(x, ids, w, p, layout(num_experts=n))[0])
            continue
        scales = int8.channel_scale(u).to(row.up_scale or torch.bfloat16), int8.channel_scale(d).to(torch.bfloat16)
        q = quant.Quantised([int8.to_int8(u, scales[0])], [scales[0]], int8.to_int8(d, scales[1]), scales[1], row)
        found.append(quant.experts_rows(x, ids, w, q, layout(num_experts=n))[0])
    assert torch.equal(*found)
    assert types == [(0, 1), (0, 1), (1, 2), (1, 2)]


@torch.no_grad()
def test_expert_weights_take_a_quarter_less_memory_than_half(store: Store) -> None:
    module, x = block("qwen3_moe").to(torch.bfloat16), torch.randn(2, 4, zoo.HIDDEN, dtype=torch.bfloat16)
    compiled(module, quantize="w8a8")(x)
    half = sum(p.numel() * 2 for p in module.experts.parameters())
    assert half / 2 < store.copied < 0.75 * half


PROBLEM = int8.Problem("w8a8", act.SWIGLU, int(Form.CONCAT), 2048, 1024, False, False, torch.bfloat16)


@pytest.mark.parametrize(("changes", "row", "objection"), [
    ({}, int8.SUMS, "fractal format"),
    ({"nz": True}, int8.FUSED, ""),
    ({"nz": True, "hidden": 2040}, int8.SUMS, "blocks of 16 x 32"),
    ({"nz": True, "inner": 1032}, int8.STEPS, "multiple of 64"),
    ({"nz": True, "inner": 5184}, int8.SUMS, "up to [65535, 10240]"),
    ({"nz": True, "hidden": 65536}, int8.SUMS, "up to [65535, 10240]"),
    ({"form": int(Form.SEPARATE)}, int8.STEPS, "SwiGLU of"),
    ({"activation": act.gelu(act.G) * act.U}, int8.STEPS, "SwiGLU of"),
    ({"inner": 192}, int8.STEPS, "few rows came out wrong"),
    ({"inner": 128}, int8.STEPS, "few rows came out wrong"),
    ({"inner": 96}, int8.STEPS, "multiple of 64"),
    ({"inner": 256}, int8.SUMS, ""),
    ({"inner": 10560}, int8.STEPS, "10496 at most"),
    ({"biases": True}, None, "biases"),
    ({"dtype": torch.float32}, None, "fp16 or bf16"),
    ({"weight_on_input": True}, None, "input"),
    ({"chain": "w8a8c8"}, None, "not registered"),
])  # fmt: skip
def test_each_row_takes_what_it_can_express(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], row: int8.Row | None, objection: str
) -> None:
    monkeypatch.setattr(schemas, "custom", lambda name: False)
    problem = dataclasses.replace(PROBLEM, **changes)
    chosen, refused = int8.choose(problem)
    assert chosen is row
    assert any(objection in why for _, why in refused)
    assert (int8.why_not(problem) is None) == (row is not None) and (row is not None or objection in str(int8.why_not(problem)))


@torch.no_grad()
def test_a_block_that_does_not_fit_stays_as_it_is_and_the_report_says_so() -> None:
    module = next(m for m in ENTRIES["gpt_oss"].build().modules() if hasattr(m, "experts")).to(torch.bfloat16)
    x = torch.randn(2, 5, zoo.HIDDEN, dtype=torch.bfloat16)
    out = first(compiled(module, quantize="w8a8")(x))
    assert error(out, first(module(x))) <= 0.02
    assert any("not quantised" in n and "biases" in n for n in moe_compile.last_report().notes)


def test_zero_weights_and_rows_are_no_trouble() -> None:
    weight = torch.zeros(2, 8, 4)
    scale = int8.channel_scale(weight)
    assert not int8.to_int8(weight, scale).any()
    q, s = torch.ops.npu.npu_dynamic_quant(torch.zeros(3, 8, dtype=torch.bfloat16))
    assert not q.any() and not s.any()


@pytest.mark.parametrize("weight_format", ["nd", "nz"])
@torch.no_grad()
def test_int8_products_are_told_how_many_rows_to_expect(weight_format: str) -> None:
    """Where the number of tokens is fixed: 32 tokens, 2 slots each, 8 experts are 8 rows an expert. Nothing else is known otherwise."""
    module = block("qwen3_moe").to(torch.bfloat16)
    for dynamic, told in ((False, [8]), (True, None)):
        torch._dynamo.reset()
        with Seen() as seen:
            compiled(module, dynamic=dynamic, quantize="w8a8", weight_format=weight_format)(torch.randn(2, 16, zoo.HIDDEN).bfloat16())
        nodes = [n for n in seen.lowered[0].module.graph.nodes if "npu_grouped_matmul" in str(n.target)]
        assert len(nodes) == 2 and all(n.kwargs.get("tuning_config") == told for n in nodes), nodes
