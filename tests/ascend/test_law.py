"""The table of laws: each row with what it takes, each near miss with the reason it is refused for, each row's calls against the oracle."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import sympy as sp
import torch

from moe_compile.ir import BiasOn, Experts, Form, Gating, Groups, MoeBlock, Norm, Normaliser, Score
from moe_compile.ir import scalar as act
from moe_compile.lowering.ascend import calls, capability, device, law, register
from moe_compile.lowering.reference.routing import Routing
from moe_compile.ops import route_args

register.ensure()
E, K = 16, 4
SUM = Normaliser(Norm.SUM, eps=1e-20)
GROUPS = Groups(4, 2, 2, -math.inf)
SIGMOID = Gating(E, K, Score.SIGMOID, bias=BiasOn.SCORE, norm=SUM, scale=2.826)
SOFTMAX = Gating(E, K, Score.SOFTMAX)
FUSED, RAW, PLAIN, SECOND, GENERAL, SELECTED, SCORED, ATEN = (row.name for row in law.ROUTING)


def but(g: Gating, **changes: Any) -> Gating:
    return dataclasses.replace(g, **changes)


# gating, the row it takes, what the row before it that knows its score objected to
CASES: dict[str, tuple[Gating, str, str]] = {
    "sigmoid": (SIGMOID, FUSED, ""),
    "sigmoid without bias": (but(SIGMOID, bias=BiasOn.NONE), FUSED, ""),
    "sigmoid in groups": (but(SIGMOID, groups=GROUPS), FUSED, ""),
    "sigmoid in groups by max": (but(SIGMOID, groups=Groups(4, 2, 1, -math.inf)), FUSED, ""),
    "sigmoid over a sum without eps": (but(SIGMOID, norm=Normaliser(Norm.SUM)), FUSED, ""),
    "sigmoid with a table": (but(SIGMOID, expert_scale=True), FUSED, ""),
    "sigmoid in groups filled with 0, no bias": (but(SIGMOID, bias=BiasOn.NONE, groups=Groups(4, 2, 2, 0.0)), FUSED, ""),
    "sigmoid in groups filled with 0": (but(SIGMOID, groups=Groups(4, 2, 2, 0.0)), ATEN, "losing groups get 0.0"),
    "sigmoid in groups by three": (but(SIGMOID, groups=Groups(4, 2, 3, -math.inf)), ATEN, "sum of 3"),
    "sigmoid in groups that hold too few": (but(SIGMOID, groups=Groups(8, 1, 2, -math.inf)), ATEN, "fewer experts"),
    "sigmoid, not normalised": (but(SIGMOID, norm=None), RAW, "the op always does"),
    "sigmoid over a clamped sum": (but(SIGMOID, norm=Normaliser(Norm.SUM, clamp_min=0.2)), RAW, "clamped"),
    "sigmoid over the max": (but(SIGMOID, norm=Normaliser(Norm.MAX)), RAW, "not divided by their sum"),
    "sigmoid over a 2-norm": (but(SIGMOID, norm=Normaliser(Norm.PNORM, p=2.0)), RAW, "not divided by their sum"),
    "sigmoid, bias in the weights": (but(SIGMOID, bias_in_weights=True), RAW, "part of the weights"),
    "sigmoid, bias on the logits": (but(SIGMOID, bias=BiasOn.LOGIT), ATEN, "added to the logits"),
    "sigmoid in fp16": (but(SIGMOID, score_dtype=torch.float16), ATEN, "near ties"),
    "sigmoid in fp16, no bias": (but(SIGMOID, bias=BiasOn.NONE, score_dtype=torch.float16), SCORED, "near ties"),
    "sigmoid in fp16 in groups": (but(SIGMOID, bias=BiasOn.NONE, groups=GROUPS, score_dtype=torch.float16), ATEN, "near ties"),
    "sigmoid of the selected": (but(SIGMOID, score_over_selected=True, bias=BiasOn.NONE), SCORED, "selected experts only"),
    "sigmoid of the selected in bf16": (
        but(SIGMOID, score_over_selected=True, bias=BiasOn.NONE, score_dtype=torch.bfloat16), SCORED, "not a softmax"),
    "sigmoid of the selected with bias": (but(SIGMOID, score_over_selected=True, bias=BiasOn.LOGIT), ATEN, "no selection bias"),
    "softmax": (SOFTMAX, PLAIN, ""),
    "softmax over the sum": (but(SOFTMAX, norm=Normaliser(Norm.SUM)), PLAIN, ""),
    "softmax over the sum, scaled": (but(SOFTMAX, norm=Normaliser(Norm.SUM), scale=2.5), PLAIN, ""),
    "softmax, scaled": (but(SOFTMAX, scale=2.5), GENERAL, "weights are scaled"),
    "softmax with bias": (but(SOFTMAX, bias=BiasOn.SCORE), GENERAL, "no selection bias"),
    "softmax with bias over a clamped sum": (
        but(SOFTMAX, bias=BiasOn.SCORE, norm=Normaliser(Norm.SUM, clamp_min=0.35)), GENERAL, "no selection bias"),
    "softmax in groups": (but(SOFTMAX, groups=Groups(4, 2, 1, 0.0), scale=1.5), GENERAL, "no groups"),
    "softmax, bias in the weights, scaled": (
        but(SOFTMAX, bias=BiasOn.SCORE, bias_in_weights=True, scale=1.5), GENERAL, "no selection bias"),
    "softmax of the selected": (but(SOFTMAX, score_over_selected=True), SELECTED, "selected experts only"),
    "softmax of the selected in bf16": (but(SOFTMAX, score_over_selected=True, score_dtype=torch.bfloat16), SELECTED, ""),
    "softmax in bf16": (but(SOFTMAX, score_dtype=torch.bfloat16), SCORED, "near ties"),
    "softmax of the selected with bias": (but(SOFTMAX, score_over_selected=True, bias=BiasOn.LOGIT), ATEN, "no selection bias"),
    "softplus": (Gating(E, K, Score.SQRT_SOFTPLUS, bias=BiasOn.SCORE, norm=SUM), ATEN, "not a softmax"),
    "softplus without bias": (Gating(E, K, Score.SOFTPLUS, norm=SUM), SCORED, "not a softmax"),
    "relu": (Gating(E, K, Score.RELU), ATEN, "does not increase"),
    "logits": (Gating(E, K, Score.IDENTITY), SCORED, "not a softmax"),
}  # fmt: skip


def routing(g: Gating) -> Routing:
    return Routing(*route_args(g))


def case(g: Gating, **where: Any) -> law.Case:
    return law.Case(routing(g), g.num_experts, **where)


@pytest.mark.parametrize("name", CASES)
def test_each_row_takes_what_it_can_express(name: str) -> None:
    gating, row, objection = CASES[name]
    chosen, refused = law.choose_routing(case(gating))
    assert chosen.name == row
    assert objection in (refused[-1][1] if refused else "") or any(objection in why for _, why in refused)


@pytest.mark.parametrize("name", CASES)
def test_the_calls_are_what_the_oracle_says(name: str) -> None:
    gating = CASES[name][0]
    logits, bias, table = torch.randn(33, E) * 3, torch.randn(E) * 0.3, torch.rand(E) + 0.5
    if gating.score is Score.IDENTITY:
        logits = logits.abs()
    given = (bias if gating.bias is not BiasOn.NONE else None, table if gating.expert_scale else None)
    weights, ids = calls.route(logits, *given, routing(gating))
    expected, chosen = gating.evaluate(logits, *given)
    if gating.score_dtype == torch.float32:
        assert torch.equal(ids.long().sort(-1).values, chosen.sort(-1).values)
        got = torch.zeros(33, E, dtype=torch.float64).scatter(1, ids.long(), weights.double())
        torch.testing.assert_close(got, torch.zeros_like(got).scatter(1, chosen, expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize("score", [Score.SOFTMAX, Score.SIGMOID])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_in_half_precision_select_by_the_logits(dtype: torch.dtype, score: Score, selected: bool) -> None:
    """gpt-oss and Llama 4: the selection is that of the logits to the last id, weights err no more than those of half precision."""
    gating = Gating(E, K, score, score_over_selected=selected, score_dtype=dtype, weight_dtype=dtype)
    assert law.choose_routing(case(gating))[0].name in (SELECTED, SCORED)
    for given in (dtype, torch.float32):  # logits in fp32 are rounded first where the model does
        logits = (torch.randn(40, E) * 3).to(given)
        distinct = torch.tensor([len(set(row)) == E for row in logits.to(dtype).tolist()])
        logits = logits[distinct]
        weights, ids = calls.route(logits, None, None, routing(gating))
        rounded = logits.to(dtype)
        chosen = rounded.topk(K, -1).indices
        assert torch.equal(ids.long(), chosen) and weights.dtype == dtype

        def scored(t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            f = (lambda v: v.softmax(-1)) if score is Score.SOFTMAX else torch.sigmoid
            return f(t.gather(1, ids)) if selected else f(t).gather(1, ids)

        exact, eager = scored(rounded.double(), chosen), scored(rounded, chosen).double()
        assert float((weights.double() - exact).norm()) <= 1.25 * float((eager - exact).norm())


@pytest.mark.parametrize(("gating", "where", "row"), [
    (SOFTMAX, {}, PLAIN),
    (SOFTMAX, {"device": "A2", "tokens": 1}, PLAIN),
    (SOFTMAX, {"device": "950"}, SECOND),
    (SOFTMAX, {"device": "310P", "tokens": 1024}, PLAIN),
    (SOFTMAX, {"device": "310P", "tokens": 1025}, ATEN),
    (SOFTMAX, {"device": "310P"}, ATEN),
    (but(SOFTMAX, score_over_selected=True), {"device": "310P"}, ATEN),
    (SIGMOID, {"device": "310P", "tokens": 8}, ATEN),
    (SIGMOID, {"device": "950", "tokens": 8}, FUSED),
])  # fmt: skip
def test_what_a_device_cannot_do(gating: Gating, where: dict[str, Any], row: str) -> None:
    assert law.choose_routing(case(gating, **where))[0].name == row
    if row == ATEN:
        assert "310P" in str(law.why_aten(case(gating, **where)))


def test_on_a_device_with_limits_the_calls_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(33, E)
    want = calls.route(logits, None, None, routing(SOFTMAX))
    for family in ("950", "310P"):
        monkeypatch.setattr(calls.device, "family", lambda family=family: family)
        got = calls.route(logits, None, None, routing(SOFTMAX))
        torch.testing.assert_close(got[0], want[0])
        assert torch.equal(got[1].long(), want[1].long())
        big = calls.route(torch.randn(2000, E), None, None, routing(SOFTMAX))
        assert big[1].dtype == (torch.int64 if family == "310P" else torch.int32), "ATen's ids are int64"


@pytest.mark.parametrize(("name", "family"), [
    ("Ascend910B1", "A2"), ("Ascend910B4", "A2"), ("Ascend910_9391", "A3"), ("Ascend310P3", "310P"), ("Ascend910_9599", "950"),
    ("Ascend950PR", "950"), ("Ascend910A", ""), ("", ""),
])  # fmt: skip
def test_families_of_devices(name: str, family: str) -> None:
    assert device.of_name(name) == family


def test_more_experts_than_the_op_takes() -> None:
    big = but(SIGMOID, num_experts=4096)
    chosen, refused = law.choose_routing(case(big))
    assert chosen.name == ATEN and "the op takes 2048" in refused[0][1]
    many = but(SIGMOID, num_experts=2048, groups=Groups(128, 4, 2, -math.inf))
    assert "aligned to 32" in law.choose_routing(case(many))[1][0][1]
    wide = but(SOFTMAX, num_experts=2048, k=1025)
    assert law.choose_routing(case(wide))[0].name == GENERAL


@pytest.mark.parametrize("name", CASES)
def test_what_stays_in_aten_says_why(name: str) -> None:
    gating, row, objection = CASES[name]
    why = law.why_aten(case(gating))
    assert (why is not None) == (row == ATEN)
    if row == ATEN and "not a softmax" not in objection:
        assert objection in str(why)


def test_every_row_says_why_it_is_exact() -> None:
    assert all(row.holds and row.calls for row in law.ROUTING) and not law.ROUTING[-1].checks


G, U = act.G, act.U


def clipped(limit: float, alpha: Any, bias: float) -> Any:
    a, b = act.clamp(G, -sp.oo, limit), act.clamp(U, -limit, limit)
    return a * act.sigmoid(alpha * a) * (b + bias)


@pytest.mark.parametrize(("expr", "form", "call"), [
    (act.SWIGLU, Form.CONCAT, "npu_swiglu"),
    (act.SWIGLU, Form.SEPARATE, "pointwise"),
    (act.SWIGLU, Form.INTERLEAVED, "pointwise"),
    (act.silu(U) * G, Form.CONCAT, "pointwise"),
    (act.gelu(G) * U, Form.CONCAT, "pointwise"),
    (clipped(7, sp.Rational(1702, 1000), 1.0), Form.INTERLEAVED, "npu_clipped_swiglu"),
    (clipped(7, 1, 0.0), Form.CONCAT, "npu_clipped_swiglu"),
    (clipped(7, 1, 0.0), Form.SEPARATE, "pointwise"),
    (act.clamp(G, -7, 7) * act.sigmoid(act.clamp(G, -7, 7)) * act.clamp(U, -7, 7), Form.CONCAT, "pointwise"),
    (act.clamp(G, -sp.oo, 7) * act.sigmoid(act.clamp(G, -sp.oo, 7)) * act.clamp(U, -5, 5), Form.CONCAT, "pointwise"),
    (act.clamp(G, -sp.oo, 7) * act.sigmoid(G) * act.clamp(U, -7, 7), Form.CONCAT, "pointwise"),
    (act.relu(G) ** 2, Form.SINGLE, "pointwise"),
])  # fmt: skip
def test_activations(expr: Any, form: Form, call: str) -> None:
    assert law.activation_call(expr, form) == call
    layout = calls.generic.Layout(*map(tuple, act.encode(expr)), int(form), 3, True, True, True, False, 0)
    h = torch.randn(5, 8) * 6
    products = list(h.chunk(2, -1)) if form is Form.SEPARATE else [h]
    g, u = (h, None) if form is Form.SINGLE else (h[:, 0::2], h[:, 1::2]) if form is Form.INTERLEAVED else h.chunk(2, -1)
    expected = act.evaluate(expr, g.double(), None if u is None else u.double())
    torch.testing.assert_close(calls.activate([p.contiguous() for p in products], layout).double(), expected, rtol=1e-5, atol=1e-5)


def block(**changes: Any) -> MoeBlock:
    experts = Experts(8, 16, 12, 16, Form.CONCAT, act.SWIGLU)
    return MoeBlock(SIGMOID, dataclasses.replace(experts, **changes))


@pytest.mark.parametrize(("changes", "reason"), [
    ({}, None),
    ({"dtype": torch.float64}, "float64"),
    ({"num_experts": 2000}, "takes 1024"),
    ({"activation": sp.Function("f")(G)}, "activation"),
    ({"num_identity": 2, "out_features": 8}, "as many outputs"),
])  # fmt: skip
def test_what_the_experts_cannot_be(changes: dict[str, Any], reason: str | None) -> None:
    told = capability.refuses(block(**changes))
    assert told is None if reason is None else told is not None and reason in told


def test_the_report_names_the_calls() -> None:
    assert capability.says(block()) == "npu_moe_gating_top_k(norm_type=1); grouped_matmul, npu_swiglu"
    written = dataclasses.replace(block(), gating=None)
    assert capability.says(written).startswith("routing as written")
    custom = dataclasses.replace(block(), gating=but(SIGMOID, norm=Normaliser(Norm.EXPR, expr=sp.Symbol("w"))))
    assert "out_flag=True" in capability.says(custom)
