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
from torch.distributed.device_mesh import init_device_mesh
from two_cards_models import Learner, peaks, qwen3
from two_cards_stages import Bench, there_and_back, worst

from moe_compile import peers
from moe_compile.ops import peer_rows, summed

FEW = (16, 64)  # tokens of each rank
# programs of each half at most and at least, and words of a tile: as many as there are tiles, or all whatever there is to carry
FEW_DESIGNS = ((264, 1, 4096), (264, 1, 2048), (264, 1, 1024), (264, 16, 4096), (264, 66, 4096), (264, 264, 4096))


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
        for most, least, tile in FEW_DESIGNS:
            how = dataclasses.replace(memory, workers=most, least=least, tile=tile)
            how.count = memory.count  # one count of calls, as of one object
            name = f"{least} to {most} workers, tiles of {tile}"
            rows = how.gather(x, ids, w, tokens)[0]
            right = bool(torch.equal(rows[b.rank * tokens :][:tokens], x)) and worst(how.scatter(rows), want) == 0
            b.note(what=what, side=f"  arriving, {name}", **b.time(functools.partial(how.gather, x, ids, w, tokens)), same_bits=right)
            if least == 1:  # sums are added by as many programs as there are tiles
                b.note(what=what, side=f"  leaving, {name}", **b.time(functools.partial(how.scatter, part)))


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
    rate = _in_turns(b, {ours: ("moe_compile", "moe_fused"), theirs: ("all_to_all", "inductor")}, config, mesh)
    b.note(what=ALONE, side=theirs, **{"ours over theirs": rate[ours] / rate[theirs]})
    _in_turns(b, {"undivided": ("", "inductor")}, config, mesh)


ALONE = "EP2 alone, tokens/s, nothing beside"


def _in_turns(b: Bench, sides: dict[str, tuple[str, str]], config: Any, mesh: Any) -> dict[str, float]:
    """Tokens a second of each side, the better of two rounds."""
    learners = {side: Learner(b, config, mesh, *how, dynamic=None) for side, how in sides.items()}
    said = {}
    for side, learner in learners.items():
        said[side] = [learner.step(n) for n in range(4)]
        b.note(what="training, compiled", side=side, seconds=round(sum(ms for _, ms in said[side]) / 1e3, 1))
    b.alone()
    rounds: dict[str, list[float]] = {side: [] for side in learners}
    for first in (4, 8) if b.tiny else (4, 14):
        for side, learner in learners.items():
            with b.turn():
                found = [learner.step(n) for n in range(first, first + (4 if b.tiny else 10))]
            said[side] += found
            rounds[side].append(b.slower(statistics.median(ms for _, ms in found)))
    rate = {side: b.tokens * b.world / min(ms) * 1e3 for side, ms in rounds.items()}
    for side, ms in rounds.items():
        each = [round(t, 1) for _, t in said[side]]
        b.note(what=ALONE, side=side, tokens_per_second=rate[side], ms=ms, each=each, losses=[loss for loss, _ in said[side]], gib=peaks(b))
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
