"""The experts op called in C++: the same results, no Python for operands it knows, and nothing it should have noticed."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
from conftest import bundle, have_compiler
from test_cpu_lowering import LAYOUTS, ROUTINGS, layout, make, relative
from test_cpu_packed import WRITES, frozen

import moe_compile
from moe_compile import ops
from moe_compile.lowering.cpu import experts as cpu
from moe_compile.lowering.cpu import frozen as cpu_frozen
from moe_compile.lowering.cpu import native as cpu_native

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_found", {})
    monkeypatch.setattr(cpu_frozen, "_frozen", {})
    assert cpu_native.load(wait=True)
    torch.ops.moe_compile.cpu_forget()


def call(name: str, t: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = torch.ops.moe_compile.experts(*t.values(), *ops.experts_args(LAYOUTS[name]))
    return out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that Python ran."""
    seen: list[int] = []
    run = cpu.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return run(*args, **kwargs)

    monkeypatch.setattr(cpu, "forward", forward)
    return seen


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_same_bits_and_no_python(name: str, routing: str, asked: list[int]) -> None:
    e = LAYOUTS[name]
    for dtype in (torch.float32, torch.bfloat16):
        t = make(e, ROUTINGS[routing](e.num_experts), dtype, add=name == "concat")
        want, _ = cpu.forward(*bundle(t), layout(e), save=False)
        asked.clear()
        assert torch.equal(call(name, t), want) and len(asked) == 1
        other = {**make(e, ROUTINGS["few"](e.num_experts), dtype, add=name == "concat"), **{n: t[n] for n in ("up", "down")}}
        other |= {n: t[n] for n in ("up_bias", "down_bias")}
        got = call(name, other)
        assert len(asked) == 1
        assert torch.equal(got, cpu.forward(*bundle(other), layout(e), save=False)[0])


def test_rows_and_ids_as_they_come(asked: list[int]) -> None:
    """Strided tokens, ids of 32 bits, weights in half precision, another number of experts a token."""
    t = make(LAYOUTS["concat"], ROUTINGS["few"](6))
    want = call("concat", t)
    wide = torch.empty(t["x"].shape[0], 2 * t["x"].shape[1])
    wide[:, ::2] = t["x"]
    for given in ({"x": wide[:, ::2]}, {"ids": t["ids"].int()}, {"ids": t["ids"].t().contiguous().t()}):
        assert torch.equal(call("concat", {**t, **given}), want)
    half = {**t, "weights": t["weights"].bfloat16()}
    assert relative(call("concat", half), LAYOUTS["concat"].evaluate(**half)) < 2e-6
    first = {**t, "ids": t["ids"][:, :1], "weights": t["weights"][:, :1]}
    assert relative(call("concat", first), LAYOUTS["concat"].evaluate(**first)) < 2e-6
    assert len(asked) == 1


def test_wrong_operands_are_told_as_before() -> None:
    t = make(LAYOUTS["concat"], ROUTINGS["few"](6))
    call("concat", t)
    for wrong in ({"ids": t["ids"][:-1]}, {"weights": t["weights"][:, :1]}, {"x": t["x"][:-1]}):
        given = {**t, **wrong}
        with pytest.raises(Exception) as python:
            cpu.forward(*bundle(given), layout(LAYOUTS["concat"]), save=False)
        with pytest.raises(type(python.value)) as native:
            call("concat", given)
        assert str(python.value) in str(native.value)


def test_other_plain_arguments_are_another_call() -> None:
    t = make(LAYOUTS["concat"], ROUTINGS["few"](6))
    for name in ("concat", "weight on input", "concat"):
        given = {**t, "down_bias": []}
        e = LAYOUTS[name]
        plain = ops.experts_args(e)
        got = torch.ops.moe_compile.experts(*given.values(), *plain)
        assert torch.equal(got, cpu.forward(*bundle(given), ops.layout_of(plain), save=False)[0])


def test_gradients_go_through_autograd() -> None:
    t = make(LAYOUTS["concat"], ROUTINGS["few"](6))
    call("concat", t)
    for leaf in (t["x"], t["weights"], t["up"][0], t["down"][0]):
        leaf.requires_grad_()
        with torch.no_grad():
            assert not call("concat", t).requires_grad
        out = call("concat", t)
        (got,) = torch.autograd.grad(out.sum(), leaf)
        (want,) = torch.autograd.grad(LAYOUTS["concat"].evaluate(**t).sum(), leaf)
        assert relative(got, want) < 1e-5
        leaf.requires_grad_(False)


@pytest.mark.parametrize("change", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["up", "down"])
def test_packed_weights_that_are_written_to(change: Any, which: str, asked: list[int]) -> None:
    e = LAYOUTS["transposed"]
    t = make(e, ROUTINGS["few"](e.num_experts))
    module = frozen(t)
    with torch.no_grad():
        for _ in range(3):
            assert relative(call("transposed", t), e.evaluate(**t)) < 2e-6
        assert len(asked) == 1 and any(c.sources for _, c in cpu._found.values())
        change(t[which][0])
        for _ in range(2):
            assert relative(call("transposed", t), e.evaluate(**t)) < 2e-6
    del module


def test_a_compiled_model_calls_it(asked: list[int]) -> None:
    block, x = small.Block().eval(), torch.randn(small.T, small.H)
    moe_compile.prepare(block)
    run = small.compiled(block)
    with torch.no_grad():
        first = run(x)
        asked.clear()
        assert torch.equal(run(x), first) and not asked
        block.up.mul_(2)
        assert relative(run(x), block.double()(x.double())) < 1e-6
