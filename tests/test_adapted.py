"""Experts with low-rank pairs: the op `experts_adapted` is the oracle, so are its gradients, and a frozen weight gets none."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck

import moe_compile
from moe_compile import ir, ops
from moe_compile.ir import Form
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import ADAPTED, Operands

E, H, I, T, K = 5, 12, 8, 11, 2
RANKS = {"up": (3, 2), "down": (4,)}
BOTH = ir.Experts(E, H, I, H, Form.SEPARATE, act.SWIGLU, stacked=False, up_pair=2.0, second_pair=0.5, down_pair=-1.5)
MEANINGS = {
    "list": BOTH,
    "stacked": replace(BOTH, stacked=True, up_bias=True, down_bias=True),
    "second only": replace(BOTH, up_pair=0.0, down_pair=0.0),
    "down only": replace(BOTH, up_pair=0.0, second_pair=0.0),
    "concat": replace(BOTH, form=Form.CONCAT, stacked=True, second_pair=0.0, up_transposed=True, down_transposed=True),
    "interleaved": replace(BOTH, form=Form.INTERLEAVED, stacked=True, second_pair=0.0, up_bias=True),
    "single": replace(BOTH, form=Form.SINGLE, activation=act.relu(act.G) ** 2, second_pair=0.0),
    "weight on input": replace(BOTH, stacked=True, weight_on_input=True, down_bias=True),
    "identity experts": replace(BOTH, stacked=True, num_identity=2),
}
BY_NAME = pytest.mark.parametrize("name", MEANINGS)


def tensors(e: ir.Experts, dtype: torch.dtype = torch.float64, pairs: torch.dtype | None = None) -> dict[str, Any]:
    """Operands of a call, in the order of the op's schema."""
    gen = torch.Generator().manual_seed(0)

    def group(parts: int, *shape: int, of: torch.dtype = dtype) -> list[Tensor]:
        t = (torch.randn(parts * E, *shape, generator=gen, dtype=torch.float64) * shape[-1] ** -0.5).to(of)
        return list(t.chunk(parts)) if e.stacked else [m.clone() for m in t]

    parts = 2 if e.form is Form.SEPARATE else 1
    rows = I * (2 if e.form in (Form.CONCAT, Form.INTERLEAVED) else 1)
    low = pairs or dtype
    ranks = [r for r, s in zip(RANKS["up"], (e.up_pair, e.second_pair), strict=True) if s]
    (down,) = RANKS["down"]
    return {
        "x": torch.randn(T, H, generator=gen, dtype=torch.float64).to(dtype),
        "ids": torch.randint(-1, E + e.num_identity + 1, (T, K), generator=gen),
        "weights": torch.rand(T, K, generator=gen, dtype=torch.float64),
        "up": group(parts, *((H, rows) if e.up_transposed else (rows, H))),
        "down": group(1, *((I, H) if e.down_transposed else (H, I))),
        "up_bias": group(parts, rows) if e.up_bias else [],
        "down_bias": group(1, H) if e.down_bias else [],
        "up_a": [t for r in ranks for t in group(1, r, H, of=low)],
        "up_b": [t for r in ranks for t in group(1, rows, r, of=low)],
        "down_a": group(1, down, I, of=low) if e.down_pair else [],
        "down_b": group(1, H, down, of=low) if e.down_pair else [],
        "add": None,
    }


def call(e: ir.Experts, t: dict[str, Any]) -> Tensor:
    return torch.ops.moe_compile.experts_adapted(*t.values(), *ops.experts_args(e))


def leaves(t: dict[str, Any]) -> list[Tensor]:
    flat = [x for v in t.values() if v is not None for x in (v if isinstance(v, list) else [v])]
    return [x for x in flat if x.is_floating_point()]


@BY_NAME
def test_the_op_is_the_oracle_and_so_are_its_gradients(name: str) -> None:
    e = MEANINGS[name]
    t = tensors(e)
    for x in leaves(t):
        x.requires_grad_()
    got, want = call(e, t), e.evaluate(**t)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(y, leaves(t), grad, allow_unused=True, materialize_grads=True) for y in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["list", "concat"])
def test_merged_weights_are_the_same_function(name: str) -> None:
    """W + s b a, as an adapter is merged."""
    e = MEANINGS[name]
    t = tensors(e)
    p = Operands.named(**{n: t[n] for n in ADAPTED})
    ups = [s for s in (e.up_pair, e.second_pair) if s]

    def merged(weights: Any, a: Any, b: Any, scales: list[float], transposed: bool) -> list[Tensor]:
        each = len(weights) // len(scales)
        deltas = [scales[i // each] * (high @ low) for i, (low, high) in enumerate(zip(a, b, strict=True))]
        return [w + (d.mT if transposed else d) for w, d in zip(weights, deltas, strict=True)]

    plain = replace(e, up_pair=0.0, second_pair=0.0, down_pair=0.0)
    up = merged(p.up, p.up_a, p.up_b, ups, e.up_transposed)
    down = merged(p.down, p.down_a, p.down_b, [e.down_pair], e.down_transposed)
    want = plain.evaluate(t["x"], t["ids"], t["weights"], up, down)
    torch.testing.assert_close(call(e, t), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["list", "stacked", "concat"])
def test_frozen_weights_get_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is asked for is computed: of a frozen base neither a gradient nor room for one."""
    e = MEANINGS[name]
    t = tensors(e)
    adapters = [x for n in ADAPTED[4:] for x in t[n]]
    for x in adapters:
        x.requires_grad_()
    asked: list[int] = []
    run = ops.gradients.below
    monkeypatch.setattr(ops.gradients, "below", lambda op, *a: (asked.append(sum(a[-1])) if op.endswith("_bwd") else None, run(op, *a))[1])
    call(e, t).sum().backward()
    assert asked == [len(adapters)] and all(x.grad is not None for x in adapters)
    assert all(w.grad is None for n in ("up", "down") for w in t[n])


@BY_NAME
def test_the_op_keeps_its_contract(name: str) -> None:
    e = MEANINGS[name]
    t = tensors(e, torch.float32)
    t["weights"] = t["weights"].float()
    opcheck(torch.ops.moe_compile.experts_adapted.default, (*t.values(), *ops.experts_args(e)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pairs_of_a_wider_type(dtype: torch.dtype) -> None:
    """Adapters in float32 beside narrow weights, as peft keeps them: no worse than 1.25 times eager's error."""
    e = replace(MEANINGS["list"], dtype=dtype)
    t = tensors(e, dtype, torch.float32)
    t["weights"] = t["weights"].float()
    exact = e.evaluate(**t)

    def project(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        return (F.linear(x, w) + (x.float() @ a.t() @ b.t()) * s).to(x.dtype)

    eager = torch.zeros_like(t["x"])
    for i in range(E):
        tok, pos = torch.where(t["ids"] == i)
        x, n = t["x"][tok], E + i
        g = project(x, t["up"][i], t["up_a"][i], t["up_b"][i], e.up_pair)
        u = project(x, t["up"][n], t["up_a"][n], t["up_b"][n], e.second_pair)
        y = project(F.silu(g) * u, t["down"][i], t["down_a"][i], t["down_b"][i], e.down_pair)
        eager.index_add_(0, tok, (y * t["weights"][tok, pos, None]).to(dtype))

    def error(y: Tensor) -> float:
        return float((y.double() - exact).norm())

    assert error(call(e, t)) <= 1.25 * error(eager)


def test_gradients_of_gradients() -> None:
    e = MEANINGS["list"]
    t = tensors(e)
    x, a = t["x"].requires_grad_(), t["down_a"][0].requires_grad_()

    def penalty(f: Any) -> list[Tensor]:
        (g,) = torch.autograd.grad(f.square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), [x, a]))

    for got, want in zip(penalty(call(e, t)), penalty(e.evaluate(**t)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class Adapter(nn.Module):
    """A frozen Linear with an adapter, dropout in front of it."""

    def __init__(self, size: int, out: int, dropout: float) -> None:
        super().__init__()
        self.base, self.dropout = nn.Linear(size, out, bias=False).requires_grad_(False), nn.Dropout(dropout)
        self.low, self.high = nn.Linear(size, 3, bias=False), nn.Linear(3, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.high(self.low(self.dropout(x))) * 2.0


class Loop(nn.Module):
    """A ModuleList of experts whose Linears have adapters."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        named = {"g": (H, I), "u": (H, I), "d": (I, H)}
        self.experts = nn.ModuleList(nn.ModuleDict({n: Adapter(*s, dropout) for n, s in named.items()}) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e, m in enumerate(self.experts):
            tok, pos = torch.where(ids == e)
            out.index_add_(0, tok, m["d"](F.silu(m["g"](x[tok])) * m["u"](x[tok])) * w[tok, pos, None])
        return out


def test_a_training_step_of_adapted_experts() -> None:
    """Fused whole, values and gradients of eager, and none for the frozen weights."""
    torch.manual_seed(0)
    model, x = Loop(), torch.randn(10, H)
    twin = copy.deepcopy(model)
    out = torch.compile(model, backend="moe_fused", options={"inner": "aot_eager"})(x)
    (block,) = moe_compile.last_report().blocks
    assert "low-rank pairs (up, down)" in block.experts
    torch.testing.assert_close(out, twin(x), rtol=1e-5, atol=1e-6)
    for y in (out, twin(x)):
        y.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == name.endswith("base.weight"), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


class Second(Adapter):
    """A second adapter, of another rank and scale."""

    def __init__(self, size: int, out: int, dropout: float) -> None:
        super().__init__(size, out, dropout)
        self.low2, self.high2 = nn.Linear(size, 5, bias=False), nn.Linear(5, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.high2(self.low2(x)) * 0.75


def two(model: Loop) -> None:
    for m in model.experts:
        for name, x in m.items():
            m[name] = Second(x.base.in_features, x.base.out_features, 0.0)


def one_base(model: Loop) -> None:
    for m in model.experts:
        for name, x in m.items():
            x.base = model.experts[0][name].base


def on_the_gate(model: Loop) -> None:
    model.gate = Adapter(H, E, 0.0)


@pytest.mark.parametrize("change", [two, one_base, on_the_gate], ids=lambda f: f.__name__)
def test_gradients_of_adapters_are_the_oracles(change: Any) -> None:
    """In float64: several adapters, one base for all experts, an adapter on the router beside. Nothing frozen gets a gradient."""
    torch.manual_seed(0)
    model = Loop()
    change(model)
    model, x = model.double(), torch.randn(10, H, dtype=torch.float64)
    for p in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(p, std=0.3)
    twin = copy.deepcopy(model)
    out, want = torch.compile(model, backend="moe_fused", options={"inner": "aot_eager", "strict": True})(x), twin(x)
    (block,) = moe_compile.last_report().blocks
    assert "low-rank pairs (up, down)" in block.experts and block.ir.gating is not None
    torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-12)
    for y in (out, want):
        y.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None) == name.endswith("base.weight"), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-9, atol=1e-11)


def test_a_base_of_all_experts_that_is_trained_is_left() -> None:
    """Its gradient would be made once for each expert."""
    torch.manual_seed(0)
    model = Loop()
    one_base(model)
    model.experts[0]["d"].base.requires_grad_(True)
    torch.compile(model, backend="moe_fused", options={"inner": "eager"})(torch.randn(10, H)).sum().backward()
    report = moe_compile.last_report()
    assert not report.blocks and any("one and the same" in r.reason for r in report.rejected), [r.reason for r in report.rejected]


@pytest.mark.parametrize("train", [False, True])
def test_dropout_inside_an_adapter(train: bool) -> None:
    """In training the adapter reads another input than its projection: left as written, and told. In evaluation dropout is nothing."""
    torch.manual_seed(0)
    model, x = Loop(0.5).train(train), torch.randn(10, H)
    torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
    report = moe_compile.last_report()
    assert len(report.blocks) == (not train)
    assert not train or any("dropout" in r.reason for r in report.rejected), [r.reason for r in report.rejected]
