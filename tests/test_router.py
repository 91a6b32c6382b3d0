"""The router's product inside the routing op, for a few tokens: where it goes there, that it is right, and where it stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.library import opcheck

import moe_compile
from moe_compile import backend, ir, ops
from moe_compile.lowering import target
from moe_compile.passes.rewrite import router

pytest.importorskip("triton")
E, H, K = 6, 16, 2


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A softmax router of one linear map and experts of one matrix each."""

    def __init__(self, dtype: torch.dtype = torch.float32, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(H, E, bias=bias, dtype=dtype)
        self.up = nn.Parameter(torch.randn(E, 2 * H, H, dtype=dtype) / 4)
        self.down = nn.Parameter(torch.randn(E, H, H, dtype=dtype) / 4)

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(x)

    def forward(self, hidden: Tensor) -> Any:
        x = hidden.reshape(-1, H)
        weights, ids = torch.topk(self.logits(x).softmax(-1, dtype=torch.float32), K)
        return self.experts(x, weights, ids).reshape(hidden.shape)

    def experts(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            g, u = F.linear(x, self.up[e]).chunk(2, -1)
            share = torch.where(ids == e, weights, 0).sum(-1, keepdim=True).to(x.dtype)
            out = out + F.linear(F.silu(g) * u, self.down[e]) * share
        return out


class Cast(Block):
    """The logits go on in fp32."""

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(x).float()


class Full(Block):
    """Product in fp32 of a matrix in another dtype."""

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.gate.weight.float())


class Stacked(Block):
    """Logits in three dimensions, flattened behind the product."""

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(x.unsqueeze(0)).view(-1, E)


class TwoLayers(Block):
    """Near miss: a bend between the last product and the logits is part of no product; the product below it stays."""

    def logits(self, x: Tensor) -> Tensor:
        return torch.tanh(self.gate(x))


class Bare(Block):
    """The product as a matrix product, weights transposed by hand: not read."""

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.gate.weight.t()


class Changed(Block):
    """The matrix is written right before the product."""

    def logits(self, x: Tensor) -> Tensor:
        self.gate.weight.mul_(1.5)
        return self.gate(x)


class Halves(Block):
    """Near miss: the product has twice the experts' columns, a row of it is two rows of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(2 * E, H))

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x[::2], self.wide).view(-1, E)


class OneBias(Block):
    """Near miss: a bias for all experts alike."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(1))

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gate.weight, self.one)


class Read(Block):
    """Near miss: the logits are a result as well."""

    def forward(self, hidden: Tensor) -> Any:
        return super().forward(hidden), self.kept

    def logits(self, x: Tensor) -> Tensor:
        self.kept = self.gate(x)
        return self.kept


def graphs_of(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, grad: bool = False, autocast: bool = False, **options: Any
) -> tuple[Any, list[torch.fx.GraphModule]]:
    """(result, graphs) of a model compiled for CUDA whose tensors are on the CPU and whose inner compiler is none."""
    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(backend, "compile_with", lambda o, m, t, gm, inputs: (graphs.append(gm), gm)[1])
    compiled = torch.compile(model, backend="moe_fused", dynamic=False, options={"target": "cuda", **options})
    with nullcontext() if grad else torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = compiled(x)
    report = moe_compile.last_report()
    assert report is not None and len(report.blocks) == 1, report
    return out, graphs


def taken(graphs: list[torch.fx.GraphModule]) -> bool:
    """Whether the product is in the routing op; else the routing must be there without it."""
    targets = [n.target for g in graphs for n in g.graph.nodes]
    ops = torch.ops.moe_compile
    assert targets.count(ops.route.default) + targets.count(ops.route_linear.default) == 1
    return ops.route_linear.default in targets


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [Block, Cast, Stacked, Full, Changed])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_few_tokens(kind: type[Block], dtype: torch.dtype, bias: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to eight tokens: the product is in the op, and the result is the module's own."""
    model = kind(dtype, bias)
    x = torch.randn(1, tokens, H, dtype=dtype)
    with torch.no_grad():
        want = copy.deepcopy(model)(x).double()
    got, graphs = graphs_of(model, x, monkeypatch)
    assert taken(graphs)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert float((got.double() - want).norm()) <= tolerance * float(want.norm())


STAYS: list[tuple[str, type[Block], dict[str, Any]]] = [
    ("nine tokens", Block, {"tokens": 9}),
    ("a gradient may be wanted", Block, {"grad": True}),
    ("autocast chooses the product's dtype", Block, {"autocast": True}),
    ("for the CPU", Block, {"target": "cpu"}),
    ("logits read elsewhere", Read, {}),
    ("a bend behind the product", TwoLayers, {}),
    ("no linear map by name", Bare, {}),
    ("half of the product's columns a row", Halves, {}),
    ("bias of one element", OneBias, {}),
]


@pytest.mark.parametrize(("why", "kind", "options"), STAYS, ids=[s[0] for s in STAYS])
def test_stays(why: str, kind: type[Block], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Near misses: the product stays as the user wrote it, and the result is right."""
    x = torch.randn(1, options.pop("tokens", 2), H)
    model = kind()
    with torch.no_grad():
        want = copy.deepcopy(model)(x)
    got, graphs = graphs_of(model, x, monkeypatch, **options)
    assert not taken(graphs), why
    got, want = (v[0] if isinstance(v, tuple) else v for v in (got, want))
    assert float((got - want).detach().norm()) <= 2e-2 * float(want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_in_float32_read_the_operands_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """x and W that are made float32 for the product: the op has them as they were, and says that the logits are float32."""
    _, graphs = graphs_of(Full(dtype), torch.randn(1, 2, H, dtype=dtype), monkeypatch)
    (node,) = [n for g in graphs for n in g.graph.nodes if n.target is torch.ops.moe_compile.route_linear.default]
    assert node.args[-1] is (dtype != torch.float32)
    assert {n.meta["example_value"].dtype for n in node.args[:2]} == {dtype}


class Mixed(Block):
    """Near miss: only the tokens are made wider."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(E, H))

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.wide)


class Rewritten(Block):
    """Near miss: the matrix is written after it was made float32."""

    def logits(self, x: Tensor) -> Tensor:
        w = self.gate.weight.float()
        self.gate.weight.mul_(3.0)
        return F.linear(x.float(), w)


@pytest.mark.parametrize("kind", [Mixed, Rewritten])
def test_products_in_float32_of_what_was_made_for_them(kind: type[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is in the op, of the operands that the user gave it."""
    model = kind().to(torch.bfloat16)
    if isinstance(model, Mixed):
        model.wide.data = model.wide.data.float()
    x = torch.randn(1, 2, H, dtype=torch.bfloat16)
    with torch.no_grad():
        want = copy.deepcopy(model)(x).double()
    got, graphs = graphs_of(model, x, monkeypatch)
    (node,) = [n for g in graphs for n in g.graph.nodes if n.target is torch.ops.moe_compile.route_linear.default]
    assert node.args[-1] is False
    assert float((got.double() - want).norm()) <= 2e-2 * float(want.norm())


class Gated(Block):
    """A shared expert behind a gate of one linear map."""

    def __init__(self, rows: int = 1) -> None:
        super().__init__()
        self.one, self.first, self.second = nn.Linear(H, rows, bias=False), nn.Linear(H, 2 * H, bias=False), nn.Linear(H, H, bias=False)

    def forward(self, hidden: Tensor) -> Any:
        x = hidden.reshape(-1, H)
        g, u = self.first(x).chunk(2, -1)
        return super().forward(hidden) + (torch.sigmoid(self.one(x)) * self.second(F.silu(g) * u)).view_as(hidden)


@pytest.mark.parametrize(("rows", "tokens", "yes"), [(1, 2, True), (1, 9, False), (H, 2, False)])
def test_gates_become_sums(rows: int, tokens: int, yes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate of few tokens, one number each, is no product of a library's; near misses: many tokens, a gate of every column."""
    model, x = Gated(rows), torch.randn(1, tokens, H)
    with torch.no_grad():
        want = model(x)
    got, graphs = graphs_of(model, x, monkeypatch)
    products = [n for g in graphs for n in g.graph.nodes if n.target in router._LINEAR]
    assert any(router.example_value(n).shape[-1] == rows for n in products) is not yes
    torch.testing.assert_close(got, want)


def test_unknown_number_of_tokens_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near miss: a graph for any number of tokens."""
    seen: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(backend, "compile_with", lambda o, m, t, gm, inputs: (seen.append(gm), gm)[1])
    x = torch.randn(1, 5, H)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        torch.compile(Block(), backend="moe_fused", options={"target": "cuda"})(x)
    assert not taken(seen)


def routed(between: Callable[[Tensor, Tensor], Tensor]) -> torch.fx.GraphModule:
    """A graph of a product, something between and a routing."""
    plain = operands()[5:]

    def forward(x: Tensor, w: Tensor) -> Any:
        return torch.ops.moe_compile.route(between(F.linear(x, w), x), None, None, *plain)

    gm: torch.fx.GraphModule = torch.fx.symbolic_trace(forward)
    FakeTensorProp(gm).propagate(torch.randn(2, H), torch.randn(E, H))
    for n in gm.graph.nodes:
        if n.target is torch.ops.moe_compile.route:
            n.target = torch.ops.moe_compile.route.default
    return gm


@pytest.mark.parametrize(
    ("why", "between", "yes"),
    [
        ("nothing", lambda y, x: y, True),
        ("wider", lambda y, x: y.to(torch.float64), True),
        ("rows in another shape and back", lambda y, x: y.unsqueeze(0).view(-1, E), True),
        ("two rows of one", lambda y, x: y.reshape(1, 2 * E), False),
        ("rounded", lambda y, x: y.to(torch.bfloat16), False),
        ("rounded and widened", lambda y, x: y.to(torch.bfloat16).float(), False),
        ("tokens overwritten", lambda y, x: (x.mul_(2.0), y)[1], False),
        ("tokens overwritten by a flag", lambda y, x: (torch.nn.functional.relu(x, True), y)[1], False),
        ("logits of overwritten tokens", lambda y, x: torch.add(y, 0.0 * x.mul_(2.0).sum()), False),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_between(why: str, between: Any, yes: bool) -> None:
    """What may stand between the product and the routing."""
    gm = routed(between)
    x, w = torch.randn(2, H), torch.randn(E, H)
    want = copy.deepcopy(gm)(x.clone(), w)
    with torch.no_grad():
        assert router.take_products(gm, target("cuda")) == yes
        got = gm(x.clone(), w)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# ---- the op ------------------------------------------------------------------------------------------------------


def operands(dtype: torch.dtype = torch.float32, tokens: int = 3, bias: bool = True) -> list[Any]:
    torch.manual_seed(1)
    gating = ir.Gating(E, K, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, norm=ir.Normaliser(ir.Norm.SUM))
    tensors = [torch.randn(tokens, H, dtype=dtype), torch.randn(E, H, dtype=dtype), torch.randn(E, dtype=dtype) if bias else None]
    return [*tensors, torch.randn(E), None, *ops.route_args(gating)]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_contract(bias: bool) -> None:
    opcheck(torch.ops.moe_compile.route_linear.default, tuple(operands(bias=bias)))


def test_gradient_by_the_parts() -> None:
    """Where a gradient is asked for the op is a product and `route`."""
    args = operands()
    for t in args[:3]:
        t.requires_grad_()
    weights, ids = torch.ops.moe_compile.route_linear(*args)
    got = torch.autograd.grad(weights.sum() * 2 + weights[0, 0], args[:3])
    again, same = torch.ops.moe_compile.route(F.linear(*args[:3]), *args[3:])
    want = torch.autograd.grad(again.sum() * 2 + again[0, 0], args[:3])
    assert torch.equal(ids, same)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
