"""Code that is compiled again on one rank, or on all of them, in a model of `moe_compile.parallelize`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import cells
import failing
import torch
from torch import Tensor

import moe_compile


class Numbered(cells.Net):
    """A number that code is compiled for."""

    number = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1 if self.number else x)


def table(rank: int, mesh: Any) -> Iterator[tuple[str, Any]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    one, x = Numbered(True), torch.randn(cells.T, cells.H, generator=torch.Generator().manual_seed(rank))
    m = moe_compile.parallelize(copy.deepcopy(one), mesh, x)
    gathers: list[bool] = []

    def inner(gm: Any, inputs: Any) -> Any:
        gathers.append("moe_compile.whole" in str(gm.graph))
        return gm.forward

    run = torch.compile(m, backend="moe_fused", options={"inner": inner}, dynamic=False)

    def off() -> dict[str, Any]:
        found = float((run(x) - one(x)).detach().abs().max())
        return {"graphs": len(gathers), "off": found}

    run(x)
    if rank == 1:
        one.number = m.number = 1
    yield "recompiled / one rank", off()
    with torch.no_grad():
        yield "recompiled / another mode", off()
    yield "recompiled / gathers weights", gathers
    yield "recompiled / other tokens", failing.failure(lambda: run(x[: cells.T - rank]))
    with torch._dynamo.config.patch(recompile_limit=1 if rank else 64):
        yield "recompiled / as written", failing.failure(lambda: run(x[:4]))
