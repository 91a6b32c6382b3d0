"""Stages of `two_cards.py` beside its targets: what few rows take, what ranks choose by themselves, training alone, and the example."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from two_cards_models import OWN, Learner, a_call, mini, peaks, profile, qwen3
from two_cards_stages import Bench, there_and_back, worst

import moe_compile
from moe_compile import peers
from moe_compile.ops import peer_rows, summed

FEW = (16, 64)  # tokens of each rank
# programs of each half at least, of at most 264, and words of a tile: as many as there are tiles, or all whatever there is to carry
FEW_DESIGNS = ((1, 4096), (1, 2048), (1, 1024), (264, 4096))


@torch.no_grad()
def travel_few(b: Bench) -> None:
    """Dispatch and combine of a step of decoding: by NCCL, and through peers' memory by launches of as few programs as each design has."""
    e, k, *_ = b.widths
    group = b.mesh.get_group()
    if not peers.join(group, b.device.type, peer_rows.MEMORY):
        return b.note(what="few rows", failed="no peers' memory")
    memory = summed.of_group(group.group_name)
    assert memory is not None
    for tokens in FEW:
        what, x = f"few rows, T={tokens}", b.x(tokens, b.rank)
        ids = torch.rand(tokens, e, device=b.device).topk(k).indices
        w, part = torch.rand(tokens, k, device=b.device, dtype=b.dtype), torch.cat([x] * b.world)
        want = there_and_back(x, ids, w, group, False)
        for through in (True, False):
            run = functools.partial(there_and_back, x, ids, w, group, through)
            b.note(what=what, side="gather" if through else "gather, NCCL", **b.time(run), off=worst(run(), want))
        b.note(what=what, side="  a number alone", **b.time(lambda: memory.say(1)))
        for least, tile in FEW_DESIGNS:
            how = dataclasses.replace(memory, least=least, few=tile)
            how.count = memory.count  # one count of calls, as of one object
            name = f"{least} to 264 workers, tiles of {tile}"
            rows = how.gather(x, ids, w, tokens)[0]
            right = bool(torch.equal(rows[b.rank * tokens :][:tokens], x)) and worst(how.scatter(rows), want) == 0
            b.note(what=what, side=f"  arriving, {name}", **b.time(functools.partial(how.gather, x, ids, w, tokens)), same_bits=right)
            if least == 1:  # sums are added by as many programs as there are tiles
                b.note(what=what, side=f"  leaving, {name}", **b.time(functools.partial(how.scatter, part)))


def decode_ways(b: Bench) -> None:
    """A step of 32 sequences, half of them on each card, by each exchange."""
    ways(b, "decode")


def prefill_ways(b: Bench) -> None:
    """Two sequences of half of 4,096 tokens, one on each card, by each exchange."""
    ways(b, "prefill")


@torch.no_grad()
def ways(b: Bench, what: str) -> None:
    """Trinity-mini divided, one compiled code, captured once for each exchange: what one takes is what a step is quicker without."""
    m = mini(b, OWN)
    made, given = a_call(b, m, what, b.world)
    run = functools.partial(b.compiled(made), *given)

    def note(side: str) -> None:
        if what == "decode":
            made.cache.reset()  # which moves on with each call, and would be full at the third way
        b.note(what=what, side=side, **b.time(run, rounds=8), fused=len(moe_compile.last_report().blocks), gib=peaks(b))

    note(OWN)
    name = b.mesh.get_group().group_name
    memory = summed.of_group(name)
    if memory is None:
        return
    for side, least, tile in (("264 programs for any rows", 264, 4096), ("tiles of 1024", 1, 1024), ("tiles of 4096", 1, 4096)):
        now = memory.least, memory.few
        memory.least, memory.few = least, tile
        note(f"  {side}")
        memory.least, memory.few = now
    note(f"{OWN}, again")
    profile(b, run, f"{what}, ways")
    summed._peers.clear()
    note("  by NCCL")
    summed.set_peers(memory)
    memory.kernels = Nothing(memory.kernels)
    note("  nothing travels")


class Nothing:
    """Exchanges that give what the first one of these sizes has given: the experts have as much to do, and nothing is waited for."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.given = kernels, {}

    def gathered(self, p: Any, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        if x.shape not in self.given:
            self.given[x.shape] = self.kernels.gathered(p, x, *rest)
        rows, ids, *others = self.given[x.shape]
        return rows, ids.clone(), *others  # whoever writes over rows and weights does no harm

    def added(self, p: Any, part: Tensor, scatter: bool) -> Tensor:
        if (part.shape, scatter) not in self.given:
            self.given[part.shape, scatter] = self.kernels.added(p, part, scatter)
        return self.given[part.shape, scatter]


def chosen(b: Bench) -> None:
    """What the ranks choose by themselves, and the seconds that their meeting takes."""
    said: list[str] = []
    log = logging.getLogger("moe_compile")
    log.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    del os.environ["MOE_COMPILE_PEERS"]
    group = b.mesh.get_group()
    dist.barrier()
    with b.turn():
        start = time.monotonic()
        have = peers.join(group, b.device.type, peer_rows.MEMORY)
    row: dict[str, Any] = {"seconds": round(time.monotonic() - start, 2), "peers": have, "failed": "; ".join(said)}
    if have:
        row["speed"] = b.slower(peers._speed(summed.of_group(group.group_name)))  # type: ignore[arg-type]
    b.note(what="what the ranks choose by themselves", side="when a model is placed", **row)


def training_alone(b: Bench) -> None:
    """Tokens a second of stage "training", while nothing else runs, and in turns: each side twice. Compiled as torch does by default:
    numbers of rows that change from step to step become symbols, where transformers' all_to_all is compiled anew for each otherwise."""
    torch._dynamo.config.recompile_limit = 64  # all sides compile one code
    config = qwen3(b)
    mesh = init_device_mesh(b.device.type, (b.world // 2, 2), mesh_dim_names=("dp", "ep"))
    ours, theirs = "gather, moe_fused", "transformers all_to_all, inductor"
    learners, said = _learners(b, {ours: ("moe_compile", "moe_fused"), theirs: ("all_to_all", "inductor")}, config, mesh)
    for what, but, first in ((f"{ALONE} but the example", True, 4), (ALONE, False, 24)):
        b.alone(but)
        rate = _in_turns(b, what, learners, said, first)
        b.note(what=what, side=theirs, **{"ours over theirs": rate[ours] / rate[theirs]})
    _in_turns(b, ALONE, *_learners(b, {"undivided": ("", "inductor")}, config, mesh), 4)


ALONE = "EP2 alone, tokens/s, nothing beside"
Said = dict[str, list[tuple[float, float]]]  # (loss, milliseconds) of each step


def _learners(b: Bench, sides: dict[str, tuple[str, str]], config: Any, mesh: Any) -> tuple[dict[str, Learner], Said]:
    learners, said = {side: Learner(b, config, mesh, *how, dynamic=None) for side, how in sides.items()}, {}
    for side, learner in learners.items():
        said[side] = [learner.step(n) for n in range(4)]
        b.note(what="training, compiled", side=side, seconds=round(sum(ms for _, ms in said[side]) / 1e3, 1))
    return learners, said


def _in_turns(b: Bench, what: str, learners: dict[str, Learner], said: Said, first: int) -> dict[str, float]:
    """Tokens a second of each side, the better of two rounds."""
    rounds: dict[str, list[float]] = {side: [] for side in learners}
    for start in (first, first + 10):
        for side, learner in learners.items():
            with b.turn():
                found = [learner.step(n) for n in range(start, start + (4 if b.tiny else 10))]
            said[side] += found
            rounds[side].append(b.slower(statistics.median(ms for _, ms in found)))
    rate = {side: b.tokens * b.world / min(ms) * 1e3 for side, ms in rounds.items()}
    for side, ms in rounds.items():
        each = [round(t, 1) for _, t in said[side]]
        b.note(what=what, side=side, tokens_per_second=rate[side], ms=ms, each=each, losses=[loss for loss, _ in said[side]])
    return rate


def example(b: Bench) -> None:
    """`examples/run_trinity.py --ep`, to its end, in a process of each rank of this stage."""
    port = [0]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port[0] = s.getsockname()[1]
    dist.broadcast_object_list(port, 0)
    script = Path(__file__).parents[1] / "examples" / "run_trinity.py"
    how = ["--size", "tiny", "--device", "cpu", "--explain"] if b.tiny else ["--size", "mini", "--device", "cuda"]
    env, start = {**os.environ, "MASTER_PORT": str(port[0])}, time.monotonic()
    command = [sys.executable, str(script), *how, "--ep", str(b.world), "--json"]
    found = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    took = round(time.monotonic() - start, 1)
    told = found.stdout.strip()
    row = json.loads(told[told.index("{") :]) if b.rank == 0 and "{" in told else {}
    b.note(what="examples/run_trinity.py --ep", seconds=took, code=found.returncode, found=row)
