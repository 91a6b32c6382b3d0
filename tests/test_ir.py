"""The oracles of the IR against a reading that shares no code with them: one token at a time, in Python floats."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch
from catalogue import naive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_compile.ir import (
    BiasOn,
    Experts,
    Form,
    Gating,
    Groups,
    MaxK,
    MinK,
    MoeBlock,
    Norm,
    Normaliser,
    Rejection,
    Score,
    SharedExpert,
    SumK,
    W,
    text,
)
from moe_compile.ir import scalar as act
from moe_compile.lowering.reference import dual
from moe_compile.lowering.triton import activation as triton_code

torch.set_num_threads(1)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ACTIVATIONS: dict[str, Any] = {
    "swiglu": act.SWIGLU,
    "swiglu up first": act.silu(act.U) * act.G,
    "geglu": act.gelu(act.G) * act.U,
    "geglu tanh": act.gelu_tanh(act.G) * act.U,
    "reglu": act.relu(act.G) * act.U,
    "clamped": (act.clamp(act.U, -7, 7) + 1) * act.clamp(act.G, -sp.oo, 7) * act.sigmoid(sp.Float(1.702) * act.clamp(act.G, -sp.oo, 7)),
    "softplus log": sp.log(1 + act.softplus(act.G)) * act.U,
    "odd": sp.tanh(act.G) * sp.Abs(act.U) + sp.exp(-(act.G**2)) - 3,
    "root": sp.sqrt(act.softplus(act.G)) / (1 + act.U**2),
    "quotient": act.G / (1 + sp.Abs(act.U)) - 1 / (2 + act.softplus(act.G)),
    "small": act.log1p(act.relu(act.G)) + act.expm1(act.U / 4),
}
SINGLE: dict[str, Any] = {
    "silu": act.silu(act.G),
    "relu2": act.relu(act.G) ** 2,
    "gelu": act.gelu(act.G),
    "erf": sp.erf(act.G),
    "constant": sp.Float(0.5),
}


# Activations ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ACTIVATIONS, *SINGLE])
def test_activation_program(name: str) -> None:
    expr = (ACTIVATIONS | SINGLE)[name]
    torch.manual_seed(0)
    g, u = torch.randn(40, 9, dtype=torch.float64) * 4, torch.randn(40, 9, dtype=torch.float64) * 4
    got = act.evaluate(expr, g, u if name in ACTIVATIONS else None)
    want = torch.from_numpy(naive.activation(expr, g.numpy(), u.numpy() if name in ACTIVATIONS else None).copy())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", act.FUNCTIONS, ids=lambda f: f.name)
def test_rows_of_the_table(row: act.Scalar) -> None:
    """What a row claims of its function: the head computes it, it rises, it is positive, its slope is the kernels'; numbers are IEEE's."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    x = x[x > 0] if row.name in ("log", "log1p") else x
    got = row.torch(x)
    torch.testing.assert_close(got, torch.from_numpy(naive.activation(row.head(act.G), x.numpy(), None).copy()), rtol=1e-12, atol=1e-12)
    assert not row.increasing or bool((got.diff() > 0).all())
    assert not row.positive or bool((got > 0).all())
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(row.torch(y).sum(), y)
    torch.testing.assert_close(dual.SLOPES[act.FUNCTIONS.index(row)](x, got), slope, rtol=1e-9, atol=1e-9)
    assert row.number(1e9) in (1.0, 1e9, math.inf, math.log(1e9), math.log1p(1e9))  # what overflows is infinite, never an error
    assert act.decode(*act.encode(row.head(act.G))) == row.head(act.G)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_keeps_dtype_and_gradient(dtype: torch.dtype) -> None:
    g, u = (torch.randn(5, 3, dtype=dtype).requires_grad_() for _ in range(2))
    out = act.evaluate(ACTIVATIONS["clamped"], g, u)
    assert out.dtype is dtype
    out.sum().backward()
    assert g.grad is not None and u.grad is not None and g.grad.isfinite().all()


def test_unknown_activation_is_named() -> None:
    with pytest.raises(act.UnknownActivation, match="sin"):
        act.encode(sp.sin(act.G) * act.U)
    with pytest.raises(act.UnknownActivation):
        act.encode(act.G**act.U)


def test_describe() -> None:
    assert text.describe(act.SWIGLU) == "SwiGLU"
    assert text.describe(act.relu(act.G) ** 2) == "ReLU²"
    assert "^" in text.describe(act.G**3)


def test_op_numbers_are_a_contract() -> None:
    """Numbers reach compiled code: they may be added to, never moved."""
    assert [s.name for s in Score] == ["IDENTITY", "SOFTMAX", "SIGMOID", "SQRT_SOFTPLUS", "SOFTPLUS", "EXP", "TANH", "RELU"]
    assert [b.name for b in BiasOn] == ["NONE", "SCORE", "LOGIT"]
    assert [n.name for n in Norm] == ["NONE", "SUM", "MAX", "PNORM", "EXPR"]
    assert [f.name for f in Form] == ["SINGLE", "CONCAT", "INTERLEAVED", "SEPARATE"]
    assert act.encode(act.SWIGLU)[0].count(act.OP_MUL) == 2
    functions = ["sigmoid", "tanh", "exp", "log", "erf", "relu", "softplus", "gelu_tanh", "abs", "log1p", "expm1", "exp2"]
    assert [f.name for f in act.FUNCTIONS] == functions
    assert len(dual.SLOPES) == len(triton_code._UNARY) == len(functions)


# Gating ---------------------------------------------------------------------------------------------------------------------


@st.composite
def normalisers(draw: st.DrawFn) -> Normaliser | None:
    kind = draw(st.sampled_from(list(Norm)))
    if kind is Norm.EXPR:
        total = SumK(W)
        choices = [W / sp.sqrt(total + 1), W / (MaxK(W) + MinK(W) + 2), sp.exp(W) / SumK(sp.exp(W)), W**2 / SumK(W**2), W]
        return Normaliser(kind, expr=draw(st.sampled_from(choices)))
    guard = draw(st.sampled_from([(0.0, 0.0), (1e-20, 0.0), (0.05, 0.0), (0.0, 0.9)]))
    return Normaliser(kind, *guard, p=draw(st.sampled_from([1.0, 2.0, 3.0])))


@st.composite
def gatings(draw: st.DrawFn) -> Gating:
    count, size = draw(st.sampled_from([(2, 4), (4, 2), (3, 4), (2, 3)]))
    grouped = draw(st.booleans())
    kept = draw(st.integers(1, count - 1))
    groups = Groups(count, kept, draw(st.integers(1, size)), draw(st.sampled_from([-math.inf, -1e30, 0.0]))) if grouped else None
    score = draw(st.sampled_from(list(Score)))
    over_selected = draw(st.booleans())
    bias = draw(st.sampled_from(list(BiasOn)))
    return Gating(
        num_experts=count * size,
        k=draw(st.integers(1, kept * size)),
        score=score,
        score_over_selected=over_selected,
        bias=bias,
        bias_in_weights=bias is not BiasOn.NONE and draw(st.booleans()),
        groups=groups,
        norm=draw(normalisers()) if score is not Score.IDENTITY else None,
        scale=draw(st.sampled_from([1.0, 2.5])),
        expert_scale=draw(st.booleans()),
    )


@QUICK
@given(gatings(), st.integers(0, 2**16), st.sampled_from([0, 1, 5]))
def test_gating(g: Gating, seed: int, tokens: int) -> None:
    torch.manual_seed(seed)
    n = g.num_experts
    logits, bias, scale = torch.randn(tokens, n).double(), torch.randn(n).double() * 0.7, torch.rand(n).double() + 0.5
    weights, ids = g.evaluate(logits, bias, scale)
    assert weights.shape == ids.shape == (tokens, g.k) and weights.dtype is torch.float64 and ids.dtype is torch.int64
    for t in range(tokens):
        want, chosen = naive.route_token(g, logits[t].tolist(), bias.tolist(), scale.tolist())
        if ties(g, logits[t], bias):
            continue
        assert ids[t].tolist() == chosen
        torch.testing.assert_close(weights[t], torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12, equal_nan=True)


def ties(g: Gating, row: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether two experts' choice scores are equal (relu, fill 0): their order is nobody's promise."""
    choice, _ = g.selection(row[None], bias, torch.float64)
    finite = choice[choice > -1e29]
    return finite.unique().numel() < finite.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gating_in_another_dtype(dtype: torch.dtype) -> None:
    g = Gating(8, 2, Score.SIGMOID, bias=BiasOn.SCORE, norm=Normaliser(Norm.SUM, 1e-20), scale=2.5)
    w, ids = g.evaluate(torch.randn(4, 8), torch.randn(8), dtype=dtype)
    assert w.dtype is dtype and ids.dtype is torch.int64
    torch.testing.assert_close(w.float().sum(-1), torch.full((4,), 2.5), rtol=2e-2, atol=0)


def test_nan_logits_stay_nan() -> None:
    logits = torch.randn(3, 8).index_fill(0, torch.tensor([1]), math.nan)
    w, _ = Gating(8, 2, Score.SOFTMAX).evaluate(logits)
    assert w[1].isnan().all() and w[[0, 2]].isfinite().all()


# Experts --------------------------------------------------------------------------------------------------------------------


@st.composite
def expert_blocks(draw: st.DrawFn) -> Experts:
    form = draw(st.sampled_from(list(Form)))
    table = SINGLE if form is Form.SINGLE else ACTIVATIONS
    hidden, out = draw(st.sampled_from([(4, 4), (4, 6), (6, 6)]))
    identity = draw(st.integers(0, 2)) if hidden == out else 0
    flags = [draw(st.booleans()) for _ in range(6)]
    return Experts(
        num_experts=draw(st.integers(1, 4)),
        hidden=hidden,
        intermediate=draw(st.sampled_from([2, 3])),
        out_features=out,
        form=form,
        activation=table[draw(st.sampled_from(list(table)))],
        stacked=flags[0],
        up_transposed=flags[1],
        down_transposed=flags[2],
        up_bias=flags[3],
        down_bias=flags[4],
        weight_on_input=flags[5],
        num_identity=identity,
    )


def random_weights(e: Experts) -> dict[str, list[torch.Tensor]]:
    """Parameters in the layout `Experts` documents."""
    n, i = e.num_experts, e.intermediate
    width = 2 * i if e.form in (Form.CONCAT, Form.INTERLEAVED) else i
    copies = 2 if e.form is Form.SEPARATE else 1

    def stack(copies: int, *shape: int) -> list[torch.Tensor]:
        if e.stacked:
            return [torch.randn(n, *shape).double() for _ in range(copies)]
        return [torch.randn(*shape).double() for _ in range(copies * n)]

    def matrix(copies: int, out: int, into: int, transposed: bool) -> list[torch.Tensor]:
        return stack(copies, *((into, out) if transposed else (out, into)))

    return {
        "up": matrix(copies, width, e.hidden, e.up_transposed),
        "down": matrix(1, e.out_features, i, e.down_transposed),
        "up_bias": stack(copies, width) if e.up_bias else [],
        "down_bias": stack(1, e.out_features) if e.down_bias else [],
    }


@QUICK
@given(expert_blocks(), st.integers(0, 2**16), st.sampled_from([0, 1, 4]), st.booleans())
def test_experts(e: Experts, seed: int, tokens: int, with_add: bool) -> None:
    """Ids of all kinds: experts, identity experts, -1, and one more than there are."""
    torch.manual_seed(seed)
    x, w = torch.randn(tokens, e.hidden).double(), torch.rand(tokens, 3).double()
    ids = torch.randint(-1, e.num_experts + e.num_identity + 1, (tokens, 3))
    add = torch.randn(tokens, e.out_features).double() if with_add else None
    m = random_weights(e)
    got = e.evaluate(x, ids, w, m["up"], m["down"], m["up_bias"], m["down_bias"], add)
    parts = naive.Parts(x, x, **m, add=add)
    want = torch.from_numpy(naive.experts(e, parts, ids.tolist(), w.tolist()))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_experts_leave_their_inputs_alone() -> None:
    e = Experts(3, 4, 2, 4, Form.CONCAT, act.SWIGLU)
    m, add = random_weights(e), torch.zeros(5, 4)
    e.evaluate(torch.randn(5, 4), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1), m["up"], m["down"], add=add)
    assert add.abs().max() == 0


# Blocks ---------------------------------------------------------------------------------------------------------------------

GATE = Gating(4, 2, Score.SIGMOID, bias=BiasOn.SCORE, norm=Normaliser(Norm.SUM, 1e-20), scale=2.0, expert_scale=True)
FEW = Experts(4, 4, 3, 4, Form.CONCAT, act.SWIGLU)


def test_block() -> None:
    torch.manual_seed(0)
    m = random_weights(FEW)
    x, logits, bias, scale, add = (torch.randn(*s).double() for s in ((5, 4), (5, 4), (4,), (4,), (5, 4)))
    block = MoeBlock(GATE, FEW)
    got = block.evaluate(x, logits, m["up"], m["down"], bias=bias, expert_scale=scale, add=add)
    parts = naive.Parts(x, logits, m["up"], m["down"], bias=bias, expert_scale=scale, add=add)
    torch.testing.assert_close(got, naive.of_ir(block, parts), rtol=1e-10, atol=1e-10)


def test_block_without_gating_says_so() -> None:
    with pytest.raises(ValueError, match="left as written"):
        MoeBlock(None, FEW).evaluate(torch.ones(1, 4), torch.ones(1, 4), [], [])


def test_meaning_is_what_compares() -> None:
    """The boundary is no part of the meaning; every other field is."""
    a = MoeBlock(GATE, FEW, SharedExpert(3, act.SWIGLU), boundary={"tokens": "x"})
    assert a == replace(a, boundary={"tokens": "other"}) and hash(a) == hash(replace(a, boundary={}))
    for change in (
        {"gating": replace(GATE, scale=2.1)},
        {"gating": replace(GATE, norm=Normaliser(Norm.SUM, 1e-6))},
        {"gating": replace(GATE, groups=Groups(2, 1, 1, 0.0))},
        {"gating": None},
        {"experts": replace(FEW, form=Form.INTERLEAVED)},
        {"experts": replace(FEW, activation=act.gelu(act.G) * act.U)},
        {"shared": None},
        {"shared": SharedExpert(3, act.SWIGLU, gated=True)},
    ):
        assert a != replace(a, **change)
    assert replace(GATE, groups=Groups(2, 1, 1, 0.0)) != replace(GATE, groups=Groups(2, 1, 1, -math.inf))


def test_rejection_is_data() -> None:
    r = Rejection("top-k is not over experts", stage="gating", source="model.py:7")
    assert (r.reason, r.stage, r.source) == ("top-k is not over experts", "gating", "model.py:7")
    assert "model.py:7" in repr(r) and isinstance(r, Exception)
