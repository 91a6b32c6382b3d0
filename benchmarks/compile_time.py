#!/usr/bin/env python3
"""Compile time of moe_fused against plain Inductor, cold and from the on-disk caches.

    python benchmarks/compile_time.py            # everything, about ten minutes on two cores
    python benchmarks/compile_time.py --quick    # one repetition
    python benchmarks/compile_time.py --passes   # the passes alone, on every zoo model at its real widths: benchmarks/pass_times.py

Each measurement is a process of its own with a cache folder of its own: `cold` is the first process on that folder, `warm` the second.
What is timed is the first call of the compiled model, everything included: wall clock, or with --cpu the processor time of the process and
the compilers it starts, which other work on the machine disturbs less. Processes of the two backends alternate, the median of the
repetitions counts. Models: a decoder of every routing family with two layers, random weights, and a block whose experts are written as a
static loop over 64 experts. Prints a table and writes results/compile_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = ("afmoe", "qwen3_moe", "deepseek_v3", "static_loop")
BACKENDS = ("inductor", "moe_fused")
TOKENS = 16


def static_loop() -> tuple[Any, dict[str, Any]]:
    """One block: 64 experts in a loop that Dynamo unrolls, each with its own matrices."""
    import torch
    from torch import nn

    class Loop(nn.Module):
        def __init__(self, experts: int = 64, hidden: int = 128, inner: int = 64, k: int = 8) -> None:
            super().__init__()
            self.k = k
            self.router = nn.Linear(hidden, experts, bias=False)
            self.gates = nn.ModuleList(nn.Linear(hidden, inner, bias=False) for _ in range(experts))
            self.ups = nn.ModuleList(nn.Linear(hidden, inner, bias=False) for _ in range(experts))
            self.downs = nn.ModuleList(nn.Linear(inner, hidden, bias=False) for _ in range(experts))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w, ids = torch.topk(self.router(x).softmax(-1, dtype=torch.float32), self.k, dim=-1)
            w = w / w.sum(-1, keepdim=True)
            out = torch.zeros_like(x)
            for e, (gate, up, down) in enumerate(zip(self.gates, self.ups, self.downs)):
                share = torch.where(ids == e, w, 0.0).sum(-1, keepdim=True)
                out = out + share * down(torch.nn.functional.silu(gate(x)) * up(x))
            return out

    torch.manual_seed(0)
    return Loop().eval(), {"x": torch.randn(TOKENS, 128)}


def measure(name: str, backend: str) -> dict[str, Any]:
    """In this process: build, compile, run once. Seconds of the first call, and what the report says of it."""
    import torch

    from moe_compile import last_report
    from moe_compile.tiny import build

    torch.set_num_threads(1)
    model, inputs = static_loop() if name == "static_loop" else build(name)
    with torch.no_grad():
        want = model(**inputs)
        # both processes have loaded the compilers' own modules before the clock starts
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        started, busy = time.perf_counter(), cpu_seconds()
        got = compiled(**inputs)
        wall, busy = time.perf_counter() - started, cpu_seconds() - busy
    want, got = (getattr(t, "logits", t) for t in (want, got))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    result: dict[str, Any] = {"wall": wall, "cpu": busy}
    report = last_report()
    if backend == "moe_fused" and report is not None:
        result |= {"blocks": len(report.blocks), "rejected": len(report.rejected), "graphs": report.graph_count, "parts": report.seconds}
    return result


def cpu_seconds() -> float:
    """Processor time so far of this process and of those it started."""
    return sum(os.times()[:4])


def in_a_process(name: str, backend: str, cache: str) -> dict[str, Any]:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--measure", name, backend]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} with {backend} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, repeats: int, clock: str) -> dict[str, Any]:
    """Median cold and warm seconds of both backends on one model."""
    runs: dict[str, dict[str, list[float]]] = {b: {"cold": [], "warm": []} for b in BACKENDS}
    last: dict[str, Any] = {}
    for i in range(repeats):
        for backend in BACKENDS if i % 2 == 0 else reversed(BACKENDS):
            with tempfile.TemporaryDirectory() as cache:
                for phase in ("cold", "warm"):
                    result = in_a_process(name, backend, cache)
                    runs[backend][phase].append(result[clock])
                    last[f"{backend}_{phase}"] = result
    seconds = {b: {phase: statistics.median(v) for phase, v in r.items()} for b, r in runs.items()}
    ratio = {phase: seconds["moe_fused"][phase] / seconds["inductor"][phase] for phase in ("cold", "warm")}
    return {"model": name, "seconds": seconds, "ratio": ratio, "runs": runs, "moe_fused": last["moe_fused_cold"]}


def row(result: dict[str, Any]) -> str:
    s, r = result["seconds"], result["ratio"]
    parts = result["moe_fused"].get("parts", {})
    cells = [f"{result['model']:<12}", f"{result['moe_fused'].get('blocks', 0):>6}"]
    for phase in ("cold", "warm"):
        cells += [f"{s['inductor'][phase]:>9.2f}", f"{s['moe_fused'][phase]:>9.2f}", f"{r[phase]:>6.2f}"]
    cells += [f"{parts.get('passes', 0):>7.2f}", f"{parts.get('validate', 0):>9.2f}"]
    return "  ".join(cells)


HEAD = "model         blocks  cold: ind.       ours   ratio  warm: ind.       ours   ratio   passes   validate"


def machine() -> dict[str, Any]:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "BACKEND"), help=argparse.SUPPRESS)
    parser.add_argument("--passes", action="store_true", help="processor seconds of the passes alone; writes results/pass_times.json")
    parser.add_argument(
        "--models", nargs="+", help=f"transformers model types or static_loop (default: {', '.join(MODELS)}; all zoo models)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one repetition instead of three; with --passes static sizes alone, as many tokens as the hidden size",
    )
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall clock")
    parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.json")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return 0
    if args.passes:
        import pass_times

        return pass_times.main(args.models or (), RESULTS / "pass_times.json", machine(), args.quick)
    print(HEAD)
    results = []
    for name in args.models or MODELS:
        print(f"{name} ...", end="\r", file=sys.stderr, flush=True)
        results.append(compare(name, 1 if args.quick else 3, "cpu" if args.cpu else "wall"))
        print(row(results[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "clock": "cpu" if args.cpu else "wall", "results": results}, indent=2) + "\n")
    print("seconds of the first call, median; written to", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
