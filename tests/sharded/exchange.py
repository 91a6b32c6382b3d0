"""The exchange of `moe_compile.integrations.transformers` among ranks with tokens of their own: beside the oracle, and when it fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import cells
import failing
import narrow
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moe_compile
from moe_compile.integrations.transformers import GatherEP, RowsEP, StaticRowsEP
from moe_compile.ir import Experts, Form, evaluate_world
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import Operands

E, K, H, I, T = 8, 3, 16, 16, 6


class Local(nn.Module):
    """This rank's experts, weights gathered by local ids; the number behind the last one is none of them."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down, self.num_experts = nn.Parameter(up), nn.Parameter(down), len(up)

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        e = ids.clamp(max=self.num_experts - 1)
        g, u = torch.einsum("th,tkih->tki", x, self.up[e]).chunk(2, -1)
        return torch.einsum("tki,tkhi,tk->th", nn.functional.silu(g) * u, self.down[e], w)


def table(rank: int, world: int) -> Iterator[tuple[str, Any]]:
    logging.getLogger("moe_compile").setLevel(logging.CRITICAL)
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "tp"))
    g = torch.Generator().manual_seed(0)
    up, down = (torch.randn(*s, generator=g) * 0.3 for s in ((E, 2 * I, H), (E, H, I)))
    xs, ws = torch.randn(world, T, H, generator=g), torch.rand(world, T, K, generator=g)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(world * T)]).view(world, T, K)
    ids[-1] = torch.arange(K)  # all tokens of the last rank go to the first experts
    n = E // world
    local = Local(up[rank * n :][:n].clone(), down[rank * n :][:n].clone())
    ops: list[int] = []
    options = {"inner": cells.counting(ops)}
    run = torch.compile(GatherEP(local, mesh["ep"], mesh["tp"]), backend="moe_fused", options=options, fullgraph=True)
    x, w = xs[rank].clone().requires_grad_(), ws[rank].clone().requires_grad_()
    out = run(x, ids[rank], w)
    (out * torch.arange(H)).sum().backward()
    again = run(x, ids[rank], w)
    off = beside_oracle(local, out, x, w, (xs, ids, ws, up, down), rank)
    told = [b.exchange for b in moe_compile.last_report().blocks]
    yield "gathered", {"fused": ops, "exchange": told, "same": bool(torch.equal(out, again)), **off}
    yield "rows", by_rows(rank, world, local, up, down)
    for name, chosen in (("rows, static", ids), ("rows, static, all to a few", torch.arange(K).expand_as(ids).contiguous())):
        yield name, static_rows(rank, world, local, (xs, chosen, ws, up, down))
    yield from (("narrow, " + way, found) for way, found in narrow.table(rank, world))
    yield from failing.table(rank, world, local, (xs[rank], ids[rank], ws[rank]))
    run, x, w = failing.compiled(local, world), xs[rank], ws[rank]  # in the group that was made anew
    run(x, ids[rank], w)
    yield "uneven", failing.failure(lambda: run(x[: T - rank], ids[rank][: T - rank], w[: T - rank]))
    if rank == world - 1:
        os._exit(0)  # dies while the others are in the exchange
    yield "dead", failing.failure(lambda: run(x, ids[rank], w))


def by_rows(rank: int, world: int, local: Local, up: Tensor, down: Tensor) -> dict[str, Any]:
    """`exchange.by_rows` of batches of their own lengths, one of them empty, one whose tokens all choose the first experts."""
    g = torch.Generator().manual_seed(1)
    counts = [T, 0, 1, 2 * T][:world]
    xs, ws = [torch.randn(t, H, generator=g) for t in counts], [torch.rand(t, K, generator=g) for t in counts]
    ids = [
        torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(t)]) if t else torch.zeros(0, K, dtype=torch.long) for t in counts
    ]
    ids[-1] = torch.arange(K).expand(counts[-1], K).contiguous()
    local.zero_grad()
    run = RowsEP(local, *(init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "tp"))[name] for name in ("ep", "tp")))
    x, w = xs[rank].clone().requires_grad_(), ws[rank].clone().requires_grad_()
    out = run(x, ids[rank], w)
    (out * torch.arange(H)).sum().backward()
    again = run(x, ids[rank], w)
    return {"same": bool(torch.equal(out, again)), **beside_oracle(local, out, x, w, (xs, ids, ws, up, down), rank)}


def static_rows(rank: int, world: int, local: Local, given: tuple[Tensor, ...]) -> dict[str, Any]:
    """`exchange.sent`, as written, and in `make zoo` compiled; where all tokens choose the same experts their rank's buffer is full."""
    xs, ids, ws, up, down = given
    local.zero_grad()
    run = StaticRowsEP(local, *(init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "tp"))[name] for name in ("ep", "tp")))
    ops: list[int] = []
    if cells.EVERY:
        torch._dynamo.reset()
        run = torch.compile(run, backend="moe_fused", options={"inner": cells.counting(ops)}, fullgraph=True)
    x, w = xs[rank].clone().requires_grad_(), ws[rank].clone().requires_grad_()
    out = run(x, ids[rank], w)
    (out * torch.arange(H)).sum().backward()
    off = beside_oracle(local, out, x, w, (xs, ids, ws, up, down), rank)
    told = [b.exchange for b in moe_compile.last_report().blocks] if ops else []
    uneven = failing.failure(lambda: run(x[: T - rank], ids[rank][: T - rank], w[: T - rank]))
    return {"same": bool(torch.equal(out, run(x, ids[rank], w))), "fused": ops, "exchange": told, "uneven": uneven["raised"], **off}


def beside_oracle(local: Local, out: Tensor, x: Tensor, w: Tensor, whole: tuple[Any, ...], rank: int) -> dict[str, float]:
    """How far result and gradients are from `evaluate_world` in float64."""
    world, n = dist.get_world_size(), local.num_experts
    xs, ids, ws = whole[:3]
    xs, ws = ([t.double().requires_grad_() for t in each] for each in (xs, ws))
    up, down = (t.double().requires_grad_() for t in whole[3:])
    kinds = [Experts(n, H, I, H, Form.CONCAT, act.SWIGLU, first=r * n) for r in range(world)]
    params = [Operands.named(up=[up[r * n :][:n]], down=[down[r * n :][:n]]) for r in range(world)]
    want = evaluate_world(kinds, params, list(xs), list(ids), list(ws))
    sum((y * torch.arange(H)).sum() for y in want).backward()  # type: ignore[union-attr]
    mine = slice(rank * n, rank * n + n)
    pairs = [(x.grad, xs[rank].grad), (w.grad, ws[rank].grad), (local.up.grad, up.grad[mine]), (local.down.grad, down.grad[mine])]
    zero = torch.zeros(())  # the gradient of no tokens
    off = max(cells.worst(a, zero if b is None else b.float()) for a, b in pairs)
    return {"out": cells.worst(out, want[rank].float()), "grad": off}
