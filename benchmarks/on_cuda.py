"""The MoE kernels on a GPU: routed experts, routing, a whole block, forward and backward, next to the floor measured in the same run.

Times are CUDA graphs that hold one call on each of several rotating input sets (so weights come from memory, not from the cache),
median over replays; steps of forward and backward are launched eagerly, one after the other, and timed by events.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from roofline import SHAPES, TOKENS, Point, Shape, floor, store, table
from torch import Tensor, nn

import moe_compile.ops
from moe_compile import ir
from moe_compile.ir import scalar as activation
from moe_compile.lowering.triton import tune, tuner
from moe_compile.lowering.triton.dispatch import dispatch

SECONDS = 0.25  # of replays a figure
STEPS = 8  # of training between two events
PEER_ORDER = (1, 4096, 64, 16384, 1024, 16, 256, 4)  # what is worth most comes first: compiling is what takes the time
BF16 = torch.bfloat16
DEVICE = "cuda"
Routing = tuple[Tensor, Tensor, Tensor]  # tokens [T, H], ids [T, k], weights [T, k]


# ---- limits ------------------------------------------------------------------------------------------------------


@triton.jit
def _read(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        total += tl.load(x + i + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def bandwidth(size: int = 1 << 28) -> float:
    """Bytes a second of a kernel that reads `size` floats."""
    programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    x, out = torch.ones(size, device=DEVICE), torch.empty(programs, device=DEVICE)
    us = tuner.microseconds([lambda: _read[(programs,)](x, out, x.numel(), BLOCK=4096, num_warps=8)], SECONDS)
    return x.numel() * 4 / us * 1e6


def peak(size: int = 8192) -> float:
    """FLOP/s of a dense bf16 product of size^3, random data."""
    a, b = (torch.randn(size, size, device=DEVICE).to(BF16) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * size**3 / tuner.microseconds([lambda: torch.mm(a, b, out=c)], SECONDS) * 1e6


# ---- operands ----------------------------------------------------------------------------------------------------


def meaning(s: Shape) -> ir.Experts:
    return ir.Experts(s.experts, s.hidden, s.intermediate, s.hidden, ir.Form.CONCAT, activation.SWIGLU, dtype=BF16)


def gating(s: Shape) -> ir.Gating:
    norm = ir.Normaliser(ir.Norm.SUM, eps=1e-20)
    return ir.Gating(s.experts, s.k, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, norm=norm, scale=2.826)


def weights_of(s: Shape) -> tuple[Tensor, Tensor]:
    return tuner.random_weights(tune.Problem(s.experts, s.hidden, s.intermediate, s.k, BF16, True))


def input_sets(s: Shape, tokens: int) -> list[Routing]:
    """Enough sets that no call finds its weights in the cache; ids from softmax of normal logits."""
    sets = []
    for i in range(8 if tokens <= 256 else 4 if tokens <= 1024 else 2):
        g = torch.Generator(DEVICE).manual_seed(1000 * tokens + i)
        x = torch.randn(tokens, s.hidden, device=DEVICE, generator=g).to(BF16)
        w, ids = torch.randn(tokens, s.experts, device=DEVICE, generator=g).softmax(-1).topk(s.k)
        sets.append((x, ids, w))
    return sets


def hits(all_ids: list[Tensor]) -> float:
    return statistics.mean(ids.unique().numel() for ids in all_ids)


def free() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


# ---- routed experts ----------------------------------------------------------------------------------------------


def fused(s: Shape, up: Tensor, down: Tensor) -> Callable[..., Tensor]:
    plain = moe_compile.ops.experts_args(meaning(s))
    return lambda x, ids, w: torch.ops.moe_compile.experts(x, ids, w, [up], [down], [], [], None, *plain)


def inductor(s: Shape, up: nn.Parameter, down: nn.Parameter) -> Callable[..., Tensor]:
    """transformers' experts on grouped_mm, compiled with static shapes; the weights are shared with ours."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    config = modeling.Qwen3MoeConfig(
        hidden_size=s.hidden, moe_intermediate_size=s.intermediate, num_experts=s.experts, num_experts_per_tok=s.k
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = modeling.Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = up, down
    return torch.compile(module, dynamic=False)


def vllm() -> Callable[..., Tensor] | None:
    """vLLM's fused_experts where it is installed."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except Exception:
        return None
    return fused_experts


def microseconds(f: Callable[..., Any], sets: list[Any]) -> float:
    with torch.no_grad():
        return tuner.microseconds([lambda args=args: f(*args) for args in sets], SECONDS)


def attempt(what: str, f: Callable[[], float]) -> float | None:
    """A peer's figure; one that fails is told and left out."""
    try:
        return f()
    except Exception as e:
        print(f"  {what} failed: {type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''}", flush=True)
        return None


def error(s: Shape, f: Callable[..., Tensor], args: Routing, up: Tensor, down: Tensor) -> float:
    """Relative error of four rows against fp32."""
    x, ids, w = args
    rows = torch.linspace(0, x.shape[0] - 1, min(4, x.shape[0]), device=DEVICE).long()
    want = meaning(s).evaluate(x[rows], ids[rows], w[rows], [up], [down], dtype=torch.float32)
    return float((f(*args)[rows].float() - want).norm() / want.norm())


def experts(name: str, tokens: list[int], limits: dict[str, float], args: argparse.Namespace) -> Iterator[Point]:
    s, start = SHAPES[name], time.perf_counter()
    up, down = (nn.Parameter(t, requires_grad=False) for t in weights_of(s))
    f, found = fused(s, up, down), {}
    for t in tokens:
        sets = input_sets(s, t)
        hit = hits([ids for _, ids, _ in sets])
        us, by = floor("experts", s, t, hit, **limits)
        with torch.no_grad():
            wrong = error(s, f, sets[0], up, down)
        found[t] = point("experts", name, t, hit=hit, floor_us=us, floor_by=by, ours_us=microseconds(f, sets), error=wrong)
    spent = time.perf_counter() - start
    print(f"  {name}: {spent:.0f} s", flush=True)
    if not args.no_peers:
        theirs = vllm()
        start = time.perf_counter()
        for t in (t for t in PEER_ORDER if t in found):
            sets = input_sets(s, t)
            if theirs is not None:
                calls = [(x, up, down, w, ids.int()) for x, ids, w in sets]
                found[t]["vllm_us"] = attempt("vllm", lambda calls=calls: microseconds(theirs, calls))
            if time.perf_counter() - start < args.peer_seconds:
                torch._dynamo.reset()
                peer = inductor(s, up, down)
                found[t]["inductor_us"] = attempt("inductor", lambda peer=peer, sets=sets: microseconds(peer, sets))
        print(f"  {name}: peers {time.perf_counter() - start:.0f} s", flush=True)
    yield from found.values()


# ---- routing, block, training ------------------------------------------------------------------------------------


def route(name: str, tokens: list[int], limits: dict[str, float], args: argparse.Namespace) -> Iterator[Point]:
    """Logits to weights, ids and the dispatch's metadata, with the row tiles that the experts would ask for."""
    s = SHAPES[name]
    plain, bias = moe_compile.ops.route_args(gating(s)), torch.randn(s.experts, device=DEVICE) * 0.1
    for t in tokens:
        choice = tune.choose(tune.Problem(s.experts, s.hidden, s.intermediate, s.k, BF16, True), t, torch.device(DEVICE, 0))
        blocks = tuple(dict.fromkeys((choice.up.bm, choice.down.bm)))

        def both(logits: Tensor, blocks: tuple[int, ...] = blocks) -> None:
            dispatch(torch.ops.moe_compile.route(logits, bias, None, *plain)[1], s.experts, blocks)

        sets = [(torch.randn(t, s.experts, device=DEVICE),) for _ in range(8)]
        us, by = floor("route", s, t, 0, **limits)
        yield point("route", name, t, floor_us=us, floor_by=by, ours_us=microseconds(both, sets))


def block(name: str, tokens: list[int], limits: dict[str, float], args: argparse.Namespace) -> Iterator[Point]:
    """Router, gating, experts and shared expert as transformers writes them, through either backend, in CUDA graphs."""
    import moe_block

    s = SHAPES[name]
    sizes = {"experts": s.experts, "k": s.k, "hidden": s.hidden, "intermediate": s.intermediate}
    module = moe_block.build(sizes, BF16, DEVICE).eval()
    for t in tokens:
        free()
        sets = [(torch.randn(1, t, s.hidden, device=DEVICE).to(BF16),) for _ in range(8)]
        sides = moe_block.compile_sides(module, "backend") if not args.no_peers else {"fused": moe_block.fused_side(module)}
        with torch.no_grad():
            hit = hits([module.router(x, module.expert_bias)[-1] for (x,) in sets])
            different = moe_block.check(sides, sets[0][0]) if "inductor" in sides else None
        us, by = floor("block", s, t, hit, **limits)
        peer = attempt("inductor", lambda sides=sides, sets=sets: microseconds(sides["inductor"], sets)) if "inductor" in sides else None
        ours = microseconds(sides["fused"], sets)
        yield point("block", name, t, hit=hit, floor_us=us, floor_by=by, ours_us=ours, inductor_us=peer, difference=different)


def backward(name: str, tokens: list[int], limits: dict[str, float], args: argparse.Namespace) -> Iterator[Point]:
    """Forward and backward of the routed experts: gradients of tokens, both weights and the routing weights."""
    s = SHAPES[name]
    up, down = (nn.Parameter(t) for t in weights_of(s))
    for t in tokens:
        sets = input_sets(s, t)
        us, by = floor("backward", s, t, hits([ids for _, ids, _ in sets]), **limits)
        found = point("backward", name, t, floor_us=us, floor_by=by, ours_us=training(fused(s, up, down), sets, up, down))
        found["graph_us"] = attempt("graph", lambda sets=sets: captured_training(fused(s, up, down), sets, up, down))
        if not args.no_peers:
            free()
            found["inductor_us"] = attempt("inductor", lambda sets=sets: training(inductor(s, up, down), sets, up, down))
            peer = inductor(s, up, down)
            found["inductor_graph_us"] = attempt("graph", lambda sets=sets, f=peer: captured_training(f, sets, up, down))
        yield found


def training(f: Callable[..., Tensor], sets: list[Routing], up: nn.Parameter, down: nn.Parameter, rounds: int = 8) -> float:
    """Median microseconds of a step, over rounds of steps one after the other, as training launches them: nothing waits in between.

    Before a step the last gradients are dropped, as an optimiser would.
    """
    leaves = [(x.clone().requires_grad_(), ids, w.clone().requires_grad_()) for x, ids, w in sets]
    grad = torch.randn_like(sets[0][0])

    def steps() -> None:
        for x, ids, w in leaves * (STEPS // len(leaves)):
            for leaf in (x, w, up, down):
                leaf.grad = None
            f(x, ids, w).backward(grad)

    seen = [elapsed(steps) / STEPS for _ in range(rounds + 1)]
    for leaf in (up, down):
        leaf.grad = None
    return statistics.median(seen[1:])


def captured_training(f: Callable[..., Tensor], sets: list[Routing], up: nn.Parameter, down: nn.Parameter) -> float:
    """Microseconds of a step of forward and backward in a CUDA graph: the device alone."""
    leaves = [(x.clone().requires_grad_(), ids, w.clone().requires_grad_()) for x, ids, w in sets]
    grad = torch.randn_like(sets[0][0])

    def step(x: Tensor, ids: Tensor, w: Tensor) -> None:
        for leaf in (x, w, up, down):
            leaf.grad = None
        f(x, ids, w).backward(grad)

    us = tuner.microseconds([lambda args=args: step(*args) for args in leaves], SECONDS)
    for leaf in (up, down):
        leaf.grad = None
    return us


def elapsed(f: Callable[[], object]) -> float:
    """Microseconds between two events around a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


# ---- the run -----------------------------------------------------------------------------------------------------

# which shapes and tokens a part is measured at, among those asked for
AT: dict[str, tuple[Callable[..., Iterator[Point]], tuple[str, ...], tuple[int, ...]]] = {
    "experts": (experts, tuple(SHAPES), TOKENS),
    "route": (route, ("Trinity-mini",), (1, 1024, 16384)),
    "block": (block, ("Trinity-mini",), (1, 64)),
    "backward": (backward, ("Trinity-mini",), (4096, 16384)),
}


def point(part: str, shape: str, tokens: int, **figures: Any) -> Point:
    rounded = {n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in figures.items()}
    return {"part": part, "shape": shape, "tokens": tokens, "date": datetime.date.today().isoformat(), **rounded}


def machine() -> dict[str, Any]:
    import transformers

    return {
        "card": torch.cuda.get_device_name(0),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


def measure(args: argparse.Namespace, path: Path) -> None:
    """All parts asked for, into the results file after each shape, so that a run cut short keeps what it has."""
    torch.set_float32_matmul_precision("highest")  # fp32 is the reference
    limits = {"bandwidth": bandwidth(), "peak": peak()}
    free()
    print(f"reads {limits['bandwidth'] / 1e12:.2f} TB/s, dense bf16 {limits['peak'] / 1e12:.0f} TFLOP/s", flush=True)
    about = machine()
    for part in args.parts:
        run, shapes, tokens = AT[part]
        for name in (n for n in shapes if n in args.shapes):
            wanted = [t for t in tokens if args.tokens is None or t in args.tokens]
            points = list(run(name, wanted, limits, args)) if wanted else []
            free()
            if points:
                print(table(points), flush=True)
            store(path, {"machine": about, "limits": limits, "points": points})
