"""Of layers that are alike one is looked at: what counts as alike, and that `parallelize` finds what it finds in the whole model.

One process, in a group whose collectives do nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moe_compile
from moe_compile import kinds, parallel

E, K, H, I, T = 4, 2, 16, 16, 6


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    dist.destroy_process_group()


class Layer(nn.Module):
    def __init__(self, number: int, act: str = "silu", widths: int = I) -> None:
        super().__init__()
        self.number, self.act, self.gate = number, act, nn.Linear(H, E)
        self.up, self.down = nn.Parameter(torch.randn(E, widths, H)), nn.Parameter(torch.randn(E, H, widths))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        h = getattr(nn.functional, self.act)(torch.einsum("th,tkih->tki", x, self.up[ids]))
        return x + torch.einsum("tki,tkhi,tk->th", h, self.down[ids], w)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Net(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(H, H), nn.ModuleList(layers), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def places(m: nn.Module) -> list[list[int]]:
    return [[layer.place for layer in k.layers] for k in kinds.kinds(m)]


def test_alike_but_for_the_number_of_the_layer() -> None:
    assert places(Net(Dense(), Dense(), *map(Layer, (2, 3, 4)))) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(
    "other", [Layer(2, "relu"), Layer(7), Layer(2, widths=32), Layer(2).requires_grad_(False), Dense(), Layer(2).half()]
)
def test_layers_that_differ(other: nn.Module) -> None:
    """By a name, by a number that is not the layer's, in shape, in what is trained, in class, in dtype."""
    assert places(Net(Layer(0), Layer(1), other)) == [[0, 1], [2]]


def test_a_hook_makes_a_kind_and_an_empty_place_none() -> None:
    net = Net(*map(Layer, range(3)))
    net.layers[1].gate.register_forward_hook(lambda m, args, out: out * 2)
    net.layers.add_module("3", None)
    assert places(net) == [[0, 2], [1]]


def test_a_loop_over_what_a_layer_gives_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_MOST", 5)
    net = Net(Dense())
    with kinds.one_of_each(kinds.kinds(net), lambda k, args, named: args[0]), pytest.raises(RuntimeError, match="on and on"):
        while True:
            net.layers[0](torch.ones(T, H))


def test_what_else_may_hold_experts() -> None:
    net, outside, lists = (Net(Layer(0), Layer(1)) for _ in range(3))
    outside.extra = nn.Parameter(torch.randn(E, H, H))
    lists.first = nn.Sequential(nn.Linear(H, H), nn.ModuleDict({"a": nn.Linear(H, H)}))
    named = Unrolled(nn.ModuleDict({"moe": Block(), "more": nn.Linear(H, H)}))
    whole = {m: kinds.rest_is_dense(m, [layer for k in kinds.kinds(m) for layer in k.layers]) for m in (net, outside, lists, named)}
    assert list(whole.values()) == [True, False, False, False]


def divided(m: nn.Module) -> set[str]:
    return {n for n, p in m.named_parameters() if isinstance(p, DTensor)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_layer_of_each_kind_is_explained(mesh: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Any] = []
    explained = parallel.explained
    monkeypatch.setattr(parallel, "explained", lambda called, *rest: looked.append(called) or explained(called, *rest))
    net = Net(Dense(), *map(Layer, (1, 2, 3)), Layer(4, "relu")).to(device)
    untouched = [vars(m).get("forward") for m in net.layers]
    moe_compile.parallelize(net, mesh, torch.randn(T, H, device=device))
    assert [called.__self__ for called in looked] == [net.layers[i] for i in (0, 1, 4)]
    assert divided(net) == {f"layers.{i}.{name}" for i in (1, 2, 3, 4) for name in ("up", "down")}
    assert untouched == [None] * 5 and "forward" not in vars(net.layers[0])


class Stacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(E, I, H)), nn.Parameter(torch.randn(E, H, I))

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        h = torch.relu(torch.einsum("th,tkih->tki", x, self.up[ids]))
        return torch.einsum("tki,tkhi,tk->th", h, self.down[ids], w)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E), Stacks()

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, -1)
        return x + self.experts(x, ids, w)


class Unrolled(nn.Module):
    """One block between dense parts, under a wrapper, in no list."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(H, H), block, Dense())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("block", [Block(), Layer(0)])
def test_of_a_model_with_one_block_the_block_is_explained(mesh: Any, block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its router among it, whether it is the block's own or stands beside a module of stacks alone."""
    looked: list[Any] = []
    explained = parallel.explained
    monkeypatch.setattr(parallel, "explained", lambda called, *rest: looked.append(called.__self__) or explained(called, *rest))
    net = Unrolled(block)
    moe_compile.parallelize(net, mesh, torch.randn(T, H))
    inside = "experts." if isinstance(block, Block) else ""
    assert looked == [block] and divided(net) == {f"body.1.{inside}{name}" for name in ("up", "down")}


def test_blocks_that_are_looked_at_apart() -> None:
    """Not a convolution, which holds no experts, nor a block in a block, nor the whole model."""

    def paths(m: nn.Module) -> list[str]:
        return [layer.path for k in kinds.kinds(m) for layer in k.layers]

    conv, outer = Unrolled(nn.Conv1d(2, 2, 3)), Unrolled(Block())
    outer.body[1].extra = nn.Parameter(torch.randn(E, H, H))
    assert paths(conv) == [] and paths(Layer(0)) == [] and paths(outer) == ["body.1"] and paths(Unrolled(Stacks())) == ["body"]
    conv_and_layers = Net(Layer(0), Layer(1))
    conv_and_layers.first = nn.Conv1d(2, 2, 3)
    assert not kinds.rest_is_dense(conv_and_layers, [layer for k in kinds.kinds(conv_and_layers) for layer in k.layers])


def test_a_layer_that_cannot_be_divided_is_told_of_the_whole_model(mesh: Any) -> None:
    class Odd(Layer):
        def forward(self, x: Tensor) -> Tensor:
            w, ids = self.gate(x).softmax(-1).topk(K, -1)
            h = torch.cummax(torch.einsum("th,tkih->tki", x, self.up[ids]), -1).values
            return x + torch.einsum("tki,tkhi,tk->th", h, self.down[ids], w)

    net = Net(Layer(0), Layer(1), Odd(2), Odd(3))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="the model's experts cannot be divided"):
        moe_compile.parallelize(net, mesh, torch.randn(T, H))
    assert not divided(net) and before.keys() == net.state_dict().keys()
    assert all("forward" not in vars(m) for m in net.layers)


def test_layers_that_a_model_looks_into_are_looked_at_with_it(mesh: Any) -> None:
    """A model that takes what a layer gives for more than a tensor of a form: the shortened run fails, the whole one does not."""

    class Counts(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                layer(x)
                if not hasattr(layer, "number") or isinstance(layer.forward, type(places)):
                    raise TypeError("no layer")
            return super().forward(x)

    net = Counts(Layer(0), Layer(1))
    moe_compile.parallelize(net, mesh, torch.randn(T, H))
    assert len(divided(net)) == 4


def test_layers_that_are_one_module_and_layers_that_share_one_tensor(mesh: Any) -> None:
    """One layer three times is divided once, and still runs; a tensor of two layers would become two."""
    layer = Layer(0)
    net = Net(layer, layer, layer)
    moe_compile.parallelize(net, mesh, torch.randn(T, H))
    assert divided(net) == {"layers.0.up", "layers.0.down"} and net(torch.randn(T, H)).shape == (T, H)
    tied = Net(Layer(0), Layer(1))
    tied.layers[1].up = tied.layers[0].up
    with pytest.raises(ValueError, match="shared with another module"):
        moe_compile.parallelize(tied, mesh, torch.randn(T, H))
    assert not divided(tied)


def test_experts_that_were_divided_are_read(mesh: Any) -> None:
    """The stacks are put together by an op whose making is not read."""
    net = moe_compile.parallelize(Net(Layer(0), Layer(1)), mesh, torch.randn(T, H))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(net, backend="moe_fused", options={"inner": "eager"})(torch.randn(T, H))
    report = moe_compile.last_report()
    assert len(report.blocks) == 2 and not report.rejected, report.rejected
