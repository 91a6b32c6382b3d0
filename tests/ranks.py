"""Several gloo processes for a test: started once for many cells, bounded in time, killed with all their children.

`start(file, function, ...)` is for tests; `python ranks.py FILE FUNCTION WORLD OUT [ARGS]` is what it starts.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COLLECTIVE = 60  # seconds for which a rank waits for another one


def start(file: Path, function: str, out: Path, *args: str, world: int = 2, timeout: float = 240) -> list[dict[str, Any]]:
    """What `function(rank, world, *args)` of a file yields in each rank, cell by cell: {name: found}, by rank.

    What a rank had found when the time was up or a process died is there; the rest is missing.
    """
    command = [sys.executable, __file__, str(file), function, str(world), str(out), *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        said = f"no answer after {timeout} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = [_read(out / f"{rank}.jsonl") for rank in range(world)]
    for cells in found:
        cells["said"] = said[-4000:]
    return found


def _read(path: Path) -> dict[str, Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {k: v for line in lines for k, v in json.loads(line).items()}


def together() -> None:
    """Import what compiles, before processes are forked: it is imported once then. Nothing of it starts a thread."""
    import lean
    import torch

    import moe_compile.passes.pipeline  # noqa: F401

    torch.set_num_threads(1)
    lean.time_no_guards()
    lean.seed_without_stacks()
    lean.fake_once()
    lean.trace_without_modules()
    lean.collect_seldom()


def imported(file: str) -> Any:
    """The module of a file, and with it all that its ranks import."""
    sys.path[:0] = [str(Path(file).parent), str(Path(__file__).parent)]
    spec = importlib.util.spec_from_file_location("cells_of_ranks", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules["cells_of_ranks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    together()
    return module


def worker(rank: int, world: int, port: int, cells: Callable[..., Iterator[tuple[str, Any]]], out: str, args: list[str]) -> None:
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=COLLECTIVE))
    try:
        with (Path(out) / f"{rank}.jsonl").open("w") as file_out:
            for name, found in cells(rank, world, *args):
                file_out.write(json.dumps({name: found}) + "\n")
                file_out.flush()
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    import torch.multiprocessing as mp

    mp._prctl_pr_set_pdeathsig(signal.SIGTERM)  # whoever ends the tests ends their processes
    path, name, world, folder, *rest = sys.argv[1:]
    of_file = getattr(imported(path), name)
    mp.start_processes(worker, (int(world), free_port(), of_file, folder, rest), nprocs=int(world), start_method="fork")
