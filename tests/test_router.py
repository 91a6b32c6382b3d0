"""The router's product for one token: where it becomes a sum that the inner compiler fuses, that it is right, and where it stays."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile import backend

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

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, H)
        weights, ids = torch.topk(self.logits(x).softmax(-1, dtype=torch.float32), K)
        out = torch.zeros_like(x)
        for e in range(E):
            g, u = F.linear(x, self.up[e]).chunk(2, -1)
            share = torch.where(ids == e, weights, 0).sum(-1, keepdim=True).to(x.dtype)
            out = out + F.linear(F.silu(g) * u, self.down[e]) * share
        return out.reshape(hidden.shape)


class Cast(Block):
    """The logits go on in fp32."""

    def logits(self, x: Tensor) -> Tensor:
        return self.gate(x).float()


class Full(Block):
    """Product in fp32 of parameters in another dtype."""

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


def graphs_of(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, grad: bool = False, autocast: bool = False, **options: Any
) -> tuple[Tensor, list[torch.fx.GraphModule]]:
    """(result, graphs) of a model compiled for CUDA whose tensors are on the CPU and whose inner compiler is none."""
    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(backend, "compile_with", lambda o, m, t, gm, inputs: (graphs.append(gm), gm)[1])
    compiled = torch.compile(model, backend="moe_fused", dynamic=False, options={"target": "cuda", **options})
    with nullcontext() if grad else torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = compiled(x)
    report = moe_compile.last_report()
    assert report is not None and len(report.blocks) == 1, report
    return out, graphs


def rewritten(graphs: list[torch.fx.GraphModule]) -> bool:
    """Whether the router's matrix goes into no product any more."""
    matrices = [n for g in graphs for n in g.graph.nodes if n.op == "placeholder" and "gate" in n.name and "weight" in n.name]
    assert matrices
    seen, todo = set(), list(matrices)
    while todo:
        n = todo.pop()
        seen.add(n)
        todo += [u for u in n.users if getattr(u.target, "__name__", u.target) in ("to", "float")]
    return not any("linear" in str(u.target) for n in seen for u in n.users)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [Block, Cast, Full, Stacked])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_one_token(kind: type[Block], dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token: a sum, whose result is the product's within the rounding of its dtype."""
    model = kind(dtype, bias)
    x = torch.randn(1, 1, H, dtype=dtype)
    got, graphs = graphs_of(model, x, monkeypatch)
    assert rewritten(graphs)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double()) if kind is not Full else model(x).double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert float((got.double() - want).norm()) <= tolerance * float(want.norm())


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_logits_are_rounded_once(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits themselves, against float64 rounded to bf16: what a product that adds up in fp32 gives."""
    model = Block(torch.bfloat16, bias)
    x = torch.randn(1, H, dtype=torch.bfloat16)
    _, graphs = graphs_of(model, x, monkeypatch)
    (route,) = [n for g in graphs for n in g.graph.nodes if n.target is torch.ops.moe_compile.route.default]
    graph = route.graph
    graph.output_node().args = ((route.args[0],),)
    graph.eliminate_dead_code()
    by_name = {"bias": model.gate.bias, "weight": model.gate.weight}
    names = [n.name for n in graph.nodes if n.op == "placeholder"]
    inputs = [next((v for k, v in by_name.items() if k in name), x if "hidden" in name else None) for name in names]
    with torch.no_grad():
        (logits,) = torch.fx.GraphModule({}, graph)(*inputs)
    want = F.linear(x.double(), model.gate.weight.double(), None if model.gate.bias is None else model.gate.bias.double())
    assert logits.dtype == torch.bfloat16 and logits.shape == (1, E)
    assert float((logits.double() - want).abs().max()) <= 2**-8 * float(want.abs().max())


@pytest.mark.parametrize(
    ("why", "tokens", "options"),
    [
        ("two tokens", 2, {}),
        ("a gradient may be wanted", 1, {"grad": True}),
        ("autocast chooses the product's dtype", 1, {"autocast": True}),
        ("for the CPU", 1, {"target": "cpu"}),
        ("the inner compiler fuses nothing", 1, {"inner": "eager"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_stays(why: str, tokens: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Near misses: the product stays as the user wrote it."""
    x = torch.randn(1, tokens, H)
    model = Block()
    got, graphs = graphs_of(model, x, monkeypatch, **options)
    assert not rewritten(graphs), why
    assert float((got - model(x)).norm()) <= 2e-2 * float(got.norm())


def test_unknown_number_of_tokens_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near miss: a graph for any number of tokens."""
    monkeypatch.setattr(backend, "compile_with", lambda o, m, t, gm, inputs: (seen.append(gm), gm)[1])
    seen: list[torch.fx.GraphModule] = []
    x = torch.randn(1, 5, H)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        torch.compile(Block(), backend="moe_fused", options={"target": "cuda"})(x)
    assert not rewritten(seen)


def test_only_the_last_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near miss: the logits are no product's values."""
    _, graphs = graphs_of(TwoLayers(), torch.randn(1, 1, H), monkeypatch)
    assert not rewritten(graphs)
