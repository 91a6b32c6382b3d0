"""Training, autocast and changing shapes through the backend, on real architectures: the same gradients as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
import zoo_run
from test_zoo import OPTIONS, check_blocks, told
from torch import Tensor, nn

import moe_compile

BY_NAME = {e.name: e for e in zoo.ENTRIES}
TRAINED = [
    ("qwen2_moe", "default"),  # sigmoid-gated shared expert
    ("mixtral", "eager"),
    ("afmoe", "default"),
    ("afmoe", "eager"),
    ("deepseek_v3", "default"),  # groups
    ("gpt_oss", "default"),  # interleaved, biases, clamps
    ("gpt_oss", "eager"),
    ("ernie4_5_moe", "default"),  # clamped normaliser, autocast region
    ("gemma4", "default"),  # trained per-expert scale
    ("aria", "default"),  # transposed
    ("kolibri1", "default"),  # bias on the logits
    ("nemotron_h", "default"),  # no gate
    ("phimoe", "default"),  # router with a custom autograd.Function and random numbers
    ("longcat_flash", "default"),  # identity experts
    ("llama4", "default"),  # weight on the input
]
if not zoo_run.EVERY:  # the same as another one, or as an entry of the catalogue
    TRAINED = [t for t in TRAINED if t not in {("afmoe", "default"), ("aria", "default"), ("kolibri1", "default"), ("gpt_oss", "default")}]
Gradients = dict[str, Tensor | None]


def loss_and_gradients(
    model: nn.Module, call: Callable[..., Any], inputs: dict[str, Any], loss_of: Callable[[Any], Tensor]
) -> tuple[Tensor, Gradients]:
    """One forward and backward through `call` (the model or its compiled self), the random numbers seeded."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = loss_of(call(**inputs))
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def projected(result: Any) -> Tensor:
    """A scalar to which every output element contributes differently."""
    output = zoo.output_of(result)
    generator = torch.Generator().manual_seed(3)
    return (output.float() * torch.randn(output.shape, generator=generator)).sum()


def assert_same_gradients(actual: Gradients, expected: Gradients) -> None:
    """Within 1e-5 of each parameter's largest gradient; the floor is for those that are zero but for rounding."""
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, e in expected.items():
        a = actual[name]
        assert (a is None) == (e is None), name
        if a is not None and e is not None:
            assert float((a - e).abs().max()) <= 1e-5 * float(e.abs().max()) + 1e-7 * largest, name


@pytest.mark.parametrize(("name", "implementation"), TRAINED)
def test_gradients(name: str, implementation: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.build(implementation).train(), entry.make_inputs(tokens=12)
    expected_loss, expected = loss_and_gradients(model, model, inputs, projected)
    compiled = torch.compile(model, backend="moe_fused", options=OPTIONS)
    loss, gradients = loss_and_gradients(model, compiled, inputs, projected)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients, expected)
    assert any(g is not None and bool(g.any()) for n, g in gradients.items() if "experts" in n)
    if name != "phimoe":  # its sampling router is left as written, and with it, in training, the experts
        check_blocks(entry, moe_compile.last_report())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoe"])
def test_auxiliary_loss_on_the_router_logits(name: str) -> None:
    """The router logits leave the fused region: the load-balancing loss reads them, and their gradient comes back."""
    entry = BY_NAME[name]
    model, inputs = entry.build().train(), entry.make_inputs(tokens=12)
    inputs |= {"labels": inputs["input_ids"], "output_router_logits": True}

    def loss_of(result: Any) -> Tensor:
        assert len(result.router_logits) == 2
        return result.loss + 10 * result.aux_loss

    expected_loss, expected = loss_and_gradients(model, model, inputs, loss_of)  # also installs transformers' recording hooks
    compiled = torch.compile(model, backend="moe_fused", options=OPTIONS)
    loss, gradients = loss_and_gradients(model, compiled, inputs, loss_of)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients, expected)
    check_blocks(entry, moe_compile.last_report())


@pytest.mark.parametrize("name", ["qwen3_moe", "afmoe"])
def test_gradient_checkpointing(name: str) -> None:
    entry = BY_NAME[name]
    model, inputs = entry.build().train(), entry.make_inputs(tokens=12)
    expected_loss, expected = loss_and_gradients(model, model, inputs, projected)
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="moe_fused", options=OPTIONS)
    loss, gradients = loss_and_gradients(model, compiled, inputs, projected)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients, expected)
    report = moe_compile.last_report()
    assert report is not None and (report.blocks or report.rejected), "neither fused nor told why not"


AUTOCAST = [("mixtral", "default"), ("mixtral", "eager"), ("afmoe", "default"), ("gpt_oss", "batched_mm"), ("ernie4_5_moe", "default")]


@pytest.mark.parametrize(("name", "implementation"), AUTOCAST)
@torch.no_grad()
def test_autocast(name: str, implementation: str) -> None:
    """bf16 autocast of one MoE block: against float64, no more than 1.25 times eager's own error."""
    block = moe_block(BY_NAME[name], implementation)
    x = torch.randn(1, 64, zoo.HIDDEN, generator=torch.Generator().manual_seed(5))
    exact = first(moe_block(BY_NAME[name], "eager").double()(x.double()))  # the same weights; grouped_mm has no float64
    compiled = torch.compile(block, backend="moe_fused", options=OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager, fused = first(block(x)), first(compiled(x))
    report = moe_compile.last_report()
    assert report is not None and len(report.blocks) == 1, told(report)
    assert fused.dtype == eager.dtype
    eager_error, fused_error = ((y.double() - exact).abs().amax(-1) for y in (eager, fused))
    # a token whose router logits nearly tie takes other experts once they are rounded to bf16: no measure of arithmetic
    same_experts = eager_error < 0.1 * exact.abs().max()
    assert same_experts.float().mean() > 0.8
    assert fused_error[same_experts].max() <= 1.25 * eager_error[same_experts].max()
    assert fused_error[same_experts].mean() <= 1.25 * eager_error[same_experts].mean()


def moe_block(entry: zoo.Entry, implementation: str = "default") -> nn.Module:
    """The first MoE block of a model: the innermost module that holds both router and experts."""
    model = entry.build(implementation)
    name = next(n for n, _ in model.named_modules() if n.rpartition(".")[2] == "experts")
    return model.get_submodule(name.rpartition(".")[0])


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


class Counting:
    """An inner compiler that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


BLOCKS = [("mixtral", "default"), ("mixtral", "eager"), ("deepseek_v3", "default"), ("afmoe", "batched_mm"), ("gpt_oss", "default"),
          ("longcat_flash", "default")]  # fmt: skip


@pytest.mark.parametrize(("name", "implementation"), BLOCKS)
@torch.no_grad()
def test_token_counts_make_no_more_graphs_than_without_us(name: str, implementation: str) -> None:
    block = moe_block(BY_NAME[name], implementation)
    plain, ours = Counting(), Counting()
    for counter, compiled in ((plain, torch.compile(block, backend=plain)),
                              (ours, torch.compile(block, backend="moe_fused", options={"inner": ours}))):  # fmt: skip
        torch._dynamo.reset()
        for tokens in (1, 2, 7, 64, 129):
            x = torch.randn(1, tokens, zoo.HIDDEN, generator=torch.Generator().manual_seed(tokens))
            expected, actual = first(block(x)), first(compiled(x))
            assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), (counter, tokens)
            if counter is ours:
                report = moe_compile.last_report()
                assert report is not None and len(report.blocks) == 1, told(report)
    assert ours.graphs <= plain.graphs


@pytest.mark.parametrize(("name", "implementation"), BLOCKS)
@torch.no_grad()
def test_zero_tokens(name: str, implementation: str) -> None:
    """An empty batch after a full one, and as the very first call."""
    block = moe_block(BY_NAME[name], implementation)
    empty, some = torch.zeros(1, 0, zoo.HIDDEN), torch.randn(1, 5, zoo.HIDDEN)
    for calls in ((some, empty, some), (empty, some)):
        torch._dynamo.reset()
        compiled = torch.compile(block, backend="moe_fused", options=OPTIONS)
        for x in calls:
            expected, actual = first(block(x)), first(compiled(x))
            assert actual.shape == expected.shape == x.shape
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
