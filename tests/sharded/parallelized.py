"""`moe_compile.parallelize` in the processes of `cells`: each cell beside the undivided model, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import cells
import in_files
import recompiled
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import moe_compile
from moe_compile import peers
from moe_compile.ir import Rejection
from moe_compile.ops import summed as ops_summed
from moe_compile.ops.summed import Peers, Sum, memory_of, of_group
from moe_compile.passes import pipeline

CELLS = (("grouped", "own", "compiled"), ("loop", "shared", "compiled"), ("loop", "own", "eager"), ("grouped", "rows", "compiled"))


def table(rank: int, world: int) -> Iterator[tuple[str, Any]]:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    for names in CELLS:
        yield f"parallelize / {' / '.join(names)}", cell(rank, world, mesh, *names)
    yield "parallelize / refused", dict(refused(mesh))
    yield "summed", summed(rank, mesh.get_group())
    with in_files.peers(rank, mesh.get_group()) as found:
        yield "peers / by hand", by_hand(rank, world, found)
        yield "peers / grouped / own", cell(rank, world, mesh, "grouped", "own", "compiled", layers=1)
        yield "peers / as written", cell(rank, world, mesh, "loop", "own", "eager", layers=1)
        yield "peers / uneven", uneven(rank, mesh)
    with in_files.peers(rank, mesh.get_group(), size=memory_of(32)) as files:
        yield "peers / too small", too_small(rank, mesh.get_group(), files)
    yield "peers / chosen", dict(chosen(rank, mesh.get_group()))
    yield "parallelize / other batches", other_batches(rank, mesh)
    yield "parallelize / left on rank 1", left_on_one(rank, mesh)
    yield "parallelize / strict on rank 0", left_on_one(rank, mesh, strict=rank == 0)
    yield from recompiled.table(rank, mesh)


def cell(rank: int, world: int, mesh: Any, spelling: str, batch: str, how: str, layers: int = 2) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    one = cells.Net(spelling == "grouped", layers)
    shared, example = batch == "shared", torch.randn(cells.T, cells.H)
    m = moe_compile.parallelize(copy.deepcopy(one), mesh, example, shared_batch=shared, rows=batch == "rows")
    xs = [torch.randn(cells.T, cells.H, generator=torch.Generator().manual_seed(r)) for r in range(1 if shared else world)]
    graphs: list[str] = []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append(str(gm.graph))
        return gm.forward

    dynamic = True if (spelling, batch) == ("grouped", "own") else None  # whose numbers are symbols, but for the number of experts
    run = torch.compile(m, backend="moe_fused", options={"inner": inner}, fullgraph=True, dynamic=dynamic) if how == "compiled" else m
    out, want = run(xs[0 if shared else rank]), [one(x) for x in xs]
    weigh = torch.arange(float(cells.H))
    (out * weigh).sum().backward()
    sum((y * weigh).sum() for y in want).backward()  # type: ignore[union-attr]
    for p in m.parameters():
        if not shared and not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
    kept = m.state_dict()["layers.0.experts.up"]
    return {
        "out": cells.worst(out, want[0 if shared else rank]),
        "grad": cells.gradients(m, one),
        "kept": [type(kept).__name__, list(kept.to_local().shape)],
        "exchange": [b.exchange for b in moe_compile.last_report().blocks] if graphs else [],
        "gathers weights": any("moe_compile.whole" in g for g in graphs),
        "fewer tokens": cells.worst(run(xs[0 if shared else rank][2:]), one(xs[0 if shared else rank][2:])) if dynamic else 0.0,
        "same": bool(torch.equal(out, run(xs[0 if shared else rank]))),
        "through memory": (found := of_group(mesh.get_group().group_name)) is not None and int(found.count[0]) > 0,
    }


def uneven(rank: int, mesh: Any) -> dict[str, str]:
    """Numbers of tokens that differ; and one rank that runs the model as written where the other one runs compiled code."""
    torch._dynamo.reset()
    m = moe_compile.parallelize(Three(4), mesh, torch.randn(cells.T, cells.H))
    run = torch.compile(m, backend="moe_fused", options={"inner": "eager"}, dynamic=False)
    run(torch.randn(cells.T, cells.H))
    other = torch.randn(cells.T - 2 * rank, cells.H)
    calls = {"tokens": lambda: run(other), "written": lambda: (m if rank else run)(torch.randn(cells.T, cells.H))}
    told = {}
    for name, call in calls.items():
        try:
            told[name] = f"{name}: none of {call().shape}"
        except RuntimeError as e:
            told[name] = str(e)
    return told


def by_hand(rank: int, world: int, found: Any) -> dict[str, Any]:
    """Every exchange beside what the ranks' tensors, made of seeds, are known to be: sizes that are no whole tiles, words or chunks."""

    def of(r: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(r))

    tried = peers._try(found, torch.device("cpu"))
    x, ids, w = (
        [f(r) for r in range(world)] for f in (lambda r: of(r, 5, 1000), lambda r: of(r, 5, 3).long(), lambda r: of(r, 5, 3).half())
    )
    *whole, told, even = found.gather(x[rank], ids[rank], w[rank], 5)
    same = all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, (x, ids, w), strict=True)) and bool(even)
    # two tiles' programs beside one that carries a number alone, in turn: neither waits for what the other one does not raise
    crossed = [found.gather(of(r, 8, 1000), *ids[:1], w[0], 8) if r == rank else (None,) * 3 + (found.say(-7), False) for r in range(world)]
    said = [(told.tolist(), bool(even)) for *_, told, even in crossed]
    part = [of(r, world * 5, 1000) for r in range(world)]
    sums = torch.equal(found.scatter(part[rank]), sum(part).chunk(world)[rank])  # type: ignore[union-attr]
    wide = [
        torch.equal(found.sum(x[rank].to(d), how), sum(y.to(d) for y in x)) for d in (torch.float32, torch.float64) for how in list(Sum)[1:]
    ]
    return {
        "tried": tried,
        "same": same,
        "told": told.tolist(),
        "sums": [sums, *wide],
        "said": found.say(-1 - rank).tolist(),
        "crossed": said,
    }


def chosen(rank: int, group: Any) -> Iterator[tuple[str, bool]]:
    """Whether this rank exchanges through peers' memory, where cards have it: by the speed that each rank finds, and what it was told."""
    cases = {
        "fast": ((2e11, 2e11), ("", "")),
        "one is slow": ((2e11, 2e10), ("", "")),
        "slow, asked for": ((2e10, 2e10), ("1", "1")),
        "slow, asked for on one rank": ((2e10, 2e10), ("1", "")),
        "not wanted on one rank": ((2e11, 2e11), ("1", "0")),
    }
    for name, (speeds, told) in cases.items():

        def meet(group: Any, timeout: float, own: Tensor, speed: float = speeds[rank]) -> Peers:
            if wrong := peers.slow(speed):
                raise RuntimeError(wrong)
            return Peers(weakref.ref(group), group.group_name, rank, group.size(), [own] * group.size(), 1, None)

        here = mock.patch.multiple(peers, _own=lambda group, size: torch.zeros(size, dtype=torch.uint8), _meet=meet, _met=set())
        cards = mock.patch.multiple(torch.cuda, is_available=lambda: True)
        with here, cards, mock.patch.dict(os.environ, {"MOE_COMPILE_PEERS": told[rank]}), mock.patch.dict(ops_summed._peers, clear=True):
            yield name, peers.join(group, "cuda", memory_of(32))


def too_small(rank: int, group: Any, files: Any) -> dict[str, Any]:
    """Rows that a group's memory does not hold: collectives, behind the numbers of tokens, which it does hold."""
    each = [torch.randn(4, 8, generator=torch.Generator().manual_seed(r)) for r in range(group.size())]
    own, none = each[rank].clone().requires_grad_(), torch.empty(4, 0, dtype=torch.int32)
    rows, *_ = torch.ops.moe_compile.rows_gathered(own, none, none.float(), group.group_name)
    out = torch.ops.moe_compile.summed_rows(rows * (rank + 1), group.group_name)
    (out * 2).sum().backward()
    times = sum(range(1, group.size() + 1))
    off = max(
        cells.worst(rows, torch.cat(each)), cells.worst(out, own.detach() * times), cells.worst(own.grad, torch.full_like(own, 2.0 * times))
    )
    met, told = int(files.count[0]), ""
    try:
        torch.ops.moe_compile.rows_gathered(own[rank:].detach(), none[rank:], none[rank:].float(), group.group_name)
    except RuntimeError as e:
        told = str(e)
    return {"off": off, "met": met, "uneven": told}


def summed(rank: int, group: Any) -> dict[str, Any]:
    """The op that sums through peers' memory where there is none: an all-reduce, whose sums are alike on every rank."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    out = torch.ops.moe_compile.summed(x, group.group_name)
    (out * 2).sum().backward()
    each = [torch.randn(4, 6, generator=torch.Generator().manual_seed(r)) for r in range(group.size())]
    want = torch.stack(each).sum(0)
    return {"off": cells.worst(out, want), "grad": x.grad.unique().tolist(), "bits": out.detach().view(torch.int32).sum().item()}


def other_batches(rank: int, mesh: Any) -> str:
    """Ranks that were said to share a batch, and do not."""
    torch._dynamo.reset()
    m = moe_compile.parallelize(Three(4), mesh, torch.randn(cells.T, cells.H), shared_batch=True)
    x = torch.randn(cells.T, cells.H, generator=torch.Generator().manual_seed(rank))
    try:
        torch.compile(m, backend="moe_fused", options={"inner": "eager"})(x)
    except RuntimeError as e:
        return str(e)
    return ""


def left_on_one(rank: int, mesh: Any, **options: Any) -> dict[str, Any]:
    """A block that one rank cannot prove, of a model whose weights are divided: they are gathered on every rank then."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    one, x = Three(4), torch.randn(cells.T, cells.H)
    run = torch.compile(
        moe_compile.parallelize(copy.deepcopy(one), mesh, x), backend="moe_fused", options={"inner": "eager", **options}, fullgraph=True
    )
    no = Rejection("made up", stage="prove", code="differs")
    with mock.patch.object(pipeline, "run", side_effect=no) if rank == 1 else contextlib.nullcontext():
        try:
            out = run(x)
        except Exception as e:
            return {"raised": type(e).__name__}
    report = moe_compile.last_report()
    return {"fused": len(report.blocks), "off": cells.worst(out, one(x)), "told": [r.reason for r in report.rejected]}


class Modules(nn.Module):
    """Experts that are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(cells.H, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(cells.H, 8), nn.SiLU(), nn.Linear(8, cells.H)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + (w * (ids == e)).sum(-1, keepdim=True) * expert(x)
        return out


class Three(nn.Module):
    """A few experts, all weights of a token's choice gathered."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(cells.H, experts)
        self.up, self.down = nn.Parameter(torch.randn(experts, 8, cells.H)), nn.Parameter(torch.randn(experts, cells.H, 8))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(2, -1)
        h = torch.relu(torch.einsum("th,tkih->tki", x, self.up[ids]))
        return torch.einsum("tki,tkhi,tk->th", h, self.down[ids], w)


class Tied(nn.Module):
    """Two blocks that have one stack of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Three(4), Three(4)
        self.second.up = self.first.up

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def refused(mesh: Any) -> Iterator[tuple[str, str]]:
    x = torch.randn(cells.T, cells.H)
    tried = {
        "three experts": (Three(), mesh, x),
        "mesh": (Three(), None, x),
        "dense": (nn.Linear(cells.H, 4), mesh, x),
        "modules": (Modules(), mesh, x),
        "no example": (Three(), mesh),
        "tied": (Tied(), mesh, x),
    }
    for name, args in tried.items():
        try:
            moe_compile.parallelize(*args)  # type: ignore[arg-type]
            yield name, "placed"
        except ValueError as e:
            yield name, str(e)
    try:
        moe_compile.parallelize(Three(4), mesh, x, shared_batch=True, rows=True)
    except ValueError as e:
        yield "rows of a shared batch", str(e)
