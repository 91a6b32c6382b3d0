"""What a call costs the host: the ops of one block, forward and backward, at any number of tokens, in microseconds.

    python benchmarks/host_time.py            # on a GPU: launched, and the queue never full
    python benchmarks/host_time.py --stub     # anywhere: a driver that launches nothing, so Python and ctypes alone

Every figure is the least of many short rounds: what the machine does besides only adds to it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
TOKENS = (1, 8, 64, 512, 4096)
EXPERTS, K, HIDDEN, INTERMEDIATE = 64, 8, 2048, 1024


def least(f: Callable[[], object], rounds: int = 60, calls: int = 20) -> float:
    """Microseconds of a call: the least over rounds, each begun with an empty queue."""
    best = float("inf")
    for i in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        if i > 2:
            best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


def operands(tokens: int, device: str) -> dict[str, Any]:
    """Of a block with a shared expert."""
    bf16 = torch.bfloat16
    x = torch.randn(tokens, HIDDEN, device=device).to(bf16)
    shapes = {"up": (EXPERTS, 2 * INTERMEDIATE, HIDDEN), "down": (EXPERTS, HIDDEN, INTERMEDIATE)}
    shapes |= {"shared_up": (2 * INTERMEDIATE, HIDDEN), "shared_down": (HIDDEN, INTERMEDIATE)}
    logits = torch.randn(tokens, EXPERTS, device=device)
    return {"x": x, "logits": logits, **{n: torch.randn(s, device=device).mul_(0.02).to(bf16) for n, s in shapes.items()}}


def measured(tokens: int, device: str, stub: bool) -> dict[str, float]:
    """Each op through the short form that compiled graphs call; `direct` through the long one."""
    from moe_compile import ir, ops
    from moe_compile.ir import scalar as act
    from moe_compile.lowering.triton import shared as shared_expert
    from moe_compile.lowering.triton import short

    e = ir.Experts(EXPERTS, HIDDEN, INTERMEDIATE, HIDDEN, ir.Form.CONCAT, act.SWIGLU, dtype=torch.bfloat16)
    one = ir.Experts(1, HIDDEN, INTERMEDIATE, HIDDEN, ir.Form.CONCAT, act.SWIGLU, stacked=False, dtype=torch.bfloat16)
    routing, plain = ops.route_args(ir.Gating(EXPERTS, K, ir.Score.SOFTMAX, norm=ir.Normaliser(ir.Norm.SUM))), ops.experts_args(e)
    t = operands(tokens, device)
    if stub:
        from moe_compile.lowering.triton import calls

        op: Any = calls.OPS
    else:
        op = {n: getattr(torch.ops.moe_compile, f"cuda_{n}").default for n in short.SCHEMAS}
    how, text = short.text(routing), short.text(plain)
    both = short.text([*plain, *ops.shared_args(one, ir.Overlap.BY_TOKENS)])
    x, logits, up, down = t["x"], t["logits"], [t["up"]], [t["down"]]
    w, ids = op["route"](logits, None, None, how)
    out, pre = op["experts_fwd"](x, ids, w, up, down, [], [], None, text)[:2]
    shared = ([t["shared_up"]], [t["shared_down"]], [], [], None, both)
    calls_ = {
        "route": lambda: op["route"](logits, None, None, how),
        "experts": lambda: op["experts"](x, ids, w, up, down, [], [], None, text),
        "experts_shared": lambda: op["experts_shared"](x, ids, w, up, down, [], [], None, *shared),
        "experts_fwd": lambda: op["experts_fwd"](x, ids, w, up, down, [], [], None, text),
        "experts_bwd": lambda: op["experts_bwd"](out, pre, x, ids, w, up, down, [], [], text, [True] * 4),
        "route_bwd": lambda: op["route_bwd"](w, ids, logits, None, None, how, [True, False, False]),
    }
    if not stub:
        calls_ |= {
            "direct route": lambda: torch.ops.moe_compile.route(logits, None, None, *routing),
            "direct experts": lambda: torch.ops.moe_compile.experts(x, ids, w, up, down, [], [], None, *plain),
            "torch.mm": lambda: torch.mm(x, t["shared_up"].t()),
            "torch.empty": lambda: torch.empty(8, 8, device=device),
        }
    if stub and tokens * INTERMEDIATE > shared_expert.MOST_BY_OURS:
        del calls_["experts_shared"]  # products by torch on a side stream
    with torch.no_grad():
        return {n: round(least(f), 1) for n, f in calls_.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    p.add_argument("--stub", action="store_true")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    if args.stub:
        import stub_driver

        stub_driver.install()
    elif not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --stub measures without one")
    rows = {t: measured(t, "cpu" if args.stub else "cuda", args.stub) for t in args.tokens}
    names = list(next(iter(rows.values()))) if rows else []
    print("tokens  " + "  ".join(f"{n:>14s}" for n in names))
    for t, row in rows.items():
        print(f"{t:6d}  " + "  ".join(f"{row.get(n, float('nan')):14.1f}" for n in names))
    if args.json:
        import triton

        card = "a driver that launches nothing" if args.stub else torch.cuda.get_device_name(0)
        about = {"card": card, "date": datetime.date.today().isoformat(), "torch": torch.__version__, "triton": triton.__version__}
        args.json.write_text(json.dumps({"machine": about, "microseconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
