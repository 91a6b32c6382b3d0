"""Experts over two cards: the exchange of this package over NCCL beside one card and beside transformers' all-reduce, and an FSDP2 step.

    torchrun --nproc-per-node 2 benchmarks/two_cards.py --out results.json
    torchrun --nproc-per-node 2 benchmarks/two_cards.py --device cpu     # tiny, over gloo: whether it runs at all

Each row is written as soon as it is found. Times are medians in µs of replays of a CUDA graph where "graph" is said, else of calls; the
slower rank's. On the CPU times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moe_compile
from moe_compile import exchange

TRINITY, TINY = (128, 8, 2048, 1024), (8, 2, 32, 16)
Row = dict[str, Any]


class Block(nn.Module):
    """A Trinity-like block: sigmoid scores, top-k, normalised weights, a loop over the experts that were hit."""

    def __init__(self, widths: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        e, self.k, h, i = widths
        g = torch.Generator(device).manual_seed(0)
        self.gate = nn.Parameter(torch.randn(e, h, generator=g, device=device, dtype=dtype) * h**-0.5)
        self.up = nn.Parameter(torch.randn(e, 2 * i, h, generator=g, device=device, dtype=dtype) * h**-0.5)
        self.down = nn.Parameter(torch.randn(e, h, i, generator=g, device=device, dtype=dtype) * i**-0.5)
        self.num_experts = e

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = F.linear(x, self.gate).float().sigmoid().topk(self.k, -1)
        return (w / w.sum(-1, keepdim=True)).to(x.dtype), ids

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, slot = torch.where(ids == e)
            g, u = F.linear(x[token], self.up[e]).chunk(2, -1)
            out.index_add_(0, token, F.linear(F.silu(g) * u, self.down[e]) * w[token, slot, None])
        return out


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.cuda = args.device == "cuda"
        rank = int(os.environ["LOCAL_RANK"])
        self.device = torch.device("cuda", rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        wait = datetime.timedelta(seconds=90)
        dist.init_process_group("nccl" if self.cuda else "gloo", timeout=wait, device_id=self.device if self.cuda else None)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(args.device, (self.world,), mesh_dim_names=("ep",))
        self.dtype, self.widths = (torch.bfloat16, TRINITY) if self.cuda else (torch.float32, TINY)
        self.out, self.rows, self.started = args.out, [], time.monotonic()

    def note(self, **row: Any) -> None:
        row["at"] = round(time.monotonic() - self.started, 1)
        if self.rank == 0:
            print(json.dumps(row), flush=True)
            self.rows.append(row)
            card = torch.cuda.get_device_name() if self.cuda else "cpu"
            if self.out:
                self.out.write_text(
                    json.dumps({"card": card, "cards": self.world, "torch": torch.__version__, "rows": self.rows}, indent=1)
                )

    def slower(self, value: float) -> float:
        t = torch.tensor([value], device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return float(t)

    def x(self, tokens: int, seed: int) -> Tensor:
        g = torch.Generator(self.device).manual_seed(100 + seed)
        return torch.randn(tokens, self.widths[2], generator=g, device=self.device, dtype=self.dtype)

    def block(self, divided: str | None = None) -> Any:
        m = Block(self.widths, self.device, self.dtype)
        if divided is not None:
            moe_compile.parallelize(m, self.mesh, self.x(16, 0), shared_batch=divided == "shared")
        return m

    def time(self, f: Callable[[], Any], rounds: int = 30) -> tuple[float, str]:
        """Median µs of a call, in a CUDA graph where it can be captured."""
        for _ in range(3):
            f()
        if not self.cuda:
            start = time.perf_counter()
            f()
            return (time.perf_counter() - start) * 1e6, "call"
        how, call = "call", f
        try:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                f()
            how, call = "graph", graph.replay
        except Exception as e:
            how = f"call (no graph: {str(e).splitlines()[0][:80]})"
        took = []
        for _ in range(rounds):
            dist.barrier()
            torch.cuda.synchronize()
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            for _ in range(5):
                call()
            b.record()
            torch.cuda.synchronize()
            took.append(a.elapsed_time(b) * 200)
        return self.slower(statistics.median(took)), how


def worst(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


def compiled(m: nn.Module, backend: str = "moe_fused") -> Any:
    return torch.compile(m, backend=backend, dynamic=False)


def correct(b: Bench) -> None:
    """Results and gradients beside the undivided model under the same compiler, and beside float32 as written."""
    torch._dynamo.reset()
    tokens = 512 if b.cuda else 12
    own, one = b.block("own"), b.block()
    run, whole = compiled(own), compiled(one)
    xs = [b.x(tokens, r).requires_grad_() for r in range(b.world)]
    x = xs[b.rank].detach().clone().requires_grad_()
    out = run(x)
    fused = [k.exchange for k in moe_compile.last_report().blocks]
    weigh = torch.linspace(-1, 1, b.widths[2], device=b.device, dtype=b.dtype)
    (out * weigh).sum().backward()
    want = [whole(y) for y in xs]
    sum((y * weigh).sum() for y in want).backward()  # type: ignore[union-attr]
    n = b.widths[0] // b.world
    part = slice(b.rank * n, b.rank * n + n)
    grads = {"x": worst(x.grad, xs[b.rank].grad)}
    grads |= {k: worst(getattr(own, k).grad.to_local(), getattr(one, k).grad[part]) for k in ("up", "down")}
    wide = Block(b.widths, b.device, b.dtype).float()
    with torch.no_grad():
        exact = wide(x.float()) if b.cuda else None
    beside = (
        {} if exact is None else {"off float32": b.slower(worst(out, exact)), "undivided off float32": b.slower(worst(want[b.rank], exact))}
    )
    with torch.no_grad():
        first = run(x)
        beside["repeats bit for bit"] = bool(torch.equal(first, run(x)))
    b.note(what="correct", tokens=tokens, exchange=fused, off_undivided=b.slower(worst(out, want[b.rank])), gradients=grads, **beside)


@torch.no_grad()
def travel(b: Bench) -> None:
    """Dispatch and combine alone, without experts, and what others move for the same tokens."""
    e, k, h, _ = b.widths
    tokens = 4096 if b.cuda else 12
    x, group, n = b.x(tokens, b.rank), b.mesh.get_group(), e // b.world
    ids = torch.randint(0, e, (tokens, k), device=b.device)
    w = torch.rand(tokens, k, device=b.device, dtype=b.dtype)
    took, how = b.time(lambda: exchange.gathered(x, ids, w, lambda rows, i, v: rows, b.rank * n, n, group))
    b.note(what="dispatch + combine", tokens=tokens, side="all-gather, reduce-scatter", us=took, how=how)
    both = b.x(tokens * b.world, 9)
    took, how = b.time(lambda: dist.all_reduce(both, group=group))
    b.note(what="dispatch + combine", tokens=tokens, side="all-reduce of all ranks' tokens", us=took, how=how)
    if b.cuda:
        sent, got = (torch.empty(tokens * k, h, device=b.device, dtype=b.dtype) for _ in range(2))

        def pairs() -> None:
            dist.all_to_all_single(got, sent, group=group)
            dist.all_to_all_single(sent, got, group=group)

        took, how = b.time(pairs)
        b.note(what="dispatch + combine", tokens=tokens, side="a row a pair, all-to-all twice, even splits", us=took, how=how)


@torch.no_grad()
def blocks(b: Bench) -> None:
    """A whole block on own batches of 4,096 tokens."""
    beside(b, 4096 if b.cuda else 12, "own")


@torch.no_grad()
def few(b: Bench) -> None:
    """A whole block on a shared batch of few tokens."""
    for tokens in (64, 1):
        beside(b, tokens, "shared")


def beside(b: Bench, tokens: int, batch: str) -> None:
    """A block of each rank beside an undivided one."""
    torch._dynamo.reset()
    x = b.x(tokens, b.rank if batch == "own" else 0)
    one = compiled(b.block())
    alone, how = b.time(lambda: one(x))
    b.note(what="block", tokens=tokens, batch=batch, side="undivided", us=alone, how=how)
    run = compiled(b.block(batch))
    took, how = b.time(lambda: run(x))
    b.note(what="block", tokens=tokens, batch=batch, side="divided", us=took, how=how, ratio=took / alone, off=worst(run(x), one(x)))


@torch.no_grad()
def theirs(b: Bench) -> None:
    """transformers' all-reduce for the same tokens: all ranks hold both batches and run their own experts on them."""
    from transformers import Qwen3MoeConfig
    from transformers.distributed.expert_parallel import AllReduceEP
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    e, k, h, i = b.widths
    n = e // b.world
    config = Qwen3MoeConfig(hidden_size=h, moe_intermediate_size=i, num_experts=e, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    tokens = (4096 if b.cuda else 12) * b.world
    x, block = b.x(tokens, 0), b.block()
    w, ids = block.route(x)
    for backend in ("inductor", "moe_fused") if b.cuda else ("moe_fused",):
        torch._dynamo.reset()
        experts = Qwen3MoeExperts(config).to(b.device, b.dtype)
        experts.num_experts, experts._is_expert_parallel = n, True
        for name, whole in (("gate_up_proj", block.up), ("down_proj", block.down)):
            setattr(experts, name, nn.Parameter(whole[b.rank * n :][:n].clone()))
        layer = AllReduceEP(experts, b.mesh, b.mesh)
        run = torch.compile(lambda x, ids, w, layer=layer: layer(x, ids, w), backend=backend, dynamic=False)
        took, how = b.time(functools.partial(run, x, ids, w))
        b.note(what="block", tokens=tokens // b.world, batch="own", side=f"transformers all_reduce, {backend}", us=took, how=how)


def fsdp(b: Bench) -> None:
    """A training step of Qwen3-MoE under FSDP2, each layer compiled: this package beside Inductor, in turns."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, num_attention_heads=32, head_dim=128)
    small = dict(hidden_size=32, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, num_attention_heads=2, head_dim=16)
    more = dict(
        num_hidden_layers=6 if b.cuda else 2, num_key_value_heads=4 if b.cuda else 2, vocab_size=151936 if b.cuda else 64, use_cache=False
    )
    config = Qwen3MoeConfig(**(sizes if b.cuda else small), **more)
    tokens = 4096 if b.cuda else 12
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if b.cuda else MixedPrecisionPolicy()

    def build(backend: str) -> tuple[Any, Any]:
        torch.manual_seed(0)
        with b.device:
            m = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", attn_implementation="sdpa")
        for layer in m.model.layers:
            layer.compile(backend=backend, dynamic=False)
            fully_shard(layer, mesh=b.mesh, mp_policy=policy)
        return fully_shard(m, mesh=b.mesh, mp_policy=policy), torch.optim.AdamW(m.parameters(), lr=1e-4, fused=b.cuda)

    def step(m: Any, optimizer: Any, n: int) -> float:
        ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(n * 10 + b.rank)).to(b.device)
        loss = m(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    torch._dynamo.reset()
    sides = {backend: build(backend) for backend in ("moe_fused", "inductor")}
    losses: dict[str, list[float]] = {k: [] for k in sides}
    took: dict[str, list[float]] = {k: [] for k in sides}
    for n in range(10 if b.cuda else 3):
        for backend, (m, optimizer) in sides.items():
            dist.barrier()
            start = time.perf_counter()
            losses[backend].append(step(m, optimizer, n))
            took[backend].append((time.perf_counter() - start) * 1e3)
    ms = {k: b.slower(statistics.median(v[2:])) for k, v in took.items()}
    b.note(
        what="FSDP2 step",
        model=f"Qwen3 widths, {config.num_hidden_layers} layers",
        tokens=tokens,
        ms=ms,
        ratio=ms["moe_fused"] / ms["inductor"],
        losses=losses,
    )


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--out", type=Path)
    p.add_argument("--only", nargs="*", default=["correct", "travel", "blocks", "few", "theirs", "fsdp"])
    args = p.parse_args()
    b = Bench(args)
    for name in args.only:
        try:
            globals()[name](b)
        except Exception as e:
            print(f"rank {b.rank}, {name}: {type(e).__name__}: {str(e)[:1500]}", flush=True)
            b.note(what=name, failed=f"{type(e).__name__}: {str(e)[:300]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
