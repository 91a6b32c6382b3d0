"""Expert weights: packed once, in place when prepared, and a state_dict in the model's own layout."""

from __future__ import annotations

import gc

import pytest
import torch
from ascend_blocks import Seen, block, compiled, first, relative, zoo
from torch import nn

import moe_compile
from moe_compile.lowering.ascend.store import Store
from moe_compile.lowering.ascend.weights import Recipe, Source


class Lists(nn.Module):
    """Experts as a list of MLPs, every one on every token."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (ids == e)).sum(-1, keepdim=True)
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def test_prepare_changes_strides_and_nothing_else() -> None:
    module = block("afmoe")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    moved = moe_compile.prepare(module, target="ascend")
    assert set(moved) == {"experts.gate_up_proj", "experts.down_proj"}
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert module.experts.gate_up_proj.transpose(1, 2).is_contiguous() and isinstance(module.experts.gate_up_proj, nn.Parameter)
    assert moe_compile.prepare(module, target="ascend") == moved  # once more is no harm


@torch.no_grad()
def test_a_prepared_model_costs_no_memory(store: Store) -> None:
    module, x = block("afmoe"), torch.randn(2, 5, zoo.HIDDEN)
    moe_compile.prepare(module, target="ascend")
    assert relative(first(compiled(module)(x)), first(module(x))) <= 1e-5
    assert store.copied == 0 and not moe_compile.last_report().notes


@torch.no_grad()
def test_weights_are_packed_once_for_all_graphs_and_the_report_says_what_it_costs(store: Store) -> None:
    module = block("afmoe")
    size = sum(p.numel() * 4 for p in (module.experts.gate_up_proj, module.experts.down_proj))
    fn = compiled(module, dynamic=False)
    for tokens in (5, 1, 5):  # a prefill and a decode graph
        x = torch.randn(1, tokens, zoo.HIDDEN)
        assert relative(first(fn(x)), first(module(x))) <= 1e-5
    assert store.copied == size
    assert any(f"{size / 2**20:.1f} MiB more memory" in n for n in moe_compile.last_report().notes)
    del fn, module
    torch._dynamo.reset()
    gc.collect()
    assert store.copied == 0


@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_weights_written_to_later_are_seen(prepared: bool) -> None:
    """load_state_dict after the first call, and memory swapped under a parameter."""
    module, other, x = block("afmoe"), block("afmoe"), torch.randn(2, 5, zoo.HIDDEN)
    for p in other.parameters():
        p.mul_(1.5)
    if prepared:
        moe_compile.prepare(module, target="ascend")
    fn = compiled(module)
    fn(x)
    module.load_state_dict(other.state_dict())
    assert relative(first(fn(x)), first(other(x))) <= 1e-5
    module.experts.down_proj.data = module.experts.down_proj.data * 2
    assert relative(first(fn(x)), first(module(x))) <= 1e-5


@torch.no_grad()
def test_memory_that_is_seen_otherwise_is_packed_anew() -> None:
    """A square weight transposed in place: neither its version nor its address tells, and a copy must not stay."""
    store, p = Store(), nn.Parameter(torch.randn(2, 4, 4))
    recipe = Recipe((Source(0),), 2, stacked=True, transposed=True, dtype=torch.float32)
    assert torch.equal(store.get(recipe, [p]), p.transpose(1, 2))
    p.data = p.data.transpose(1, 2)
    assert torch.equal(store.get(recipe, [p]), p.transpose(1, 2))


@torch.no_grad()
def test_a_saved_model_has_its_own_layout(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    entry = zoo.ENTRIES[[e.name for e in zoo.ENTRIES].index("qwen3_moe")]
    model = entry.build()
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    moe_compile.prepare(model, target="ascend")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    model.save_pretrained(tmp_path / "hub")
    plain = torch.load(tmp_path / "plain.pt")
    again = type(model).from_pretrained(tmp_path / "hub").state_dict()
    for name, value in expected.items():
        assert torch.equal(plain[name], value) and torch.equal(again[name], value)
    del safetensors


@torch.no_grad()
def test_lists_of_experts_are_stacked_once_or_laid_together(store: Store) -> None:
    module, x = Lists(), torch.randn(6, 16)
    expected = module(x)
    with Seen() as seen:
        torch.testing.assert_close(compiled(module)(x), expected, rtol=1e-5, atol=1e-5)
    recipes = [i for i in seen.lowered[0].inputs if isinstance(i, Recipe)]
    assert [len(r.sources) for r in recipes] == [4] * len(recipes) and len(recipes) == 6
    used = store.copied
    assert used > 0
    prepared = Lists()
    prepared.load_state_dict(module.state_dict())
    moe_compile.prepare(prepared, target="ascend")
    torch.testing.assert_close(compiled(prepared)(x), expected, rtol=1e-5, atol=1e-5)
    assert store.copied == used
    assert all(torch.equal(a, b) for a, b in zip(prepared.state_dict().values(), module.state_dict().values()))


@torch.no_grad()
def test_weights_stored_in_out_are_used_as_they_are(store: Store) -> None:
    module, x = block("llama4"), torch.randn(2, 5, zoo.HIDDEN)
    assert moe_compile.prepare(module, target="ascend") == {}
    assert relative(first(compiled(module)(x)), first(module(x))) <= 1e-5
    assert store.copied == 0


def test_other_targets_need_no_preparation() -> None:
    assert moe_compile.prepare(nn.Linear(2, 2), target="cpu") == {}
    with pytest.raises(moe_compile.OptionError, match="'ascend'"):
        moe_compile.prepare(nn.Linear(2, 2), target="tpu")
