"""What goes wrong among ranks that exchange rows: each cell is run by every rank of a group, in the processes of `exchange`."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moe_compile
from moe_compile import agreement
from moe_compile.integrations.transformers import GatherEP

Compiled = Callable[..., Tensor]


def table(rank: int, world: int, local: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[str, Any]]:
    """batch: x [T, H], ids and weights [T, k] of this rank."""
    want = exchanged(local, world)(*batch)
    yield "declined", declined(rank, world, local, batch, want)
    yield "strict", failure(lambda: compiled(Noisy(local, rank == 1), world, strict=rank == 0)(*batch))
    yield "several", several(world, local, batch, want)
    yield "late", late(rank, world, local, batch, want)
    yield "versions", versions(rank, world)
    yield "anew", anew(rank, world, local, batch, want)


def exchanged(local: Any, world: int) -> GatherEP:
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "tp"))
    return GatherEP(local, mesh["ep"], mesh["tp"])


def compiled(local: Any, world: int, **options: Any) -> Compiled:
    torch._dynamo.reset()
    return torch.compile(exchanged(local, world), backend="moe_fused", options={"inner": "eager", **options}, fullgraph=True)


class Noisy(torch.nn.Module):
    """The same experts, whose results on one rank go through what is not looked into."""

    def __init__(self, local: Any, noisy: bool) -> None:
        super().__init__()
        self.local, self.noisy, self.num_experts = local, noisy, local.num_experts

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        if not self.noisy:
            return self.local(x, ids, w)  # type: ignore[no-any-return]
        e = ids.clamp(max=self.num_experts - 1)
        g, u = torch.einsum("th,tkih->tki", x, self.local.up[e]).chunk(2, -1)
        h = torch.cummax(torch.nn.functional.silu(g) * u, -1).values * 0 + torch.nn.functional.silu(g) * u
        return torch.einsum("tki,tkhi,tk->th", h, self.local.down[e], w)


def declined(rank: int, world: int, local: Any, batch: tuple[Tensor, ...], want: Tensor) -> dict[str, Any]:
    out = compiled(Noisy(local, rank == 1), world)(*batch)
    report = moe_compile.last_report()
    return {"fused": len(report.blocks), "told": [f"{r.reason} [{r.code}]" for r in report.rejected], "same": bool(torch.equal(out, want))}


def several(world: int, local: Any, batch: tuple[Tensor, ...], want: Tensor) -> dict[str, Any]:
    models = [compiled(local, world), torch.compile(exchanged(Noisy(local, False), world), backend="moe_fused", options={"inner": "eager"})]
    outs, fused = [], []
    for m in models * 2:
        outs.append(m(*batch))
        fused.append(len(moe_compile.last_report().blocks))
    return {"fused": fused, "off": max(float((o - want).abs().max()) for o in outs)}


def late(rank: int, world: int, local: Any, batch: tuple[Tensor, ...], want: Tensor) -> dict[str, Any]:
    """One rank runs the exchange as written where the others compile it, and compiles it afterwards."""
    talks = list(agreement._talks.values())
    kept = [t.timeout for t in talks]
    for t in talks:
        t.timeout = 6  # of which a rank that compiles waits for half
    torch._dynamo.reset()
    written = exchanged(local, world)
    run = torch.compile(written, backend="moe_fused", options={"inner": "eager"}, fullgraph=True)
    start = time.monotonic()
    alone = (written if rank == 1 else run)(*batch)
    took, notes = time.monotonic() - start, moe_compile.last_report().notes if rank != 1 else []
    together = run(*batch)
    for t, timeout in zip(talks, kept, strict=True):
        t.timeout = timeout
    off = max(float((out - want).abs().max()) for out in (alone, together))
    return {"off": off, "after": took, "notes": list(notes), "fused": len(moe_compile.last_report().blocks)}


def versions(rank: int, world: int) -> dict[str, Any]:
    kept, agreement._version = agreement._version, lambda: {"moe_compile": f"0.{rank}"}
    group = dist.new_group(list(range(world)))
    try:
        return failure(lambda: agreement.join(group))
    finally:
        agreement._version = kept


def anew(rank: int, world: int, local: Any, batch: tuple[Tensor, ...], want: Tensor) -> dict[str, Any]:
    """The group is destroyed and another one made under its name."""
    port = [ranks.free_port()]
    dist.broadcast_object_list(port, 0)
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port[0])
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=ranks.COLLECTIVE / 2))
    out = compiled(local, world)(*batch)
    return {"fused": len(moe_compile.last_report().blocks), "off": float((out - want).abs().max())}


def failure(f: Any) -> dict[str, Any]:
    start = time.monotonic()
    try:
        f()
    except Exception as e:
        return {"raised": f"{type(e).__name__}: {e}"[:600], "after": time.monotonic() - start}
    return {"raised": "", "after": time.monotonic() - start}
