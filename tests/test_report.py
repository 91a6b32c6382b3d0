"""The report: every field of the IR readable, a table at a glance, JSON for machines."""

from __future__ import annotations

import json

import pytest
import sympy as sp
import torch
from conftest import Recovered

from moe_compile import GraphBreak, Report
from moe_compile.ir import BiasOn, Experts, Form, Gating, Groups, MoeBlock, Norm, Normaliser, Rejection, Score, SharedExpert, SumK, W
from moe_compile.ir import scalar as act
from moe_compile.ir.text import activation_text, experts_text, formula, number, shared_text
from moe_compile.reported import _headline

INF = float("inf")
SUM = Normaliser(Norm.SUM)
AFTER_SIGMOID = Gating(128, 8, Score.SIGMOID, bias=BiasOn.SCORE, norm=Normaliser(Norm.SUM, eps=1e-20), scale=2.826)
SWIGLU_EXPERTS = Experts(128, 2048, 1024, 2048, Form.CONCAT, act.SWIGLU)

FORMULAS = [
    (AFTER_SIGMOID, "w = 2.826 · σ(l)[top8 of σ(l)+b] / (Σ + 1e-20)"),
    (Gating(8, 2, Score.SOFTMAX), "w = softmax(l)[top2]"),
    (Gating(8, 2, Score.SOFTMAX, norm=SUM), "w = softmax(l)[top2] / Σ"),
    (Gating(8, 2, Score.SOFTMAX, norm=Normaliser(Norm.NONE)), "w = softmax(l)[top2]"),
    (Gating(8, 2, Score.SOFTMAX, score_over_selected=True), "w = softmax(l[top2])"),
    (Gating(8, 1, Score.IDENTITY), "w = l[top1]"),
    (Gating(8, 2, Score.SIGMOID, score_over_selected=True, bias=BiasOn.LOGIT), "w = σ(l[top2 of l+b])"),
    (Gating(8, 2, Score.SIGMOID, bias=BiasOn.LOGIT), "w = σ(l)[top2 of l+b]"),
    (Gating(8, 2, Score.SIGMOID, score_over_selected=True, bias=BiasOn.SCORE), "w = σ(l[top2 of l+b])"),
    (Gating(8, 2, Score.SQRT_SOFTPLUS, bias=BiasOn.SCORE), "w = √softplus(l)[top2 of √softplus(l)+b]"),
    (Gating(8, 2, Score.SOFTMAX, bias=BiasOn.SCORE, bias_in_weights=True), "w = (softmax(l)+b)[top2]"),
    (
        Gating(8, 2, Score.SOFTMAX, score_over_selected=True, bias=BiasOn.LOGIT, bias_in_weights=True),
        "w = (softmax(l[top2 of l+b]) + b[id])",
    ),
    (
        Gating(256, 8, Score.SIGMOID, bias=BiasOn.SCORE, groups=Groups(8, 4, 2, -INF), norm=SUM, scale=2.5),
        "w = 2.5 · σ(l)[top8 of σ(l)+b in best 4 of 8 groups by Σ top2] / Σ",
    ),
    (
        Gating(64, 6, Score.SOFTMAX, groups=Groups(8, 3, 1, 0.0), scale=16.0),
        "w = 16 · softmax(l)[top6 in best 3 of 8 groups by max, others 0]",
    ),
    (Gating(8, 2, Score.SOFTMAX, norm=Normaliser(Norm.SUM, clamp_min=1e-12)), "w = softmax(l)[top2] / max(Σ, 1e-12)"),
    (Gating(8, 2, Score.SOFTMAX, norm=Normaliser(Norm.MAX)), "w = softmax(l)[top2] / max"),
    (Gating(8, 2, Score.SOFTMAX, norm=Normaliser(Norm.PNORM, p=2.0)), "w = softmax(l)[top2] / ‖·‖₂"),
    (Gating(8, 2, Score.SOFTMAX, norm=Normaliser(Norm.PNORM, p=INF)), "w = softmax(l)[top2] / ‖·‖∞"),
    (
        Gating(8, 2, Score.SOFTMAX, norm=Normaliser(Norm.EXPR, expr=W / (SumK(W**2) + 1))),
        "w = w'/(Σ(w'^2) + 1), w' = softmax(l)[top2]",
    ),
    (Gating(8, 2, Score.EXP, expert_scale=True, norm=SUM), "w = exp(l)[top2] / Σ · c[id]"),
    (Gating(8, 2, Score.TANH, scale=-1.0), "w = -1 · tanh(l)[top2]"),
    (Gating(8, 2, Score.RELU, weight_dtype=torch.bfloat16), "w = relu(l)[top2] (w in bf16)"),
    (Gating(8, 2, Score.SOFTPLUS, score_dtype=torch.bfloat16, weight_dtype=torch.bfloat16), "w = softplus(l)[top2] (scored in bf16)"),
    (Gating(8, 2, Score.SOFTMAX, score_dtype=torch.float64), "w = softmax(l)[top2] (scored in fp64, w in fp32)"),
]


@pytest.mark.parametrize("gating, text", FORMULAS)
def test_formula(gating, text):
    assert formula(gating) == text


def test_different_gatings_read_differently():
    assert len({formula(g) for g, _ in FORMULAS}) >= len(FORMULAS) - 2  # SCORE over selected logits and LOGIT are one thing


BIASED = dict(up_bias=True, down_bias=True)
OSS = (act.clamp(act.U, -7, 7) + 1) * act.clamp(act.G, -sp.oo, 7) * act.sigmoid(sp.Float(1.702) * act.clamp(act.G, -sp.oo, 7))
EXPERTS = [
    (SWIGLU_EXPERTS, "128 × SwiGLU 2048→1024→2048, stacked [E,out,in]"),
    (Experts(8, 64, 32, 48, Form.SINGLE, act.relu(act.G) ** 2, stacked=False), "8 × ReLU² 64→32→48, list of [out,in]"),
    (Experts(8, 64, 32, 64, Form.SEPARATE, act.SWIGLU), "8 × SwiGLU 64→32→64, stacked [E,out,in], gate and up apart"),
    (
        Experts(4, 8, 16, 8, Form.INTERLEAVED, OSS, up_transposed=True, down_transposed=True, **BIASED, dtype=torch.bfloat16),
        "4 × (clamp(u, -7, 7) + 1)·clamp(g, −∞, 7)·σ(1.702·clamp(g, −∞, 7)) 8→16→8, stacked [E,in,out], gate/up interleaved, biases, bf16",
    ),
    (
        Experts(4, 8, 16, 8, Form.CONCAT, act.SWIGLU, up_transposed=True, up_bias=True, weight_on_input=True),
        "4 × SwiGLU 8→16→8, stacked up [E,in,out] down [E,out,in], up bias, w on input",
    ),
    (
        Experts(4, 8, 16, 8, Form.CONCAT, act.SWIGLU, down_bias=True, num_identity=2, ids_mapped=True),
        "4 × SwiGLU 8→16→8, stacked [E,out,in], down bias, + 2 identity, ids mapped",
    ),
]


@pytest.mark.parametrize("experts, text", EXPERTS)
def test_experts_text(experts, text):
    assert experts_text(experts) == text


@pytest.mark.parametrize(
    "shared, text",
    [
        (None, "–"),
        (SharedExpert(1024, act.SWIGLU), "SwiGLU 1024"),
        (SharedExpert(512, act.SWIGLU, gated=True), "σ(x·g) · SwiGLU 512"),
        (SharedExpert(512, act.gelu_tanh(act.G), bias=True), "GELU (tanh) 512, biases"),
    ],
)
def test_shared_text(shared, text):
    assert shared_text(shared) == text


def test_numbers():
    assert [number(x) for x in (2.826, 1e-20, 1.0, INF, -INF, 0.1 + 0.2)] == ["2.826", "1e-20", "1", "∞", "−∞", "0.3"]
    assert activation_text(act.gelu_tanh(act.G) * act.U) == "GeGLU (tanh)"


# -- the whole report -------------------------------------------------------------------------------------------------------

SOURCE = "/somewhere/site-packages/library/models/modeling.py:523"


def full_report() -> Report:
    report = Report(graph_count=2, seconds={"total": 4.2, "passes": 0.61, "validate": 0.22})
    block = MoeBlock(AFTER_SIGMOID, SWIGLU_EXPERTS, SharedExpert(1024, act.SWIGLU))
    report.add_blocks([Recovered(block, SOURCE, lowering="grouped gemm") for _ in range(30)], "cpu")
    odd = MoeBlock(None, EXPERTS[3][0], routing_note="sampled with noise")
    report.add_blocks([Recovered(odd, SOURCE, validated=False, lowering="generic", note="gating in the graph")], "cpu")
    report.add_rejected([Rejection("the accumulator starts from `residual`, which is not zero", "node", "experts", SOURCE)])
    report.add_breaks([GraphBreak("Dynamic shape operator: output shape depends on input data.", SOURCE)])
    return report


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_table(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = str(full_report())
    lines = text.splitlines()
    assert max(map(len, lines)) <= max(columns, 100)
    assert "× 30" in text and text.count("modeling.py:523") >= 4
    assert "SwiGLU 1024" in text and "grouped gemm" in text and "cpu" in text
    if columns >= 120:
        assert any("w = 2.826 · σ(l)[top8 of σ(l)+b] / (Σ + 1e-20)" in line for line in lines)
        assert any("128 × SwiGLU 2048→1024→2048, stacked [E,out,in]" in line for line in lines)
    assert "as written: sampled with noise" in " ".join(text.split())
    assert text.index("left as written:") < text.index("accumulator starts") < text.index("graph breaks:") < text.index("Dynamic shape")
    totals = " ".join(lines[-2:])
    assert "31 MoE blocks fused" in totals and "2 graphs" in totals and "validation 0.22 s" in totals


def test_folding_is_only_in_the_table():
    report = full_report()
    assert len(report.blocks) == 31 and not report.fused
    assert len(report.to_dict()["blocks"]) == 31


def test_to_dict_is_json():
    data = json.loads(json.dumps(full_report().to_dict(), allow_nan=False))
    assert data["blocks"][0]["formula"] == FORMULAS[0][1] and data["blocks"][0]["validated"] is True
    assert data["blocks"][0]["ir"]["gating"]["score"] == "sigmoid" and data["blocks"][0]["ir"]["experts"]["dtype"] == "float32"
    assert data["blocks"][30]["ir"]["gating"] is None
    (rejected,) = data["rejected"]
    reason = "the accumulator starts from `residual`, which is not zero"
    assert rejected == {"reason": reason, "source": SOURCE, "code": "experts", "part": "", "stage": "experts"}
    assert data["graph_count"] == 2 and data["graph_breaks"][0]["source"] == SOURCE
    assert data["seconds"]["validate"] == 0.22


@pytest.mark.parametrize("gating", [g for g, _ in FORMULAS])
def test_every_ir_is_json(gating):
    report = Report()
    report.add_blocks([Recovered(MoeBlock(gating, SWIGLU_EXPERTS))], "cpu")
    json.dumps(report.to_dict(), allow_nan=False)
    assert str(report)


def test_empty_report():
    assert str(Report()).startswith("0 MoE blocks fused") and not Report().fused
    json.dumps(Report().to_dict())
    assert "no selection of experts was seen" in str(Report(graph_count=1)) and "no selection" not in str(Report())


def test_a_break_of_every_layer_is_told_once():
    report = Report()
    for _ in range(3):
        report.add_breaks([GraphBreak("why", "a.py:1")])
    report.add_breaks([GraphBreak("why", "a.py:2")])
    assert len(report.graph_breaks) == 2


@pytest.mark.parametrize("reason", ["", "\n\nHint: none", "   \n"])
def test_a_break_without_a_reason_has_a_headline(reason):
    assert _headline(reason) in ("Dynamo gives no reason", "Hint: none")
