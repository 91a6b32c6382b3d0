"""What a block's time under CUDA graphs is made of: every kernel of one call, in order, with its microseconds and the gap before it.

    python benchmarks/profile_blocks.py --blocks Qwen3-30B Ernie-4.5-21B --tokens 1 8

The compiled block is called on eight inputs in one graph; the profiler reads a few replays. A figure is the median over calls. `gap`
is what lies between the end of the kernel before and this one's start: negative where a kernel was launched early and waits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from blocks import BLOCKS, build
from never_slower import compiled, replayed, sets_of


def kernels(replay: Any, replays: int, calls: int) -> list[list[tuple[str, float, float]]]:
    """(name, microseconds, gap) of every kernel, call by call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(replays):
            replay()
        torch.cuda.synchronize()
    path = Path("/tmp/moe_profile.json")
    p.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events.sort(key=lambda e: e["ts"])
    each = len(events) // (replays * calls)
    found, last = [], None
    for e in events:
        gap = 0.0 if last is None else e["ts"] - last
        last = e["ts"] + e["dur"]
        found.append((e["name"], float(e["dur"]), gap))
    return [found[i * each : (i + 1) * each] for i in range(replays * calls)]


def shown(name: str, tokens: int, backend: str) -> dict[str, Any]:
    b = BLOCKS[name]
    block = build(b, torch.bfloat16, "cuda").requires_grad_(False)
    g = torch.Generator("cuda").manual_seed(tokens)
    inputs = [torch.randn(1, tokens, b.hidden, device="cuda", generator=g).bfloat16() for _ in range(sets_of(tokens))]
    f = compiled(block, backend, f"{backend}_{tokens}")

    def call(x: Any) -> Any:
        with torch.no_grad():
            return f(x)

    calls = [lambda x=x: call(x) for x in inputs]
    for c in calls:
        c()
    replay = replayed(calls)
    us = statistics.median(replay() for _ in range(40))
    rows = kernels(replay, 6, len(inputs))
    print(f"{name}, {tokens} tokens, {backend}: {us:.1f} us in a graph", flush=True)
    table = []
    for at in zip(*rows):
        row = (at[0][0], statistics.median(k[1] for k in at), statistics.median(k[2] for k in at))
        table.append(row)
        print(f"    {row[1]:8.2f}  gap {row[2]:6.2f}  {row[0][:100]}", flush=True)
    return {"block": name, "tokens": tokens, "graph_us": us, "kernels": table}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    p.add_argument("--tokens", nargs="+", type=int, default=[1])
    p.add_argument("--backend", default="moe_fused")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    found = []
    for name in args.blocks:
        for tokens in args.tokens:
            found.append(shown(name, tokens, args.backend))
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
