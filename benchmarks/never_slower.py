"""Whole MoE blocks as users call them, beside plain Inductor: one table over blocks, numbers of tokens, dtypes, forward and backward.

    python benchmarks/never_slower.py                               # everything; hours of compiling, spread over the machine's cores
    python benchmarks/never_slower.py --blocks OLMoE --tokens 1 8   # some of it

Two figures a side, in microseconds: `called`, plain calls of torch.compile(block) one after the other, host and device together; and
`graph`, the same calls captured in a CUDA graph and replayed, the device alone. Inputs rotate, so that different experts are touched.
Every process compiles one block; then they take turns, so that each is timed on a quiet machine. A ratio above 1 is ours slower: it is
marked, and the command ends with 1. Results are merged into benchmarks/results/never_slower_<card>.json.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import functools
import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TOKENS = (1, 2, 8, 32, 64, 128, 512, 2048, 4096, 8192)
DTYPES = ("bfloat16", "float16")
BACKENDS = ("inductor", "moe_fused")
KEY = ("block", "dtype", "kind", "tokens")
SLACK = 1.02  # what two runs of one program differ by
Point = dict[str, Any]


def sets_of(tokens: int) -> int:
    return 8 if tokens <= 256 else 2


# ---- one block, in a process of its own ------------------------------------------------------------------------------


def compiled(block: Any, backend: str, name: str) -> Any:
    """The block through a backend, entered by a function of its own: what Dynamo keeps of one does not lengthen the other's guards."""
    import torch

    import moe_compile  # noqa: F401 (a checkout that is not installed registers the backend)

    space: dict[str, Any] = {"block": block}
    exec(f"def {name}(x):\n    return block(x)", space)
    return torch.compile(space[name], backend=backend, dynamic=False)


def calls_of(f: Any, block: Any, inputs: list[Any], training: bool) -> list[Callable[[], object]]:
    """A call on each input; in training a step of forward and backward after which gradients are dropped."""
    import torch

    if not training:

        def infer(x: Any) -> Any:
            with torch.no_grad():
                return f(x)

        return [lambda x=x: infer(x) for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = [torch.randn_like(x) for x in inputs]
    parameters = [p for p in block.parameters() if p.requires_grad]

    def step(x: Any, grad: Any) -> None:
        f(x).backward(grad)
        x.grad = None
        for p in parameters:
            p.grad = None

    return [lambda x=x, g=g: step(x, g) for x, g in zip(leaves, grads)]


def called(calls: list[Callable[[], object]]) -> float:
    """Microseconds of a call, over calls one after the other."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls * 2:
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / (2 * len(calls)) * 1e6


def replayed(calls: list[Callable[[], object]]) -> Callable[[], float]:
    """The calls captured in one CUDA graph; microseconds of a call at each replay."""
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / len(calls)

    return replay


def in_turns(sides: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """The lower quartile of each side's figures, taken in turns: a machine that is busy for a while slows both."""
    seen: dict[str, list[float]] = {n: [] for n in sides}
    until = time.perf_counter() + seconds * len(sides)
    while time.perf_counter() < until or min(map(len, seen.values())) < 6:
        for n, side in sides.items():
            seen[n].append(side())
    return {n: sorted(v)[len(v) // 4] for n, v in seen.items()}


def worker(args: argparse.Namespace) -> None:
    """Compile all that is asked for of one block, then time it when it is this process's turn. Prints a JSON line a point."""
    import torch
    from blocks import BLOCKS, build

    sys.path.insert(0, str(Path(__file__).parent))
    (name,), (dtype,), (kind,) = args.blocks, args.dtypes, args.kinds
    training, b = kind == "training", BLOCKS[name]
    block = build(b, getattr(torch, dtype), "cuda")
    block.requires_grad_(training)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    ready: dict[tuple[int, str], Any] = {}
    for tokens, backend in itertools.product(args.tokens, args.backends):
        g = torch.Generator("cuda").manual_seed(tokens)
        inputs = [torch.randn(1, tokens, b.hidden, device="cuda", generator=g).to(getattr(torch, dtype)) for _ in range(sets_of(tokens))]
        point: Point = {"block": name, "dtype": dtype, "kind": kind, "tokens": tokens}
        start = time.perf_counter()
        try:
            f = compiled(block, backend, f"{backend}_{tokens}")
            calls = calls_of(f, block, inputs, training)
            result = calls[0]()
            for call in calls:
                call()
            torch.cuda.synchronize()
            ready[tokens, backend] = (point, calls, result, time.perf_counter() - start, fused())
        except Exception as e:
            print(json.dumps({**point, "failed": f"{backend}: {type(e).__name__}: {str(e)[:200]}"}), flush=True)
    print("ready", flush=True)
    sys.stdin.readline()
    for tokens in args.tokens:
        sides = {backend: ready.pop((tokens, backend)) for backend in args.backends if (tokens, backend) in ready}
        if len(sides) == len(args.backends):
            print(json.dumps(measured(sides, args.seconds)), flush=True)
        del sides
        gc.collect()
        torch.cuda.empty_cache()


def fused() -> int:
    import moe_compile

    report = moe_compile.last_report()
    return len(report.blocks) if report else 0


def measured(sides: dict[str, Any], seconds: float) -> Point:
    """The sides in turns."""
    import torch

    point: Point = dict(next(iter(sides.values()))[0])
    if "moe_fused" in sides:
        point["fused"] = sides["moe_fused"][4]
    point["compile_s"] = {n: round(s[3], 1) for n, s in sides.items()}
    results = [s[2] for s in sides.values()]
    if len(sides) == 2 and isinstance(results[0], torch.Tensor):
        a, c = (r.float() for r in results)
        point["difference"] = float(f"{float((a - c).norm() / a.norm()):.2e}")
    found = in_turns({n: functools.partial(called, s[1]) for n, s in sides.items()}, seconds)
    graphs: dict[str, Callable[[], float]] = {}
    for n, s in sides.items():
        try:
            graphs[n] = replayed(s[1])
        except Exception as e:  # a step that waits for the device cannot be captured
            point[f"graph_{n}_failed"] = f"{type(e).__name__}: {str(e)[:120]}"
    point |= {f"called_{n}": round(us, 1) for n, us in found.items()}
    return point | {f"graph_{n}": round(us, 1) for n, us in in_turns(graphs, seconds).items()} if graphs else point


# ---- all of them -------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, card: str) -> list[Point]:
    """A process for every block, dtype and kind: they compile at the same time and are timed one after the other. What a process has
    measured is kept when it is done, so that a run cut short loses one."""
    jobs = list(itertools.product(args.blocks, args.dtypes, args.kinds))
    points: list[Point] = []
    for i in range(0, len(jobs), args.jobs):
        together(jobs[i : i + args.jobs], args, points, lambda: store(points, card))
    return points


def together(jobs: list[tuple[str, str, str]], args: argparse.Namespace, points: list[Point], done: Callable[[], object]) -> None:
    rest = ["--tokens", *map(str, args.tokens), "--backends", *args.backends, "--seconds", str(args.seconds), "--worker"]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--blocks", block, "--dtypes", dtype, "--kinds", kind, *rest],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None if args.verbose else subprocess.DEVNULL, text=True, env=environment,
        )
        for block, dtype, kind in jobs
    ]  # fmt: skip
    for process in started:  # all compile meanwhile
        for point in until_ready(process):
            points.append(point)
            print(row(point), flush=True)
    for process in started:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write("\n")
            process.stdin.flush()
        except BrokenPipeError:
            continue
        for line in process.stdout:
            if line.startswith("{"):
                points.append(json.loads(line))
                print(row(points[-1]), flush=True)
        process.wait()
        done()


def until_ready(process: Any) -> Iterator[Point]:
    for line in process.stdout:
        if line.startswith("ready"):
            return
        if line.startswith("{"):
            yield json.loads(line)


# ---- the table ---------------------------------------------------------------------------------------------------------


def ratio(p: Point, what: str) -> float | None:
    ours, theirs = p.get(f"{what}_moe_fused"), p.get(f"{what}_inductor")
    return ours / theirs if ours and theirs else None


def row(p: Point) -> str:
    """One line: microseconds of ours and of Inductor's, and the ratio, as called and in a graph. `*`: slower."""
    head = f"{p['block']:26s} {p['dtype']:9s} {p['kind']:9s} {p['tokens']:5d}"
    if "failed" in p:
        return f"{head}  {p['failed']}"
    cells = []
    for what in ("called", "graph"):
        r = ratio(p, what)
        figures = f"{p.get(f'{what}_moe_fused', 0):9.1f} {p.get(f'{what}_inductor', 0):9.1f}"
        cells.append(f"{figures} {r:5.2f}{'*' if r > SLACK else ' '}" if r is not None else f"{figures}     - ")
    return f"{head} {cells[0]}  {cells[1]}{'' if p.get('fused') else '  not fused'}"


_COLUMNS = f"{'Inductor':>9s} {'x':>5s}"
HEAD = f"{'block':26s} {'dtype':9s} {'kind':9s} {'T':>5s} {'called us':>9s} {_COLUMNS}   {'graph us':>9s} {_COLUMNS}"


def summary(points: list[Point]) -> str:
    found = {what: [r for p in points if (r := ratio(p, what)) is not None] for what in ("called", "graph")}
    return "; ".join(
        f"{what}: {sum(r > SLACK for r in rs)} of {len(rs)} slower, geometric mean {statistics.geometric_mean(rs):.2f}"
        for what, rs in found.items()
        if rs
    )


def store(points: list[Point], card: str) -> Path:
    """Merge into the card's file: points measured again replace the old ones."""
    path = RESULTS / f"never_slower_{re.sub(r'[^A-Za-z0-9]+', '_', card).strip('_').lower()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["points"] if path.exists() else []
    by_key: dict[Any, Point] = {}
    for p in (*old, *points):
        key = tuple(p[k] for k in KEY)
        by_key[key] = {**by_key.get(key, {}), **p}
    path.write_text(json.dumps({"machine": machine(card), "points": list(by_key.values())}, indent=1) + "\n")
    return path


def machine(card: str) -> dict[str, str]:
    import torch
    import transformers
    import triton

    return {
        "card": card,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


@contextmanager
def alone() -> Iterator[None]:
    """One run on a machine at a time."""
    with open("/tmp/never_slower.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    sys.path.insert(0, str(Path(__file__).parent))
    from blocks import BLOCKS

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--kinds", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    p.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="measure one side only")
    p.add_argument("--jobs", type=int, default=12, help="blocks compiled at the same time (default: %(default)s)")
    p.add_argument("--seconds", type=float, default=0.15, help="of timing a figure (default: %(default)s)")
    p.add_argument("--verbose", action="store_true", help="show what the processes say")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main() -> int:
    args = parse()
    if args.worker:
        worker(args)
        return 0
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device")
    card = torch.cuda.get_device_name(0)
    print(HEAD)
    with alone():
        points = run(args, card)
    print(f"{len(points)} points on {card}: {summary(points)}; kept in {store(points, card)}")
    return int(any((r := ratio(p, what)) is not None and r > SLACK for p in points for what in ("called", "graph")))


if __name__ == "__main__":
    sys.exit(main())
