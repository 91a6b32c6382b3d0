"""What ranks that are to share a batch compare (`moe_compile.batches`), without ranks: tests/sharded has those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

from moe_compile import batches, divided

C10D = torch.ops._c10d_functional


def summed(g: fx.Graph, x: fx.Node) -> fx.Node:
    return g.call_function(C10D.wait_tensor, (g.call_function(C10D.all_reduce, (x, "sum", "tp")),))


def as_it_is(g: fx.Graph, x: fx.Node) -> fx.Node:
    return x


def in_place(g: fx.Graph, x: fx.Node) -> fx.Node:
    """`torch.distributed.all_reduce(x)` as Dynamo writes it; x is read afterwards."""
    g.call_method("copy_", (x, summed(g, x)))
    return x


def in_a_custom_function(g: fx.Graph, x: fx.Node) -> fx.Node:
    inside = fx.Graph()
    inside.output(summed(inside, inside.placeholder("x")))
    g.owning_module.body = fx.GraphModule(nn.Module(), inside)  # type: ignore[union-attr]
    return g.call_function(torch.ops.higher_order.cond, (g.get_attr("body"), x))


@pytest.mark.parametrize("way", [as_it_is, summed, in_place, in_a_custom_function])
def test_what_ranks_sum_may_be_their_own(way: Any) -> None:
    """Tensor parallelism by hand: each rank has slopes and keys of its own heads; what it makes of them is summed."""
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    g = gm.graph
    tokens, slopes = g.placeholder("tokens"), g.placeholder("slopes")
    x = g.call_function(torch.add, (tokens, way(g, g.call_function(torch.mul, (tokens, slopes)))))
    g.output(g.call_function(divided.divided_experts, (x, x, x, [], None, [], "ep", True)))
    assert [name for _, name in batches.shared(gm)] == (["tokens", "slopes"] if way is as_it_is else ["tokens"])


class Told:
    """A group of two whose other rank says always the same."""

    size, timeout = 2, 1.0

    def __init__(self, other: Any) -> None:
        self.other, self.topics = other, []

    def round(self, topic: str, word: Any, patience: float) -> list[Any]:
        self.topics.append(topic)
        return [word, self.other]


def test_another_batch_raises_until_it_is_the_same() -> None:
    """Each graph by a topic of its own: a rank that calls another one is silent, and not of another batch."""
    x = torch.arange(6.0)
    talk = Told({"x": batches._sample(x)})
    run = batches.compared(lambda x: x, [(0, "x")], [talk], "graph a")  # type: ignore[list-item]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="rank 1 of 2 called the model with another batch than rank 0"):
            run(-x)
    assert run(x) is x and run(-x) is not None
    assert talk.topics == ["batch, graph a"] * 3


@pytest.mark.parametrize("x", [torch.empty(2, device="meta"), torch.eye(2).to_sparse(), torch.empty(0, 3), torch.ones(2, dtype=torch.bool)])
def test_any_tensor_has_a_sample(x: Tensor) -> None:
    assert not batches._differ(batches._sample(x), batches._sample(x))
