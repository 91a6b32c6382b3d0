"""torchtitan's MoE with its own all-to-all over two processes, beside the undivided layer: run by `ranks`, once in each process."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moe_compile.report import collecting

H, I, E, K = 16, 8, 8, 2


def layer(dispatcher: str, held: int) -> Any:
    """The layer whose experts, all or a part of them, are held here."""
    m = importlib.import_module("torchtitan.models.common.moe")
    config, dispatch = (importlib.import_module(f"torchtitan.models.common.{name}") for name in ("config_utils", "token_dispatcher"))
    experts = m.GroupedExperts.Config(dim=H, hidden_dim=I, num_experts=held)
    routed = m.RoutedExperts.Config(inner_experts=experts, token_dispatcher=getattr(dispatch, dispatcher).Config(num_experts=E, top_k=K))
    router = config.make_router_config(dim=H, num_experts=E, gate_param_init={}, top_k=K, route_norm=True, route_scale=2.5)
    return m.MoE.Config(num_experts=E, router=router, routed_experts=routed).build()


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def cells(rank: int, world: int) -> Iterator[tuple[str, dict[str, Any]]]:
    importlib.import_module("torchtitan.distributed.utils").set_spmd_backend("default")
    torch.manual_seed(0)
    whole = layer("LocalTokenDispatcher", E)
    for p in whole.parameters():
        nn.init.normal_(p, std=0.3)
    mine = layer("AllToAllTokenDispatcher", E // world)
    own = slice(rank * E // world, (rank + 1) * E // world)
    state = whole.state_dict()
    with torch.no_grad():
        for name, p in mine.named_parameters():
            p.copy_(state[name] if state[name].shape == p.shape else state[name][own])
    mine.routed_experts.token_dispatcher.wire_meshes(ep_mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)))
    x = torch.randn(2, 6 + rank, H, generator=torch.Generator().manual_seed(rank))
    found = []
    with collecting() as report:
        for run in (torch.compile(mine, backend="moe_fused", options={"inner": "aot_eager"}), mine):
            mine.zero_grad()
            out = run(x)
            out.square().sum().backward()
            found.append((out.detach(), torch.cat([p.grad.flatten() for p in mine.parameters() if p.grad is not None])))
    (out, grads), (want, of_eager) = found
    with torch.no_grad():
        undivided = error(out, whole(x))
    reasons = [r.code for r in report.rejected]
    errors = {"out": error(out, want), "whole": undivided, "grad": error(grads, of_eager)}
    yield "layer", {"fused": len(report.blocks), "left": reasons, **errors}
    dist.barrier()
