"""Routed experts on weights in few bits on a CPU, beside the kernel for bf16 on the same shape, in one interleaved run on one thread.

    python benchmarks/cpu_stored.py                      # table and benchmarks/results/cpu_stored.json
    python benchmarks/cpu_stored.py --shapes S --tokens 1 16 --schemes mxfp4
    python benchmarks/cpu_stored.py --each 8 10 26       # so many rows for each of four experts of S: cpu_stored_each.json
    python benchmarks/cpu_stored.py --inductor --shapes S --tokens 64 1024   # beside Inductor on bf16: cpu_stored_inductor.json

Ids and weights are given, activations are SwiGLU. Layers and inputs rotate, so that weights come from memory. Each sample is one call,
timed by the thread's own processor time, so that waiting for a processor is no part of it; schemes take turns. Figures are the least of
all samples, and ratios are of these. The floor of a scheme is what it would take if its bytes came at the speed of bf16's.
`--inductor`: torch's grouped products on the dequantised model's bf16 weights and what stands around them, compiled by Inductor; medians of
pairs, each scheme's call beside one of Inductor's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cpu_levels
import torch
from cpu_experts import SHAPES, Shape
from torch import Tensor

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import CODED, PLAIN, Operands
from moe_compile.lowering.cpu import levels

RESULTS = Path(__file__).parent / "results"
F8, BF16 = torch.float8_e4m3fn, torch.bfloat16
HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCHEMES = {
    "bf16": None,
    "fp8": ir.Stored(8, F8, True, 128, 128),
    "int8": ir.Stored(8, torch.int8, rows=1),
    "mxfp4": ir.Stored(4, torch.uint8, True, 1, 32, 2, (0, 1), values=(*HALF, *(-v for v in HALF)), exponents=ir.stored.Exponent.VALUE),
    "int4": ir.Stored(4, torch.int32, True, 1, 128, 2, tuple(range(8)), offset=-8.0),
    "int4 z": ir.Stored(4, torch.int32, True, 1, 128, 2, tuple(range(8)), zeroed=ir.stored.Zero.PLAIN),
}
INPUTS = 8
TOTAL = 192 << 20  # bytes of weights that one turn through the layers reads at most


def bytes_of(shape: Shape, how: ir.Stored | None) -> float:
    """Of a layer's codes and scales."""
    if how is None:
        return shape.bytes(BF16)
    per = how.bits / 8 + (0 if not how.columns or how.rows > 1 else (1 if how.exponents else 4) / how.columns)
    return shape.bytes(BF16) / 2 * per


def matrices(experts: int, rows: int, columns: int, how: ir.Stored | None) -> list[list[Tensor]]:
    """Codes (or floats), scales and zero points of a stack."""
    if how is None:
        return [[torch.randn(experts, rows, columns, dtype=BF16) * columns**-0.5], [], []]
    per = len(how.order) or 1
    codes = torch.randint(0, 256, (experts, rows, columns // per * how.dtype.itemsize), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    shape = (experts, *how.scales_of((rows, columns)))
    scales = torch.randint(118, 122, shape, dtype=torch.uint8) if how.exponents else torch.rand(shape) * 2e-3
    zeros = [torch.randint(6, 10, shape).float()] if how.zeroed else []
    return [[codes.view(how.dtype)], [scales], zeros]


def side(shape: Shape, how: ir.Stored | None, tokens: int, alike: bool = False) -> Callable[[int], Tensor]:
    """Call number i, on a layer and inputs of its own. `alike`: every expert has as many of the tokens, which go to one each."""
    h, i = shape.hidden, shape.intermediate
    held = ir.Experts(shape.experts, h, i, h, ir.Form.CONCAT, act.SWIGLU, dtype=BF16, up_stored=how, down_stored=how)
    count = max(1, min(16, int(TOTAL / bytes_of(shape, how))))
    layers = []
    for _ in range(count):
        up = matrices(shape.experts, 2 * shape.intermediate, shape.hidden, how)
        down = matrices(shape.experts, shape.hidden, shape.intermediate, how)
        layers.append((up, down))
    gen = torch.Generator().manual_seed(1)
    routed = []
    for _ in range(INPUTS):
        weights, ids = torch.rand(tokens, shape.experts, generator=gen).topk(1 if alike else shape.k)
        ids = torch.arange(tokens)[:, None] % shape.experts if alike else ids
        routed.append((torch.randn(tokens, shape.hidden, generator=gen).to(BF16), ids, weights / weights.sum(-1, keepdim=True)))
    plain = ops.experts_args(held)

    lists = [parameters(up, down, how) for up, down in layers]

    def call(i: int) -> Tensor:
        x, ids, weights = routed[i % INPUTS]
        op = torch.ops.moe_compile.experts if how is None else torch.ops.moe_compile.experts_stored
        return op(x, ids, weights, *lists[i % count], None, *plain)

    return call


def parameters(up: list[list[Tensor]], down: list[list[Tensor]], how: ir.Stored | None) -> list[list[Tensor]]:
    """An op's lists."""
    named = {
        name + what: part for name, parts in (("up", up), ("down", down)) for what, part in zip(("", "_scale", "_zero"), parts, strict=True)
    }
    return Operands.named(**named).lists(PLAIN if how is None else CODED)


def measure(sides: dict[str, Callable[[int], Tensor]], seconds: float) -> dict[str, float]:
    """Least processor time of a call, ms."""
    least = dict.fromkeys(sides, float("inf"))
    for call in sides.values():
        for i in range(20):
            call(i)
    i, end = 0, time.monotonic() + seconds
    while i < 48 or time.monotonic() < end:
        for name, call in sides.items():
            start = time.thread_time()
            call(i)
            least[name] = min(least[name], (time.thread_time() - start) * 1e3)
        i += 1
    return least


def inductor(shape: Shape, tokens: int) -> Callable[[int], Tensor]:
    """As `side`, on weights that were made bf16 ahead."""
    layers, x = cpu_levels.weights_of(shape, 4), cpu_levels.routed(shape, tokens)
    compiled = torch.compile(cpu_levels.grouped_block, fullgraph=True)
    return lambda i: compiled(*layers[i % len(layers)], *x)


def paired(ours: Callable[[int], Tensor], theirs: Callable[[int], Tensor], seconds: float) -> tuple[float, float]:
    """Processor time of ours, and the median of theirs over ours."""
    times, ratios, end, i = [], [], time.monotonic() + seconds, 0
    while len(ratios) < 8 or time.monotonic() < end:
        start = time.thread_time()
        ours(i)
        between = time.thread_time()
        theirs(i)
        times.append((between - start) * 1e3)
        ratios.append((time.thread_time() - between) / (between - start))
        i += 1
    return min(times[2:]), statistics.median(ratios[2:])


def beside_inductor(args: argparse.Namespace) -> None:
    rows = []
    for name in args.shapes:
        for tokens in args.tokens:
            theirs, found = inductor(SHAPES[name], tokens), {}
            with torch.inference_mode():
                for scheme in ["bf16", *args.schemes]:
                    found[scheme] = paired(side(SHAPES[name], SCHEMES[scheme], tokens), theirs, args.seconds)
            rows.append({"shape": name, "tokens": tokens, "ms": {s: t for s, (t, _) in found.items()}})
            rows[-1]["inductor over it"] = {s: r for s, (_, r) in found.items()}
            print(name, tokens, *(f"{s} {t:.3f} ms {r:.2f}" for s, (t, r) in found.items()), flush=True)
            args.out.write_text(json.dumps({"machine": machine(), "torch": torch.__version__, "threads": 1, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 128])
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES)[1:], choices=list(SCHEMES)[1:])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--each", nargs="+", type=int, default=[], help="rows of each of four experts, in place of shapes and tokens")
    parser.add_argument("--inductor", action="store_true", help="beside Inductor on the dequantised model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.out = args.out or RESULTS / f"cpu_stored{'_inductor' if args.inductor else '_each' if args.each else ''}.json"
    torch.set_num_threads(1)
    if args.inductor:
        return beside_inductor(args)
    rows = []
    few = replace(SHAPES["S"], experts=4)
    for name, shape in {"S, 4 experts": few}.items() if args.each else {s: SHAPES[s] for s in args.shapes}.items():
        for tokens in [4 * n for n in args.each] or args.tokens:
            sides = {s: side(shape, SCHEMES[s], tokens, bool(args.each)) for s in ["bf16", *args.schemes]}
            with torch.inference_mode():
                least = measure(sides, args.seconds)
            rows.append({"shape": name, "tokens": tokens, "ms": least, "bf16 over it": {s: least["bf16"] / least[s] for s in args.schemes}})
            print(name, tokens, f"bf16 {least['bf16']:.3f} ms", *(f"{s} {least['bf16'] / least[s]:.2f}" for s in args.schemes), flush=True)
            args.out.write_text(json.dumps({"machine": machine(), "torch": torch.__version__, "threads": 1, "rows": rows}, indent=1) + "\n")


def machine() -> str:
    with open("/proc/cpuinfo") as f:
        seen = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in f if ":" in line}
    name, level = seen.get("model name", platform.processor()), levels.supported()[-2]
    return f"{name}, family {seen.get('cpu family')}, model {seen.get('model')}, {level}"


if __name__ == "__main__":
    main()
