"""The differentiable path through the emulated ops: gradients are eager's, and no gradient is lost in silence."""

from __future__ import annotations

import pytest
import torch
from ascend_blocks import Seen, block, compiled, first, zoo

import moe_compile
from moe_compile.lowering.ascend import register, schemas
from moe_compile.lowering.ascend.store import Store

register.ensure()
if schemas.wheel():
    pytest.skip("torch_npu has gradients on its own device only", allow_module_level=True)

MODELS = ("afmoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "llama4", "kolibri1", "longcat_flash")


def gradients(fn, module: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    module.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    out = first(fn(leaf))
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {"x": leaf.grad, **{n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}}


def same(a: dict[str, torch.Tensor | None], b: dict[str, torch.Tensor | None]) -> None:
    for name, expected in b.items():
        if expected is None:
            assert a[name] is None or not a[name].any(), name
            continue
        assert a[name] is not None, f"{name} has lost its gradient"
        assert float((a[name] - expected).abs().max()) <= 1e-4 * max(float(expected.abs().max()), 1e-3), name


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_eagers(name: str, inner: str) -> None:
    if inner == "aot_eager" and name not in ("afmoe", "gpt_oss"):
        pytest.skip("one of each kind is enough")
    module, x = block(name), torch.randn(2, 5, zoo.HIDDEN)
    expected = gradients(module, module, x)
    with Seen() as seen:
        same(gradients(compiled(module, inner=inner), module, x), expected)
    calls = seen.calls()
    assert {"npu_moe_token_permute", "npu_moe_token_unpermute"} <= set(calls) and not any("gating" in c or "finalize" in c for c in calls)


@pytest.mark.parametrize("prepared", [False, True])
def test_no_weight_is_copied_on_a_step(prepared: bool, store: Store) -> None:
    """Whatever the layout, weights go in as views; prepared ones are [E, in, out] in memory, and so are their gradients."""
    module, x = block("afmoe"), torch.randn(2, 5, zoo.HIDDEN)
    expected = gradients(module, module, x)
    if prepared:
        moe_compile.prepare(module, target="ascend")
    same(gradients(compiled(module), module, x), expected)
    assert store.copied == 0
    if prepared:
        grad = module.experts.gate_up_proj.grad
        assert grad.transpose(1, 2).is_contiguous()


def test_only_some_parameters_train() -> None:
    module, x = block("afmoe"), torch.randn(2, 5, zoo.HIDDEN)
    module.experts.gate_up_proj.requires_grad_(False)
    same(gradients(compiled(module), module, x), gradients(module, module, x))


@pytest.mark.parametrize("name", ["afmoe", "qwen3_moe", "routing apart"])
def test_only_the_input_wants_a_gradient(name: str) -> None:
    """Frozen weights, as under an adapter further down: the experts are still differentiated."""
    module, x = (block(name) if name != "routing apart" else RoutingApart()), torch.randn(2, 5, zoo.HIDDEN)
    module.requires_grad_(False)
    expected = gradients(module, module, x)
    with Seen() as seen:
        same(gradients(compiled(module), module, x), expected)
    assert seen.lowered and seen.lowered[0].training


class RoutingApart(torch.nn.Module):
    """Routing that does not depend on the input's gradient at all."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = block("qwen3_moe")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            _, w, ids = self.moe.gate(x.reshape(-1, zoo.HIDDEN))
        return self.moe.experts(x.reshape(-1, zoo.HIDDEN), ids, w)


def test_a_training_step_changes_what_the_next_one_computes() -> None:
    module, twin, x = block("qwen3_moe"), block("qwen3_moe"), torch.randn(2, 5, zoo.HIDDEN)
    fn = compiled(module)
    for f, m in ((fn, module), (twin, twin)):
        optimiser = torch.optim.SGD(m.parameters(), lr=0.05)
        for _ in range(3):
            optimiser.zero_grad()
            first(f(x)).square().mean().backward()
            optimiser.step()
    for (n, a), b in zip(module.named_parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=n)


def test_an_op_without_a_gradient_raises_where_one_is_wanted() -> None:
    from moe_compile.lowering.ascend import calls, rules

    rows, weight = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 6)
    counts = torch.tensor([1, 3])
    with pytest.raises(rules.ArgumentError, match="gradient"):
        calls.grouped(rows, weight, None, counts)
    with torch.no_grad():
        calls.grouped(rows, weight, None, counts)


def test_quantised_experts_do_not_train() -> None:
    with pytest.raises(moe_compile.OptionError, match="inference"):
        compiled(block("afmoe"), quantize="w8a8")(torch.randn(2, 5, zoo.HIDDEN))
