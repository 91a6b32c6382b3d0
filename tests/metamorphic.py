"""Strategies over Specs, Spellings and mutations, and what is compiled from them."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from catalogue import naive
from catalogue.check import difference_problem, worse_than
from catalogue.compare import experts_differences, gating_differences, shared_differences
from composed import (
    ACTIVATIONS,
    ADD,
    CLAMP,
    DENSE,
    DISPATCH,
    DIVIDE,
    FIND,
    GROUP_FILL,
    GROUP_MASK,
    GROUP_RANK,
    LOOPS,
    MAXIMUM,
    NORM2,
    PICK,
    SCALE_AT,
    SCORES,
    SELECT,
    SHARED_AT,
    SUMS,
    Composed,
    H,
    I,
    Spec,
    Spelling,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import nn

from moe_compile.ir import BiasOn, Experts, Form, Gating, Groups, Norm, Normaliser, Score, SumK, W
from moe_compile.report import Report, collecting

# A few hundred examples by default; MOE_COMPILE_EXAMPLES=20 runs twenty times as many.
FACTOR = int(os.environ.get("MOE_COMPILE_EXAMPLES", "1"))


def examples(n: int) -> Any:
    """Hypothesis settings: a quarter of n examples, the same ones every time, in CI; n times the factor from the environment elsewhere."""
    slow = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    count = n * FACTOR if FACTOR > 1 or "ZOO_ALL" in os.environ else -(-n // 4)
    return settings(max_examples=count, deadline=None, derandomize=FACTOR == 1, suppress_health_check=slow)


def one_of(draw: st.DrawFn, choices: Any) -> Any:
    return draw(st.sampled_from(list(choices)))


NORMS = (
    None,
    Normaliser(Norm.SUM),
    Normaliser(Norm.SUM, eps=1e-20),
    Normaliser(Norm.SUM, eps=0.05),
    Normaliser(Norm.SUM, clamp_min=0.6),
    Normaliser(Norm.MAX),
    Normaliser(Norm.PNORM, p=2.0),
    Normaliser(Norm.EXPR, expr=W * (SumK(W) + 1) ** -0.5),
)


@st.composite
def groups_for(draw: st.DrawFn, num_experts: int) -> Groups | None:
    if not draw(st.booleans()):
        return None
    count, kept = one_of(draw, [(2, 1), (4, 2), (4, 3)] if num_experts == 8 else [(2, 1)])
    return Groups(count, kept, one_of(draw, (1, 2)), one_of(draw, (-math.inf, 0.0)))


@st.composite
def gatings(draw: st.DrawFn) -> Gating:
    num_experts = one_of(draw, (4, 8))
    score = one_of(draw, SCORES)
    groups = draw(groups_for(num_experts))
    bias = one_of(draw, BiasOn if groups is None and score is not Score.SOFTMAX else (BiasOn.NONE, BiasOn.SCORE))
    return Gating(
        num_experts=num_experts,
        k=one_of(draw, (2, 3) if num_experts == 8 else (2,)),
        score=score,
        bias=bias,
        bias_in_weights=bias is BiasOn.SCORE and one_of(draw, (False, False, False, True)),
        groups=groups,
        norm=one_of(draw, NORMS),
        scale=one_of(draw, (1.0, 2.5)),
        expert_scale=one_of(draw, (False, False, True)),
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    gating = draw(gatings())
    activation = one_of(draw, ACTIVATIONS)
    gated, expr, _ = ACTIVATIONS[activation]
    experts = Experts(
        num_experts=gating.num_experts,
        hidden=H,
        intermediate=I,
        out_features=H,
        form=one_of(draw, (Form.CONCAT, Form.INTERLEAVED, Form.SEPARATE)) if gated else Form.SINGLE,
        activation=expr,
        stacked=one_of(draw, (True, True, False)),
        up_transposed=draw(st.booleans()),
        down_transposed=draw(st.booleans()),
        up_bias=one_of(draw, (False, False, True)),
        down_bias=one_of(draw, (False, False, True)),
        weight_on_input=one_of(draw, (False, False, False, True)),
    )
    return Spec(gating, experts, activation, one_of(draw, ("none", "none", "plain", "gated")))


def dispatches(spec: Spec) -> list[str]:
    """The dispatch styles that can say this Spec."""
    if spec.experts.weight_on_input:
        return ["loop"]
    return list(DISPATCH if spec.experts.stacked else LOOPS)


def may_select_first(g: Gating) -> bool:
    """Whether top-k on the logits, then softmax over the k values, says this gating."""
    plain = g.bias is BiasOn.NONE and g.groups is None
    return plain and g.score is Score.SOFTMAX and g.norm == Normaliser(Norm.SUM)


def may_use_values(g: Gating) -> bool:
    """Whether the values top-k returns are the weights: with a fill of 0 only scores that are surely positive beat it."""
    if g.groups is not None and g.groups.fill == 0.0 and g.bias is not BiasOn.NONE:
        return False
    return g.bias is BiasOn.NONE or (g.bias is BiasOn.SCORE and g.bias_in_weights)


@st.composite
def spellings(draw: st.DrawFn, spec: Spec) -> Spelling:
    g = spec.gating
    return Spelling(
        score=one_of(draw, SCORES[g.score]),
        select=one_of(draw, SELECT),
        pick=one_of(draw, [*PICK, *(["values"] if may_use_values(g) else [])]),
        over_selected=may_select_first(g) and draw(st.booleans()),
        total=one_of(draw, SUMS),
        divide=one_of(draw, DIVIDE),
        clamp=one_of(draw, CLAMP),
        norm2=one_of(draw, NORM2),
        maximum=one_of(draw, MAXIMUM),
        scale_at=one_of(draw, SCALE_AT[:3] if spec.experts.weight_on_input else SCALE_AT),
        rank=one_of(draw, GROUP_RANK),
        mask=one_of(draw, GROUP_MASK),
        fill=one_of(draw, GROUP_FILL),
        activation=one_of(draw, ACTIVATIONS[spec.activation][2]),
        product=one_of(draw, ("linear", "matmul")),
        dispatch=one_of(draw, dispatches(spec)),
        find=one_of(draw, FIND),
        add=one_of(draw, ADD),
        dense=one_of(draw, DENSE),
        shared_at=one_of(draw, SHARED_AT),
    )


@st.composite
def spelled(draw: st.DrawFn) -> tuple[Spec, Spelling]:
    spec = draw(specs())
    return spec, draw(spellings(spec))


# One field changed ----------------------------------------------------------------------------------------------------------


def _changes(spec: Spec) -> dict[str, Callable[[], Spec]]:
    """Each field that can change alone, and the Spec after the change."""
    g, e = spec.gating, spec.experts

    def gate(**kw: Any) -> Callable[[], Spec]:
        return lambda: replace(spec, gating=replace(g, **kw))

    def expert(**kw: Any) -> Callable[[], Spec]:
        return lambda: replace(spec, experts=replace(e, **kw))

    out = {
        "gating.scale": gate(scale=1.5),
        "gating.expert_scale": gate(expert_scale=not g.expert_scale),
        "gating.norm": gate(norm=None if g.norm else Normaliser(Norm.SUM, eps=1e-20)),
        "experts.down_bias": expert(down_bias=not e.down_bias),
        "experts.up_bias": expert(up_bias=not e.up_bias),
        "experts.up_transposed": expert(up_transposed=not e.up_transposed),
        "experts.down_transposed": expert(down_transposed=not e.down_transposed),
        "experts.stacked": expert(stacked=not e.stacked),
    }
    if g.norm is not None and g.norm.kind is Norm.SUM and g.norm.eps:
        out["gating.norm.eps"] = gate(norm=replace(g.norm, eps=0.02))
    if g.bias is BiasOn.SCORE:
        out["gating.bias_in_weights"] = gate(bias_in_weights=not g.bias_in_weights)
        if g.groups is None and not g.bias_in_weights and g.score is not Score.SOFTMAX:
            out["gating.bias"] = gate(bias=BiasOn.LOGIT)
    if g.bias is BiasOn.NONE:
        out["gating.bias"] = gate(bias=BiasOn.SCORE)
    if g.groups is not None:
        fill = 0.0 if g.groups.fill else -math.inf
        out["gating.groups.fill"] = gate(groups=replace(g.groups, fill=fill))
        out["gating.groups.top"] = gate(groups=replace(g.groups, top=3 - g.groups.top))
        out["gating.groups"] = gate(groups=None)
    if e.form in (Form.CONCAT, Form.INTERLEAVED):
        out["experts.form"] = expert(form=Form.CONCAT if e.form is Form.INTERLEAVED else Form.INTERLEAVED)
        other = "geglu" if spec.activation != "geglu" else "capped"
        changed = replace(spec, activation=other, experts=replace(e, activation=ACTIVATIONS[other][1]))
        out["experts.activation"] = lambda: changed
    return out


@st.composite
def changed(draw: st.DrawFn) -> tuple[Spec, Spelling, Spec, Spelling]:
    """Two Specs that differ in one field, each in a Spelling of its own."""
    spec = draw(specs())
    options = _changes(spec)
    other = options[one_of(draw, options)]()
    return spec, draw(spellings(spec)), other, draw(spellings(other))


def differences(a: Any, b: Any) -> set[str]:
    """Between two things with `.gating`, `.experts` and a shared expert."""
    shared = [v.shared_ir() if isinstance(v, Spec) else v.shared for v in (a, b)]
    return gating_differences(a.gating, b.gating) | experts_differences(a.experts, b.experts) | shared_differences(*shared)


# Compiling ------------------------------------------------------------------------------------------------------------------


class Host(nn.Module):
    """The model around the block."""

    def __init__(self, block: Composed) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def exactly(block: Composed, x: torch.Tensor) -> Any:
    """The naive reading of the block's Spec on its own parameters, [T, H] in float64."""
    biases = [list(b) if b is not None else [] for b in (block.up_biases, block.down_biases)]
    add = None if block.spec.shared == "none" else block.shared(x)
    if block.mutation == "residual base":
        add = x if add is None else x + add
    weights, scale = (list(block.ups), list(block.downs), *biases), block.expert_scale
    parts = naive.Parts(x, x @ block.gate.T, *weights, bias=block.bias, expert_scale=scale, add=add)
    return naive.block(block.spec.gating, block.spec.experts, parts)


def tied(block: Composed, x: torch.Tensor) -> torch.Tensor:
    """[T]: tokens whose choice hangs on the last two bits of a score, as it does between saturated sigmoids: any rounding may decide."""
    g, exact = block.spec.gating, copy.deepcopy(block).double()
    logits = torch.nn.functional.linear(x, block.gate).double()
    s = exact.score(logits)
    c = logits if block.how.over_selected else exact.criterion(logits, s, x.double())
    near = 2 * torch.finfo(torch.float32).eps * torch.stack([c.abs().amax(-1), s.abs().amax(-1)]).amax(0)
    margins = []
    if g.groups is not None:
        ranks = GROUP_RANK["topk"](c.view(c.shape[0], g.groups.count, -1), g.groups.top)
        margins.append(_margin(ranks, g.groups.kept))
        c = exact.limit(c)
    margins.append(_margin(exact.reversed(c), g.k))
    return torch.stack(margins).amin(0) <= near


def _margin(v: torch.Tensor, k: int) -> torch.Tensor:
    """How far the last chosen is from the first one that is not."""
    *_, last, first_out = v.topk(k + 1, dim=-1).values.unbind(-1) if k < v.shape[-1] else (v[:, 0], torch.full_like(v[:, 0], -torch.inf))
    return last - first_out


def compile_and_compare(spec: Spec, how: Spelling, mutation: str = "", dynamic: bool = False) -> Report:
    """The report; fails if any output differs from eager's: fresh tokens, tokens all alike, and peaked scores."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Composed(spec, how, mutation).eval()
    eager = copy.deepcopy(block)
    fused = torch.compile(Host(block), backend="moe_fused", dynamic=dynamic, options={"inner": "eager"})
    x = torch.randn(5, H)
    with torch.no_grad():
        with collecting() as report:
            fused(x.clone())
        same_rows = mutation in ("", "residual base")  # what `exactly` reads; others may mix tokens
        for inputs in (x, torch.randn(1, H).repeat(5, 1), torch.randn(5, H) * 4):
            got, want = fused(inputs.clone()), eager(inputs.clone())
            sure = ~tied(eager, inputs)
            if not (same_rows or sure.all()):
                continue
            got, want = got[sure], want[sure]
            problem = difference_problem(got, want)
            if problem and same_rows:  # some spellings are less exact than 1e-5 themselves
                problem = worse_than(got, want, exactly(eager, inputs)[sure.numpy()])
            assert not problem, f"output: {problem}\n{report}"
    internal = [r.reason for r in report.rejected if r.stage == "internal"]
    assert not internal, internal
    return report


def only_block(report: Report) -> Any:
    """The IR of the one block that must have been fused and validated."""
    told = [f"{r.stage}: {r.reason}" for r in report.rejected]
    assert len(report.blocks) == 1, f"{len(report.blocks)} blocks; rejected: {told}; breaks: {report.graph_breaks}"
    assert report.blocks[0].validated
    return report.blocks[0].ir


def summary(spec: Spec) -> str:
    """For messages: the fields of a Spec that are not the default."""
    parts = []
    for value in (spec.gating, spec.experts):
        for f in dataclasses.fields(value):
            if getattr(value, f.name) != f.default:
                parts.append(f"{f.name}={getattr(value, f.name)}")
    return ", ".join(parts)
