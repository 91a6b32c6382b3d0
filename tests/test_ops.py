"""The fused ops: operator contract, values and gradients against the IR's oracle, over many layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy as sp
import torch
from torch import Tensor
from torch.library import opcheck

from moe_compile import ir, ops
from moe_compile.ir import scalar as act

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One experts call: meaning, sizes, and what is passed."""

    name: str
    experts: ir.Experts
    tokens: int = 5
    k: int = 2
    add: bool = False
    id_dtype: torch.dtype = torch.int64
    dtype: torch.dtype = torch.float32
    foreign: bool = False  # some ids outside [0, experts)


def experts(form: ir.Form = ir.Form.CONCAT, activation: Any = act.SWIGLU, **kwargs: Any) -> ir.Experts:
    return ir.Experts(4, 8, 6, kwargs.pop("out_features", 8), form, activation, **kwargs)


GPT_OSS = (act.clamp(act.U, -7, 7) + 1) * act.clamp(act.G, -sp.oo, 7) * act.sigmoid(1.702 * act.clamp(act.G, -sp.oo, 7))
CASES = [
    Case("stacked", experts()),
    Case("list", experts(stacked=False)),
    Case("single", experts(ir.Form.SINGLE, act.relu(act.G) ** 2)),
    Case("interleaved", experts(ir.Form.INTERLEAVED)),
    Case("separate", experts(ir.Form.SEPARATE)),
    Case("separate list", experts(ir.Form.SEPARATE, stacked=False)),
    Case("transposed", experts(up_transposed=True, down_transposed=True)),
    Case("down transposed", experts(ir.Form.SEPARATE, down_transposed=True)),
    Case(
        "interleaved transposed biased",
        experts(ir.Form.INTERLEAVED, GPT_OSS, up_transposed=True, down_transposed=True, up_bias=True, down_bias=True),
    ),
    Case("list transposed", experts(stacked=False, up_transposed=True, down_transposed=True)),
    Case("biases", experts(up_bias=True, down_bias=True)),
    Case("separate list biases", experts(ir.Form.SEPARATE, stacked=False, up_bias=True, down_bias=True)),
    Case("single bias", experts(ir.Form.SINGLE, act.gelu(act.G), up_bias=True)),
    Case("add", experts(), add=True),
    Case("weight on input", experts(weight_on_input=True, down_bias=True)),
    Case("identity experts", experts(num_identity=2), foreign=True),
    Case("foreign ids", experts(), foreign=True),
    Case("wider output", experts(out_features=10, down_bias=True), add=True),
    Case("no tokens", experts(), tokens=0),
    Case("one token", experts(), tokens=1),
    Case("k=1", experts(), k=1),
    Case("int32 ids", experts(), id_dtype=torch.int32),
    Case("float64", experts(down_bias=True), dtype=torch.float64),
    Case("odd sizes", ir.Experts(3, 7, 5, 7, ir.Form.CONCAT, act.SWIGLU)),
]
BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def tensors(case: Case, seed: int = 0) -> dict[str, Any]:
    """Leaves in the layout of the case; everything that floats requires grad."""
    e, gen = case.experts, torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(case.dtype).requires_grad_()

    def matrices(out: int, inner: int, transposed: bool, parts: int) -> list[Tensor]:
        shape = (inner, out) if transposed else (out, inner)
        return [leaf(e.num_experts, *shape) for _ in range(parts)] if e.stacked else [leaf(*shape) for _ in range(parts * e.num_experts)]

    def vectors(size: int, parts: int) -> list[Tensor]:
        return [leaf(e.num_experts, size) for _ in range(parts)] if e.stacked else [leaf(size) for _ in range(parts * e.num_experts)]

    parts = 2 if e.form is ir.Form.SEPARATE else 1
    rows = e.intermediate * (2 if e.form in (ir.Form.CONCAT, ir.Form.INTERLEAVED) else 1)
    low, high = (-1, e.num_experts + e.num_identity + 1) if case.foreign else (0, e.num_experts)
    return {
        "x": leaf(case.tokens, e.hidden),
        "ids": torch.randint(low, high, (case.tokens, case.k), generator=gen).to(case.id_dtype),
        "weights": torch.rand(case.tokens, case.k, generator=gen, dtype=torch.float64)
        .to(torch.promote_types(case.dtype, torch.float32))
        .requires_grad_(),
        "up": matrices(rows, e.hidden, e.up_transposed, parts),
        "down": matrices(e.out_features, e.intermediate, e.down_transposed, 1),
        "up_bias": vectors(rows, parts) if e.up_bias else [],
        "down_bias": vectors(e.out_features, 1) if e.down_bias else [],
        "add": leaf(case.tokens, e.out_features) if case.add else None,
    }


def leaves(t: dict[str, Any]) -> list[Tensor]:
    flat = [t["x"], t["weights"], *t["up"], *t["down"], *t["up_bias"], *t["down_bias"]]
    return [*flat, t["add"]] if t["add"] is not None else flat


def call(case: Case, t: dict[str, Any]) -> Tensor:
    return torch.ops.moe_compile.experts(*t.values(), *ops.experts_args(case.experts))


def close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE, least: float = 1e-30) -> None:
    """Relative to the largest value: what a norm-wise error bound means. `least`: at least so large, where terms are larger than sums."""
    assert got.shape == want.shape
    got, want = got.detach(), want.detach()
    scale = float(want.abs().max()) if want.numel() else 1.0
    error = float((got.double() - want.double()).abs().max()) if want.numel() else 0.0
    assert error <= tolerance * max(scale, least), f"error {error:.2e} at scale {scale:.2e}"


@BY_NAME
def test_experts_is_the_oracle(case: Case) -> None:
    t = tensors(case)
    close(call(case, t), case.experts.evaluate(**t))


@BY_NAME
def test_experts_gradients(case: Case) -> None:
    t = tensors(case)
    out, want = call(case, t), case.experts.evaluate(**t)
    grad = torch.randn_like(want)
    got = torch.autograd.grad(out, leaves(t), grad.to(out.dtype), allow_unused=True)
    expected: Any = [None] * len(got)
    if want.requires_grad:  # without tokens the oracle's result depends on nothing
        expected = torch.autograd.grad(want, leaves(t), grad, allow_unused=True)
    for g, e, leaf in zip(got, expected, leaves(t), strict=True):
        assert g is not None and g.dtype == leaf.dtype
        close(g, torch.zeros_like(leaf) if e is None else e, 2 * TOLERANCE)


@BY_NAME
def test_experts_opcheck(case: Case) -> None:
    t = tensors(case)
    opcheck(torch.ops.moe_compile.experts.default, (*t.values(), *ops.experts_args(case.experts)))


@pytest.mark.parametrize("frozen", ["x", "weights", "up", "down"])
def test_what_needs_no_grad_gets_none(frozen: str) -> None:
    case = Case("stacked", experts())
    t = tensors(case)
    for leaf in t[frozen] if isinstance(t[frozen], list) else [t[frozen]]:
        leaf.requires_grad_(False)
    call(case, t).sum().backward()
    for leaf in leaves(t):
        assert (leaf.grad is not None) == leaf.requires_grad


def test_one_frozen_expert_in_a_list() -> None:
    case = Case("list", experts(stacked=False))
    t, all_of_it = tensors(case), tensors(case)
    t["up"][1].requires_grad_(False)
    call(case, t).sum().backward()
    call(case, all_of_it).sum().backward()
    assert t["up"][1].grad is None
    for i in (0, 2, 3):
        close(t["up"][i].grad, all_of_it["up"][i].grad)


def test_no_grad_mode_saves_nothing() -> None:
    case = Case("stacked", experts())
    with torch.no_grad():
        assert call(case, tensors(case)).grad_fn is None


def test_inputs_of_other_strides() -> None:
    case = Case("stacked", experts())
    t = tensors(case)
    want = call(case, t)
    moved = {**t, "x": t["x"].t().contiguous().t(), "ids": t["ids"].t().contiguous().t(), "weights": t["weights"].t().contiguous().t()}
    close(call(case, moved), want)
    padded = torch.zeros(4, 12, 16)
    padded[:, :, 3:11] = t["up"][0]
    close(call(case, {**t, "up": [padded[:, :, 3:11]]}), want)


def test_weights_of_another_dtype_than_tokens() -> None:
    case = Case("stacked", experts())
    t = tensors(case)
    out = call(case, {**t, "up": [u.bfloat16() for u in t["up"]], "weights": t["weights"].bfloat16()})
    rounded = {**t, "up": [u.bfloat16().float() for u in t["up"]], "weights": t["weights"].bfloat16().float()}
    assert out.dtype == torch.float32
    close(out, case.experts.evaluate(**rounded))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_stay_with_their_token(value: float) -> None:
    case = Case("stacked", experts())
    t = tensors(case)
    x = t["x"].detach().clone()
    x[2, 3] = value
    out, clean = call(case, {**t, "x": x}), call(case, t)
    assert not out[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], clean[others])


def test_autocast_casts_products_but_not_routing_weights() -> None:
    case = Case("stacked", experts(up_bias=True))
    t = tensors(case)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(case, t)
    assert out.dtype == torch.bfloat16
    low = {name: [v.bfloat16() for v in value] if isinstance(value, list) else value for name, value in t.items()}
    assert torch.equal(out, call(case, {**low, "x": t["x"].bfloat16()}))
    out.float().sum().backward()
    assert t["up"][0].grad.dtype == torch.float32


def test_autocast_in_a_compiled_graph() -> None:
    case = Case("stacked", experts())
    t = tensors(case)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(case, {**t, "x": x})

    assert torch.equal(torch.compile(step, backend="aot_eager")(t["x"]), step(t["x"]))


def test_compiled_training_step_with_changing_tokens() -> None:
    """One symbolic graph serves every token count and its gradients are eager's."""
    graphs = []

    def count(gm: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(gm)
        return aot_eager(gm, inputs)

    case = Case("stacked", experts())
    t = tensors(case)

    def step(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return call(case, {**t, "x": x, "ids": ids, "weights": weights})

    compiled = torch.compile(step, backend=count, dynamic=True)
    for tokens in (5, 7, 64, 3):
        u = tensors(replace(case, tokens=tokens))
        got = compiled(u["x"], u["ids"], u["weights"])
        want = step(u["x"], u["ids"], u["weights"])
        assert torch.equal(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sum(), [u["x"], t["up"][0]]), torch.autograd.grad(want.sum(), [u["x"], t["up"][0]]), strict=True
        ):
            close(a, b)
    assert len(graphs) == 1


GATINGS = {
    "softmax renormalised": ir.Gating(8, 2, ir.Score.SOFTMAX, norm=ir.Normaliser(ir.Norm.SUM)),
    "softmax bias clamp": ir.Gating(8, 3, ir.Score.SOFTMAX, bias=ir.BiasOn.SCORE, norm=ir.Normaliser(ir.Norm.SUM, clamp_min=1e-3)),
    "sigmoid bias": ir.Gating(8, 2, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, norm=ir.Normaliser(ir.Norm.SUM, 1e-20), scale=2.826),
    "groups": ir.Gating(
        8, 2, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, groups=ir.Groups(4, 2, 2, -math.inf), norm=ir.Normaliser(ir.Norm.SUM, 1e-20)
    ),
    "groups filled with zero": ir.Gating(8, 2, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, groups=ir.Groups(4, 2, 1, 0.0)),
    "softmax of the selected": ir.Gating(8, 3, ir.Score.SOFTMAX, score_over_selected=True),
    "bias on logits, sigmoid of the selected": ir.Gating(8, 2, ir.Score.SIGMOID, score_over_selected=True, bias=ir.BiasOn.LOGIT),
    "bias in weights": ir.Gating(8, 2, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, bias_in_weights=True, norm=ir.Normaliser(ir.Norm.SUM, 1e-6)),
    "2-norm": ir.Gating(8, 3, ir.Score.SOFTMAX, norm=ir.Normaliser(ir.Norm.PNORM, p=2.0)),
    "max": ir.Gating(8, 3, ir.Score.SOFTMAX, norm=ir.Normaliser(ir.Norm.MAX, 1e-6)),
    "expert scale": ir.Gating(8, 2, ir.Score.SOFTMAX, norm=ir.Normaliser(ir.Norm.SUM), expert_scale=True, scale=0.5),
    "k=1": ir.Gating(8, 1, ir.Score.SIGMOID),
    **{s.name.lower(): ir.Gating(8, 2, s) for s in ir.Score},
}
BY_GATING = pytest.mark.parametrize("gating", GATINGS.values(), ids=GATINGS.keys())


def routing_inputs(gating: ir.Gating, tokens: int = 6) -> dict[str, Tensor | None]:
    gen = torch.Generator().manual_seed(1)
    return {
        "logits": torch.randn(tokens, 8, generator=gen).requires_grad_(),
        "bias": torch.randn(8, generator=gen).requires_grad_() if gating.bias is not ir.BiasOn.NONE else None,
        "expert_scale": torch.rand(8, generator=gen).requires_grad_() if gating.expert_scale else None,
    }


@BY_GATING
def test_route_is_the_oracle(gating: ir.Gating) -> None:
    t = routing_inputs(gating)
    w, ids = torch.ops.moe_compile.route(*t.values(), *ops.route_args(gating))
    want, want_ids = gating.evaluate(**t)
    assert torch.equal(ids, want_ids) and ids.dtype == torch.int64 and w.dtype == gating.weight_dtype
    close(w, want)
    grad = torch.randn_like(w)
    given = [v for v in t.values() if v is not None]
    got = torch.autograd.grad(w, given, grad, allow_unused=True)
    expected = torch.autograd.grad(want, given, grad.double(), allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None and e is not None:
            close(g, e)


@BY_GATING
def test_route_opcheck(gating: ir.Gating) -> None:
    for tokens in (0, 1, 6):
        opcheck(torch.ops.moe_compile.route.default, (*routing_inputs(gating, tokens).values(), *ops.route_args(gating)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@BY_GATING
def test_route_of_bad_logits_is_eagers(gating: ir.Gating, value: float) -> None:
    t = routing_inputs(gating)
    logits = t["logits"].detach().clone()
    logits[1, 3] = logits[2, 0] = logits[2, 5] = value
    logits[4] = value
    t["logits"] = logits
    w, ids = torch.ops.moe_compile.route(*t.values(), *ops.route_args(gating))
    want, want_ids = gating.evaluate(**t, dtype=torch.float32)
    assert torch.equal(ids, want_ids)
    assert torch.equal(w.isnan(), want.isnan())
    assert torch.allclose(w, want, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_route_in_low_precision_is_eagers(dtype: torch.dtype) -> None:
    """Scoring dtype, logits dtype and weight dtype are three separate things."""
    logits = torch.randn(32, 8).to(dtype)
    for score_dtype in (torch.float32, dtype):
        gating = replace(GATINGS["softmax renormalised"], score_dtype=score_dtype, weight_dtype=dtype)
        w, ids = torch.ops.moe_compile.route(logits, None, None, *ops.route_args(gating))
        want, want_ids = gating.evaluate(logits, dtype=score_dtype)
        assert w.dtype == dtype and torch.equal(ids, want_ids) and torch.equal(w, want.to(dtype))


def test_meta_tensors_have_shapes() -> None:
    case = Case("stacked", experts())
    with torch.device("meta"):
        t = {n: [v.to("meta") for v in x] if isinstance(x, list) else None if x is None else x.to("meta") for n, x in tensors(case).items()}
        out = call(case, t)
    assert out.device.type == "meta" and out.shape == (5, 8)
