"""Rows among the eight ranks of a node, by all-gather and by all-to-all: experts of `moe_compile.parallelize` beside one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cells
import parallelized
from torch.distributed.device_mesh import init_device_mesh

EXPERTS = 16


def table(rank: int, world: int) -> Iterator[tuple[str, Any]]:
    cells.E = EXPERTS
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    for batch in ("own", "rows"):
        yield batch, parallelized.cell(rank, world, mesh, "grouped", batch, "compiled", layers=1)
