"""Seconds of the first call of a MoE block on a GPU, by moe_fused and by plain Inductor, cold and from the caches on disk.

    python benchmarks/compile_time_cuda.py --json benchmarks/results/compile_time_cuda_<card>.json

A process for each block, backend and phase, with a cache folder of its own: `cold` is the first process on that folder, `warm` the second.
All pairs of block and backend run at the same time, on a machine of 16 cores or more. What is timed is the first call of the compiled
block on 512 tokens in bf16, until the device is done; importing, making the weights and compiling something small came before.
Bytecode of this package and of Triton is on disk before, as pip leaves it, and Python may write more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
NAMES = ("Trinity-mini", "Qwen3-30B", "GLM-Air-like", "gpt-oss-20b")
BACKENDS = ("inductor", "moe_fused")
TOKENS = 512


def measure(name: str, backend: str) -> float:
    import torch
    from blocks import BLOCKS, build

    import moe_compile  # noqa: F401 (registers the backend where the checkout is not installed)

    b = BLOCKS[name]
    block = build(b, torch.bfloat16, "cuda")
    x = torch.randn(1, TOKENS, b.hidden, device="cuda").to(torch.bfloat16)
    with torch.no_grad():
        torch.compile(torch.nn.Linear(2, 2).cuda(), backend=backend)(torch.ones(1, 2, device="cuda"))
        torch._dynamo.reset()
        compiled = torch.compile(block, backend=backend)
        torch.cuda.synchronize()
        start = time.perf_counter()
        compiled(x)
        torch.cuda.synchronize()
        return time.perf_counter() - start


def in_processes(name: str, backend: str) -> dict[str, Any]:
    found: dict[str, Any] = {"block": name, "backend": backend}
    with tempfile.TemporaryDirectory() as cache:
        folders = {n: f"{cache}/{n}" for n in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MOE_COMPILE_CACHE_DIR")}
        env = {**os.environ, **folders, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        for phase in ("cold", "warm"):
            command = [sys.executable, __file__, "--measure", name, backend]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            found[phase] = round(float(done.stdout.splitlines()[-1]), 2) if done.returncode == 0 else done.stderr[-300:]
    return found


def with_bytecode() -> None:
    import compileall

    for name in ("moe_compile", "moe_compile.passes", "moe_compile.lowering", "triton"):
        found = importlib.util.find_spec(name)
        for folder in (found.submodule_search_locations or ()) if found else ():
            compileall.compile_dir(folder, quiet=2)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", nargs="+", default=list(NAMES))
    p.add_argument("--json", type=Path)
    p.add_argument("--measure", nargs=2, metavar=("BLOCK", "BACKEND"), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        print(measure(*args.measure))
        return
    with_bytecode()
    pairs = [(name, backend) for name in args.blocks for backend in BACKENDS]
    with ThreadPoolExecutor(len(pairs)) as pool:
        points = list(pool.map(lambda pair: in_processes(*pair), pairs))
    for point in points:
        print(point)
    if args.json:
        import on_cuda

        args.json.write_text(json.dumps({"machine": on_cuda.machine(), "tokens": TOKENS, "points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
