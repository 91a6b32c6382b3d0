"""A shared expert in few bits on a CPU: the op of one expert, beside what Inductor makes of the matrices made floats and multiplied.

    python benchmarks/cpu_shared_stored.py               # table and benchmarks/results/cpu_shared_stored.json

SwiGLU 2048 -> 1024 -> 2048, rows in bf16, weight 1 for each token, one thread. Samples take turns, each timed by the process' own time; a
figure is the median of samples, a ratio the median of the pairs' ratios.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.ir.operands import CODED, Operands

RESULTS = Path(__file__).parent / "results" / "cpu_shared_stored.json"
HIDDEN, INNER, BLOCK = 2048, 1024, 128
TOKENS = (1, 4, 16, 64, 256, 1024)
SAMPLES = 7
SCHEMES = {
    "fp8": ir.Stored(8, torch.float8_e4m3fn, rows=BLOCK, columns=BLOCK),
    "int8": ir.Stored(8, torch.int8, rows=1),
    "int4": ir.Stored(4, torch.int32, True, 1, BLOCK, 2, tuple(range(8)), offset=-8.0),
}


def floats(how: ir.Stored, q: Tensor, s: Tensor) -> Tensor:
    """As a model writes it."""
    if how.axis:
        q = (q[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).flatten(-2) - 8
        return (q.float().unflatten(-1, (-1, BLOCK)) * s[..., None]).flatten(-2).bfloat16()
    if not how.columns:
        return (q.float() * s[:, None]).bfloat16()
    n, k = s.shape
    return (q.float().view(n, BLOCK, k, BLOCK) * s[:, None, :, None]).view(n * BLOCK, k * BLOCK).bfloat16()


def matrix(how: ir.Stored, n: int, k: int) -> tuple[Tensor, Tensor]:
    scale = torch.rand(how.scales_of((n, k))) * 1e-3
    if how.axis:
        return torch.randint(-(2**31), 2**31, (n, k // 8)).int(), scale
    return (torch.randn(n, k) * 20).to(how.dtype), scale


def both(how: ir.Stored) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Inductor's, and the op."""
    (up, up_scale), (down, down_scale) = matrix(how, 2 * INNER, HIDDEN), matrix(how, HIDDEN, INNER)

    @torch.compile
    def inductor(x: Tensor) -> Tensor:
        g, u = F.linear(x, floats(how, up, up_scale)).chunk(2, -1)
        return F.linear(F.silu(g) * u, floats(how, down, down_scale))

    e = ir.Experts(1, HIDDEN, INNER, HIDDEN, ir.Form.CONCAT, act.SWIGLU, dtype=torch.bfloat16, up_stored=how, down_stored=how)
    p: Operands[Tensor] = Operands.named(up=[up[None]], down=[down[None]], up_scale=[up_scale[None]], down_scale=[down_scale[None]])
    rest = (*p.lists(CODED), None, *ops.experts_args(e))

    def own(x: Tensor) -> Tensor:
        ids, weights = torch.zeros(x.shape[0], 1, dtype=torch.int64), torch.ones(x.shape[0], 1, dtype=x.dtype)
        out: Tensor = torch.ops.moe_compile.experts_stored(x, ids, weights, *rest)
        return out

    return inductor, own


def took(f: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        f(x)
    return (time.process_time() - start) / calls * 1e3


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch._dynamo.config.automatic_dynamic_shapes = False
    rows = []
    with torch.no_grad():
        for name, how in SCHEMES.items():
            fs = both(how)
            for tokens in TOKENS:
                torch._dynamo.reset()  # each is compiled for its own number of tokens
                x = torch.randn(tokens, HIDDEN).bfloat16()
                a, b = (f(x).float() for f in fs)
                assert float((a - b).norm() / a.norm()) < 1e-2
                calls = max(2, 32 // max(1, tokens // 8))
                pairs = [[took(f, x, calls) for f in fs] for _ in range(SAMPLES)]
                inductor, own = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(i / o for i, o in pairs)
                rows.append({"scheme": name, "tokens": tokens, "inductor_ms": inductor, "op_ms": own, "ratio": ratio})
                print(f"{name:5} {tokens:5}  Inductor {inductor:8.2f} ms  op {own:8.2f} ms  {ratio:5.2f} x", flush=True)
    about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": 1, "timer": "process time"}
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
