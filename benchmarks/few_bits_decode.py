"""Decoding with Trinity-Mini's shape (32 layers, random weights), experts in bf16 and in few bits: tokens a second at batch 1 on a GPU.

    python benchmarks/few_bits_decode.py                     # bf16, then fp8
    python benchmarks/few_bits_decode.py --weights mxfp4 --json results.json

A process for each kind of weights compiles the decoding step by moe_fused; they compile at the same time and are timed one after the
other: as called (mode "default") and in a CUDA graph, 64 tokens behind 256 in the cache, the median of five rounds.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
TOKENS, BEFORE, ROUNDS = 64, 256, 5
LOCK = Path("/tmp/few_bits_decode.lock")


def measure(weights: str, layers: int) -> dict[str, Any]:
    import torch
    import trinity
    from decoding import Session
    from quantised import quantise

    import moe_compile

    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # who is timed waits for those that compile
        model = trinity.build_mini(torch.device("cuda"), torch.bfloat16, layers, 0)
        if weights != "bf16":
            quantise(model, weights)
            torch.cuda.empty_cache()
        session = Session(model, "moe_fused", BEFORE, BEFORE + TOKENS)
        session.warm_up("decode")
        report = moe_compile.last_report()
        replayed = session.in_graphs()
        replayed.warm_up("decode")
    found: dict[str, Any] = {"weights": weights, "layers": layers, "fused": len(report.blocks) if report else 0}
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, s in (("called", session), ("graph", replayed)):
            found[f"{name}_ms"] = round(statistics.median(milliseconds(s) for _ in range(ROUNDS)), 3)
    found["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return found


def milliseconds(session: Any) -> float:
    """Of a token."""
    import torch

    with torch.no_grad():
        session._set_length(BEFORE)
        token = torch.full((1, 1), 7, device=session.device)
        position = torch.full((1, 1), BEFORE, device=session.device)
        start = session.now()
        for _ in range(TOKENS):
            token = session.decode(token, position).argmax(-1).view(1, 1)
            position = position + 1
        return float((session.now() - start) / TOKENS * 1e3)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--weights", nargs="+", default=["bf16", "fp8"], choices=("bf16", "fp8", "mxfp4", "int4"))
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--json", type=Path)
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        print(json.dumps(measure(args.weights[0], args.layers)))
        return
    start = time.perf_counter()
    command = [sys.executable, __file__, "--worker", "--layers", str(args.layers), "--weights"]
    running = [subprocess.Popen([*command, w], stdout=subprocess.PIPE, text=True) for w in args.weights]
    found = [json.loads(r.communicate()[0].splitlines()[-1]) for r in running]
    for f in found:
        print(f, flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        import on_cuda

        args.json.write_text(json.dumps({"machine": on_cuda.machine(), "points": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
