"""The routing kernel against the IR's oracle: every form, ties, NaN, odd sizes, gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from moe_compile import ops
from moe_compile.ir import BiasOn, Gating, Groups, Norm, Normaliser, Score
from moe_compile.lowering.reference import routing
from moe_compile.lowering.triton import route

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SUM = Normaliser(Norm.SUM)

FORMS: dict[str, Gating] = {
    **{f"{score.name.lower()}": Gating(12, 3, score) for score in Score},
    **{f"top-k then {s.name.lower()}": Gating(12, 3, s, score_over_selected=True) for s in (Score.SOFTMAX, Score.SIGMOID)},
    "renormalised": Gating(12, 4, Score.SOFTMAX, norm=SUM),
    "bias": Gating(12, 3, Score.SIGMOID, bias=BiasOn.SCORE, norm=Normaliser(Norm.SUM, eps=1e-20), scale=2.5),
    "softmax and bias": Gating(12, 3, Score.SOFTMAX, bias=BiasOn.SCORE),
    "bias in the weights": Gating(12, 3, Score.SIGMOID, bias=BiasOn.SCORE, bias_in_weights=True, norm=SUM),
    "bias on the logits": Gating(12, 3, Score.SOFTMAX, bias=BiasOn.LOGIT, norm=SUM),
    "bias on the logits, top-k first": Gating(12, 3, Score.SOFTMAX, score_over_selected=True, bias=BiasOn.LOGIT),
    "groups by top-2 sum": Gating(12, 3, Score.SIGMOID, bias=BiasOn.SCORE, groups=Groups(4, 2, 2, 0.0), norm=SUM, scale=16.0),
    "groups by maximum": Gating(12, 3, Score.SOFTMAX, groups=Groups(3, 1, 1, -math.inf)),
    "groups of 5, filled": Gating(15, 6, Score.SOFTMAX, groups=Groups(3, 1, 3, -1.0)),
    "maximum": Gating(12, 3, Score.SIGMOID, norm=Normaliser(Norm.MAX)),
    "2-norm, guarded": Gating(12, 3, Score.TANH, norm=Normaliser(Norm.PNORM, eps=1e-3, p=2.0)),
    "3-norm": Gating(12, 3, Score.SQRT_SOFTPLUS, norm=Normaliser(Norm.PNORM, p=3.0)),
    "1-norm": Gating(12, 3, Score.IDENTITY, norm=Normaliser(Norm.PNORM, p=1.0)),
    "largest absolute": Gating(12, 3, Score.IDENTITY, norm=Normaliser(Norm.PNORM, p=math.inf)),
    "clamped": Gating(12, 3, Score.SOFTMAX, norm=Normaliser(Norm.SUM, clamp_min=0.5)),
    "scaled by expert": Gating(12, 3, Score.SOFTMAX, norm=SUM, expert_scale=True, scale=0.5),
    "one expert": Gating(1, 1, Score.SOFTMAX),
    "all experts": Gating(4, 4, Score.SIGMOID),
}


def plain(gating: Gating) -> routing.Routing:
    return routing.Routing(*ops.route_args(gating))


def inputs(gating: Gating, tokens: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logits, bias and expert_scale; some biases larger than any score."""
    e = gating.num_experts
    bias = torch.randn(e) if gating.bias is not BiasOn.NONE else None
    scale = torch.rand(e) + 0.5 if gating.expert_scale else None
    return tuple(None if t is None else t.to(DEVICE) for t in (torch.randn(tokens, e).to(dtype), bias, scale))  # type: ignore[return-value]


def stable_ids(gating: Gating, logits: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The oracle's choice, of equals the first. On the CPU: sorting on a GPU takes a NaN with a sign for the smallest."""
    device, g = logits.device, gating.groups
    logits, bias = logits.cpu(), None if bias is None else bias.cpu()
    choice, _ = replace(gating, groups=None).selection(logits, bias, dtype)
    if g is not None:
        by_group = choice.unflatten(-1, (g.count, -1))
        best = by_group.topk(g.top, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, first(best, g.kept), True)
        choice = by_group.masked_fill(~kept[..., None], g.fill).flatten(-2)
    return first(choice, gating.k).to(device)


def first(t: Tensor, k: int) -> Tensor:
    return t.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def check(gating: Gating, logits: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> None:
    """Experts and weights are the oracle's."""
    r = plain(gating)
    assert route.can_route(r, gating.num_experts) is None
    weights, ids = route.forward(logits, bias, scale, r)
    assert weights.dtype == gating.weight_dtype and ids.dtype == torch.int64
    assert torch.equal(ids, stable_ids(gating, logits, bias))
    raw = gating.selection(logits, bias, torch.float64)[1]
    wanted = gating.weights_of(raw, ids, bias, scale)
    torch.testing.assert_close(weights.double(), wanted, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.fixture(params=["few tokens", "many tokens"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both shapes of program: a warp per token, several tokens per program."""
    if request.param == "many tokens":
        monkeypatch.setattr(route, "_FEW_TOKENS", 0)
    return request.param


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, path: str) -> None:
    check(FORMS[name], *inputs(FORMS[name]))


@pytest.mark.parametrize(("experts", "k"), [(60, 4), (64, 6), (160, 6), (384, 8), (1024, 32), (40, 32), (2, 1)])
def test_sizes(experts: int, k: int, path: str) -> None:
    gating = Gating(experts, k, Score.SOFTMAX, norm=SUM)
    check(gating, *inputs(gating, 3))


def test_grouped_sizes(path: str) -> None:
    """Eight groups of 20 experts: neither a power of two."""
    gating = Gating(160, 6, Score.SIGMOID, bias=BiasOn.SCORE, groups=Groups(8, 3, 2, -math.inf))
    check(gating, *inputs(gating, 3))


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "groups by maximum", "relu"])
def test_ties(name: str, path: str) -> None:
    """Of equal scores the lowest expert wins; -0 equals 0."""
    gating = FORMS[name]
    logits = torch.randint(-1, 2, (9, gating.num_experts)).float()
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    check(gating, logits.to(DEVICE))


@pytest.mark.parametrize(("experts", "k"), [(128, 8), (200, 12), (256, 8), (33, 20)])
def test_near_and_far(experts: int, k: int, path: str) -> None:
    """The best of a row close together, far apart, on either side of zero, equal; rows of all kinds in one program."""
    gating = Gating(experts, k, Score.IDENTITY, norm=None)
    rows = torch.randn(11, experts)
    rows[1] = rows[1].abs() * 10.0 ** torch.randint(-30, 30, (experts,))
    rows[2] = 1.0 + torch.arange(experts).flip(0) * 2.0**-23
    rows[3] = -(2.0 ** torch.randint(-8, 8, (experts,)).float())
    rows[4] = rows[4].bfloat16().float()
    rows[5] = rows[5].abs() + 1.0
    rows[5, 7] = 4.0 * rows[5].max()
    rows[6] = 2.0 ** (torch.randperm(experts) % 5).float()
    rows[7, ::3] = math.inf
    rows[8] = 0.0
    rows[9, k // 2 :] = -1.0
    check(gating, rows.to(DEVICE))


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "identity", "groups by maximum", "top-k then softmax", "maximum", "renormalised"])
def test_not_a_number(name: str, path: str) -> None:
    """NaN counts as greatest, a row of NaN gives the first experts, and no id leaves the range."""
    gating = FORMS[name]
    logits = torch.randn(4, gating.num_experts)
    logits[0, 7] = math.nan
    logits[1] = math.nan
    logits[2, 3] = -math.nan
    check(gating, logits.to(DEVICE))


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "softplus", "tanh", "groups by maximum"])
def test_infinite(name: str, path: str) -> None:
    """-inf marks experts that must not be chosen; with too few others they are, lowest first."""
    gating = FORMS[name]
    logits = torch.randn(3, gating.num_experts)
    logits[0, ::2] = -math.inf
    logits[1, 2:] = -math.inf
    logits[2] = -math.inf
    check(gating, logits.to(DEVICE))


def test_wide_range() -> None:
    """Scores that underflow in fp32 are still ordered as the oracle orders them."""
    gating = FORMS["softmax"]
    check(gating, (torch.randperm(12).float() * 40)[None].to(DEVICE))


def test_no_tokens() -> None:
    check(FORMS["bias"], *inputs(FORMS["bias"], 0))


def test_strided_logits(path: str) -> None:
    """Columns of a wider tensor, and a transposed one."""
    gating = Gating(8, 2, Score.SOFTMAX)
    check(gating, torch.randn(5, 20, device=DEVICE)[:, 4:12])
    check(gating, torch.randn(8, 5, device=DEVICE).t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logit_dtypes(dtype: torch.dtype, path: str) -> None:
    """Logits of any float dtype are scored in the routing's."""
    gating = Gating(12, 3, Score.SOFTMAX, norm=SUM)
    check(gating, *inputs(gating, dtype=dtype))


# the interpreter does not round to bf16 as the hardware does
LOW = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", ["softmax", "top-k then softmax", "renormalised", "clamped", "scaled by expert", "relu", "maximum"])
def test_low_precision_scores(name: str, dtype: torch.dtype, path: str) -> None:
    """Scores in 16 bits: torch's experts except where its scores are equal, its weights up to one rounding a step."""
    gating = replace(FORMS[name], score_dtype=dtype, weight_dtype=dtype)
    logits, bias, scale = inputs(gating, dtype=dtype)
    r = plain(gating)
    assert route.can_route(r, gating.num_experts) is None
    weights, ids = route.forward(logits, bias, scale, r)
    wanted, expected = routing.forward(logits, bias, scale, r)
    choice, _ = gating.selection(logits, bias, dtype)
    assert torch.equal(choice.gather(-1, ids), choice.gather(-1, expected))
    torch.testing.assert_close(weights, wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(k=33), "up to"),
        (dict(k=0), "cannot be chosen"),
        (dict(score_dtype=torch.float64), "compute in"),
        (dict(norm=int(Norm.EXPR)), "normaliser"),
        (dict(norm=int(Norm.PNORM), norm_p=-1.0), "normaliser"),
        (dict(n_groups=5, kept_groups=1, group_top=1), "divide"),
        (dict(score=int(Score.SIGMOID), bias_on=int(BiasOn.SCORE), score_dtype=torch.bfloat16), "rounding"),
    ],
)
def test_declined(change: dict[str, Any], reason: str) -> None:
    """What the kernel does not cover has a reason."""
    r = replace(plain(Gating(64, 2, Score.SOFTMAX)), **change)
    assert reason in (route.can_route(r, 64) or "")
    assert "up to" in (route.can_route(plain(Gating(2000, 2, Score.SOFTMAX)), 2000) or "")


def test_declined_runs() -> None:
    """A declined form comes from plain torch."""
    gating = replace(FORMS["bias"], score_dtype=torch.float64, weight_dtype=torch.float64)
    logits, bias, scale = inputs(gating)
    for ours, theirs in zip(route.forward(logits, bias, scale, plain(gating)), routing.forward(logits, bias, scale, plain(gating))):
        assert torch.equal(ours, theirs)


def gradients(gating: Gating, tokens: int = 4) -> None:
    """Gradients of logits, bias and expert_scale against autograd through the oracle."""
    logits, bias, scale = inputs(gating, tokens)
    leaves = [None if t is None else t.double().requires_grad_() for t in (logits, bias, scale)]
    r = plain(gating)
    weights, ids = route.forward(logits, bias, scale, r)
    grad = torch.randn_like(weights)
    raw = gating.selection(leaves[0], leaves[1], torch.float64)[1]  # type: ignore[arg-type]
    gating.weights_of(raw, ids, leaves[1], leaves[2]).backward(grad.double())
    needs = [True, bias is not None and gating.bias_in_weights, scale is not None]
    got = route.backward(grad, ids, logits, bias, scale, r, needs)
    assert len(got) == sum(needs)
    for ours, leaf in zip(got, [leaf for leaf, need in zip(leaves, needs) if need]):
        assert leaf is not None
        wanted = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(ours.double(), wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_gradients(name: str) -> None:
    gradients(FORMS[name])


def test_gradients_of_odd_sizes() -> None:
    gradients(Gating(60, 6, Score.SOFTMAX, norm=SUM, scale=2.0))
    gradients(Gating(160, 3, Score.SIGMOID, bias=BiasOn.SCORE, groups=Groups(8, 3, 2, -math.inf), norm=SUM))


def test_no_gradient_tokens() -> None:
    r = plain(FORMS["renormalised"])
    logits = torch.zeros(0, 12, device=DEVICE)
    weights, ids = route.forward(logits, None, None, r)
    assert route.backward(weights, ids, logits, None, None, r, [True, False, False])[0].shape == (0, 12)


@st.composite
def groupings(draw: st.DrawFn, count: int, size: int) -> Groups:
    return Groups(count, draw(st.integers(1, count)), draw(st.integers(1, size)), draw(st.sampled_from([-math.inf, 0.0])))


@st.composite
def gatings(draw: st.DrawFn) -> Gating:
    """Any meaning the IR can hold that the kernel takes."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    experts = groups * size
    over = draw(st.booleans())
    kind = draw(st.sampled_from([Norm.NONE, Norm.SUM, Norm.MAX, Norm.PNORM]))
    score = draw(st.sampled_from([Score.SOFTMAX, Score.SIGMOID, Score.SQRT_SOFTPLUS, Score.EXP, Score.SOFTPLUS]))
    grouped = groups > 1 and not over and draw(st.booleans())
    return Gating(
        experts,
        draw(st.integers(1, min(experts, 6))),
        score,
        score_over_selected=over,
        bias=draw(st.sampled_from([BiasOn.NONE, BiasOn.LOGIT] if over else list(BiasOn))),
        groups=draw(groupings(groups, size)) if grouped else None,
        norm=None if kind is Norm.NONE else Normaliser(kind, eps=draw(st.sampled_from([0.0, 1e-6])), p=2.0),
        scale=draw(st.sampled_from([1.0, 2.5])),
        expert_scale=draw(st.booleans()),
    )


@settings(max_examples=30 if not ON_GPU else 150, deadline=None, suppress_health_check=list(HealthCheck))
@given(gating=gatings(), tokens=st.integers(1, 3), seed=st.integers(0, 99), many=st.booleans())
def test_any_gating(gating: Gating, tokens: int, seed: int, many: bool) -> None:
    """Random meanings on random logits."""
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        if many:
            patch.setattr(route, "_FEW_TOKENS", 0)
        check(gating, *inputs(gating, tokens))


def test_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Kernel:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **kwargs: seen.append(grid)

    monkeypatch.setattr(route, "route_kernel", Kernel())
    logits, bias, scale = inputs(FORMS["bias"], 3)
    route.forward(logits, bias, scale, plain(FORMS["bias"]))
    assert len(seen) == 1


@pytest.mark.skipif(not ON_GPU, reason="sizes for a GPU")
@pytest.mark.parametrize("tokens", [1, 64, 4096, 16384])
@pytest.mark.parametrize("name", ["renormalised", "bias", "groups by top-2 sum", "top-k then softmax"])
@pytest.mark.parametrize(("experts", "k"), [(128, 8), (60, 4), (256, 8), (1024, 32)])
def test_real_sizes(tokens: int, name: str, experts: int, k: int) -> None:
    """Where fp32 scores come within a rounding of each other either expert is right: compare what was chosen, not which."""
    gating = replace(FORMS[name], num_experts=experts, k=k)
    logits, bias, scale = inputs(gating, tokens)
    weights, ids = route.forward(logits, bias, scale, plain(gating))
    choice, raw = gating.selection(logits, bias, torch.float64)
    torch.testing.assert_close(choice.gather(-1, ids), choice.topk(k).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights.double(), gating.weights_of(raw, ids, bias, scale), rtol=1e-5, atol=1e-7)
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
