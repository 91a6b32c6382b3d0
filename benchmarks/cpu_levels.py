"""Levels of instructions side by side on one processor: the experts kernels with AMX's tiles, with AVX-512, and torch's own products.

    python benchmarks/cpu_levels.py                  # S and Q, five token counts: benchmarks/results/cpu_levels.json
    python benchmarks/cpu_levels.py --each 2 4 8 16  # as many rows of every expert: from how many on tiles are faster

`held` reads weights as a model holds them, `packed` what `prepare` makes of them; behind the dot stands the level. `torch` is a loop over
experts with torch's linear (oneDNN), `grouped` torch's grouped product. bf16, SwiGLU, k = 8, ids and weights given. Sides take turns in
one process, layers rotate so that weights come from memory; figures are the least and the median of a side's samples.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cpu_experts import RESULTS, SHAPES, Shape, exact, processor
from torch import Tensor

import moe_compile.ops
from moe_compile import ir
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import Operands
from moe_compile.lowering.cpu import build, levels
from moe_compile.lowering.cpu.call import Call

Layer, Routed = tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
Side = Callable[[int, Routed], Tensor]  # the layer's number and one input to [T, H]
BF16 = torch.bfloat16
EACH = Shape(32, 2048, 768)  # experts that all have the same number of rows


def weights_of(shape: Shape, count: int) -> list[Layer]:
    """Layers whose experts are shifted copies of one: numbers cost more time than products."""
    gen = torch.Generator().manual_seed(0)
    up = (torch.randn(2 * shape.intermediate, shape.hidden, generator=gen) * shape.hidden**-0.5).to(BF16)
    down = (torch.randn(shape.hidden, shape.intermediate, generator=gen) * shape.intermediate**-0.5).to(BF16)
    shifted = [[torch.stack([m.roll(e + 7 * n, 0) for e in range(shape.experts)]) for m in (up, down)] for n in range(count)]
    return [(u, d) for u, d in shifted]


def routed(shape: Shape, tokens: int, even: bool = False) -> Routed:
    gen = torch.Generator().manual_seed(tokens)
    weights, ids = torch.rand(tokens, shape.experts, generator=gen).topk(shape.k)
    if even:
        ids = (torch.arange(tokens * shape.k) % shape.experts).view(tokens, shape.k)
    return torch.randn(tokens, shape.hidden, generator=gen).to(BF16), ids, weights / weights.sum(-1, keepdim=True)


class Kernels:
    """Our kernels of one level on some layers, called without the op around them; packed layers are shared between levels."""

    def __init__(self, shape: Shape, layers: list[Layer], level: str, shared: list[Call] | None = None) -> None:
        e = ir.Experts(shape.experts, shape.hidden, shape.intermediate, shape.hidden, ir.Form.CONCAT, act.SWIGLU)
        layout = moe_compile.ops.layout_of(moe_compile.ops.experts_args(e))
        direction = "forward" if shared is None else "packed"
        self.library = build._load(direction, BF16, level)
        self.calls = []
        for i, (up, down) in enumerate(layers):
            call = Call(layout, shape.hidden, [down])
            call.parameters("", Operands.named(up=[up], down=[down]))
            if shared is not None:
                self._pack(call, shared, i)
            self.calls.append(call)

    def _pack(self, call: Call, shared: list[Call], i: int) -> None:
        if i == len(shared):
            call.pack(self.library, None)  # type: ignore[arg-type]
            shared.append(call)
        call.set(packed_up=shared[i].args.packed_up, packed_down=shared[i].args.packed_down)

    def __call__(self, i: int, x: Routed) -> Tensor:
        call, out = self.calls[i].on(*x), torch.empty_like(x[0])
        call.args.out = out.data_ptr()
        call.run(self.library.moe_experts_forward)
        return out


def loop(layers: list[Layer]) -> Side:
    """Expert by expert, as models are written."""

    def side(i: int, x: Routed) -> Tensor:
        (up, down), (tokens, ids, weights) = layers[i], x
        out = torch.zeros_like(tokens)
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=len(up)).tolist()
        for e, slots in enumerate(order.split(counts)):
            if len(slots):
                t = slots // ids.shape[1]
                gate, u = torch.nn.functional.linear(tokens[t], up[e]).chunk(2, -1)
                y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * u, down[e])
                out.index_add_(0, t, y * weights.flatten()[slots, None].to(y.dtype))
        return out

    return side


def grouped_block(up: Tensor, down: Tensor, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """torch's grouped product on rows that are sorted by expert."""
    order = ids.flatten().argsort(stable=True)
    ends = torch.histc(ids.flatten().float(), bins=len(up), min=0, max=len(up) - 1).cumsum(0).int()
    gate, u = torch._grouped_mm(tokens[order // ids.shape[1]], up.transpose(1, 2), offs=ends).chunk(2, -1)
    y = torch._grouped_mm(torch.nn.functional.silu(gate) * u, down.transpose(1, 2), offs=ends) * weights.flatten()[order, None].to(BF16)
    return torch.empty_like(y).index_copy_(0, order, y).view(*ids.shape, -1).sum(1)


def grouped(layers: list[Layer]) -> Side:
    return lambda i, x: grouped_block(*layers[i], *x)


def sides_of(shape: Shape, layers: list[Layer], wanted: list[str], peers: bool) -> dict[str, Side]:
    shared: list[Call] = []
    sides: dict[str, Side] = {}
    for level in wanted:
        if level in levels.supported():
            sides |= {f"held.{level}": Kernels(shape, layers, level), f"packed.{level}": Kernels(shape, layers, level, shared)}
    return {**sides, "torch": loop(layers), "grouped": grouped(layers)} if peers else sides


def measure(sides: dict[str, Side], layers: int, x: Routed, limit: float, want: int) -> dict[str, list[float]]:
    """Seconds a call; short calls in groups of some milliseconds. Every side has two samples at least."""
    seen: dict[str, list[float]] = {name: [] for name in sides}
    end, at, calls = time.perf_counter() + limit, 0, dict.fromkeys(sides, 1)
    while min(map(len, seen.values())) < 2 or (time.perf_counter() < end and min(map(len, seen.values())) < want):
        for name, side in sides.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                at += 1
                side(at % layers, x)
            took = (time.perf_counter() - start) / calls[name]
            if calls[name] == 1 and took < 5e-3 and not seen[name]:  # the first call is no sample
                calls[name] = max(2, round(5e-3 / took))
            else:
                seen[name].append(took)
    return seen


def wrong(sides: dict[str, Side], layers: list[Layer], x: Routed) -> dict[str, float]:
    few = (x[0][:24], x[1][:24], x[2][:24])
    truth = exact(layers[0], few)
    return {n: float(f"{float((side(0, x)[:24].double() - truth).norm() / truth.norm()):.3g}") for n, side in sides.items()}


def point(seen: dict[str, list[float]], **what: Any) -> dict[str, Any]:
    least = {n: round(1e3 * min(s), 4) for n, s in seen.items()}
    found = {**what, "least_ms": least, "median_ms": {n: round(1e3 * statistics.median(s), 4) for n, s in seen.items()}}
    cells = "  ".join(f"{n} {v:.3f}/{found['median_ms'][n]:.3f}" for n, v in least.items())
    print(" ".join(f"{k}={v}" for k, v in what.items() if k != "error"), cells, what.get("error", ""), flush=True)
    return found


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    named = {"each": EACH} if args.each else {n: SHAPES[n] for n in args.shapes}
    for name, shape in named.items():
        layers = weights_of(shape, 2 if args.each else max(1, min(6, (256 << 20) // shape.bytes(BF16))))
        sides = sides_of(shape, layers, args.levels, not args.each)
        if args.each:  # tiles at any number of rows
            for side in sides.values():
                side.library.moe_tiles_from(ctypes.c_int64(2))  # type: ignore[attr-defined]
        for count in args.each or args.tokens:
            x = routed(shape, count * shape.experts // shape.k if args.each else count, bool(args.each))
            error = wrong(sides, layers, x) if count <= 128 and not args.each else {}
            for threads in args.threads:
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    seen = measure(sides, len(layers), x, args.limit, args.want)
                key = "rows" if args.each else "tokens"
                yield point(seen, shape=name, threads=threads, error=error, **{key: count})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--levels", nargs="+", default=["amx", "avx512_bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 128, 1024, 4096])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--each", nargs="+", type=int, help="rows of every expert, 32 experts of Q's size")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a figure at most")
    parser.add_argument("--want", type=int, default=15, help="samples of each side")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    machine = {"processor": processor(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    points, output = [], args.output or RESULTS / ("cpu_levels_each.json" if args.each else "cpu_levels.json")
    for p in run(args):
        points.append(p)
        output.write_text(json.dumps({"machine": machine, "points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
