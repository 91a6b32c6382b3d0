"""A shared expert in few bits on a GPU: the op of one expert, beside what Inductor makes of the matrices made floats and multiplied.

    python benchmarks/cuda_shared_stored.py --json benchmarks/results/cuda_shared_stored_<card>.json

SwiGLU, rows in bf16, weight 1 for each token. Microseconds of a CUDA graph of one call on each of several matrices, so that these come from
memory, the sides in turns; `called`: of a compiled function, a call. `tiles`: the op's kernels with other tiles than the chosen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import on_cuda
import stored
import torch
import torch.nn.functional as F
from never_slower import called, in_turns, replayed
from on_cuda import BF16, DEVICE
from roofline import Point, Shape
from torch import Tensor

from moe_compile import ops
from moe_compile.ir.operands import CODED, Operands
from moe_compile.lowering.triton import coded, short
from moe_compile.lowering.triton.coded_tiles import Choice, Tile, Vector

SHAPES = {"2048 x 1024": Shape(1, 1, 2048, 1024), "7168 x 2048": Shape(1, 1, 7168, 2048)}
TOKENS = (1, 4, 8, 16, 64, 128, 256)
SCHEMES = ("fp8", "w8a8", "int8", "int4", "mxfp4")
SECONDS = 0.1  # of replays a side
_VECTORS = Vector(4, 1024, 2), Vector(4, 1024, 4)


def others(tokens: int, packed: bool) -> dict[str, Choice]:
    """Tiles that make more programs of one expert's columns, and the few-token pair beyond its tokens."""
    bm, bk = (16 if tokens <= 16 else 32 if tokens <= 32 else 64), 64 if packed and tokens > 40 else 128
    found = {f"{bm} x {bn} x {bk}": Tile(bm, bn, bk, 4, 4, early=True) for bn in (16, 32)}
    few = {"few": Choice(*found.values(), few=_VECTORS)} if 4 <= tokens <= 16 and not packed else {}
    return {n: Choice(tile, tile) for n, tile in found.items()} | few


def inductor(s: Shape, scheme: str, w: stored.Weights) -> Callable[..., Tensor]:
    """As a model writes it."""
    how, table, rounds = w.how, None, stored.ROUNDED.get(scheme)
    if how.values:
        how, table = replace(how, values=(), tabled=True), torch.tensor(how.values, device=DEVICE)

    def row(x: Tensor) -> Tensor:
        if rounds is None:
            return x
        q, scale = rounds.codes(x.float())
        return (q * scale).flatten(-2).to(x.dtype)

    def linear(x: Tensor, q: Tensor, scale: Tensor, bias: tuple[Tensor, ...]) -> Tensor:
        return F.linear(row(x), how.matrix(q[0], scale[0], torch.float32, table=table).to(BF16), *(b[0] for b in bias))

    def mlp(x: Tensor, w: stored.Weights) -> Tensor:
        h = linear(x, w.up, w.up_scale, w.up_bias)
        g, u = (h[:, 0::2], h[:, 1::2]) if w.up_bias else h.chunk(2, -1)
        return linear(F.silu(g) * u, w.down, w.down_scale, w.down_bias)

    return torch.compile(mlp)


def in_a_graph(s: Shape, scheme: str) -> Callable[..., Tensor]:
    """The op as compiled graphs call it."""
    op, text = torch.ops.moe_compile.cuda_experts_stored.default, short.text(ops.experts_args(stored.meaning(s, scheme)))

    def mlp(x: Tensor, ids: Tensor, one: Tensor, w: list[list[Tensor]]) -> Tensor:
        out: Tensor = op(x, ids, one, *w, None, text)
        return out

    return torch.compile(mlp, dynamic=False)


def with_tiles(s: Shape, scheme: str, choice: Choice) -> Callable[..., Tensor | None]:
    layout, storage = ops.storage_of(ops.experts_args(stored.meaning(s, scheme)))

    def f(x: Tensor, ids: Tensor, one: Tensor, w: stored.Weights) -> Tensor | None:
        return coded.forward(x, ids, one, Operands.read(w.lists(), CODED), None, layout, storage, choice)

    return f


def measured(scheme: str, name: str, tokens: int, matrices: list[stored.Weights], bandwidth: float, tiles: bool) -> Point:
    s, how = SHAPES[name], stored.SCHEMES[scheme]
    x, ids = torch.randn(tokens, s.hidden, device=DEVICE).to(BF16), torch.zeros(tokens, 1, dtype=torch.int64, device=DEVICE)
    if tokens > 1:
        torch._dynamo.mark_dynamic(x, 0)
    one, theirs = torch.ones(tokens, 1, dtype=BF16, device=DEVICE), inductor(s, scheme, matrices[0])
    sides = {
        "inductor": [lambda w=w: theirs(x, w) for w in matrices],
        "ours": [lambda w=w: stored.ours(s, scheme, w)(x, ids, one) for w in matrices],
    }
    if tiles and scheme != "w8a8":
        for what, choice in others(tokens, how.axis > 0).items():
            f = with_tiles(s, scheme, choice)
            sides[what] = [lambda w=w, f=f: f(x, ids, one, w) for w in matrices]
    want, figures = sides["inductor"][0]().double(), {}
    for what, calls in list(sides.items()):
        try:
            got, *_ = (call() for call in calls)
            figures[f"{what} error"] = float((got.double() - want).norm() / want.norm())
        except Exception as e:
            print(f"  {scheme} {tokens} {what}: {type(e).__name__} {str(e)[:90]}", flush=True)
            del sides[what]
    times = in_turns({n: replayed(calls) for n, calls in sides.items()}, SECONDS)
    f, lists = in_a_graph(s, scheme), [w.lists() for w in matrices]
    launched = {"inductor": sides["inductor"], "ours": [lambda w=w: f(x, ids, one, w) for w in lists]}
    python = in_turns({n: lambda calls=calls: called(calls) for n, calls in launched.items()}, SECONDS)
    return {
        "scheme": scheme, "shape": name, "tokens": tokens, "floor_us": round(matrices[0].nbytes / bandwidth * 1e6, 2),
        "us": {n: round(v, 2) for n, v in times.items()}, "called_us": {n: round(v, 1) for n, v in python.items()},
        "difference": round(figures["ours error"], 5), "largest difference": round(max(figures.values()), 5),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    p.add_argument("--shapes", nargs="+", default=list(SHAPES))
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    p.add_argument("--tiles", action="store_true", help="other tiles too")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    bandwidth, points = on_cuda.bandwidth(), []
    for name in args.shapes:
        for scheme in args.schemes:
            matrices = [stored.weights_of(SHAPES[name], scheme) for _ in range(16 if SHAPES[name].hidden < 4096 else 6)]
            with torch.no_grad():
                points += [measured(scheme, name, t, matrices, bandwidth, args.tiles) for t in args.tokens]
            for point in points[-len(args.tokens) :]:
                print(*point.values(), flush=True)
            on_cuda.free()
            if args.json:
                about = {"machine": on_cuda.machine(), "bandwidth": bandwidth, "points": points}
                args.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
