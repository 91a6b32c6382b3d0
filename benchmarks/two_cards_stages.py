"""What one stage of `two_cards.py` measures: run by it in every rank, `python two_cards_stages.py STAGE LINES [--tiny]`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 (defines grouped_mm_fallback, which is there for fp32 too)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import moe_compile
from moe_compile import exchange, peers
from moe_compile.ops import peer_rows, summed

DESIGNS = ((132, 1), (132, 2), (264, 1), (512, 1))  # (workers, chunks) of an exchange through peers' memory
# experts of all ranks, experts a token, model width, experts' width
TRINITY, DEEPSEEK, TINY = (128, 8, 2048, 1024), (256, 8, 7168, 2048), (8, 2, 32, 16)


class Block(nn.Module):
    """A Trinity-like block: sigmoid scores, top-k, normalised weights, sorted rows and grouped products."""

    def __init__(self, widths: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        e, self.k, h, i = widths
        g = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        for name, shape in (("gate", (e, h)), ("up", (e, 2 * i, h)), ("down", (e, h, i))):
            p = torch.empty(shape, device=device, dtype=dtype)
            setattr(self, name, nn.Parameter(p if g is None else p.normal_(std=shape[-1] ** -0.5, generator=g)))
        self.num_experts = e

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = F.linear(x, self.gate).float().sigmoid().topk(self.k, -1)
        return (w / w.sum(-1, keepdim=True)).to(x.dtype), ids

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        e, order = ids.reshape(-1).sort()
        ends = torch.histc(e.float(), bins=self.num_experts, min=0, max=self.num_experts - 1).cumsum(0).int()
        product = F.grouped_mm if x.dtype == torch.bfloat16 else torch.ops.transformers.grouped_mm_fallback
        g, u = product(x[order // self.k], self.up.mT, offs=ends).chunk(2, -1)
        y = product(F.silu(g) * u, self.down.mT, offs=ends) * w.reshape(-1)[order, None]
        return y[order.argsort()].view(*ids.shape, -1).sum(1)


class Bench:
    """The group, the sizes and how a time is taken."""

    def __init__(self, lines: Path, tiny: bool) -> None:
        self.tiny, self.lines = tiny, lines
        rank = int(os.environ["LOCAL_RANK"])
        self.one_card = not tiny and torch.cuda.device_count() < int(os.environ["WORLD_SIZE"])  # NCCL does not take that: gloo
        self.device = torch.device("cpu") if tiny else torch.device("cuda", 0 if self.one_card else rank)
        if tiny:
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(self.device)
            torch.empty(1, device=self.device)
            os.environ["LOCAL_RANK"] = str(self.device.index)
        wait = datetime.timedelta(seconds=90)
        gloo = tiny or self.one_card
        dist.init_process_group("gloo" if gloo else "nccl", timeout=wait, device_id=None if gloo else self.device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.device.type, (self.world,), mesh_dim_names=("ep",))
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.widths = TINY if tiny else TRINITY
        self.tokens = 12 if tiny else 4096
        self.turns = 0
        self.started = time.monotonic()
        card = "cpu" if tiny else torch.cuda.get_device_name()
        self.note(machine={"card": card, "torch": torch.__version__} | ({"one card for all ranks": True} if self.one_card else {}))

    def note(self, **row: Any) -> None:
        if self.rank == 0:
            with self.lines.open("a") as f:
                f.write(json.dumps({**row, **({} if "machine" in row else {"at": round(time.monotonic() - self.started, 1)})}) + "\n")

    def slower(self, value: float) -> float:
        t = torch.tensor([value], device=self.device)
        dist.all_reduce(t, dist.ReduceOp.MAX)
        return float(t)

    def x(self, tokens: int, seed: int, width: int | None = None) -> Tensor:
        g = torch.Generator(self.device).manual_seed(100 + seed)
        return torch.randn(tokens, width or self.widths[2], generator=g, device=self.device, dtype=self.dtype)

    def block(self, batch: str | None = None) -> Any:
        """batch: "own", "shared" or "rows" of a divided block."""
        m = Block(self.widths, self.device, self.dtype)
        if batch is not None:
            moe_compile.parallelize(m, self.mesh, self.x(16, 0), shared_batch=batch == "shared", rows=batch == "rows")
        return m

    def compiled(self, m: Any, backend: str = "moe_fused", dynamic: bool | None = False) -> Any:
        if not self.tiny:
            return torch.compile(m, backend=backend, dynamic=dynamic)
        ours = backend == "moe_fused"
        return torch.compile(m, backend=backend if ours else "eager", dynamic=dynamic, **({"options": {"inner": "eager"}} if ours else {}))

    def time(self, f: Callable[[], Any], rounds: int = 30, graph: bool = True) -> dict[str, Any]:
        """Median µs of a call, in a CUDA graph where it can be captured."""
        for _ in range(1 if self.tiny else 3):
            f()
        if self.tiny:
            start = time.perf_counter()
            f()
            return {"us": (time.perf_counter() - start) * 1e6, "how": "call"}
        how, call = self.graph_of(f) if graph else ("call", f)
        with self.turn():
            took = []
            for _ in range(1 if self.one_card else 5):  # other stages compile meanwhile, and may come between for a moment
                took.append(self.slower(statistics.median(self.replays(call, 2 if self.one_card else rounds))))
                time.sleep(0.2)
        return {"us": min(took), "how": how}

    def replays(self, call: Callable[[], Any], rounds: int) -> Iterator[float]:
        """µs of a call, the mean of five."""
        for _ in range(rounds):
            dist.barrier()
            torch.cuda.synchronize()
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            for _ in range(5):
                call()
            b.record()
            torch.cuda.synchronize()
            yield a.elapsed_time(b) * 200

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """While no other stage is timed. The ranks wait for the first one, whose lock it is, by the store: not with a card that is busy."""
        self.turns += 1
        store, key = dist.distributed_c10d._get_default_store(), f"turn/{self.turns}"
        with open(os.environ["TURN"]) as file:
            if self.rank == 0:
                fcntl.flock(file, fcntl.LOCK_EX)
                store.set(key, "")
            else:
                store.wait([key], datetime.timedelta(seconds=600))
            yield
            dist.barrier()
            if not self.tiny:
                torch.cuda.synchronize()

    def alone(self, but_the_example: bool = False) -> None:
        """Waits until all other stages have ended, for calls of the host that are timed: they compile on many processors meanwhile."""
        at = os.environ.get("ALONE", "") + (".but" if but_the_example else "")
        while "ALONE" in os.environ and not os.path.exists(at):
            time.sleep(0.5)
        dist.barrier()

    def graph_of(self, f: Callable[[], Any]) -> tuple[str, Callable[[], Any]]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                f()
        except Exception as e:
            return f"call (no graph: {str(e).splitlines()[0][:80]})", f
        return "graph", graph.replay


def worst(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


def correct(b: Bench) -> None:
    """Results and gradients of each exchange beside the undivided model under the same compiler, and the same bits twice."""
    b.tokens = 12 if b.tiny else 512
    one = b.block()
    whole = b.compiled(one)
    xs = [b.x(b.tokens, r).requires_grad_() for r in range(b.world)]
    weigh = torch.linspace(-1, 1, b.widths[2], device=b.device, dtype=b.dtype)
    want = [whole(y) for y in xs]
    sum((y * weigh).sum() for y in want).backward()  # type: ignore[union-attr]
    part = slice(b.rank * b.widths[0] // b.world, (b.rank + 1) * b.widths[0] // b.world)
    for batch in ("own",) if b.one_card else ("own", "rows"):
        torch._dynamo.reset()
        own = b.block(batch)
        run = b.compiled(own)
        x = xs[b.rank].detach().clone().requires_grad_()
        out = run(x)
        fused = [k.exchange for k in moe_compile.last_report().blocks]
        (out * weigh).sum().backward()
        grads = {"x": worst(x.grad, xs[b.rank].grad)}
        grads |= {k: worst(getattr(own, k).grad.to_local(), getattr(one, k).grad[part]) for k in ("up", "down")}
        with torch.no_grad():
            same = bool(torch.equal(run(x), run(x)))
        b.note(what="correct", side=batch, fused=fused, off=b.slower(worst(out, want[b.rank])), grads=grads, same_bits=same)


@torch.no_grad()
def travel(b: Bench) -> None:
    """Dispatch and combine alone, without experts, and what others move for the same tokens."""
    e, k, h, _ = b.widths
    x, group, n = b.x(b.tokens, b.rank), b.mesh.get_group(), e // b.world
    ids = torch.rand(b.tokens, e, device=b.device).topk(k).indices
    w = torch.rand(b.tokens, k, device=b.device, dtype=b.dtype)
    what = "dispatch + combine"

    def local(rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return rows

    have = peers.join(group, b.device.type, peer_rows.MEMORY)
    if b.one_card:
        return by_hand(b, (x, ids, w))
    want = there_and_back(x, ids, w, group, False)
    for side, through in (("gather", have), ("gather, NCCL", False)):
        if side == "gather" or have:
            run = functools.partial(there_and_back, x, ids, w, group, through)
            b.note(what=what, side=side, **b.time(run), peers=through, off=worst(run(), want))
    if have:
        speed = peers._speed(summed.of_group(group.group_name))  # type: ignore[arg-type]
        b.note(what="bytes/s from card to card", side="as the ranks find it when they meet", speed=b.slower(speed))
    for name, f in halves(b, x, ids, w).items() if have else ():
        b.note(what=what, side=name, **b.time(f))
    b.note(what=what, side="rows, one graph of Dynamo's", **b.time(lambda: exchange.sent(x, ids, w, local, n, group), graph=False))
    both = b.x(b.tokens * b.world, 9)
    b.note(what=what, side="all-reduce of all ranks' tokens", **b.time(lambda: dist.all_reduce(both, group=group)))
    sent, got = (torch.empty(b.tokens * k, h, device=b.device, dtype=b.dtype) for _ in range(2))

    def pairs() -> None:
        dist.all_to_all_single(got, sent, group=group)
        dist.all_to_all_single(sent, got, group=group)

    b.note(what=what, side="a row a pair, all-to-all twice", **b.time(pairs))


def there_and_back(x: Tensor, ids: Tensor, w: Tensor, group: Any, through: bool) -> Tensor:
    return exchange.leaving(exchange.arriving(x, ids, w, group, peers=through)[0], group, through)


def by_hand(b: Bench, own: tuple[Tensor, Tensor, Tensor]) -> None:
    """Rows through peers' memory, beside what the other ranks' own are known to be: they are made of seeds."""
    group = b.mesh.get_group()
    rows, ids, w = exchange.arriving(*own, group, peers=True)
    want = torch.cat([b.x(b.tokens, r, own[0].shape[1]) for r in range(b.world)])
    at = slice(b.rank * b.tokens, (b.rank + 1) * b.tokens)
    mine = bool(torch.equal(ids[at], own[1])) and bool(torch.equal(w[at], own[2]))
    back = exchange.leaving(rows * (1 + b.rank), group, peers=True)
    sums = sum(want[at] * (1 + r) for r in range(b.world))
    again = exchange.leaving(rows * (1 + b.rank), group, peers=True)
    same = bool(torch.equal(rows, want)) and mine and bool(torch.equal(back, again))
    b.note(what="arriving, leaving", side="through memory", off=b.slower(worst(back, sums)), same_bits=same)


def halves(b: Bench, x: Tensor, ids: Tensor, w: Tensor) -> dict[str, Callable[[], Any]]:
    """The parts of a gather through peers' memory."""
    group = b.mesh.get_group()
    memory = summed.of_group(group.group_name)
    assert memory is not None
    part = torch.cat([x] * b.world)
    found: dict[str, Callable[[], Any]] = {
        "  arriving": lambda: exchange.arriving(x, ids, w, group, peers=True),
        "  leaving": lambda: exchange.leaving(part, group, peers=True),
        "  only a number each": lambda: memory.say(1),
        "  a copy of the rows": lambda: x.clone(),
        "  arriving, NCCL": lambda: exchange.arriving(x, ids, w, group),
        "  leaving, NCCL": lambda: exchange.leaving(part, group),
    }
    for workers, chunks in DESIGNS:
        how = dataclasses.replace(memory, workers=workers, chunks=chunks)
        how.count = memory.count  # one count of calls, as of one object
        name = f"{workers} workers, {chunks} chunks"
        found[f"  arriving, {name}"] = lambda how=how: how.gather(x, ids, w, b.tokens)
        found[f"  leaving, {name}"] = lambda how=how: how.scatter(part)
    return found


def travel_deepseek(b: Bench) -> None:
    b.widths = b.widths if b.tiny else DEEPSEEK
    travel(b)


@torch.no_grad()
def sums(b: Bench) -> None:
    """The sum of what all ranks hold, as results on a shared batch are summed: by NCCL, through peers' memory each way, and as chosen."""
    group = b.mesh.get_group()
    have = peers.join(group, b.device.type)
    memory = summed.of_group(group.group_name)
    for tokens in (1, 12) if b.tiny else (1, 16, 64, 256, 1024, 2048, 4096):
        what, x = f"sum, T={tokens}", b.x(tokens, b.rank)
        want = sum(b.x(tokens, r).double() for r in range(b.world))
        ways: dict[str, Callable[[], Tensor]] = {}
        if not b.one_card:
            ways["nccl"] = lambda x=x: fc.wait_tensor(fc.all_reduce(x, "sum", group))
        if memory is not None:
            ways["TWO_SHOT"] = functools.partial(memory.sum, x, summed.Sum.TWO_SHOT)
        ways["op"] = lambda x=x: torch.ops.moe_compile.summed(x, group.group_name)
        for side, f in ways.items():
            took, out = b.time(f), f().clone()
            each: list[Any] = [None] * b.world
            dist.all_gather_object(each, int(out.view(torch.int16 if out.dtype == torch.bfloat16 else torch.int32).long().sum()))
            same = len(set(each)) == 1 and bool(torch.equal(out, f()))
            b.note(what=what, side=side, **took, off=worst(out, want), same_bits=same, peers=have)


@torch.no_grad()
def dead(b: Bench) -> None:
    """The last rank is gone: how long another one waits for it in a sum through peers' memory, and what it is told."""
    group = b.mesh.get_group()
    have = peers.join(group, b.device.type)
    if have:
        summed.of_group(group.group_name).timeout = 5000  # type: ignore[union-attr]
    dist.barrier()
    if b.rank == b.world - 1 or not have:
        time.sleep(0 if have else 1)
        b.note(what="a sum whose peer is gone", failed="no peers' memory")
        os._exit(0)
    start, told = time.monotonic(), ""
    try:
        torch.ops.moe_compile.summed(b.x(64, 0), group.group_name).sum().item()
    except Exception as e:
        told = f"{type(e).__name__}: {str(e).splitlines()[0]}"
    said = summed.of_group(group.group_name).missing()  # type: ignore[union-attr]
    b.note(what="a sum whose peer is gone", failed=f"{told}; {said}", seconds=round(time.monotonic() - start, 1))
    os._exit(0)


def block(b: Bench) -> None:
    """A whole block on own batches."""
    beside(b, b.tokens, ("own", "own, nccl", "rows"))


def block_deepseek(b: Bench) -> None:
    b.widths = b.widths if b.tiny else DEEPSEEK
    beside(b, b.tokens, ("own", "own, nccl"))


def few(b: Bench) -> None:
    """A whole block on a shared batch of few tokens."""
    beside(b, 64, ("shared", "shared, nccl"))


def one(b: Bench) -> None:
    beside(b, 1, ("shared", "shared, nccl"))


@torch.no_grad()
def beside(b: Bench, tokens: int, batches: tuple[str, ...]) -> None:
    """A block of each rank beside an undivided one."""
    what = f"block, {'shared' if batches[0] == 'shared' else 'own'}, T={tokens}"
    x = b.x(tokens, 0 if batches[0] == "shared" else b.rank)
    alone, want = undivided(b, x)
    b.note(what=what, side="undivided", **alone)
    sides = {"own": "divided", "shared": "divided", "rows": "divided, rows by all-to-all", "shared, nccl": "divided, NCCL"}
    sides["own, nccl"] = sides["shared, nccl"]
    for batch in batches[:1] if b.one_card else batches:
        torch._dynamo.reset()
        if batch.endswith("nccl"):
            without_peers(b)
        run = b.compiled(b.block(batch.partition(",")[0]))
        took = b.time(functools.partial(run, x), graph=batch != "rows")
        out = run(x).clone()
        same = bool(torch.equal(out, run(x)))
        b.note(what=what, side=sides[batch], **took, ratio=took["us"] / alone["us"], off=worst(out, want), same_bits=same)


def without_peers(b: Bench) -> None:
    """Sums of models that are placed from now on are collectives."""
    os.environ["MOE_COMPILE_PEERS"] = "0"
    summed._peers.clear()


def undivided(b: Bench, x: Tensor) -> tuple[dict[str, Any], Tensor]:
    whole = b.compiled(b.block())
    return b.time(lambda: whole(x)), whole(x).clone()


def apart(b: Bench, config: Any, whole: Any, how: str, mesh: Any) -> tuple[Any, Any]:
    """(transformers' experts with this rank's part of the weights, its exchange or ours); `how`: the name of an implementation."""
    from transformers.distributed.expert_parallel import EPImplementationInterface
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import moe_compile.integrations.transformers  # noqa: F401 (registers ours)

    n = config.num_experts // mesh.size()
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config).to(b.dtype)
    experts.num_experts, experts._is_expert_parallel = n, True
    for name, weight in (("gate_up_proj", whole[0]), ("down_proj", whole[1])):
        setattr(experts, name, nn.Parameter(weight.detach()[mesh.get_local_rank() * n :][:n].clone()))
    alone = init_device_mesh(b.device.type, (b.world, 1), mesh_dim_names=("all", "tp"))["tp"]
    tp = mesh if how == "all_reduce" else alone
    return experts, EPImplementationInterface()[how](experts, mesh, tp)


@torch.no_grad()
def theirs(b: Bench) -> None:
    """transformers' own expert parallelism under Inductor, for the tokens of stage "block", routing aside."""
    from transformers import Qwen3MoeConfig

    e, k, h, i = b.widths
    config = Qwen3MoeConfig(hidden_size=h, moe_intermediate_size=i, num_experts=e, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"
    m = b.block()
    for how, tokens in (("all_reduce", b.tokens * b.world), ("all_to_all", b.tokens), ("all_reduce", 64)):
        x = b.x(tokens, b.rank if how == "all_to_all" else 0)
        w, ids = m.route(x)
        torch._dynamo.reset()
        layer = apart(b, config, (m.up, m.down), how, b.mesh)[1]
        run = b.compiled(lambda x, ids, w, layer=layer: layer(x, ids, w), "inductor")
        took = b.time(functools.partial(run, x, ids, w), graph=how == "all_reduce")
        per = tokens // b.world if tokens > b.tokens else tokens
        b.note(what=f"block, {'shared' if tokens == 64 else 'own'}, T={per}", side=f"transformers {how}, inductor", **took)


def main() -> None:
    import two_cards_apart
    import two_cards_models

    name, lines = sys.argv[1], Path(sys.argv[2])
    b = Bench(lines, "--tiny" in sys.argv)
    stage = globals().get(name) or getattr(two_cards_models, name, None) or getattr(two_cards_apart, name)
    try:
        stage(b)
        dist.barrier()
    except Exception as e:
        print(f"rank {b.rank}, {name}: {type(e).__name__}: {str(e)[:1500]}", flush=True)
        b.note(what=name, failed=f"{type(e).__name__}: {str(e)[:300]}")
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
