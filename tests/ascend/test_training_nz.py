"""Training with weights in the fractal format: where it is used, how long a cast is kept, and what is said where there is none."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from ascend_blocks import compiled, first, relative, zoo
from test_quant import block
from torch import Tensor, nn

import moe_compile
from moe_compile.lowering.ascend import calls, casts, register, schemas, training

register.ensure()
if schemas.wheel():
    pytest.skip("torch_npu has gradients on its own device only", allow_module_level=True)
BF = torch.bfloat16


class Watch:
    """Casts that are made, and every grouped product: its kind, and whether its weight is (a view of) a cast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Tensor] = []
        self.products: list[tuple[int, bool]] = []
        self.count = 0
        self.store = casts.Casts()
        monkeypatch.setattr(casts, "to_nz", self.cast)
        monkeypatch.setattr(training, "CASTS", self.store)
        real = calls.call

        def call(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "npu_grouped_matmul" and type(args[1][0]) in (Tensor, nn.Parameter):
                memory = {t.untyped_storage()._cdata for t in self.made}
                self.products.append((kwargs["group_type"], args[1][0].untyped_storage()._cdata in memory))
            return real(name, *args, **kwargs)

        monkeypatch.setattr(calls, "call", call)
        monkeypatch.setattr(training, "call", call)

    def cast(self, t: Tensor) -> Tensor:
        self.count += 1
        made = t.clone().contiguous()
        self.made.append(made)
        return made


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def models(inner: int = 32) -> tuple[nn.Module, nn.Module, Tensor]:
    plain, module = (block("qwen3_moe", moe_intermediate_size=inner).to(BF) for _ in range(2))
    module.load_state_dict(plain.state_dict())
    return plain, module, torch.randn(2, 5, zoo.HIDDEN, dtype=BF)


def backward(fn: Any, x: Tensor) -> None:
    first(fn(x)).float().sin().sum().backward()


@pytest.mark.parametrize("prepared", [False, True])
def test_forward_and_rows_gradient_take_it_the_weights_gradient_never_does(prepared: bool, watch: Watch) -> None:
    plain, module, x = models()
    if prepared:
        moe_compile.prepare(module, target="ascend", training=True)
    fn = compiled(module, weight_format="nz")
    leaf = x.clone().requires_grad_()
    backward(fn, leaf)
    other = x.clone().requires_grad_()
    backward(plain, other)
    assert relative(leaf.grad, other.grad) <= 0.05
    assert watch.count == 2, "once for each weight: the cast of the forward pass serves the backward pass too"
    assert watch.products.count((0, True)) == 4 and (0, False) not in watch.products
    assert watch.products.count((2, False)) == 2 and (2, True) not in watch.products


def test_micro_steps_share_a_cast_and_an_optimiser_step_ends_it(watch: Watch) -> None:
    plain, module, x = models()
    fn = compiled(module, weight_format="nz")
    optimisers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (module, plain)]
    for step in range(1, 4):
        for f in (fn, plain):
            for _ in range(3):  # gradient accumulation
                backward(f, x)
        assert watch.count == 2 * step and len(watch.store.kept) == 2
        for o in optimisers:
            o.step()
            assert not watch.store.kept, "nothing is kept over an optimiser's step"
            o.zero_grad()
    for (n, a), b in zip(module.named_parameters(), plain.parameters()):
        assert relative(a.detach().float(), b.detach().float()) <= 0.02, n


def test_a_weight_written_without_an_optimiser_is_cast_again(watch: Watch) -> None:
    plain, module, x = models()
    fn = compiled(module, weight_format="nz")
    for _ in range(2):
        backward(fn, x)
        for m in (module, plain):
            with torch.no_grad():
                m.experts.down_proj.mul_(-1)
        assert relative(first(fn(x)).float(), first(plain(x)).float()) <= 0.05
    assert len(watch.store.kept) == 2


def test_a_weight_that_was_cast_can_be_swapped_and_is_cast_again(watch: Watch) -> None:
    owner, other = (nn.Parameter(torch.randn(2, 16, 16, dtype=BF)) for _ in range(2))
    watch.store.get(owner, owner)
    wanted = other.detach().clone()
    torch.utils.swap_tensors(owner, other)
    assert torch.equal(watch.store.get(owner, owner), wanted) and watch.count == 2


def test_memory_that_its_owner_frees_takes_the_cast_along(watch: Watch) -> None:
    """FSDP2 frees a weight by resizing its storage to nothing; the next cast of any weight drops what was made of it."""
    owners = [nn.Parameter(torch.randn(2, 16, 16, dtype=BF)) for _ in range(3)]
    for o in owners:
        watch.store.get(o, o)
    owners[0].untyped_storage().resize_(0)
    owners.pop(1)
    gc.collect()
    fresh = nn.Parameter(torch.randn(2, 32, 16, dtype=BF))
    watch.store.get(fresh, fresh)
    assert len(watch.store.kept) == 2


def test_refilled_memory_is_cast_again(watch: Watch) -> None:
    """The same parameter, the same version, values gathered anew in memory that was freed in between."""
    owner = nn.Parameter(torch.randn(2, 16, 16, dtype=BF))
    size = owner.untyped_storage().nbytes()
    watch.store.get(owner, owner)
    owner.untyped_storage().resize_(0)
    other = nn.Parameter(torch.randn(2, 32, 16, dtype=BF))
    watch.store.get(other, other)
    owner.untyped_storage().resize_(size)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(owner):
        owner.fill_(3)
    assert float(watch.store.get(owner, owner).max()) == 3 and watch.count == 3


def test_what_has_no_fractal_format_trains_as_it_is_and_is_told(watch: Watch) -> None:
    plain, module, x = models(inner=24)
    backward(compiled(module, weight_format="nz"), x)
    backward(plain, x)
    assert any("blocks of 16 x 16" in n for n in moe_compile.last_report().notes)
    assert watch.count == 1, "[32, 48] is whole blocks, [24, 32] is not"
    assert relative(module.experts.down_proj.grad.float(), plain.experts.down_proj.grad.float()) <= 0.05


@pytest.mark.parametrize("inner", ["aot_eager"])
def test_a_tracer_never_meets_the_cast(inner: str, watch: Watch) -> None:
    """It has no shape function: compilers that trace the backward pass use weights as they are, and the report says so."""
    plain, module, x = models()
    backward(compiled(module, weight_format="nz", inner=inner), x)
    backward(plain, x)
    assert watch.count == 0
    assert relative(module.experts.down_proj.grad.float(), plain.experts.down_proj.grad.float()) <= 0.05
    assert any("weight_format='nz'" in n and "traces" in n for n in moe_compile.last_report().notes)
