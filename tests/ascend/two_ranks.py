"""Two gloo processes that train a sharded block, in every way that test_fsdp.py asks about; rank 0 writes what it found as JSON.

python two_ranks.py OUT.json [SCENARIO ...]
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

E, K, H, I, T = 8, 2, 32, 64, 12
STEPS = 3


class Block(nn.Module):
    """Experts [E, out, in] in one stack each, weights gathered by their ids."""

    def __init__(self, experts: int = E) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(*s, generator=g) * 0.3) for s in ((experts, H), (experts, 2 * I, H), (experts, H, I))
        )

    def forward(self, x: Tensor) -> Tensor:
        w, ids = (x @ self.gate.t().to(x.dtype)).softmax(-1).topk(K, -1)
        rows, e = x.repeat_interleave(K, 0), ids.reshape(-1)
        g, u = torch.bmm(self.up[e], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[e], (F.silu(g) * u).unsqueeze(-1)).squeeze(-1) * w.reshape(-1, 1)
        return y.view(*ids.shape, -1).sum(1)


def full(t: Tensor) -> Tensor:
    from moe_compile.lowering.ascend.shards import plain

    return plain(t).full_tensor() if isinstance(plain(t), DTensor) else plain(t)


def train(
    rank: int, world: int, experts: int = E, nz: bool = False, dim: int = 0, mixed: bool = False, reshard: bool = True, **options: Any
) -> dict[str, Any]:
    """STEPS optimiser steps of the sharded, compiled block beside the whole one in eager mode; the worst relative errors."""
    import moe_compile

    xs = [torch.randn(T, H, generator=torch.Generator().manual_seed(5 + r)) for r in range(world)]
    whole, model = Block(experts), Block(experts)
    moved = moe_compile.prepare(model, target="ascend", training=True, weight_format="nz" if nz else "nd")
    model.compile(backend="moe_fused", options={"target": "ascend", "inner": "aot_eager", **options})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
    fully_shard(model, mp_policy=policy, reshard_after_forward=reshard, shard_placement_fn=lambda p: Shard(dim) if p.ndim == 3 else None)
    optimisers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, whole)]
    gradients: list[float] = []
    for _ in range(STEPS):
        for o in optimisers:
            o.zero_grad()
        model(xs[rank]).sin().sum().backward()
        (sum(whole(x).sin().sum() for x in xs) / world).backward()
        pairs = zip(model.parameters(), whole.parameters())
        gradients.append(max(_worst(full(p.grad), q.grad) for p, q in pairs))
        for o in optimisers:
            o.step()
    state = {k: full(v) for k, v in model.state_dict().items()}
    report = moe_compile.last_report()
    return {
        "moved": sorted(moved), "gradients": gradients, "notes": report.notes, "blocks": len(report.blocks),
        "weights": max(_worst(state[k], v) for k, v in whole.state_dict().items()),
        "types": sorted({type(v).__name__ for v in state.values()}),
    }  # fmt: skip


def _worst(a: Tensor, b: Tensor) -> float:
    a = a if a.shape == b.shape else a.transpose(-1, -2)
    return float((a - b).abs().max() / b.abs().max())


def plain_prepare_then_shard(rank: int, world: int) -> dict[str, Any]:
    """What happens to who prepares for inference and then shards, and to who shards first."""
    import moe_compile

    told = {}
    model = Block()
    moe_compile.prepare(model, target="ascend")
    try:
        fully_shard(model)
    except NotImplementedError as e:
        told["fully_shard"] = str(e)
    model = fully_shard(Block())
    try:
        moe_compile.prepare(model, target="ascend", training=True)
    except moe_compile.OptionError as e:
        told["prepare"] = str(e)
    return told


def bytes_of_the_gather(rank: int, world: int) -> dict[str, Any]:
    """What the ranks bring, one behind the other, is the whole weight cast behind a gather."""
    from moe_compile.lowering.ascend import formats

    _emulate_formats()
    import moe_compile

    out = {}
    real, gathered = formats.over, []

    def over(blocks: Tensor, shape: Any) -> Tensor:
        gathered.append(blocks.clone())
        return real(blocks, shape)

    formats.over = over
    for experts in (E, E - 1):  # the last rank has fewer
        gathered.clear()
        model, whole = Block(experts), Block(experts)
        moe_compile.prepare(model, target="ascend", training=True, weight_format="nz")
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32))
        model(torch.randn(T, H, dtype=torch.bfloat16))
        wanted = [formats.in_blocks(w.detach().bfloat16().transpose(1, 2)).view(-1) for w in (whole.up, whole.down)]
        out[str(experts)] = [any(torch.equal(g[: w.numel()], w) for g in gathered) for w in wanted] + [len(gathered) == 2]
    return out


def _emulate_formats() -> None:
    """The fractal format on the CPU: a tensor of it is decoded where it is laid over memory, and again where that is filled anew."""
    from moe_compile.lowering.ascend import formats

    def over(blocks: Tensor, shape: Any) -> Tensor:
        return formats.out_of_blocks(blocks[: torch.Size(shape).numel()].view(*shape))

    def point(nz: Tensor, blocks: Tensor) -> None:
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(nz):
            nz.copy_(over(blocks, nz.shape))

    formats.has_formats, formats.over, formats.point = (lambda t: True), over, point
    formats.is_nz = lambda t: False


def gathered_in_the_format(rank: int, world: int, **kwargs: Any) -> dict[str, Any]:
    """The same training with and without the format emulated: nothing but the format differs."""
    before = train(rank, world, nz=False, mixed=True, inner="eager", **kwargs)  # parameters as they are: the format is not asked for
    torch._dynamo.reset()
    _emulate_formats()
    return {"nd": before, "nz": train(rank, world, nz=True, mixed=True, inner="eager", **kwargs)}


SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": train,
    "kept": lambda r, w: train(r, w, reshard=False),
    "uneven": lambda r, w: train(r, w, experts=7),
    "inputs": lambda r, w: train(r, w, dim=1),
    "outputs": lambda r, w: train(r, w, dim=2),
    "refusals": plain_prepare_then_shard,
    "bytes": bytes_of_the_gather,
    "nz": gathered_in_the_format,
    "nz kept": lambda r, w: gathered_in_the_format(r, w, reshard=False),
    "nz uneven": lambda r, w: gathered_in_the_format(r, w, experts=7),
    "nz inputs": lambda r, w: gathered_in_the_format(r, w, dim=1),
}


class Log(logging.Handler):
    """What the package says while it is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("moe_compile").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def taken(self) -> str:
        lines, self.lines = self.lines, []
        return "\n".join(lines)


def worker(rank: int, world: int, port: int, path: str, names: list[str]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=90))
    log, found = Log(), {}
    try:
        for name in names:  # those that emulate the format come last: nothing takes that back
            torch._dynamo.reset()
            found[name] = {**SCENARIOS[name](rank, world), "log": log.taken()}
    finally:
        dist.destroy_process_group()
    if rank == 0:
        Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import ranks

    ranks.together()
    mp.start_processes(worker, (2, ranks.free_port(), sys.argv[1], sys.argv[2:] or list(SCENARIOS)), nprocs=2, start_method="fork")
