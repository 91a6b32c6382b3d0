"""The CPU kernels: against the oracle, against plain torch, numerics contract, determinism, building, capability."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch
from conftest import bundle, have_compiler
from torch import Tensor

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import Operands
from moe_compile.lowering import target
from moe_compile.lowering.cpu import build as cpu_build
from moe_compile.lowering.cpu import experts as cpu
from moe_compile.lowering.reference import generic

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HIDDEN, INTER, EXPERTS = 64, 48, 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


needs_kernels = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler on this machine")


def block(form: ir.Form = ir.Form.CONCAT, activation: Any = act.SWIGLU, **kwargs: Any) -> ir.Experts:
    sizes = kwargs.pop("sizes", (EXPERTS, HIDDEN, INTER, HIDDEN))
    return ir.Experts(*sizes, form, activation, **kwargs)


def make(e: ir.Experts, ids: Tensor, dtype: torch.dtype = torch.float32, add: bool = False) -> dict[str, Any]:
    """Inputs of a size that keeps activations near one, in the layout of `e`."""
    gen = torch.Generator().manual_seed(0)

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=gen) * scale).to(dtype)

    def spread(parts: int, transposed: bool, out: int, inner: int) -> list[Tensor]:
        t = rand(parts * e.num_experts, *((inner, out) if transposed else (out, inner)), scale=inner**-0.5)
        return list(t.chunk(parts)) if e.stacked else [m.clone() for m in t]

    def bias(parts: int, size: int) -> list[Tensor]:
        t = rand(parts * e.num_experts, size)
        return list(t.chunk(parts)) if e.stacked else [m.clone() for m in t]

    parts = 2 if e.form is ir.Form.SEPARATE else 1
    rows = e.intermediate * (2 if e.form in (ir.Form.CONCAT, ir.Form.INTERLEAVED) else 1)
    return {
        "x": rand(ids.shape[0], e.hidden),
        "ids": ids,
        "weights": torch.rand(ids.shape, generator=gen),
        "up": spread(parts, e.up_transposed, rows, e.hidden),
        "down": spread(1, e.down_transposed, e.out_features, e.intermediate),
        "up_bias": bias(parts, rows) if e.up_bias else [],
        "down_bias": bias(1, e.out_features) if e.down_bias else [],
        "add": rand(ids.shape[0], e.out_features) if add else None,
    }


def layout(e: ir.Experts) -> generic.Layout:
    return ops.layout_of(ops.experts_args(e))


def balanced(tokens: int, k: int = 2, experts: int = EXPERTS) -> Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(2)).topk(k).indices


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def grads_of(run: Any, t: dict[str, Any], pre: Tensor, e: ir.Experts, grad: Tensor) -> list[Tensor]:
    *tensors, parameters, _ = bundle(t)
    return run(grad, pre, *tensors, parameters, layout(e), [True] * (2 + len([*parameters])))


LAYOUTS = {
    "concat": block(),
    "interleaved": block(ir.Form.INTERLEAVED, up_bias=True),
    "separate": block(ir.Form.SEPARATE, up_bias=True, down_bias=True),
    "single": block(ir.Form.SINGLE, act.relu(act.G) ** 2),
    "list": block(stacked=False, up_bias=True, down_bias=True),
    "separate list": block(ir.Form.SEPARATE, stacked=False),
    "transposed": block(up_transposed=True, down_transposed=True, up_bias=True, down_bias=True),
    "interleaved transposed": block(ir.Form.INTERLEAVED, up_transposed=True, down_transposed=True),
    "only down transposed": block(down_transposed=True),
    "only up transposed": block(up_transposed=True),
    "weight on input": block(weight_on_input=True, down_bias=True),
    "identity experts": block(num_identity=2),
    "odd sizes": block(sizes=(5, 37, 21, 37), up_bias=True),
    "odd sizes transposed": block(sizes=(5, 37, 21, 37), up_transposed=True, down_transposed=True),
    "wide output": block(sizes=(EXPERTS, HIDDEN, INTER, 80), down_bias=True),
    "wide": block(ir.Form.SEPARATE, sizes=(3, 528, 272, 528)),
}
BY_LAYOUT = pytest.mark.parametrize("name", LAYOUTS)
ROUTINGS = {
    "one token": lambda n: balanced(1, 2, n),
    "few": lambda n: balanced(9, 2, n),
    "many": lambda n: balanced(150, 2, n),
    "all on expert 0": lambda n: torch.zeros(140, 1, dtype=torch.int64),
    "all on the last, long": lambda n: torch.full((1100, 1), n - 1),
    "with strangers": lambda n: torch.randint(-2, n + 3, (61, 3), generator=torch.Generator().manual_seed(3)),
}


@needs_kernels
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@BY_LAYOUT
def test_kernel_values_and_gradients(name: str, dtype: torch.dtype, routing: str) -> None:
    e = LAYOUTS[name]
    t = make(e, ROUTINGS[routing](e.num_experts), dtype, add=name == "concat")
    out, pre = cpu.forward(*bundle(t), layout(e), save=True)
    _, want_pre = generic.forward(*bundle(t), layout(e))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert relative(out, e.evaluate(**t)) < tolerance
    assert relative(pre, want_pre) < tolerance
    assert torch.equal(out, cpu.forward(*bundle(t), layout(e), save=False)[0])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    got = grads_of(cpu.backward, t, want_pre, e, grad)
    for g, w in zip(got, grads_of(generic.backward, t, want_pre, e, grad), strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape
        assert relative(g, w) < 2 * tolerance


ACTIVATIONS = {
    "swiglu": act.SWIGLU,
    "geglu": act.gelu(act.G) * act.U,
    "geglu tanh": act.gelu_tanh(act.G) * act.U,
    "reglu": act.relu(act.G) * act.U,
    "tanh": sp.tanh(act.G) * act.U,
    "softplus": act.softplus(act.G) * act.U,
    "exp log": sp.log(1 + sp.exp(act.G)) + sp.Abs(act.U),
    "power": (act.G**2 + 1) ** sp.Rational(1, 2) * act.U + act.U**3,
    "clamped": act.clamp(act.silu(act.G), -sp.oo, 2) * act.clamp(act.U, -1, 1),
    "constant slope": act.G + 2 * act.U,
    "quotient": act.G / (1 + sp.Abs(act.U)) - 1 / (2 + act.softplus(act.G)),
    "small": act.log1p(act.relu(act.G)) * act.U + act.expm1(act.U),
}


@needs_kernels
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_programs(name: str) -> None:
    e = block(activation=ACTIVATIONS[name])
    t = make(e, balanced(40))
    leaves = [t["x"].requires_grad_(), t["up"][0].requires_grad_(), t["down"][0].requires_grad_(), t["weights"].requires_grad_()]
    want = e.evaluate(**t)
    out = torch.ops.moe_compile.experts(*t.values(), *ops.experts_args(e))
    assert relative(out.detach(), want.detach()) < 2e-6
    for g, w in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert relative(g, w) < 1e-5


@needs_kernels
@pytest.mark.parametrize("expr", [act.log1p(act.G), act.expm1(act.G), act.softplus(act.G), sp.tanh(act.G)], ids=str)
def test_activations_of_small_values(expr: sp.Expr) -> None:
    """Relative to the value itself: what these functions are there for."""
    values = torch.cat([torch.linspace(-0.99, 3, 400), 10.0 ** torch.linspace(-30, -1, 60)])
    e = block(ir.Form.SINGLE, expr, sizes=(1, 1, 1, 1))
    ones = torch.ones(len(values), 1)
    up, down = [torch.ones(1, 1, 1)], [torch.ones(1, 1, 1)]
    out, _ = cpu.forward(values[:, None], ones.long() - 1, ones, Operands.named(up=up, down=down), None, layout(e), save=False)
    want = act.evaluate(expr, values.double())
    assert float(((out[:, 0] - want) / want.abs().clamp(min=1e-37)).abs().max()) < 1e-6


@needs_kernels
def test_activations_far_out() -> None:
    """Saturation, overflow and NaN as torch has them."""
    values = torch.tensor(
        [-1e30, -200.0, -100.0, -88.0, -20.0, -1e-30, 0.0, 1e-4, 0.3, 20.0, 88.0, 100.0, torch.inf, -torch.inf, torch.nan, 3.0]
    )
    for expr in (
        act.sigmoid(act.G),
        sp.tanh(act.G),
        sp.exp(act.G),
        sp.erf(act.G),
        act.relu(act.G),
        act.softplus(act.G),
        act.gelu_tanh(act.G),
        act.log1p(act.G),
        act.expm1(act.G),
        act.exp2(act.G),
    ):
        e = block(ir.Form.SINGLE, expr, sizes=(1, 1, 1, 1))
        for value in values:
            one = torch.ones(1, 1)
            out, _ = cpu.forward(one, one.long() - 1, one, Operands((value.reshape(1, 1, 1),), (one[None],)), None, layout(e), save=False)
            want = act.evaluate(expr, value.reshape(1))
            assert torch.allclose(out[0], want, rtol=1e-5, atol=1e-7, equal_nan=True), (expr, value)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 128, 700])
def test_numerics_contract(dtype: torch.dtype, tokens: int) -> None:
    """No more than 1.25 x the error of the same block run expert by expert in the model's dtype; 1e-5 in fp32."""
    e = block(sizes=(8, 128, 64, 128))
    t = make(e, balanced(tokens, 4, 8), dtype)
    t["weights"] = t["weights"].to(dtype)
    oracle = e.evaluate(**t)
    eager = torch.zeros_like(t["x"])
    for expert in range(8):
        token, slot = torch.where(t["ids"] == expert)
        gate, up = torch.nn.functional.linear(t["x"][token], t["up"][0][expert]).chunk(2, -1)
        y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, t["down"][0][expert])
        eager.index_add_(0, token, y * t["weights"][token, slot, None])
    ours = torch.ops.moe_compile.experts(*t.values(), *ops.experts_args(e))
    if dtype == torch.float32:
        assert relative(ours, oracle) < 1e-5
    else:
        assert relative(ours, oracle) <= 1.25 * relative(eager, oracle)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    e = LAYOUTS["concat"]
    for tokens in (1, 90):
        t = make(e, balanced(tokens), dtype)
        pre = cpu.forward(*bundle(t), layout(e), save=True)[1]
        grad = torch.ones(tokens, HIDDEN, dtype=dtype)
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append([cpu.forward(*bundle(t), layout(e), save=False)[0], *grads_of(cpu.backward, t, pre, e, grad)])
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@needs_kernels
def test_calls_from_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    e = LAYOUTS["concat"]
    inputs = [make(e, balanced(n)) for n in (1, 30, 200)]
    want = [cpu.forward(*bundle(t), layout(e), save=False)[0] for t in inputs]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            got = pool.map(lambda t: cpu.forward(*bundle(t), layout(e), save=False)[0], inputs)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_float64_and_deep_programs_run_in_plain_torch() -> None:
    t = make(block(), balanced(7), torch.float64)
    out, _ = cpu.forward(*bundle(t), layout(block()), save=False)
    assert out.dtype == torch.float64 and relative(out, block().evaluate(**t)) < 1e-12
    deep = act.G
    for i in range(12):  # a level holds one operand back while the next is evaluated
        deep = sp.Add(sp.Mul(act.U, sp.tanh(deep), evaluate=False), sp.Integer(i + 1), evaluate=False)
    e = block(activation=deep)
    t = make(e, balanced(7))
    assert relative(cpu.forward(*bundle(t), layout(e), save=False)[0], e.evaluate(**t)) < 1e-5


class TestBuilding:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(cpu_build, "_builds", {})
        monkeypatch.setattr(cpu, "_found", {})

    def test_without_a_compiler_plain_torch_runs(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        e = block()
        t = make(e, balanced(5))
        with caplog.at_level(logging.INFO, logger="moe_compile"):
            out, _ = cpu.forward(*bundle(t), layout(e), save=False)
        assert relative(out, e.evaluate(**t)) < 1e-5
        assert any("no-such-compiler" in r.getMessage() for r in caplog.records)

    def test_a_failing_compiler_leaves_nothing_behind(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CXX", "false")
        assert cpu_build.library("forward", torch.float32) is None
        assert not list(tmp_path.iterdir())

    @needs_kernels
    def test_built_once_then_loaded(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert cpu_build.library("route", torch.float32) is not None  # the smallest of them
        (built,) = tmp_path.iterdir()
        monkeypatch.setattr(cpu_build, "_builds", {})
        monkeypatch.setattr(cpu_build, "_compile", lambda *_: pytest.fail("compiled again"))
        assert cpu_build.library("route", torch.float32) is not None
        assert list(tmp_path.iterdir()) == [built]

    def test_no_kernels_for_other_dtypes(self) -> None:
        assert cpu_build.library("forward", torch.float64) is None


def moe(e: ir.Experts) -> ir.MoeBlock:
    return ir.MoeBlock(ir.Gating(e.num_experts, 2, ir.Score.SOFTMAX), e)


def test_a_target_says_why_not() -> None:
    assert target("cpu").reason(moe(block())) is None
    assert "int8" in (target("cpu").reason(moe(block(dtype=torch.int8))) or "")
    assert "asin" in (target("cpu").reason(moe(block(activation=sp.asin(act.G)))) or "")
    assert "identity" in (target("cpu").reason(moe(block(sizes=(4, 8, 8, 16), num_identity=1))) or "")
    assert "no-such" in (target("no-such").reason(moe(block())) or "")


def test_what_runs_a_block() -> None:
    assert target("cpu").says(moe(block())) == "cpu kernel (float32)"
    assert target("cpu").says(moe(replace(block(), dtype=torch.float64))) == "cpu torch (float64)"
