"""Routed experts on weights in few bits on a GPU, beside bf16, Inductor on floats of all experts, and torch's grouped product.

Times are CUDA graphs of one call on each of several rotating input sets, median over replays. `inductor`: a loop over experts that makes
each matrix of floats before it multiplies is data-dependent, so what is compiled makes floats of all experts and takes grouped products
(no biases). `scaled`: `F.scaled_grouped_mm` with a scale a row, both projections alone: no gathering, no activation, no combine.
`workspace`: what runs where no kernel has these codes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import on_cuda
import torch
import torch.nn.functional as F
from on_cuda import BF16, DEVICE, SHAPES, Routing, Shape, attempt, hits, input_sets, microseconds
from roofline import Point
from torch import Tensor

import moe_compile.ops
from moe_compile import ir
from moe_compile.ir import scalar as activation
from moe_compile.ir.operands import CODED, Operands
from moe_compile.lowering.triton import stored as by_workspace

F8 = torch.float8_e4m3fn
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCHEMES = {
    "fp8": ir.Stored(8, F8, True, 128, 128),
    "mxfp4": ir.Stored(4, torch.uint8, True, 1, 32, 2, (0, 1), values=(*_HALF, *(-v for v in _HALF)), exponents=True),
    "int4": ir.Stored(4, torch.int32, True, 1, 128, 2, tuple(range(8)), offset=-8.0),
    "int8": ir.Stored(8, torch.int8, True, rows=1),
}
SCHEMES["w8a8"] = SCHEMES["fp8"]
ROUNDED = {"w8a8": ir.Rows(8, F8, 128, floor=1e-12)}  # as the model rounds its rows
MODELS = {**SHAPES, "gpt-oss-20b": Shape(32, 4, 2880, 2880), "gpt-oss-120b": Shape(128, 4, 2880, 2880)}
CASES = {
    "fp8": ("Qwen3-30B-A3B", "Trinity-mini", "DeepSeek-V3"),
    "w8a8": ("Qwen3-30B-A3B", "Trinity-mini", "DeepSeek-V3"),
    "mxfp4": ("gpt-oss-20b", "gpt-oss-120b"),
    "int4": ("Qwen3-30B-A3B",),
    "int8": ("Qwen3-30B-A3B",),
}
PEERS_OF = ("Qwen3-30B-A3B", "gpt-oss-20b")  # whose floats of all experts fit beside what else is held
TOKENS = (1, 16, 64, 256, 1024, 4096)
# microseconds to reach on an H100, from the issue of stored weights
FLOAT8_TARGETS = {
    "Qwen3-30B-A3B": (17, 138, 208, 218, 235, 340),
    "Trinity-mini": (22, 182, 276, 288, 310, 450),
    "DeepSeek-V3": (126, 1530, 3330, 3850, 4150, 5000),
}
TARGETS = {
    **{("fp8", n): us for n, us in FLOAT8_TARGETS.items()},
    **{("w8a8", n): us for n, us in FLOAT8_TARGETS.items()},
    ("mxfp4", "gpt-oss-20b"): (24, 138, 162, 180, 380, 1500),
    ("mxfp4", "gpt-oss-120b"): (24, 245, 530, 620, 680, 1650),
}


@dataclass(frozen=True)
class Weights:
    """Codes and scales of both projections, as the op takes them."""

    how: ir.Stored
    up: Tensor
    down: Tensor
    up_scale: Tensor
    down_scale: Tensor
    up_bias: tuple[Tensor, ...] = ()
    down_bias: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.up, self.down, self.up_scale, self.down_scale))

    def lists(self) -> list[list[Tensor]]:
        scales = {"up_scale": [self.up_scale], "down_scale": [self.down_scale]}
        return Operands.named(up=[self.up], down=[self.down], up_bias=self.up_bias, down_bias=self.down_bias, **scales).lists(CODED)


def meaning(s: Shape, scheme: str) -> ir.Experts:
    gpt = scheme == "mxfp4"
    how, rows = SCHEMES[scheme], ROUNDED.get(scheme)
    form, act = (ir.Form.INTERLEAVED if gpt else ir.Form.CONCAT), activation.SWIGLU
    kept = {"up_bias": gpt, "down_bias": gpt, "up_stored": how, "down_stored": how, "up_rows": rows, "down_rows": rows}
    return ir.Experts(s.experts, s.hidden, s.intermediate, s.hidden, form, act, dtype=BF16, **kept)


def weights_of(s: Shape, scheme: str) -> Weights:
    """Random ones of the size that trained ones have."""
    how = SCHEMES[scheme]

    def codes(rows: int, columns: int) -> Tensor:
        if how.axis:
            shape = (s.experts, rows, columns // len(how.order))
            return torch.randint(0, 256, (*shape, how.dtype.itemsize), dtype=torch.uint8, device=DEVICE).view(how.dtype).view(shape)
        every = [(torch.randn(rows, columns, device=DEVICE) * 60).clamp(-127, 127).to(how.dtype) for _ in range(s.experts)]
        return torch.stack(every)

    def scales(rows: int, columns: int, wide: float) -> Tensor:
        shape = (s.experts, *how.scales_of((rows, columns)))
        if how.exponents:
            return torch.randint(118, 122, shape, dtype=torch.uint8, device=DEVICE)
        return (torch.rand(shape, device=DEVICE) + 0.5) * columns**-0.5 / wide

    wide = {"fp8": 60.0, "w8a8": 60.0, "int8": 60.0, "int4": 5.0, "mxfp4": 1.0}[scheme]
    up, down = (2 * s.intermediate, s.hidden), (s.hidden, s.intermediate)
    biases = [(torch.randn(s.experts, n, device=DEVICE).to(BF16),) if scheme == "mxfp4" else () for n in (up[0], down[0])]
    return Weights(how, codes(*up), codes(*down), scales(*up, wide), scales(*down, wide), *biases)


def ours(s: Shape, scheme: str, w: Weights) -> Callable[..., Tensor]:
    plain = moe_compile.ops.experts_args(meaning(s, scheme))
    return lambda x, ids, ws: torch.ops.moe_compile.experts_stored(x, ids, ws, *w.lists(), None, *plain)


def error(s: Shape, scheme: str, w: Weights, f: Callable[..., Tensor], args: Routing) -> float:
    """Relative error of one or two rows against float64 on the codes."""
    x, ids, ws = args
    rows = torch.linspace(0, x.shape[0] - 1, min(2, x.shape[0]), device=DEVICE).long()
    hit, local = ids[rows].unique(return_inverse=True)
    few = Shape(len(hit), s.k, s.hidden, s.intermediate)
    names = ("up", "down", "up_bias", "down_bias", "up_scale", "down_scale")
    held = {n: [t[hit] for t in ts] for n, ts in zip(names, w.lists(), strict=False)}
    want = meaning(few, scheme).evaluate(x[rows], local, ws[rows], **held)
    return float((f(*args)[rows].double() - want).norm() / want.norm())


def workspace(s: Shape, scheme: str, w: Weights) -> Callable[..., Tensor]:
    """What runs where no kernel has these codes: floats of the experts that are hit in a workspace of bounded size."""
    layout, storage = moe_compile.ops.storage_of(moe_compile.ops.experts_args(meaning(s, scheme)))
    p = Operands.read(w.lists(), CODED)
    return lambda x, ids, ws: by_workspace.forward(x, ids, ws, p, None, layout, storage)


def how_float8(scheme: str) -> bool:
    return SCHEMES[scheme].dtype is F8


def written(s: Shape, w: Weights) -> Callable[..., Tensor]:
    """The model as written for all experts at once: floats of all of them, then grouped products."""

    how, table = w.how, None
    if how.values:
        how, table = replace(how, values=(), tabled=True), torch.tensor(how.values, device=DEVICE)

    def block(x: Tensor, ids: Tensor, ws: Tensor) -> Tensor:
        up, down = (how.matrix(q, t, torch.float32, table=table).to(BF16) for q, t in ((w.up, w.up_scale), (w.down, w.down_scale)))
        order = ids.flatten().argsort(stable=True)
        ends = torch.histc(ids.float(), s.experts, 0, s.experts - 1).cumsum(0).int()
        h = torch._grouped_mm(x[order // s.k], up.transpose(1, 2), offs=ends)
        g, u = (h[:, 0::2], h[:, 1::2]) if w.up_bias else h.chunk(2, -1)
        y = torch._grouped_mm(F.silu(g) * u, down.transpose(1, 2), offs=ends)
        y = y * ws.flatten()[order].unsqueeze(-1).to(y.dtype)
        return torch.zeros_like(x).index_add(0, order // s.k, y)

    return torch.compile(block, dynamic=False)


def scaled(s: Shape, w: Weights, args: Routing) -> Callable[..., Tensor] | None:
    """torch's grouped product on float8 rows and weights with a scale a row, both projections."""
    mm = getattr(F, "scaled_grouped_mm", None)
    if mm is None:
        return None
    kind = F.ScalingType.RowWise
    _, ids, _ = args
    rows = ids.numel()
    ends = torch.bincount(ids.flatten(), minlength=s.experts).cumsum(0).int()
    a, b = (torch.randn(rows, n, device=DEVICE).to(F8) for n in (s.hidden, s.intermediate))
    one = torch.ones(rows, device=DEVICE)
    up, down = (torch.ones(s.experts, t.shape[1], device=DEVICE) for t in (w.up, w.down))

    def both(*_: Any) -> Tensor:
        mm(a, w.up.transpose(1, 2), one, kind, up, kind, offs=ends, output_dtype=BF16)
        return mm(b, w.down.transpose(1, 2), one, kind, down, kind, offs=ends, output_dtype=BF16)  # type: ignore[no-any-return]

    return both


def measured(scheme: str, name: str, tokens: list[int], bandwidth: float, peak: float, peers: list[int]) -> list[Point]:
    s = MODELS[name]
    w = weights_of(s, scheme)
    f, points = ours(s, scheme, w), []
    goals = dict(zip(TOKENS, TARGETS.get((scheme, name), ()), strict=False))
    for t in tokens:
        sets = input_sets(s, t)
        hit = hits([ids for _, ids, _ in sets])
        moved, flops = hit / s.experts * w.nbytes + 4 * t * s.hidden, 6 * t * s.k * s.hidden * s.intermediate
        figures = {"floor_us": max(moved / bandwidth, flops / peak) * 1e6, "target_h100_us": goals.get(t)}
        with torch.no_grad():
            wrong = error(s, scheme, w, f, sets[0])
        figures |= {"error": wrong, "ours_us": microseconds(f, sets)}
        if t in peers and name in PEERS_OF and scheme not in ROUNDED:
            figures["workspace_us"] = attempt("workspace", lambda sets=sets: microseconds(workspace(s, scheme, w), sets[:2]))
        if peers and how_float8(scheme):
            peer = attempt("scaled_grouped_mm", lambda sets=sets: microseconds(scaled(s, w, sets[0]), sets[:1]))  # type: ignore[arg-type]
            figures["scaled_us"] = peer
        if t in peers and name in PEERS_OF and scheme not in ROUNDED:
            torch._dynamo.reset()
            with torch.no_grad():
                figures["inductor_us"] = attempt("inductor", lambda sets=sets: microseconds(written(s, w), sets))
        points.append(on_cuda.point(f"stored {scheme}", name, t, **figures))
        print(points[-1], flush=True)
    return points


def floats(name: str, tokens: list[int]) -> dict[int, float]:
    """bf16 of the same shape."""
    s = MODELS[name]
    up, down = on_cuda.weights_of(s)
    f = on_cuda.fused(s, up, down)
    found = {t: microseconds(f, input_sets(s, t)) for t in tokens}
    return found


def show(points: list[Point]) -> None:
    columns = ("floor_us", "ours_us", "bf16_us", "workspace_us", "scaled_us", "inductor_us", "target_h100_us", "error")
    print(f"{'':30s}{'T':>6s}" + "".join(f"{c:>16s}" for c in columns))
    for p in points:
        row = "".join(f"{p[c]:16.5g}" if isinstance(p.get(c), (int, float)) else f"{'-':>16s}" for c in columns)
        print(f"{p['part'] + ' ' + p['shape']:30s}{p['tokens']:6d}{row}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--schemes", nargs="+", default=list(CASES), choices=list(CASES))
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    p.add_argument("--peers-at", nargs="*", type=int, default=[1, 64, 1024, 4096], help="tokens that peers are timed at")
    p.add_argument("--no-floats", action="store_true", help="without bf16 of the same shape")
    p.add_argument("--seconds", type=float, default=on_cuda.SECONDS, help="of replays a figure")
    p.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "stored.json")
    args = p.parse_args()
    on_cuda.SECONDS = args.seconds
    torch.set_float32_matmul_precision("highest")
    limits = {"bandwidth": on_cuda.bandwidth(), "peak": on_cuda.peak()}
    print(f"reads {limits['bandwidth'] / 1e12:.2f} TB/s, dense bf16 {limits['peak'] / 1e12:.0f} TFLOP/s", flush=True)
    every: list[Point] = []
    for scheme in args.schemes:
        for name in (n for n in CASES[scheme] if n in args.models):
            start = time.perf_counter()
            found = measured(scheme, name, args.tokens, **limits, peers=args.peers_at)
            on_cuda.free()
            plain = {} if args.no_floats else floats(name, args.tokens)
            on_cuda.free()
            for point in found:
                point["bf16_us"] = plain.get(point["tokens"])
            every += found
            args.json.write_text(json.dumps({"machine": on_cuda.machine(), "limits": limits, "points": every}, indent=1) + "\n")
            print(f"  {scheme} {name}: {time.perf_counter() - start:.0f} s", flush=True)
    show(every)


if __name__ == "__main__":
    main()
