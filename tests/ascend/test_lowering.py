"""Blocks of every class of routing, rewritten to npu calls and run through the emulated ops: eager's outputs, static and dynamic."""

from __future__ import annotations

import pytest
import torch
from ascend_blocks import CLASSES, ENTRIES, Seen, block, compiled, first, relative, zoo
from torch import nn

import moe_compile
from moe_compile.lowering.ascend import register

register.ensure()
WHOLE = ("gemma4", "dbrx", "afmoe", "longcat_flash")  # the first two have no block of their own to call
DYNAMIC = {c: n for c, n in CLASSES.items() if n not in WHOLE[:2]}
GATING = {
    "qwen3_moe": "npu_moe_gating_top_k_softmax_v2", "jamba": "npu_moe_gating_top_k_softmax", "gpt_oss": "npu_moe_gating_top_k_softmax_v2",
    "afmoe": "npu_moe_gating_top_k", "minimax_m2": "npu_moe_gating_top_k", "deepseek_v3": "npu_moe_gating_top_k",
    "deepseek_v2": "npu_moe_gating_top_k", "ernie4_5_moe": "npu_moe_gating_top_k", "longcat_flash": "npu_moe_gating_top_k",
}  # fmt: skip


def check_lowered(name: str, seen: Seen, blocks: int) -> None:
    """Every block is lowered, by the routing's own op, and nothing fused is left."""
    report, calls = moe_compile.last_report(), seen.calls()
    assert len(report.blocks) == blocks and not any("not lowered" in n for n in report.notes), report.notes
    assert calls.count("npu_moe_init_routing_v2") == calls.count("npu_moe_finalize_routing") == blocks
    assert calls.count("npu_grouped_matmul") >= 2 * blocks
    assert GATING.get(name, calls[0]) in calls
    assert any("routing as ATen" in n for n in report.notes) == (name in ("kolibri1", "axk2")), report.notes
    assert not any("moe_compile" in str(n.target) for n in seen.lowered[0].module.graph.nodes)


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_models_give_eagers_outputs(name: str) -> None:
    """Whole models where the block is none of its own or layers differ, with a fixed number of tokens."""
    entry = ENTRIES[name]
    model, inputs = entry.build(), entry.make_inputs()
    with Seen() as seen:
        actual = zoo.output_of(compiled(model, dynamic=False)(**inputs))
    assert relative(actual, zoo.output_of(model(**inputs))) <= 1e-5
    check_lowered(name, seen, entry.blocks)


@pytest.mark.parametrize("name", DYNAMIC.values())
@torch.no_grad()
def test_blocks_give_eagers_outputs_for_any_number_of_tokens(name: str) -> None:
    """Dynamo turns float attributes (scales, epsilons) into inputs under dynamic=True; a law needs them as the constants they are."""
    module = block(name)
    fn = compiled(module, dynamic=True)
    with Seen() as seen, torch._dynamo.config.patch(specialize_float=True):
        for batch, tokens in ((2, 5), (3, 4), (1, 7)):
            x = torch.randn(batch, tokens, zoo.HIDDEN)
            assert relative(first(fn(x)), first(module(x))) <= 1e-5
    assert len(seen.lowered) <= 2, "a batch of one may be compiled apart, other sizes not"
    check_lowered(name, seen, 1)
    rows = next(n for n in seen.lowered[0].module.graph.nodes if "init_routing" in str(n.target)).args[0].meta["example_value"]
    assert isinstance(rows.shape[0], torch.SymInt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["afmoe", "deepseek_v3", "llama4"])
@torch.no_grad()
def test_the_shared_expert_goes_into_the_combine(name: str, dtype: torch.dtype) -> None:
    module, x = block(name).to(dtype), torch.randn(2, 5, zoo.HIDDEN, dtype=dtype)
    with Seen() as seen:
        out = first(compiled(module)(x))
    assert relative(out, first(module(x))) <= (1e-5 if dtype == torch.float32 else 0.03)
    (combine,) = [n for n in seen.lowered[0].module.graph.nodes if "finalize" in str(n.target)]
    assert combine.args[1] is not None and combine.args[7] == 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@torch.no_grad()
def test_any_inner_compiler_takes_the_graph(inner: str) -> None:
    module, x = block("deepseek_v3"), torch.randn(2, 5, zoo.HIDDEN)
    assert relative(first(compiled(module, inner=inner)(x)), first(module(x))) <= 1e-5


@torch.no_grad()
def test_only_the_first_expert_is_used() -> None:
    """Expert 0 is an expert: all tokens on one, the others empty."""
    module, x = block("afmoe"), torch.randn(2, 5, zoo.HIDDEN)
    module.expert_bias.zero_()[:2] = 10.0
    assert relative(first(compiled(module)(x)), first(module(x))) <= 1e-5


class Masked(nn.Module):
    """Ids of padding tokens are -1: no expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, 24, 16)), nn.Parameter(torch.randn(4, 16, 12))

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        ids = ids.masked_fill(~real[:, None], -1)
        out = torch.zeros_like(x)
        for e in range(4):
            g, u = nn.functional.linear(x, self.up[e]).chunk(2, -1)
            y = nn.functional.linear(nn.functional.silu(g) * u, self.down[e])
            out = out + y * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


@torch.no_grad()
def test_ids_of_no_expert_contribute_nothing() -> None:
    module, x = Masked(), torch.randn(6, 16)
    real = torch.tensor([True, False, True, True, False, True])
    with Seen() as seen:
        out = compiled(module)(x, real)
    torch.testing.assert_close(out, module(x, real), rtol=1e-5, atol=1e-5)
    if seen.lowered:
        assert "npu_moe_finalize_routing" in seen.calls()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_errs_no_more_than_eager(dtype: torch.dtype) -> None:
    module, wide = block("deepseek_v3").to(dtype), block("deepseek_v3", "eager").to(dtype).double()
    x = torch.randn(2, 16, zoo.HIDDEN).to(dtype)
    exact = first(wide(x.double()))
    eager, fused = first(module(x)).double(), first(compiled(module)(x)).double()
    assert float((fused - exact).norm()) <= 1.25 * float((eager - exact).norm())


@pytest.mark.parametrize(("name", "dtype"), [
    ("afmoe", torch.float32), ("deepseek_v3", torch.bfloat16), ("longcat_flash", torch.float32), ("llama4", torch.float32),
])  # fmt: skip
@torch.no_grad()
def test_the_other_combine(name: str, dtype: torch.dtype) -> None:
    """npu_moe_token_unpermute in its place, addends behind it: the same sums, so that a user can tell one op from the other."""
    module, x = block(name).to(dtype), torch.randn(2, 5, zoo.HIDDEN, dtype=dtype)
    with Seen() as seen:
        out = first(compiled(module, combine="unpermute", strict=True)(x))
    assert relative(out, first(module(x))) <= (1e-5 if dtype == torch.float32 else 0.03)
    assert seen.calls()[-1] == "npu_moe_token_unpermute" and "npu_moe_finalize_routing" not in seen.calls()


@torch.no_grad()
def test_what_is_not_lowered_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain torch the fused ops read counts back to the host: on an NPU too they run op by op, whatever mode is asked for."""
    from moe_compile.lowering.ascend import modes

    def never(*_: object) -> None:
        raise AssertionError("a graph mode got the fused ops")

    def fails(*_: object) -> None:
        raise ValueError("no")

    monkeypatch.setattr(modes, "lower", fails)
    monkeypatch.setattr(modes, "_on_npu", lambda inputs: True)
    for name in ("npugraph_ex_backend", "ge_backend"):
        monkeypatch.setattr(modes, name, never)
    module, x = block("qwen3_moe"), torch.randn(2, 5, zoo.HIDDEN)
    for mode in ("auto", "ge"):
        torch._dynamo.reset()
        assert relative(first(compiled(module, mode=mode)(x)), first(module(x))) <= 1e-5
        assert any("op by op: ValueError: no" in n for n in moe_compile.last_report().notes)
