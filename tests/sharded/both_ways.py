"""A training step on four ranks: experts divided over two of them, and FSDP2 over the others; beside one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import cells
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moe_compile


def table(rank: int, world: int) -> Iterator[tuple[str, Any]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    for batch in ("own", "shared", "rows"):
        yield batch, step(rank, mesh, batch)


def step(rank: int, mesh: Any, batch: str) -> dict[str, Any]:
    """`shared`: the two ranks that divide experts get one batch; `rows`: own batches, rows by all-to-all. Each FSDP pair averages; ranks
    that divide experts sum theirs."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    one, x = cells.Net(True), torch.randn(4, cells.T, cells.H, generator=torch.Generator().manual_seed(1))
    shared = batch == "shared"
    m = moe_compile.parallelize(copy.deepcopy(one), mesh["ep"], x[0], shared_batch=shared, rows=batch == "rows")
    for layer in m.layers:
        layer.compile(backend="moe_fused", options={"inner": "eager"})
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(m, mesh=mesh["dp"])
    mine = rank // 2 if shared else rank
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (m, one)]
    out = m(x[mine])
    kept = [b.exchange for b in moe_compile.last_report().blocks]
    weigh = torch.arange(float(cells.H)) / cells.H
    (out * weigh).mean().backward()
    batches = range(2 if shared else 4)
    want = [one(x[r]) for r in batches]
    (sum((y * weigh).mean() for y in want) / len(batches)).backward()  # type: ignore[union-attr]
    if not shared:
        _mean_over(m, mesh["ep"].get_group())
    found = {"out": cells.worst(out, want[mine]), "grad": cells.gradients(m, one), "exchange": kept}
    for optimizer in optimizers:
        optimizer.step()
    found["after"] = cells.worst(m(x[mine]), one(x[mine]))
    return found


def _mean_over(m: nn.Module, group: Any) -> None:
    """Gradients of experts are sums over the ranks that divide them, those of other parameters each rank's own: both to means."""
    for name, p in m.named_parameters():
        local = p.grad.to_local()
        if "experts" not in name:
            dist.all_reduce(local, group=group)
        local /= group.size()
