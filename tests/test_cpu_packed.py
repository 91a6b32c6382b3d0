"""Weights packed for the CPU by `prepare`: values, bytes, what is written to them later, and what happens without them."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import small
import torch
from conftest import bundle, have_compiler
from test_cpu_lowering import FLOATS, LAYOUTS, ROUTINGS, layout, make, relative
from torch import Tensor, nn

import moe_compile
from moe_compile.lowering.cpu import experts as cpu
from moe_compile.lowering.cpu import frozen as cpu_frozen

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler on this machine")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "_found", {})
    monkeypatch.setattr(cpu_frozen, "_frozen", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def frozen(t: dict[str, Any]) -> nn.Module:
    """A module whose parameters are the operands' weights, prepared."""
    module = nn.Module()
    module.weights = nn.ParameterList(nn.Parameter(w) for w in (*t["up"], *t["down"]))
    t["up"], t["down"] = list(module.weights)[: len(t["up"])], list(module.weights)[len(t["up"]) :]
    moe_compile.prepare(module, target="cpu")
    return module


def packed() -> int:
    """Bytes of packed copies."""
    return sum(t.numel() for _, call in cpu._found.values() if call.sources for t in call.keep if isinstance(t, Tensor))


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS, ids=str)
def test_values(name: str, dtype: torch.dtype, routing: str) -> None:
    e = LAYOUTS[name]
    t = make(e, ROUTINGS[routing](e.num_experts), dtype, add=name == "concat")
    module = frozen(t)
    with torch.no_grad():
        out, _ = cpu.forward(*bundle(t), layout(e), save=False)
        assert packed() > 0
        assert relative(out, e.evaluate(**t)) < TOLERANCE[dtype]
    if dtype != torch.bfloat16 or e.hidden % 2 == 0 == e.intermediate % 2:
        assert packed() == cpu_frozen.packed_bytes(layout(e), e.hidden, t["down"])
    del module


def test_same_bits_on_any_number_of_threads() -> None:
    e = LAYOUTS["concat"]
    t = make(e, ROUTINGS["many"](e.num_experts), torch.bfloat16)
    module, runs = frozen(t), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            runs.append(cpu.forward(*bundle(t), layout(e), save=False)[0])
    assert all(torch.equal(run, runs[0]) for run in runs)
    del module


def write(t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(2)


def write_data(t: Tensor) -> None:
    """Past the count of versions."""
    t.data.mul_(2)


def write_one_expert(t: Tensor) -> None:
    with torch.no_grad():
        t[0].mul_(2)


def write_numpy(t: Tensor) -> None:
    t.detach().numpy()[:] *= 2


def give_other_memory(t: Tensor) -> None:
    t.data = t.data * 2


WRITES = (write, write_data, write_one_expert, write_numpy, give_other_memory)


@pytest.mark.parametrize("change", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["up", "down"])
def test_a_written_weight_is_read_as_it_is(change: Any, which: str, caplog: pytest.LogCaptureFixture) -> None:
    e = LAYOUTS["transposed"]
    t = make(e, ROUTINGS["few"](e.num_experts))
    module = frozen(t)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="moe_compile"):
        for _ in range(2):
            cpu.forward(*bundle(t), layout(e), save=False)
        assert packed() > 0
        change(t[which][0])
        out, _ = cpu.forward(*bundle(t), layout(e), save=False)
        assert relative(out, e.evaluate(**t)) < 2e-6
        if change is not give_other_memory:
            assert packed() == 0 and "after moe_compile.prepare" in caplog.text
        moe_compile.prepare(module, target="cpu")
        cpu.forward(*bundle(t), layout(e), save=False)
        assert packed() > 0


@pytest.mark.parametrize("how", ["swap_tensors", "another parameter"])
def test_a_frozen_weight_may_be_swapped(how: str) -> None:
    """torch.utils.swap_tensors (torch.__future__.set_swap_module_params_on_conversion) refuses tensors that anybody refers to weakly."""
    e = LAYOUTS["transposed"]
    t = make(e, ROUTINGS["few"](e.num_experts))
    module = frozen(t)
    with torch.no_grad():
        cpu.forward(*bundle(t), layout(e), save=False)
        assert packed() > 0
        name, old = next((n, p) for n, p in module.named_parameters() if p is t["up"][0])
        new = nn.Parameter(old * 2)
        if how == "swap_tensors":
            torch.utils.swap_tensors(old, new)
        else:
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, new)
            t["up"][0] = new
        out, _ = cpu.forward(*bundle(t), layout(e), save=False)
        assert relative(out, e.evaluate(**t)) < 2e-6
        assert packed() == 0  # nothing of the old weight is kept
        moe_compile.prepare(module, target="cpu")
        cpu.forward(*bundle(t), layout(e), save=False)
        assert packed() > 0


def test_a_weight_of_two_modules_outlives_one() -> None:
    e = LAYOUTS["concat"]
    t = make(e, ROUTINGS["few"](e.num_experts))
    module = nn.ModuleList([frozen(t), nn.Module()])
    module[1].weights = nn.ParameterList(module[0].parameters())
    moe_compile.prepare(module, target="cpu")
    cpu.forward(*bundle(t), layout(e), save=False)
    assert packed() > 0
    del module[0]
    gc.collect()
    cpu.forward(*bundle(t), layout(e), save=False)
    assert packed() > 0


def test_copies_go_with_the_model() -> None:
    e = LAYOUTS["concat"]
    t = make(e, ROUTINGS["few"](e.num_experts))
    module = frozen(t)
    cpu.forward(*bundle(t), layout(e), save=False)
    assert packed() > 0
    t.clear()
    del module
    gc.collect()
    assert packed() == 0 and not cpu_frozen._frozen


def test_only_what_is_prepared_is_packed() -> None:
    e = LAYOUTS["concat"]
    t, other = (make(e, ROUTINGS["few"](e.num_experts)) for _ in range(2))
    module = frozen(t)
    half = {**other, "up": t["up"]}
    for given in (other, half):
        out, _ = cpu.forward(*bundle(given), layout(e), save=False)
        assert packed() == 0 and relative(out.detach(), e.evaluate(**given).detach()) < 2e-6
    out, _ = cpu.forward(*bundle(t), layout(e), save=True)  # a gradient is wanted: the model's own weights
    assert packed() == 0
    del module


def test_a_parameter_that_keeps_no_count_is_refused() -> None:
    with torch.inference_mode():
        block = small.Block()
    with pytest.raises(moe_compile.OptionError, match=r"'up'|'router.weight'.*inference_mode"):
        moe_compile.prepare(block, target="cpu")


class TestThroughTorchCompile:
    def test_values_and_report(self) -> None:
        block, x = small.Block().eval(), torch.randn(small.T, small.H)
        told = moe_compile.prepare(block)
        assert told == {n: getattr(block, n).numel() * 4 for n in ("up", "down")}
        with torch.no_grad():
            out = small.compiled(block)(x)
        exact = copy.deepcopy(block).double()(x.double())
        assert relative(out, exact.detach()) < 1e-6
        assert packed() == small.E * 4 * (32 * small.H + 32 * small.I)
        (note,) = moe_compile.last_report().notes  # type: ignore[union-attr]
        assert f"{packed():,} bytes" in note and "1 block" in note

    def test_a_write_between_calls(self) -> None:
        block, x = small.Block().eval(), torch.randn(small.T, small.H)
        moe_compile.prepare(block, target="cpu")
        run = small.compiled(block)
        with torch.no_grad():
            run(x)
            block.load_state_dict({n: p * 1.5 for n, p in block.state_dict().items()})
            assert relative(run(x), copy.deepcopy(block).double()(x.double())) < 1e-6
            assert packed() == 0

    def test_training_reads_the_weights_themselves(self) -> None:
        block, x = small.Block(), torch.randn(small.T, small.H)
        moe_compile.prepare(block, target="cpu")
        run, sgd = small.compiled(block), torch.optim.SGD(block.parameters(), 0.1)
        for _ in range(2):
            loss, want = run(x).sum(), copy.deepcopy(block)(x).sum()
            torch.testing.assert_close(loss, want)
            loss.backward()
            sgd.step(), sgd.zero_grad()
        assert packed() == 0

    def test_without_prepare_nothing_is_said(self) -> None:
        with torch.no_grad():
            small.compiled(small.Block())(torch.randn(small.T, small.H))
        assert moe_compile.last_report().notes == []  # type: ignore[union-attr]
