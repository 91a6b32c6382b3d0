"""The routed experts' forward kernels against the IR's float64 oracle: layouts, activations, routings, strides, both paths."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import sympy as sp
import torch
from conftest import bundle
from test_ops import CASES, GPT_OSS, Case, close
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from calls import DEVICE, DTYPES, FACTORS, GROUPED, ON_GPU, PATHS, TOLERANCE, cover, covered, kernel, layout_of, op, operands

from moe_compile import ir
from moe_compile.ir import scalar as act
from moe_compile.lowering.reference import dual, generic
from moe_compile.lowering.triton import activation, combine, experts
from moe_compile.lowering.triton import call as call_of

G, U = act.G, act.U
SIZES = (6, 96, 80) if ON_GPU else (4, 20, 18)
BY_PATH = pytest.mark.parametrize("path", PATHS)
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# every pair of properties in the interpreter, every triple on a GPU
COVER = [c for dtype in DTYPES for c in covered(3 if ON_GPU and dtype is torch.bfloat16 else 2, SIZES, dtype)]
GATED = {
    "swiglu": act.SWIGLU,
    "up first": act.silu(U) * G,
    "geglu": act.gelu(G) * U,
    "geglu tanh": act.gelu_tanh(G) * U,
    "reglu": act.relu(G) * U,
    "glu": act.sigmoid(G) * U,
    "gpt-oss": GPT_OSS,
    "clamped swiglu": act.silu(act.clamp(G, -sp.oo, 2)) * act.clamp(U, -2, 2),
    "softplus gate": act.softplus(G) * U,
    "tanh of the sum": sp.tanh(G + U),
    "exp of minus |g|": sp.exp(-sp.Abs(G)) * U,
    "root of softplus": sp.sqrt(act.softplus(G)) * U,
    "inverse": U / (1 + G**2),
    "second only": act.silu(U),
    "log1p of relu": act.log1p(act.relu(G)) * U,
}
ALONE = {
    "relu squared": act.relu(G) ** 2,
    "silu": act.silu(G),
    "gelu": act.gelu(G),
    "gelu tanh": act.gelu_tanh(G),
    "softplus": act.softplus(G),
    "log": sp.log(1 + act.relu(G)),
    "power 3/2": (1 + G**2) ** sp.Rational(3, 2),
    "exp2": act.exp2(act.clamp(G, -8, 8)),
    "identity": G,
    "expm1": act.expm1(act.clamp(G, -8, 2)),
}


def check(case: Case, path: str, t: dict[str, Any] | None = None) -> Tensor:
    t = operands(case) if t is None else t
    out, _ = kernel(case, t, PATHS[path])
    assert out.dtype == case.dtype and out.is_contiguous()
    close(out, case.experts.evaluate(**t), TOLERANCE[case.dtype])
    return out


def simple(form: ir.Form = ir.Form.CONCAT, activation: Any = act.SWIGLU, **kw: Any) -> ir.Experts:
    experts_, hidden, inter = SIZES
    return ir.Experts(experts_, hidden, inter, kw.pop("out_features", hidden), form, activation, **kw)


# ---- layouts -----------------------------------------------------------------------------------------------------


def test_the_cover_holds_every_pair() -> None:
    rows = cover(FACTORS, 2)
    assert len(rows) < 24
    for a in FACTORS:
        for b in FACTORS:
            if a != b:
                assert {(r[a], r[b]) for r in rows} == {(x, y) for x in FACTORS[a] for y in FACTORS[b]}


@BY_PATH
@pytest.mark.parametrize("case", COVER, ids=lambda c: f"{c.name} {c.dtype}")
def test_layouts(case: Case, path: str) -> None:
    check(case, path)


@BY_PATH
@pytest.mark.parametrize("name", ["wider output", "one token", "k=1", "int32 ids", "odd sizes", "interleaved transposed biased"])
def test_named_cases(name: str, path: str) -> None:
    """Of the catalogue of the ops, what the cover leaves out."""
    check(next(c for c in CASES if c.name == name), path)


@pytest.mark.parametrize("case", covered(2, SIZES)[::3], ids=lambda c: c.name)
def test_saved_preactivations(case: Case) -> None:
    """In the order that the backward pass reads; the result is that of the saved values."""
    t = operands(case)
    out, pre = kernel(case, t, GROUPED, save=True)
    _, want = generic.forward(*bundle(t), layout_of(case))
    rows = int(((t["ids"] >= 0) & (t["ids"] < case.experts.num_experts)).sum())
    assert pre.shape == want.shape
    close(pre[:rows], want[:rows], TOLERANCE[case.dtype])
    close(out, case.experts.evaluate(**t), TOLERANCE[case.dtype])


def test_nothing_is_saved_without_need() -> None:
    case = Case("plain", simple())
    assert kernel(case, operands(case), GROUPED)[1].shape == (0, 2 * SIZES[2])


def test_persistent_programs_walk_several_tiles() -> None:
    """Fewer programs than tiles, row tiles in groups, with a last group that is not full."""
    case = Case("many", simple(), tokens=60 if not ON_GPU else 900, k=2)
    tile = replace(GROUPED.up, per_sm=1, group=4)
    t = operands(case)
    out, _ = kernel(case, t, replace(GROUPED, up=tile, down=replace(tile, group=3)))
    assert torch.equal(out, kernel(case, t, GROUPED)[0])
    close(out, case.experts.evaluate(**t), TOLERANCE[case.dtype])


# ---- routings ----------------------------------------------------------------------------------------------------

ROUTINGS: dict[str, Any] = {
    "all to one expert": lambda e: torch.full((17, 2), 3),
    "only expert 0": lambda e: torch.zeros(17, 1, dtype=torch.long),
    "only the last expert": lambda e: torch.full((3, 2), e - 1),
    "empty experts": lambda e: torch.tensor([[0, 3]] * 7),
    "one token": lambda e: torch.tensor([[2, 0]]),
    "duplicates": lambda e: torch.tensor([[2, 2], [1, 2], [2, 1]]),
    "no expert": lambda e: torch.full((4, 2), -1),
    "some without expert": lambda e: torch.tensor([[-1, 1], [e, 2], [-5, -1], [0, e + 7]]),
    "beyond 32 bits": lambda e: torch.tensor([[2**32, 1], [-(2**40), 0]]),
    "no tokens": lambda e: torch.zeros(0, 2, dtype=torch.long),
    "more slots than experts": lambda e: torch.arange(10)[None].expand(2, 10) % e,
}


@BY_PATH
@pytest.mark.parametrize("name", ROUTINGS)
def test_routings(name: str, path: str) -> None:
    ids = ROUTINGS[name](SIZES[0]).to(DEVICE)
    case = Case(name, simple(down_bias=True), *ids.shape, add=True)
    t = {**operands(case), "ids": ids}
    out = check(case, path, t)
    without = ((ids < 0) | (ids >= SIZES[0])).all(1)
    assert torch.equal(out[without], t["add"][without])


@BY_PATH
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_values_stay_with_their_token(value: float, path: str) -> None:
    """In a token, in an unused expert's matrix, and in the routing weight of a slot without expert."""
    case = Case("plain", simple(), tokens=6)
    t = operands(case)
    t["ids"] = torch.tensor([[0, 1], [1, 2], [2, 0], [0, -1], [1, 1], [-1, -1]], device=DEVICE)
    clean, _ = kernel(case, t, PATHS[path])
    x, weights, up = t["x"].clone(), t["weights"].clone(), t["up"][0].clone()
    x[1, 3] = value
    weights[5] = value
    up[3] = value
    out, _ = kernel(case, {**t, "x": x, "weights": weights, "up": [up]}, PATHS[path])
    others = [0, 2, 3, 4, 5]
    assert not out[1].isfinite().any() and torch.equal(out[others], clean[others])


# ---- strides and dtypes ------------------------------------------------------------------------------------------


def padded(t: Tensor, before: int = 3, behind: int = 5) -> Tensor:
    """The same values as a range of columns of a wider tensor: neither packed nor aligned."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + before + behind), math.nan)
    wide[..., before : before + t.shape[-1]] = t
    return wide[..., before : before + t.shape[-1]]


def turned(t: Tensor) -> Tensor:
    """The same values with the last two dimensions stored the other way round."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@BY_PATH
@pytest.mark.parametrize("form", ir.Form, ids=lambda f: f.name.lower())
def test_strides(form: ir.Form, path: str) -> None:
    """Every operand as a part of something larger."""
    case = Case("strided", simple(form, act.silu(G) if form is ir.Form.SINGLE else act.SWIGLU, up_bias=True, down_bias=True), 7, add=True)
    t = operands(case)
    want = check(case, path, t)
    for change in (padded, turned):
        moved = {n: [change(i) for i in v] if isinstance(v, list) else change(v) for n, v in t.items() if n != "ids"}
        assert all(not v.is_contiguous() for n, v in moved.items() if not isinstance(v, list))
        got = check(case, path, {**t, **moved})
        close(got, want, TOLERANCE[case.dtype])


@BY_PATH
def test_rows_that_are_one_row(path: str) -> None:
    """Expanded tokens, addend, ids, and one matrix that is every expert's."""
    case = Case("expanded", simple(), tokens=5, add=True)
    t = operands(case)
    t |= {n: t[n][:1].expand_as(t[n]) for n in ("x", "add")}
    t["ids"] = t["ids"][:1].expand(5, 2)
    t["up"] = [t["up"][0][1:2].expand_as(t["up"][0])]
    check(case, path, t)


@BY_PATH
def test_lists_of_slices(path: str) -> None:
    """One matrix per expert, each a slice of its own, far from the others."""
    case = Case("list", simple(ir.Form.SEPARATE, stacked=False, down_transposed=True), tokens=5)
    t = operands(case)
    check(case, path, {**t, "up": [padded(u) for u in t["up"]], "down": [turned(d) for d in t["down"]]})


@BY_DTYPE
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["fp32 weights", "their own"])
def test_routing_weights_keep_their_dtype(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    case = Case("weights", simple(dtype=dtype), tokens=5, dtype=dtype)
    t = operands(case)
    for path in PATHS:
        check(case, path, {**t, "weights": t["weights"].to(weight_dtype or dtype)})


def test_beyond_the_kernels() -> None:
    """float64, mixed dtypes and matrices without a contiguous dimension run, as plain torch."""
    base = Case("plain", simple(), tokens=5)
    t = operands(base)
    strided = [torch.stack([m, m], -1)[..., 0] for m in t["up"]]
    for case, changed in (
        (replace(base, dtype=torch.float64), operands(replace(base, dtype=torch.float64))),
        (base, {**t, "up": [u.half() for u in t["up"]]}),
        (base, {**t, "up": strided}),
    ):
        assert call_of.read(*bundle(changed), layout_of(case)) is None
        out, _ = experts.forward(*bundle(changed), layout_of(case), False)
        close(out, case.experts.evaluate(**changed), TOLERANCE[case.dtype])


def test_too_few_experts_are_refused() -> None:
    case = Case("plain", simple(), tokens=5)
    t = operands(case)
    with pytest.raises(ValueError, match="fewer experts"):
        experts.forward(*bundle({**t, "down": [t["down"][0][:-1]]}), layout_of(case), False)


def test_tf32_only_where_torch_may() -> None:
    """By either of torch's switches; the older one cannot be read once the newer was used."""
    matmul = torch.backends.cuda.matmul
    try:
        for switch, off, on in (("allow_tf32", False, True), ("fp32_precision", "ieee", "tf32")):
            setattr(matmul, switch, off)
            assert experts.precision(torch.float32) == "ieee"
            setattr(matmul, switch, on)
            assert experts.precision(torch.float32) == "tf32" and experts.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.allow_tf32 = False


@pytest.mark.skipif(not ON_GPU, reason="the op's kernels are those of the device")
def test_the_op_is_the_kernels() -> None:
    for case in covered(2, SIZES)[:4]:
        t = operands(case)
        close(op(case, t), case.experts.evaluate(**t), TOLERANCE[case.dtype])


# ---- combine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 64, 1500])
def test_combine(width: int) -> None:
    """out = add + Σ w y over slots of real experts; y of other slots is never read."""
    tokens, k = 5, 3
    gen = torch.Generator().manual_seed(0)
    y, x, add = (torch.randn(n, width, generator=gen).to(DEVICE) for n in (tokens * k, tokens, tokens))
    w = torch.rand(tokens, k, generator=gen).to(DEVICE)
    ids = torch.tensor([[0, 1, 2], [-1, 3, 4], [5, 6, 0], [-1, -1, -1], [2, 2, 2]], device=DEVICE)
    known, same = (ids >= 0) & (ids < 4), (ids >= 4) & (ids < 6)
    y[~known.reshape(-1)] = math.nan
    for weighted in (True, False):
        scale = w if weighted else torch.ones_like(w)
        routed = (torch.nan_to_num(y).view(tokens, k, width) * (scale * known)[..., None]).sum(1)
        want = add + routed + x * (w * same).sum(1, keepdim=True)
        close(combine.combine(y, ids, w, x, add, torch.empty_like(x), 4, 2, weighted), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [2, 3])
def test_combine_of_parts(parts: int, dtype: torch.dtype) -> None:
    """out = add + Σ_j w Σ_p y_p over sorted rows, weights in y or not; rows of no expert are not read in any part."""
    tokens, k, width = 5, 3, 70
    gen = torch.Generator().manual_seed(0)
    y = torch.randn(parts, tokens * k, width, generator=gen).to(DEVICE, dtype)
    x, add = (torch.randn(tokens, width, generator=gen).to(DEVICE, dtype) for _ in range(2))
    w = torch.rand(tokens, k, generator=gen).to(DEVICE)
    ids = torch.tensor([[0, 1, 2], [-1, 3, 4], [5, 6, 0], [-1, -1, -1], [2, 2, 2]], device=DEVICE)
    rank = torch.randperm(tokens * k, generator=gen).to(DEVICE)
    known, same = (ids >= 0) & (ids < 4), (ids >= 4) & (ids < 6)
    y[:, rank[~known.reshape(-1)]] = math.nan
    for weighted in (True, False):
        scale = ((w if weighted else torch.ones_like(w)) * known).double()
        routed = (torch.nan_to_num(y.double().sum(0)[rank]).view(tokens, k, width) * scale[..., None]).sum(1)
        want = add + routed + x * (w * same).double().sum(1, keepdim=True)
        runs = [combine.combine(y.view(-1, width), ids, w, x, add, torch.empty_like(x), 4, 2, weighted, rank=rank.int()) for _ in range(2)]
        close(runs[0], want, TOLERANCE[dtype])
        assert torch.equal(*runs)


# ---- activations -------------------------------------------------------------------------------------------------


@triton.jit
def _pointwise(g, u, value, dg, du, n, ACT: tl.constexpr, DUAL: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    x, y = tl.load(g + at, mask=at < n, other=0.0), tl.load(u + at, mask=at < n, other=0.0)
    v, a, b = DUAL(x, y)
    tl.store(dg + at, a, mask=at < n)
    tl.store(du + at, b, mask=at < n)
    tl.store(value + at, ACT(x, y), mask=at < n)
    tl.store(value + n + at, v, mask=at < n)


@pytest.mark.parametrize("name", {**GATED, **ALONE})
def test_generated_functions(name: str) -> None:
    """act and dual, pointwise, at small, large and special arguments."""
    program = act.encode({**GATED, **ALONE}[name])
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 7.0, -7.0, 1e-4, -1e-4, 20.0, -20.0])
    g = torch.cat([torch.randn(100, generator=torch.Generator().manual_seed(0)) * 3, special, special]).to(DEVICE)
    u = torch.cat([torch.randn(100, generator=torch.Generator().manual_seed(1)) * 3, special, special.flip(0)]).to(DEVICE)
    value, dg, du = g.new_empty(2, len(g)), torch.empty_like(g), torch.empty_like(g)
    fns = activation.functions(*program)
    _pointwise[(1,)](g, u, value, dg, du, len(g), ACT=fns.act, DUAL=fns.dual, SIZE=128)
    want = dual.run_dual(*program, g.double(), u.double())
    zero = torch.zeros_like(want[0])
    wanted = [zero if w is None else w for w in want]
    for got, expected in zip((value[0], value[1], dg, du), (want[0], *wanted), strict=True):
        # exp of an argument of 20 that is rounded to fp32 is off by 2e-6
        torch.testing.assert_close(got.double(), expected, rtol=5e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("name", {**GATED, **ALONE})
def test_activations_in_the_kernels(name: str) -> None:
    form = ir.Form.SINGLE if name in ALONE else ir.Form.INTERLEAVED if name == "gpt-oss" else ir.Form.CONCAT
    case = Case(name, simple(form, {**GATED, **ALONE}[name], up_bias=True), tokens=3)
    for path in PATHS if ON_GPU or name in ("gpt-oss", "softplus") else ["grouped"]:
        check(case, path)
