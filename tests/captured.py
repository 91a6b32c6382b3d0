"""What the tests of capture share: a data-dependent loop, and an inner compiler that keeps its graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, K, H, I = 6, 2, 16, 8


class Loop(nn.Module):
    """Router and `for e in hit` in two functions, as most models have them."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.act = act
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 2 * I, H) * 0.3)
        self.down = nn.Parameter(torch.randn(E, H, I) * 0.3)
        self.num_experts, self.limit = E, 7.0

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        return self.dispatch(x, ids, w)

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, (self.expert(e, x[t]) * w[t, j, None]).to(out.dtype))
        return out

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(self.act(g.clamp(max=self.limit)) * u, self.down[e])


class Counter:
    """An inner compiler that keeps the graphs it gets and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any, **kw: Any) -> Any:
        self.graphs.append(gm)
        return gm.forward

    @property
    def ops(self) -> int:
        """How many experts calls the graphs hold."""
        return sum(n.target is torch.ops.moe_compile.experts.default for g in self.graphs for n in g.graph.nodes)


def compiled(m: Any, counter: Counter, **kw: Any) -> Any:
    return torch.compile(m, backend="moe_fused", options={"inner": counter}, **kw)


def agree(m: nn.Module, twin: nn.Module, counter: Counter, x: Tensor, times: int = 2, **kw: Any) -> None:
    """The compiled module computes what its twin does, call by call, and leaves its buffers as that leaves its own."""
    c = compiled(m, counter, **kw)
    for _ in range(times):
        torch.testing.assert_close(c(x), twin(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(m.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)
