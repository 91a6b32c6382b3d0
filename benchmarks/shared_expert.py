"""Routed experts with a shared expert on a GPU: the shared one's products by torch or by our grouped GEMMs, by the rule's tiles or others.

    python benchmarks/shared_expert.py --json benchmarks/results/shared_expert_<card>.json

SwiGLU in bf16, the shared expert's projections apart as models hold them. Microseconds: `graph`, of a CUDA graph of one call on each of
several inputs; `host`, what a call costs the host, the least of many rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blocks import BLOCKS, Block
from host_time import least
from torch import Tensor

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.lowering.triton import shared, short, tuner
from moe_compile.lowering.triton.experts import runnable
from moe_compile.lowering.triton.launch import plans
from moe_compile.lowering.triton.tune import Choice, Tile

TOKENS = (8, 32, 64, 256, 512, 2048, 4096)
BF16, SETS, SECONDS = torch.bfloat16, 3, 0.08


def narrow(rows: int) -> Choice:
    """Tiles that make more programs of one expert's columns."""
    if rows <= 10:
        return Choice(Tile(16, 16, 256, 4, 4), Tile(16, 32, 256, 4, 4), None)
    if rows <= 32:
        return Choice(Tile(32, 32, 128, 4, 4), Tile(32, 32, 128, 4, 4), None)
    if rows <= 64:
        return Choice(Tile(64, 32, 128, 4, 3), Tile(64, 32, 128, 4, 3), None)
    if rows <= 512:
        return Choice(
            Tile(64, 64, 128, 8, 2, tma=True, hopper=True, group=8), Tile(64, 64, 128, 8, 2, tma=True, hopper=True, group=8), None
        )
    one = Tile(128, 64, 64, 8, 6, tma=True, hopper=True, group=8, together=2)
    return Choice(one, one, None)


def inputs(b: Block, tokens: int) -> tuple[list[list[Any]], str]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").mul_(0.02).to(BF16)

    e = ir.Experts(b.experts, b.hidden, b.intermediate, b.hidden, ir.Form.CONCAT, act.SWIGLU, dtype=BF16)
    one = ir.Experts(1, b.hidden, b.shared, b.hidden, ir.Form.SEPARATE, act.SWIGLU, stacked=False, dtype=BF16)
    text = short.text([*ops.experts_args(e), *ops.shared_args(one, ir.Overlap.BY_TOKENS)])
    stacks = [torch.empty(b.experts, 2 * b.intermediate, b.hidden, device="cuda", dtype=BF16).normal_(0, 0.02)]
    stacks.append(torch.empty(b.experts, b.hidden, b.intermediate, device="cuda", dtype=BF16).normal_(0, 0.02))
    made = []
    for _ in range(SETS):
        ids = torch.rand(tokens, b.experts, device="cuda").topk(b.k).indices
        mlp = [random(b.shared, b.hidden), random(b.shared, b.hidden)], [random(b.hidden, b.shared)]
        gate = torch.rand(tokens, 1, device="cuda") if b.model == "qwen2_moe" else None
        weights = torch.rand(tokens, b.k, device="cuda")
        made.append([random(tokens, b.hidden) * 50, ids, weights, stacks[:1], stacks[1:], [], [], None, *mlp, [], [], gate, text])
    return made, text


def runnables(c: Any, a: Tensor, choice: Choice) -> tuple[Tile, Tile]:
    return runnable(c.x, c.up, choice.up), runnable(a, c.down, choice.down)


def sides(tokens: int) -> dict[str, tuple[int, Callable[..., Any]]]:
    """Activations up to which the products are ours, tiles."""
    own = shared._tiles
    return {"torch": (0, own), "ours": (1 << 30, own), "narrow": (1 << 30, lambda c, a, _: runnables(c, a, narrow(tokens)))}


def measured(b: Block, tokens: int, only_compile: bool) -> dict[str, Any]:
    given, _ = inputs(b, tokens)
    op = torch.ops.moe_compile.cuda_experts_shared.default
    row: dict[str, Any] = {}
    before, wanted = (shared.MOST_BY_OURS, shared._tiles), None
    for name, (most, tiles) in sides(tokens).items():
        shared.MOST_BY_OURS, shared._tiles = most, tiles
        plans.forget()
        got = op(*given[0]).float()
        wanted = got if wanted is None else wanted
        row[f"{name} error"] = round(float((got - wanted).norm() / wanted.norm()), 5)
        if not only_compile:
            calls = [lambda g=g: op(*g) for g in given]
            row[f"{name} graph"] = round(tuner.microseconds(calls, SECONDS), 1)
            row[f"{name} host"] = round(least(calls[0], rounds=12, calls=10), 1)
    shared.MOST_BY_OURS, shared._tiles = before
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", nargs="+", default=[n for n, b in BLOCKS.items() if b.shared])
    p.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    p.add_argument("--compile", action="store_true", help="only compile the kernels, for a later run")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    rows = []
    for name in args.blocks:
        for tokens in args.tokens:
            row = measured(BLOCKS[name], tokens, args.compile)
            rows.append({"block": name, "tokens": tokens, **row})
            print(f"{name:20s} {tokens:5d}  " + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            if args.json:
                machine = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
                args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
