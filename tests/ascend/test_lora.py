"""Experts with low-rank pairs: grouped products beside those of the weights, in inference and in training."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from ascend_blocks import Seen, compiled, relative
from hazards import hazards
from torch import Tensor, nn

import moe_compile
from moe_compile.lowering.ascend import register, schemas, streams

sys.path.insert(0, str(Path(__file__).parent.parent))
from catalogue import lora

register.ensure()
PRODUCT = "npu_grouped_matmul"


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module = getattr(lora, name)()
    return module, module.example_inputs()


@pytest.mark.parametrize(("name", "products"), [("LoraLinears", 9), ("LoraStacks", 6), ("LoraBias", 9), ("LoraSecond", 5), ("LoraDown", 5)])
@torch.no_grad()
def test_pairs_are_grouped_products(name: str, products: int) -> None:
    """Two more for each projection that has a pair; weights and pairs are graph inputs, nothing is made on a step."""
    module, inputs = made(name)
    with Seen() as seen:
        out = compiled(module, strict=True)(*inputs)
    assert relative(out, module(*inputs)) <= 1e-5
    assert seen.calls().count(PRODUCT) == products and len(moe_compile.last_report().blocks) == 1
    nodes = [n for n in seen.lowered[0].module.graph.nodes if PRODUCT in str(n.target)]
    assert all(n.args[1][0].op == "placeholder" for n in nodes)


@pytest.mark.parametrize("pair", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_half_precision_errs_no_more_than_eager(pair: torch.dtype) -> None:
    """Adapters in bf16, and in fp32 beside weights in bf16: then the pair's products are in fp32, as the ops want one type."""
    module, (x,) = made("LoraStacks")
    module, x = module.to(torch.bfloat16), x.bfloat16()
    exact = copy.deepcopy(module).double()(x.double())
    eager = module(x).double()
    for name in ("up_a", "up_b", "down_a", "down_b"):
        setattr(module, name, nn.Parameter(getattr(module, name).to(pair)))
    if pair is torch.float32:
        linear = nn.functional.linear

        def project(rows: Tensor, e: int, name: str) -> Tensor:
            w, a, b = (getattr(module, f"{name}{what}") for what in ("", "_a", "_b"))
            return (linear(rows, w[e]) + 2.0 * linear(linear(rows.float(), a[e]), b[e])).bfloat16()

        module.project = project  # type: ignore[assignment]
    with Seen() as seen:
        out = compiled(module)(x).double()
    assert float((out - exact).norm()) <= 1.25 * float((eager - exact).norm())
    dtypes = [n.args[1][0].meta["example_value"].dtype for n in seen.lowered[0].module.graph.nodes if PRODUCT in str(n.target)]
    assert dtypes.count(pair) >= 4 and dtypes.count(torch.bfloat16) >= 2


@torch.no_grad()
def test_an_adapter_that_is_written_to_is_seen() -> None:
    """Adapters are swapped while the weights stay."""
    module, inputs = made("LoraStacks")
    fn = compiled(module)
    fn(*inputs)
    module.up_b.mul_(-3.0)
    assert relative(fn(*inputs), module(*inputs)) <= 1e-5


@torch.no_grad()
def test_pairs_are_not_quantised() -> None:
    """Near: the same block without pairs is W8A8. A pair reads rows as they are, so the block stays in its own precision."""
    module, (x,) = made("LoraStacks")
    module, x = module.to(torch.bfloat16), x.bfloat16()
    assert relative(compiled(module, quantize="w8a8")(x), module(x)) <= 0.03
    assert any("not quantised: low-rank pairs" in n for n in moe_compile.last_report().notes)


class Shared(lora.LoraStacks):
    """With a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.two(nn.functional.silu(self.one(x)))


@torch.no_grad()
def test_the_shared_expert_runs_beside_them() -> None:
    module, x = Shared(), torch.randn(7, 16)
    with Seen() as seen:
        out = compiled(module, overlap_shared=False)(x)
    assert relative(out, module(x)) <= 1e-5
    graph = seen.lowered[0].module.graph
    assert streams.overlap(graph, streams.NpugraphEx) == 1 and hazards(graph) == []


@pytest.mark.skipif(schemas.wheel(), reason="torch_npu has gradients on its own device only")
@pytest.mark.parametrize(("name", "frozen"), [("LoraStacks", True), ("LoraLinears", False)])
def test_gradients_are_eagers(name: str, frozen: bool) -> None:
    """Adapters train beside frozen weights, which get none, or all of them do."""
    module, inputs = made(name)
    for n, p in module.named_parameters():
        p.requires_grad_(not frozen or n.endswith(("_a", "_b")))
    found = []
    for fn in (module, compiled(module, strict=True)):
        module.zero_grad(set_to_none=True)
        with Seen() as seen:
            fn(*inputs).sin().sum().backward()
        found.append({n: p.grad for n, p in module.named_parameters()})
    assert seen.lowered and seen.lowered[0].training and "npu_moe_token_permute" in seen.calls()
    for n, want in found[0].items():
        if want is None:
            assert found[1][n] is None, n
        else:
            torch.testing.assert_close(found[1][n], want, rtol=1e-4, atol=1e-5, msg=n)
