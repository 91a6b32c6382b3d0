"""torchtitan's MoE over two processes, by its own all-to-all and by our gather, beside the undivided layer: run by `ranks`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moe_compile.integrations.torchtitan as ours
from moe_compile.report import collecting

H, I, E, K = 16, 8, 8, 2


def layer(dispatcher: str, held: int) -> Any:
    """The layer whose experts, all or a part of them, are held here; "gather": by the override of `moe_compile.integrations.torchtitan`."""
    m = importlib.import_module("torchtitan.models.common.moe")
    config, dispatch = (importlib.import_module(f"torchtitan.models.common.{name}") for name in ("config_utils", "token_dispatcher"))
    experts = m.GroupedExperts.Config(dim=H, hidden_dim=I, num_experts=held)
    own = dispatcher == "gather"
    tokens = getattr(dispatch, "AllToAllTokenDispatcher" if own else dispatcher).Config(num_experts=E, top_k=K)
    tokens = ours.gather(tokens) if own else tokens
    routed = m.RoutedExperts.Config(inner_experts=experts, token_dispatcher=tokens)
    router = config.make_router_config(dim=H, num_experts=E, gate_param_init={}, top_k=K, route_norm=True, route_scale=2.5)
    return m.MoE.Config(num_experts=E, router=router, routed_experts=routed).build()


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def cells(rank: int, world: int) -> Iterator[tuple[str, dict[str, Any]]]:
    importlib.import_module("torchtitan.distributed.utils").set_spmd_backend("default")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield "all-to-all", beside(rank, world, "AllToAllTokenDispatcher", 6 + rank)
    yield "gather", beside(rank, world, "gather", 6, fullgraph=True)
    yield "uneven", uneven(rank, world)
    dist.barrier()


def divided(rank: int, world: int, dispatcher: str) -> tuple[Any, Any]:
    """The undivided layer, and one that holds this rank's experts of it."""
    torch.manual_seed(0)
    whole = layer("LocalTokenDispatcher", E)
    for p in whole.parameters():
        nn.init.normal_(p, std=0.3)
    mine = layer(dispatcher, E // world)
    own = slice(rank * E // world, (rank + 1) * E // world)
    state = whole.state_dict()
    with torch.no_grad():
        for name, p in mine.named_parameters():
            p.copy_(state[name] if state[name].shape == p.shape else state[name][own])
    mine.routed_experts.token_dispatcher.wire_meshes(ep_mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)))
    return whole, mine


def beside(rank: int, world: int, dispatcher: str, length: int, **options: Any) -> dict[str, Any]:
    whole, mine = divided(rank, world, dispatcher)
    x = torch.randn(2, length, H, generator=torch.Generator().manual_seed(rank))
    found = []
    with collecting() as report:
        for run in (torch.compile(mine, backend="moe_fused", options={"inner": "aot_eager"}, **options), mine):
            mine.zero_grad()
            own = x.clone().requires_grad_()
            out = run(own)
            out.square().sum().backward()
            grads = [own.grad, *(p.grad for p in mine.parameters() if p.grad is not None)]
            found.append((out.detach(), torch.cat([g.flatten() for g in grads])))
    (out, grads), (want, of_eager) = found
    with torch.no_grad():
        undivided = error(out, whole(x))
    return {
        "fused": len(report.blocks),
        "graphs": report.graph_count,
        "exchange": [b.exchange for b in report.blocks],
        "left": [r.code for r in report.rejected],
        "out": error(out, want),
        "whole": undivided,
        "grad": error(grads, of_eager),
        "whole grad": of_whole(whole, mine, x, rank, world),
    }


def of_whole(whole: Any, mine: Any, x: Tensor, rank: int, world: int) -> float:
    """How far the gradients of this rank's experts are from the undivided layer's, summed over the ranks' batches."""
    batches: list[Any] = [None] * world
    dist.all_gather_object(batches, x)
    whole.zero_grad()
    for batch in batches:
        whole(batch).square().sum().backward()
    held = E // world
    want = {n: p.grad[rank * held :][:held] for n, p in whole.routed_experts.inner_experts.named_parameters()}
    return max(error(p.grad, want[n]) for n, p in mine.routed_experts.inner_experts.named_parameters())


def uneven(rank: int, world: int) -> str:
    _, mine = divided(rank, world, "gather")
    try:
        mine(torch.randn(1, 4 + rank, H))
    except RuntimeError as e:
        return str(e)
    return ""
