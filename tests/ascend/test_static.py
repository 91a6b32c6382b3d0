"""Graphs captured by address: packed weights are static, made again where they are, and a weight with other memory is captured anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from address_graph import AddressGraph
from ascend_blocks import block, compiled, first, relative, zoo
from torch import nn

import moe_compile
from moe_compile.lowering.ascend.store import Store


def tokens() -> torch.Tensor:
    return torch.randn(2, 5, zoo.HIDDEN)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("name", ["afmoe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_only_the_tokens_are_copied(name: str, prepared: bool, store: Store) -> None:
    module, x, graph = block(name), tokens(), AddressGraph()
    if prepared:
        moe_compile.prepare(module, target="ascend")
    assert relative(first(compiled(module, inner=graph.backend)(x)), first(module(x))) <= 1e-5
    assert graph.copied == x.numel() * x.element_size()


def in_place(m: nn.Module) -> None:
    m.experts.down_proj.mul_(2)


def loaded(m: nn.Module) -> None:
    m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()})


def other_memory(m: nn.Module) -> None:
    m.experts.down_proj.data = m.experts.down_proj.data * 2


def assigned(m: nn.Module) -> None:
    m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}, assign=True)


def prepared_late(m: nn.Module) -> None:
    moe_compile.prepare(m, target="ascend")


def moved_and_back(m: nn.Module) -> None:
    m.to(torch.float64).to(torch.float32).experts.gate_up_proj.neg_()


def swapped(m: nn.Module) -> None:
    """Tensors change places under the names: torch refuses that for one that is referred to weakly."""
    kept = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()})
        m.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(kept)


CHANGES: list[Callable[[nn.Module], None]] = [in_place, loaded, other_memory, assigned, prepared_late, moved_and_back, swapped]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_no_change_of_a_weight_is_missed(change: Callable[[nn.Module], None], prepared: bool, store: Store) -> None:
    module, x, graph = block("afmoe"), tokens(), AddressGraph()
    if prepared:
        moe_compile.prepare(module, target="ascend")
    fn = compiled(module, inner=graph.backend)
    for _ in range(2):
        assert relative(first(fn(x)), first(module(x))) <= 1e-5
        change(module)
    assert relative(first(fn(x)), first(module(x))) <= 1e-5


@pytest.mark.parametrize("change", [in_place, loaded, other_memory], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_copy_is_made_again_in_its_own_memory(change: Callable[[nn.Module], None], store: Store) -> None:
    """One capture for good: the graph holds the address of the copy, and a frozen one reads the new values there."""
    module, x, graph = block("qwen3_moe"), tokens(), AddressGraph(frozen=True)
    router = module.gate.weight
    fn = compiled(module, inner=graph.backend)
    fn(x)
    before = {id(k): (k.packed.data_ptr(), k.bytes) for k in store.kept.values()}
    for _ in range(3):
        change(module)
        assert module.gate.weight is router
        assert relative(first(fn(x)), first(module(x))) <= 1e-5
    assert {id(k): (k.packed.data_ptr(), k.bytes) for k in store.kept.values()} == before and graph.captures == 1


@torch.no_grad()
def test_preparing_again_makes_copies_anew(store: Store) -> None:
    """A write through `.data` moves no version: `prepare` behind it is what tells, and the copies keep their memory."""
    module, x, graph = block("qwen3_moe").to(torch.bfloat16), tokens().to(torch.bfloat16), AddressGraph(frozen=True)
    moe_compile.prepare(module, target="ascend")
    fn = compiled(module, inner=graph.backend, quantize="w8a8")
    before = first(fn(x))
    module.experts.down_proj.data.mul_(2)
    moe_compile.prepare(module, target="ascend")
    assert relative(first(fn(x)), 2 * before) <= 0.01 and graph.captures == 1


@torch.no_grad()
def test_preparing_late_gives_the_copies_back(store: Store) -> None:
    module, x = block("afmoe"), tokens()
    fn = compiled(module, inner=AddressGraph().backend)
    fn(x)
    assert store.copied > 0
    moe_compile.prepare(module, target="ascend")
    fn(x)
    assert store.copied == 0


@torch.no_grad()
def test_int8_weights_are_static_too(store: Store) -> None:
    import test_int8

    module, x, exact = test_int8.made(test_int8.Dense, torch.bfloat16)
    for option in (None, "w8a8"):
        torch._dynamo.reset()
        graph = AddressGraph()
        out = compiled(module, inner=graph.backend, quantize=option)(x)
        assert test_int8.error(out, exact) <= 0.03
        assert graph.copied == x.numel() * x.element_size(), option


def test_weights_made_under_inference_mode(store: Store) -> None:
    """A copy that was made under inference mode can be written again outside of it."""
    module, x = block("qwen3_moe"), tokens()
    fn = compiled(module, inner=AddressGraph().backend)
    with torch.inference_mode():
        fn(x)
    with torch.no_grad():
        in_place(module)
        assert relative(first(fn(x)), first(module(x))) <= 1e-5


class Computed(nn.Module):
    """Verdict: fused, and what every step costs is told. Expert weights are made of others in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4, 16))
        self.up, self.down = nn.Parameter(torch.randn(4, 24, 16)), nn.Parameter(torch.randn(4, 16, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, ids = (x @ self.gate.t()).softmax(-1).topk(2, -1)
        up, down = self.up * 0.5, self.down * 2.0
        rows, e = x.repeat_interleave(2, 0), ids.reshape(-1)
        g, u = torch.bmm(up[e], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(down[e], (nn.functional.silu(g) * u).unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)
        return y.view(*ids.shape, -1).sum(1)


@torch.no_grad()
def test_weights_that_a_step_makes_are_counted() -> None:
    x = torch.randn(7, 16)
    report = moe_compile.explain(Computed(), x, options={"target": "ascend"})
    size = 4 * (4 * 24 * 16 + 4 * 16 * 12)
    assert len(report.blocks) == 1
    told = f"copies {x.numel() * 4} bytes of inputs and {size / 1024:.1f} KiB of expert weights"
    assert any(told in n for n in report.notes), report.notes


@torch.no_grad()
def test_only_who_asks_is_told_what_a_step_copies(store: Store) -> None:
    module, x = block("afmoe"), tokens()
    compiled(module)(x)
    assert not any("replayed" in n for n in moe_compile.last_report().notes)
    report = moe_compile.explain(module, x, options={"target": "ascend"})
    assert any("and 0 bytes of expert weights" in n for n in report.notes)
