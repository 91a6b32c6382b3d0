"""The CPU's routing kernel against plain torch in the same dtype: the same experts, equal weights; ties and NaN are torch's."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import have_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_compile import ir, ops
from moe_compile.lowering.cpu import route as cpu_route
from moe_compile.lowering.reference import routing

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler")
SUM = ir.Normaliser(ir.Norm.SUM, 1e-20)


def plain(g: ir.Gating) -> routing.Routing:
    return routing.Routing(*ops.route_args(g))


def inputs(g: ir.Gating, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, g.num_experts, generator=gen).to(dtype)
    bias = torch.randn(g.num_experts, generator=gen) * 0.1 if g.bias is not ir.BiasOn.NONE else None
    return [logits, bias, torch.rand(g.num_experts, generator=gen) + 0.5 if g.expert_scale else None]


def check(g: ir.Gating, *args: Tensor | None, kernel: bool = True) -> None:
    """The kernel is asked (or not), and gives what plain torch gives."""
    r = plain(g)
    assert (cpu_route._kernel(r, g.num_experts) is not None) is kernel
    w, ids = cpu_route.forward(*args, r)
    want, want_ids = routing.forward(*args, r)
    assert torch.equal(ids, want_ids) and w.dtype == want.dtype and ids.dtype == torch.int64
    torch.testing.assert_close(w, want, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (60, 4), (64, 16), (160, 6), (384, 8), (1024, 32)])
@pytest.mark.parametrize("score", ir.Score)
def test_scores_and_sizes(score: ir.Score, experts: int, k: int) -> None:
    for bias, norm in itertools.product(ir.BiasOn, (None, SUM, ir.Normaliser(ir.Norm.MAX, clamp_min=0.5))):
        g = ir.Gating(experts, k, score, bias=bias, norm=norm, scale=2.826)
        check(g, *inputs(g, 9))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_groups(data: st.DataObject) -> None:
    """Any grouping, either fill, with the bias on scores or logits."""
    count, size = data.draw(st.sampled_from([(2, 4), (4, 8), (8, 32), (8, 20)]))
    kept = data.draw(st.integers(1, count))
    groups = ir.Groups(count, kept, data.draw(st.integers(1, min(3, size))), data.draw(st.sampled_from([0.0, -float("inf")])))
    k = data.draw(st.integers(1, min(kept * size, 8)))
    score = data.draw(st.sampled_from([ir.Score.SIGMOID, ir.Score.SOFTMAX, ir.Score.SQRT_SOFTPLUS]))
    g = ir.Gating(count * size, k, score, bias=data.draw(st.sampled_from(ir.BiasOn)), groups=groups, norm=SUM)
    args = inputs(g, data.draw(st.sampled_from([1, 5, 700])), data.draw(st.integers(0, 99)))
    if args[1] is not None and groups.fill == 0.0:
        args[1] = args[1].abs() + 0.1  # a negative score would lose to the fill, which ties with itself
    check(g, *args)


@pytest.mark.parametrize("score", [ir.Score.IDENTITY, ir.Score.SOFTMAX, ir.Score.SIGMOID])
@pytest.mark.parametrize("in_weights", [False, True])
def test_scores_of_the_selected(score: ir.Score, in_weights: bool) -> None:
    g = ir.Gating(32, 4, score, score_over_selected=True, bias=ir.BiasOn.LOGIT, bias_in_weights=in_weights, expert_scale=True, norm=SUM)
    check(g, *inputs(g, 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_logits_are_widened_and_tie(dtype: torch.dtype) -> None:
    """Rounded logits tie often: which of two equal experts is chosen is torch's choice, as in eager mode."""
    g = ir.Gating(128, 8, ir.Score.SIGMOID, norm=SUM)
    check(g, *inputs(g, 200, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
@pytest.mark.parametrize("groups", [None, ir.Groups(4, 2, 2, -float("inf"))])
def test_odd_values(value: float, groups: ir.Groups | None) -> None:
    for score in (ir.Score.SOFTMAX, ir.Score.SIGMOID, ir.Score.IDENTITY):
        g = ir.Gating(16, 3, score, groups=groups, norm=SUM)
        logits, *rest = inputs(g, 6)
        assert logits is not None
        logits[1, 5] = logits[3, :9] = value
        check(g, logits, *rest)


def test_what_the_kernel_does_not_take() -> None:
    """Other norms and scores after the selection, half precision scores: plain torch."""
    for g in (
        ir.Gating(8, 2, ir.Score.SOFTMAX, norm=ir.Normaliser(ir.Norm.PNORM, p=2.0)),
        ir.Gating(8, 2, ir.Score.TANH, score_over_selected=True),
        ir.Gating(8, 2, ir.Score.SOFTMAX, score_dtype=torch.bfloat16),
    ):
        check(g, *inputs(g, 5), kernel=False)


def test_strided_logits_and_no_tokens() -> None:
    g = ir.Gating(16, 3, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE)
    logits, bias, _ = inputs(g, 10)
    assert logits is not None and bias is not None
    check(g, logits.t().contiguous().t(), bias, None)
    check(g, logits[:, ::1][::2], torch.stack([bias, bias], 1)[:, 0], None)
    w, ids = cpu_route.forward(logits[:0], bias, None, plain(g))
    assert w.shape == ids.shape == (0, 3)
