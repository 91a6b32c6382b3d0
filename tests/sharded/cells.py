"""Cells of the table of sharded models: each set-up, spelling of the experts and mode, beside the same model in one process.

`table` runs in every rank of a process group (see tests/ranks.py); a cell says how many experts ops and graphs there were, how far the
result and the gradients are from one process, and what was left as written.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch.distributed as dist
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 (defines grouped_mm_fallback, which is there for fp32 too)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import moe_compile

E, K, H, I, T = 4, 2, 16, 16, 10
Model = nn.Module
Made = Callable[..., tuple[Model, Model]]


class Experts(nn.Module):
    """SwiGLU experts, as transformers writes them: sorted rows and grouped products, or a loop over the experts that were hit."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.grouped = grouped
        self.up, self.down = nn.Parameter(torch.randn(E, 2 * I, H) * 0.3), nn.Parameter(torch.randn(E, H, I) * 0.3)

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return self.products(x, ids, w) if self.grouped else self.loop(x, ids, w)

    def loop(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for e in (mask.sum((-1, -2)) > 0).nonzero():
            e = e[0]
            slot, token = torch.where(mask[e])
            g, u = F.linear(x[token], self.up[e]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(g) * u, self.down[e]) * w[token, slot, None])
        return out

    def products(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        e, order = ids.reshape(-1).sort()
        ends = torch.histc(e.float(), bins=E, min=0, max=E - 1).cumsum(0).int()
        g, u = torch.ops.transformers.grouped_mm_fallback(x[order // K], self.up.mT, ends).chunk(2, -1)
        y = torch.ops.transformers.grouped_mm_fallback(F.silu(g) * u, self.down.mT, ends) * w.reshape(-1)[order, None]
        return y[order.argsort()].view(*ids.shape, -1).sum(1)


class Layer(nn.Module):
    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.norm, self.gate, self.experts = nn.RMSNorm(H), nn.Linear(H, E, bias=False), Experts(grouped)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        w, ids = self.gate(y).softmax(-1).topk(K, -1)
        return x + self.experts(y, ids, w / w.sum(-1, keepdim=True))


class Net(nn.Module):
    def __init__(self, grouped: bool, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(grouped) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# ---- set-ups: (the model that is called, whose parameters have the gradients) ------------------------------------------------


def layers(m: Model, options: dict[str, Any]) -> None:
    for layer in m.layers:  # type: ignore[union-attr]
        layer.compile(**options)


def shard(m: Model, mesh: DeviceMesh, apart: bool = False, **kwargs: Any) -> Model:
    for layer in m.layers:  # type: ignore[union-attr]
        if apart:
            fully_shard(layer.experts, mesh=mesh, **kwargs)
        fully_shard(layer, mesh=mesh, **kwargs)
    return fully_shard(m, mesh=mesh, **kwargs)


def by_layer(m: Model, mesh: DeviceMesh, options: dict[str, Any], **kwargs: Any) -> tuple[Model, Model]:
    layers(m, options)
    return (shard(m, mesh, **kwargs),) * 2


def whole(m: Model, mesh: DeviceMesh, options: dict[str, Any]) -> tuple[Model, Model]:
    return torch.compile(shard(m, mesh), **options), m  # type: ignore[call-overload, no-any-return]


def mixed(m: Model, mesh: DeviceMesh, options: dict[str, Any]) -> tuple[Model, Model]:
    return by_layer(m, mesh, options, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32))


def ddp(m: Model, mesh: DeviceMesh, options: dict[str, Any], **kwargs: Any) -> tuple[Model, Model]:
    return torch.compile(DistributedDataParallel(m, **kwargs), **options), m  # type: ignore[call-overload, no-any-return]


def buckets(m: Model, mesh: DeviceMesh, options: dict[str, Any]) -> tuple[Model, Model]:
    """Every parameter in a bucket of its own: the graph is cut in front of each of them."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 64  # the first bucket has 1 MB else, in which there is room for all of this model
    return ddp(m, mesh, options, bucket_cap_mb=0.0001)


SETUPS: dict[str, Made] = {
    "ddp": ddp,
    "ddp, several buckets": buckets,
    "ddp, optimize_ddp=False": ddp,
    "fsdp, by layer": by_layer,
    "fsdp, whole": whole,
    "fsdp, experts apart": lambda m, mesh, o: by_layer(m, mesh, o, apart=True),
    "fsdp, mixed precision": mixed,
    "fsdp, accumulation": by_layer,
    "fsdp, kept": lambda m, mesh, o: by_layer(m, mesh, o, reshard_after_forward=False),
}


# Left to `make zoo`: set-ups that differ from another one by a setting of torch's alone; the loop where it meets nothing that it does not
# meet in the others; inference where nothing is gathered; AOTAutograd, but for one of DDP and one of FSDP2
EVERY = "ZOO_ALL" in os.environ
LEFT = () if EVERY else ("ddp, optimize_ddp=False", "fsdp, kept")
GROUPED = () if EVERY else ("fsdp, whole", "fsdp, mixed precision", "fsdp, accumulation")
INFERENCE = tuple(SETUPS) if EVERY else ("fsdp, by layer", "fsdp, experts apart")
TRACED = tuple(SETUPS) if EVERY else ("ddp", "fsdp, by layer")


# ---- a cell ------------------------------------------------------------------------------------------------------------------


def table(rank: int, world: int, *names: str) -> Iterator[tuple[str, Any]]:
    """Every set-up that is asked for (all but `LEFT`, if none is), with both spellings, in training and without gradients."""
    logging.getLogger("moe_compile").setLevel(logging.CRITICAL)
    mesh = init_device_mesh("cpu", (world,))
    for name in names or (s for s in SETUPS if s not in LEFT):
        for grouped in (True, False)[: 1 if name in GROUPED else 2]:
            for train in (True, False):
                spelling, mode = ("grouped_mm" if grouped else "loop"), ("training" if train else "inference")
                if not train and name not in INFERENCE:
                    continue
                yield f"{name} / {spelling} / {mode}", cell(name, grouped, train, rank, world, mesh)
    if not names:
        import narrow
        import parallelized

        yield "example", example()
        yield from (("narrow, " + way, found) for way, found in narrow.table(rank, world))
        yield from parallelized.table(rank, world)


def cell(name: str, grouped: bool, train: bool, rank: int, world: int, mesh: DeviceMesh) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    one = Net(grouped).train(train)
    xs = [torch.randn(T, H, generator=torch.Generator().manual_seed(7 + r)) for r in range(world)]
    weigh = torch.randn(T, H, generator=torch.Generator().manual_seed(3))
    ops: list[int] = []
    called, owner = SETUPS[name](copy.deepcopy(one), mesh, {"backend": "moe_fused", "options": {"inner": counting(ops, name in TRACED)}})
    steps = 2 if name == "fsdp, accumulation" else 1
    with torch._dynamo.config.patch(optimize_ddp=name != "ddp, optimize_ddp=False"), torch.enable_grad() if train else torch.no_grad():
        for step in range(steps):
            if steps > 1:
                called.set_requires_gradient_sync(step == steps - 1)  # type: ignore[operator]
            out = called(xs[rank])
            if train:
                ((out * weigh).sum() / steps).backward()
        want = [one(x) for x in xs]
        if train:
            (sum((y * weigh).sum() for y in want) / world).backward()  # type: ignore[union-attr]
    report = moe_compile.last_report()
    return {
        "fused": sum(ops), "graphs": len(ops), "out": worst(out, want[rank]), "grad": gradients(owner, one) if train else 0.0,
        "left": [r.reason for r in report.rejected],
    }  # fmt: skip


def example() -> dict[str, Any]:
    """What `examples/run_trinity.py --ep 2 --explain` tells, in the process group that is there; nothing in all ranks but the first."""
    from unittest import mock

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import divided
    import run_trinity

    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        found = divided.run(run_trinity.parse(["--ep", "2", "--explain", "--json"], ""))
    return {} if found is None else divided.as_json(found) | {"complete": found.complete}


def counting(ops: list[int], traced: bool = True) -> Callable[..., Any]:
    """The graphs as they are, or `traced` by AOTAutograd, and for each how many experts ops it has."""

    def inner(gm: torch.fx.GraphModule, examples: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        ops.append(sum(str(n.target).startswith("moe_compile.experts") for n in gm.graph.nodes))
        return lookup_backend("aot_eager")(gm, examples) if traced else gm.forward

    return inner


def gradients(model: Model, one: Model) -> float:
    """How far the farthest gradient is; inf where one is missing."""
    found = {n.replace("_orig_mod.", "").replace("module.", ""): p.grad for n, p in model.named_parameters()}
    pairs = [(found.get(n), p.grad) for n, p in one.named_parameters()]
    return max(float("inf") if a is None or b is None else worst(a, b) for a, b in pairs)


def worst(a: Tensor, b: Tensor) -> float:
    a = a.full_tensor() if isinstance(a, DTensor) else a
    return float((a.detach().float() - b.detach()).norm() / b.detach().norm().clamp(min=1e-30))


if __name__ == "__main__":
    sys.exit("run by test_sharded.py")
