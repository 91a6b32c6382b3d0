"""The recorder: whatever plain torch a lowering is written in, the nodes it leaves compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import Tensor

from moe_compile.lowering.ascend.record import recording

SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operators": lambda x, y: (x + y) * 2.0 - y / 3.0,
    "reflected": lambda x, y: 2.0 - x + 3.0 / (y.abs() + 1.0) + 2.0**x,
    "powers": lambda x, y: x**2 + (y.abs() + 1.0) ** -0.5,
    "comparisons": lambda x, y: torch.where((x >= 0) & (y < 1), x, torch.zeros_like(y)),
    "inverted": lambda x, y: x.masked_fill(~(y > 0), 0.5),
    "slices": lambda x, y: x[..., 0::2] * y[:, None][:, 0, 1::2],
    "methods": lambda x, y: x.softmax(-1).topk(2, dim=-1).values.sum(-1, keepdim=True).expand_as(y) + y.unflatten(-1, (2, 2)).flatten(-2),
    "results": lambda x, y: x.topk(2, -1)[0] + y.chunk(2, -1)[1],
    "functions": lambda x, y: torch.nn.functional.silu(x) + torch.nn.functional.gelu(y, approximate="tanh") + torch.clamp(x, -1.0, 1.0),
    "casts": lambda x, y: x.to(torch.float64).sum(0).to(torch.float32) + y,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_recorded_nodes_compute_the_same(name: str) -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    graph = fx.Graph()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for n, v in zip(nodes, (x, y)):
        n.meta["example_value"] = v
    out = graph.output(None)
    with recording(out, nodes[0], nodes) as r:
        value = SPELLINGS[name](*(r.value(n) for n in nodes))
    r.drop_unused()
    out.args = (r.node(value),)
    module = fx.GraphModule({}, graph)
    graph.lint()
    torch.testing.assert_close(module(x, y), SPELLINGS[name](x, y))
    other = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(module(*other), SPELLINGS[name](*other))
