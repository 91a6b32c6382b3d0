"""Experts with a norm behind them (`experts_chained`) on a CPU, beside the model's own loop over the experts that were hit.

    python benchmarks/cpu_chained.py     # table and benchmarks/results/cpu_chained.json

One thread, its own processor time, the least of samples that take turns. Nothing but the experts is timed: ids and weights are given.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import sympy as sp
import torch
import torch.nn.functional as F
from cpu_stored import RESULTS, machine
from torch import Tensor

from moe_compile import ir, ops
from moe_compile.ir import Form
from moe_compile.ir import scalar as act
from moe_compile.ir.chain import Chain, Kind, Matrix, Stage, Vector, mean, product, vector

SHAPES = {"S": (64, 512, 256, 8), "Q": (32, 2048, 768, 8)}
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EPS = 1e-6


def chain_of(hidden: int, inner: int) -> Chain:
    y = product(0)
    normed = y / sp.sqrt(mean(y**2) + sp.Float(EPS)) * vector(0)
    first = Stage(inner, (Matrix(0), Matrix(0, 1, inner)), (), act.silu(y) * product(1))
    return Chain((first, Stage(hidden, (Matrix(1),), (Vector(2),), normed)), (Kind.STACKED, Kind.STACKED, Kind.SHARED))


def loop(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        t, j = torch.where(ids == e)
        g, u = F.linear(x[t], up[e]).chunk(2, -1)
        y = F.rms_norm(F.linear(F.silu(g) * u, down[e]), scale.shape, scale, EPS)
        out.index_add_(0, t, (y * weights[t, j, None]).to(x.dtype))
    return out


def row(name: str, kind: str, tokens: int, seconds: float) -> dict[str, object]:
    experts, hidden, inner, k = SHAPES[name]
    dtype, gen = TYPES[kind], torch.Generator().manual_seed(0)
    e = ir.Experts(experts, hidden, inner, hidden, Form.SINGLE, act.G, chain=chain_of(hidden, inner), stacked=True, dtype=dtype)
    parts = [
        (torch.randn(*shape, generator=gen) * 0.03).to(dtype)
        for shape in ((experts, 2 * inner, hidden), (experts, hidden, inner), (hidden,))
    ]
    weights, ids = torch.rand(tokens, experts, generator=gen).topk(k)
    x, weights, plain = torch.randn(tokens, hidden, generator=gen).to(dtype), weights.to(dtype), ops.experts_args(e)
    sides = {
        "op": lambda: torch.ops.moe_compile.experts_chained(x, ids, weights, parts, None, *plain),
        "loop": lambda: loop(x, ids, weights, *parts),
    }
    least, samples, end = dict.fromkeys(sides, float("inf")), 0, time.monotonic() + seconds
    while samples < 24 or time.monotonic() < end:
        for side, run in sides.items():
            start = time.thread_time()
            run()
            if samples > 2:
                least[side] = min(least[side], (time.thread_time() - start) * 1e3)
        samples += 1
    return {"shape": name, "dtype": kind, "tokens": tokens, "ms": least, "loop over op": least["loop"] / least["op"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_chained.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.inference_mode():
        for name in args.shapes:
            for kind in args.dtypes:
                for tokens in args.tokens:
                    rows.append(row(name, kind, tokens, args.seconds))
                    print(*rows[-1].values(), flush=True)
    args.out.write_text(json.dumps({"machine": machine(), "torch": torch.__version__, "threads": 1, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
