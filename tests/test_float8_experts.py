"""transformers' `FP8Experts`, the class that experts of every architecture become where its weights load as float8: each of its gates,
by each of the ways that it calls kernels, which stand-ins compute here; and which gate each architecture has."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

from moe_compile import ir
from moe_compile.passes.aten import contracts_float8
from moe_compile.report import Report, collecting

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
moe = pytest.importorskip("transformers.integrations.moe")

E, H, I, K, B = 4, 32, 32, 2, 16
F8 = torch.float8_e4m3fn
LIB = torch.library.Library("_finegrained_fp8_3c1f", "DEF")  # the kernels' namespace holds a hash of their build
_HEAD, _END = "Tensor A, Tensor B, Tensor Bs, ", "ScalarType? output_dtype=None) -> Tensor"
_WAYS = {"_grouped": "Tensor offsets, Tensor tokens_per_expert, ", "_batched": "Tensor expert_ids, ", "": ""}
for _way, _more in _WAYS.items():
    for _kind, _size in (("block", "SymInt[] block_size, "), ("tensor", "")):
        _name = f"w8a8_{_kind}_dynamic_fp8_matmul{_way}"
        LIB.define(f"{_name}({_HEAD}{_more}{_size}{_END}")
        LIB.impl(_name, getattr(contracts_float8, f"_{_kind}{_way or '_2d'}"), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{LIB.ns}::{_name}", lambda A, B, *_: A.new_empty(A.shape[0], B.shape[-2]), lib=LIB)
OPS = torch.ops._finegrained_fp8_3c1f


def grouped(A: Tensor, B: Tensor, Bs: Tensor, offsets: Tensor, tokens_per_expert: Tensor, block_size: Any) -> Tensor:
    if block_size is None:
        return OPS.w8a8_tensor_dynamic_fp8_matmul_grouped(A, B, Bs, offsets, tokens_per_expert)
    return OPS.w8a8_block_dynamic_fp8_matmul_grouped(A, B, Bs, offsets, tokens_per_expert, block_size)


def batched(A: Tensor, B: Tensor, Bs: Tensor, expert_ids: Tensor, block_size: Any) -> Tensor:
    if block_size is None:
        return OPS.w8a8_tensor_dynamic_fp8_matmul_batched(A, B, Bs, expert_ids)
    return OPS.w8a8_block_dynamic_fp8_matmul_batched(A, B, Bs, expert_ids, block_size)


def matmul(A: Tensor, B: Tensor, Bs: Tensor, block_size: Any, output_dtype: Any, activation_scale: Any = None) -> Tensor:
    if block_size is None:
        return OPS.w8a8_tensor_dynamic_fp8_matmul(A, B, Bs, output_dtype)
    return OPS.w8a8_block_dynamic_fp8_matmul(A, B, Bs, block_size, output_dtype)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In place of the kernels that transformers would load from the hub."""
    monkeypatch.setattr(fp8, "_FINEGRAINED_FP8", fp8.FineGrainedFP8(matmul, batched, grouped))
    yield


WAYS = ("grouped_mm", "batched_mm", "eager")  # transformers' default, what it decodes by, a loop over the experts that were hit


class Block(nn.Module):
    """A router and the experts; `way`: transformers' name of the dispatch, one of `WAYS`."""

    def __init__(self, way: str, gate: bool = True, scales: Any = None, block: Any = (B, B), **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(H, E, bias=False)
        given = {"hidden_act": "silu", "hidden_size": H, "num_experts": E, "moe_intermediate_size": I, "_experts_implementation": way}
        own = type("FP8Experts", (fp8.FP8Experts,), {})  # it is changed in place, and other tests have another gate
        cls = moe.use_experts_implementation(
            experts_class=own, experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS, has_bias=False, has_gate=gate
        )
        self.experts = cls(config=SimpleNamespace(**(given | config)), block_size=block, has_gate=gate)
        for name in ("gate_up_proj" if gate else "up_proj", "down_proj"):
            w = getattr(self.experts, name)
            w.data = (torch.randn(w.shape) * 30).to(F8)
            s = getattr(self.experts, f"{name}_scale_inv")
            s.data = (torch.rand(s.shape if block else (E, 1, 1)) + 0.3) / 100
        if scales is not None:
            for s in (p for n, p in self.experts.named_parameters() if n.endswith("_scale_inv")):
                s.data = torch.exp2(torch.randint(-9, -5, s.shape).float()).to(scales)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        return self.experts(x, ids, w)


def compiled(m: nn.Module, x: Tensor) -> tuple[Tensor, Report]:
    torch._dynamo.reset()
    with torch.no_grad(), collecting() as report:
        return torch.compile(m.eval(), backend="moe_fused", options={"inner": "eager"})(x), report


GATES: dict[str, dict[str, Any]] = {
    "silu": {},
    "gelu, tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "limits and alpha": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "limits": {"swiglu_limit": 2.0},
    "soft caps": {"mlp_gate_softcap": 3.0, "mlp_up_softcap": 5.0},
    "no gate, relu squared": {"gate": False, "hidden_act": "relu2"},
}


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_and_each_way(gate: str) -> None:
    """One recovered meaning and one graph, as near to eager as rounding at the edges of steps lets it."""
    found = []
    for way in WAYS if gate in ("silu", "limits and alpha") else WAYS[:2]:
        m, x = Block(way, **GATES[gate]), torch.randn(7, H)
        got, report = compiled(m, x)
        assert len(report.blocks) == 1 and not report.graph_breaks, (report.rejected, report.graph_breaks)
        found.append(report.blocks[0].ir.experts)
        with torch.no_grad():
            want = m(x)
        assert float((got - want).norm() / want.norm()) < 2e-3
    assert all(e == found[0] for e in found)
    how, rows = ir.Stored(8, F8, rows=B, columns=B), ir.Rows(8, F8, B, 1e-12, floored=False)
    assert (found[0].up_stored, found[0].down_stored, found[0].up_rows, found[0].down_rows) == (how, how, rows, rows)


def test_scales_of_powers_of_two_and_of_matrices() -> None:
    """`scale_fmt: ue8m0`, and no blocks at all: one number for each matrix, one scale for each row."""
    _, report = compiled(Block("grouped_mm", scales=torch.float8_e8m0fnu), torch.randn(7, H))
    assert report.blocks and report.blocks[0].ir.experts.up_stored == ir.Stored(8, F8, rows=B, columns=B), report.rejected
    _, report = compiled(Block("grouped_mm", moe_intermediate_size=B), torch.randn(7, H))  # a block as wide as an expert is
    assert report.blocks and report.blocks[0].ir.experts.down_stored == ir.Stored(8, F8, rows=B), report.rejected
    m, x = Block("grouped_mm", block=None), torch.randn(7, H)
    got, report = compiled(m, x)
    assert report.blocks, report.rejected
    e = report.blocks[0].ir.experts
    assert e.up_stored == ir.Stored(8, F8) and e.up_rows == ir.Rows(8, F8, floor=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(got, m(x), rtol=1e-3, atol=1e-3)


# transformers cannot make `FP8Experts` of these itself: their configs lack what it asks for, or their experts have biases
NOT_AS_FLOAT8 = {"dbrx", "aria", "gpt_oss", "openai_privacy_filter", "jetmoe", "lfm2_moe", "nemotron_h", "ernie4_5_vl_moe"}
# What a gate is made of, by its name in `GATES`: activation, then whether there are alpha, a limit, soft caps
SIGNATURES = {
    ("silu", False, False, False): "silu",
    ("gelu_pytorch_tanh", False, False, False): "gelu, tanh",
    ("silu", True, True, False): "limits and alpha",
    ("silu", False, True, False): "limits",
    ("silu", False, False, True): "soft caps",
}


def _gates(entry: zoo.Entry) -> set[str]:
    """The names of the gates that the experts of an architecture have once they are `FP8Experts`."""
    found = set()
    with torch.device("meta"):
        config = entry.build_config()
        model = getattr(zoo._module(entry.package, "modeling"), entry.model)(config)
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                given = getattr(module, "config", config)
                has_bias, has_gate = getattr(module, "has_bias", False), getattr(module, "has_gate", True)
                made = fp8.FP8Experts(given, (B, B), has_bias=has_bias, has_gate=has_gate)
                assert made.has_gate
                act = getattr(given, "hidden_activation", None) or given.hidden_act
                found.add(SIGNATURES[act, made.swiglu_alpha is not None, made.limit is not None, made.gate_softcap is not None])
    return found


def test_every_architecture_has_a_gate_that_is_tested_above() -> None:
    """Every architecture of transformers whose experts load as `FP8Experts`: what differs between them is their gate."""
    others = {}
    for entry in zoo.ENTRIES:
        try:
            assert len(_gates(entry) & GATES.keys()) == 1, entry.name
        except (AttributeError, TypeError, AssertionError) as e:
            others[entry.name] = str(e)
    assert others.keys() == NOT_AS_FLOAT8, others


class WithShared(Block):
    """Beside them a shared expert of `FP8Linear`, as DeepSeek's and GLM's checkpoints load."""

    def __init__(self) -> None:
        super().__init__("grouped_mm")
        self.gate, self.up, self.down = (fp8.FP8Linear(i, o, (B, B)) for i, o in ((H, I), (H, I), (I, H)))
        for m in (self.gate, self.up, self.down):
            m.weight.data, m.weight_scale_inv.data = (torch.randn(m.weight.shape) * 30).to(F8), (torch.rand(2, 2) + 0.3) / 100
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(("device", "tokens"), [("cuda", 7), ("cuda", 9), ("cpu", 7)])
def test_a_shared_expert_of_float8_linears(device: str, tokens: int) -> None:
    """Read by the contract of the product of one matrix, rows rounded by groups of a block: an op of its own where kernels round rows, of
    so many tokens as they are known to be good for."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    m, x = WithShared().eval(), torch.randn(tokens, H)
    with torch.no_grad(), collecting() as report:
        got = torch.compile(m, backend="moe_fused", options={"inner": "eager", "target": device})(x)
        want = m(x)
    (block,) = report.blocks
    assert "rows in float8_e4m3fn by 16" in block.shared and block.shared.endswith("as written") is ((device, tokens) != ("cuda", 7))
    assert ("rows that are rounded" in block.note) is (device == "cpu") and ("more than 8 tokens" in block.note) is (tokens == 9)
    assert float((got - want).norm() / want.norm()) < 2e-3
