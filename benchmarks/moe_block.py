"""MoE blocks against plain Inductor and against what the machine can do at best, on whatever device is there.

    python benchmarks/moe_block.py            # table, benchmarks/results/<cpu or card>.json and .png

On a CPU: one whole block (router, gating, experts, shared expert), inference and training. Both sides are interleaved, every figure
is a median, inputs rotate so that different experts are touched. The floor is the larger of (touched expert weights / measured memory
bandwidth) and (dense matrix products of the same FLOPs). On a GPU: see on_cuda.py; results are merged into the card's file.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import axes as axes_of
import roofline
import torch
import transformers
from torch import Tensor, nn
from transformers.models.afmoe import modeling_afmoe
from transformers.models.afmoe.configuration_afmoe import AfmoeConfig

import moe_compile.ops
from moe_compile import ir
from moe_compile.ir import scalar as activation

MoeBlock: Any = getattr(modeling_afmoe, "AfmoeSparseMoeBlock", None) or modeling_afmoe.AfmoeMoE  # its name in older releases
RESULTS = Path(__file__).parent / "results"
TOKENS = (1, 16, 128, 1024)
TRAINING_TOKENS = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
INPUTS = 8  # rotated


class HandFused(nn.Module):
    """What the backend's rewrite amounts to for this block, written by hand (`--fused hand`)."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        config = block.config
        self.gating = ir.Gating(
            config.num_experts,
            config.num_experts_per_tok,
            ir.Score.SIGMOID,
            bias=ir.BiasOn.SCORE,
            norm=ir.Normaliser(ir.Norm.SUM, eps=1e-20),
            scale=config.route_scale,
        )
        up = block.experts.gate_up_proj
        size = (config.num_experts, config.hidden_size, config.moe_intermediate_size, config.hidden_size)
        self.experts = ir.Experts(*size, ir.Form.CONCAT, activation.SWIGLU, dtype=up.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        block = self.block
        x = hidden.flatten(0, 1)
        logits = block.router.gate(x).float()
        w, ids = torch.ops.moe_compile.route(logits, block.expert_bias, None, *moe_compile.ops.route_args(self.gating))
        shared = block.shared_experts(x)
        plain = moe_compile.ops.experts_args(self.experts)
        up, down = block.experts.gate_up_proj, block.experts.down_proj
        return torch.ops.moe_compile.experts(x, ids, w, [up], [down], [], [], shared, *plain).view_as(hidden)


def build(shape: dict[str, int], dtype: torch.dtype, device: str = "cpu") -> Any:
    """A random block with transformers' default experts implementation, made on the device."""
    config = AfmoeConfig(
        hidden_size=shape["hidden"],
        moe_intermediate_size=shape["intermediate"],
        num_experts=shape["experts"],
        num_experts_per_tok=shape["k"],
        num_shared_experts=1,
        route_scale=2.826,
    )
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device(device):
        block = MoeBlock(config)
    for name, p in block.named_parameters():
        nn.init.normal_(p, std=0.0 if name == "expert_bias" else p.shape[-1] ** -0.5)
    return block.to(dtype)


def compile_sides(block: Any, fused: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each side owns its parameters, so neither finds them warm in cache because of the other."""
    other = copy.deepcopy(block)
    ours = torch.compile(HandFused(other), dynamic=False) if fused == "hand" else fused_side(other)
    return {"inductor": torch.compile(block, dynamic=False), "fused": ours}


def fused_side(block: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(block, backend="moe_fused", dynamic=False)


def check(sides: dict[str, Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Largest relative difference between the sides; a benchmark of two different results would be worth nothing."""
    with torch.no_grad():
        a, b = (side(x).float() for side in sides.values())
    difference = float((a - b).norm() / a.norm())
    limit = 1e-5 if x.dtype == torch.float32 else 2e-2
    if not difference < limit:
        raise SystemExit(f"the sides disagree: relative difference {difference:.2e}")
    return difference


def interleaved(steps: dict[str, Callable[[int], None]], rounds: int, target_s: float = 0.01) -> dict[str, float]:
    """Median seconds of one call of each step, the steps taking turns."""
    calls = {}
    for name, step in steps.items():
        for i in range(INPUTS):
            step(i)
        start = time.perf_counter()
        step(0)
        calls[name] = max(1, min(INPUTS * 4, round(target_s / (time.perf_counter() - start))))
    seen: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for i in range(calls[name]):
                step(i)
            seen[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in seen.items()}


def inference_step(side: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> Callable[[int], None]:
    def step(i: int) -> None:
        with torch.no_grad():
            side(inputs[i % len(inputs)])

    return step


def training_step(side: Any, inputs: list[Tensor], grad: Tensor) -> Callable[[int], None]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    parameters = [p for p in side.parameters() if p.requires_grad]

    def step(i: int) -> None:
        x = leaves[i % len(leaves)]
        side(x).backward(grad)
        x.grad = None
        for p in parameters:
            p.grad = None

    return step


def median_time(f: Callable[[], object], repeats: int = 9) -> float:
    f()
    seen = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        seen.append(time.perf_counter() - start)
    return statistics.median(seen)


def bandwidth() -> float:
    """Bytes a second of reading a buffer far larger than the caches."""
    buffer = torch.ones(1 << 26)
    return buffer.numel() * buffer.element_size() / median_time(buffer.sum)


def floor(shape: dict[str, int], inputs: list[Tensor], block: Any, speed: float) -> dict[str, float]:
    """Seconds: reading the weights the inputs touch, and dense products of the same FLOPs."""
    dtype, tokens = inputs[0].dtype, inputs[0].shape[1]
    hidden, inter, k = shape["hidden"], shape["intermediate"], shape["k"]
    with torch.no_grad():
        hit = statistics.mean(block.router(x, block.expert_bias)[2].unique().numel() for x in inputs)
    per_expert = 3 * hidden * inter * dtype.itemsize
    rows = tokens * (k + 1)  # the shared expert is one more
    x, a = torch.randn(rows, hidden, dtype=dtype), torch.randn(rows, inter, dtype=dtype)
    up, down = torch.randn(hidden, 2 * inter, dtype=dtype), torch.randn(inter, hidden, dtype=dtype)
    dense = median_time(lambda: (x @ up, a @ down))
    return {"weights": (hit + 1) * per_expert / speed, "dense": dense}


def measure(args: argparse.Namespace, shape: dict[str, int]) -> list[dict[str, Any]]:
    speed = bandwidth()
    print(f"memory bandwidth {speed / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    points = []
    for dtype_name in args.dtypes:
        dtype = DTYPES[dtype_name]
        for tokens in args.tokens:
            torch._dynamo.reset()
            block = build(shape, dtype)
            inputs = [torch.randn(1, tokens, shape["hidden"]).to(dtype) for _ in range(INPUTS)]
            sides = compile_sides(block, args.fused)
            difference = check(sides, inputs[0])
            found = interleaved({name: inference_step(side, inputs) for name, side in sides.items()}, args.rounds)
            limits = floor(shape, inputs, block, speed)
            points.append(tell(point("inference", dtype_name, tokens, found, limits, difference)))
            if tokens == TRAINING_TOKENS and not args.no_training:
                grad = torch.randn_like(inputs[0])
                steps = {name: training_step(side, inputs, grad) for name, side in sides.items()}
                found = interleaved(steps, max(args.rounds // 2, 3))
                tripled = {"weights": 3 * limits["weights"], "dense": 3 * limits["dense"]}
                points.append(tell(point("training", dtype_name, tokens, found, tripled, difference)))
    return points


def point(kind: str, dtype: str, tokens: int, found: dict[str, float], limits: dict[str, float], difference: float) -> dict[str, Any]:
    ms = {f"{name}_ms": round(1e3 * s, 4) for name, s in (found | limits).items()}
    speedup = round(found["inductor"] / found["fused"], 3)
    floor_ms = max(ms["weights_ms"], ms["dense_ms"])
    return {"kind": kind, "dtype": dtype, "tokens": tokens, **ms, "floor_ms": floor_ms, "speedup": speedup, "difference": difference}


def tell(p: dict[str, Any]) -> dict[str, Any]:
    """Progress: a run takes minutes."""
    times = f"{p['inductor_ms']:.2f} -> {p['fused_ms']:.2f} ms"
    print(f"  {p['kind']} {p['dtype']} {p['tokens']} tokens: {times}, {p['speedup']:.2f} x", flush=True)
    return p


COLUMNS = ("kind", "dtype", "tokens", "inductor_ms", "fused_ms", "speedup", "floor_ms", "weights_ms", "dense_ms")


def show(points: list[dict[str, Any]]) -> None:
    """A table: rich where it is installed, plain text otherwise."""
    cells = [[f"{p[c]:.2f}" if isinstance(p[c], float) else str(p[c]) for c in COLUMNS] for p in points]
    heads = [c.removesuffix("_ms") + (" [ms]" if c.endswith("_ms") else "") for c in COLUMNS]
    if importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(*heads)
        for row in cells:
            table.add_row(*row)
        Console(width=max(Console().width, 112)).print(table)
        return
    widths = [max(len(r[i]) for r in [heads, *cells]) for i in range(len(heads))]
    for row in [heads, *cells]:
        print("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)))


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


_LINES = (
    ("inductor", "Inductor", "o-"),
    ("fused", "moe_fused", "s-"),
    ("weights", "weights / bandwidth: the floor of few tokens", "k:"),
    ("dense", "torch's matmul of as many FLOPs: no floor", "k--"),
)


def plot(points: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Milliseconds over tokens, both sides and what bounds them, one panel a dtype; below how many times as fast."""
    if not importlib.util.find_spec("matplotlib"):
        print("matplotlib is not installed: no plot")
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(p["dtype"] for p in points))
    size = (5.5 * len(dtypes), 5.6)
    figure, axes = plt.subplots(2, len(dtypes), figsize=size, sharex="col", height_ratios=(3, 1), squeeze=False)
    for axis, ratio, dtype in zip(*axes, dtypes, strict=True):
        here = {p["tokens"]: p for p in points if p["dtype"] == dtype and p["kind"] == "inference"}
        tokens = sorted(here)
        for key, label, style in _LINES:
            axes_of.line(axis, tokens, {t: here[t][f"{key}_ms"] for t in tokens}, style, label=label)
        axes_of.scales(axis, tokens, (p[f"{key}_ms"] for p in points if p["kind"] == "inference" for key, *_ in _LINES))
        faster = {t: here[t]["inductor_ms"] / here[t]["fused_ms"] for t in tokens}
        axes_of.line(ratio, tokens, faster, "s-", color="tab:orange")
        ratio.set(xlabel="tokens", ylim=(0, math.ceil(max(faster.values()))))
        ratio.axhline(1, color="tab:blue")
        ratio.grid(True, alpha=0.25)
        axis.set_title(dtype)
    axes[0][0].set_ylabel("milliseconds")
    axes[1][0].set_ylabel("times as fast")
    axes[0][0].legend()
    figure.suptitle(f"MoE block on {about['processor']}, {about['threads']} threads, torch {about['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    backend_ready = importlib.util.find_spec("moe_compile.passes.pipeline") is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--fused", choices=["backend", "hand"], default="backend" if backend_ready else "hand")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="token counts (default: those of the table)")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON and the plot")
    for name, value in (("experts", 64), ("k", 8), ("hidden", 512), ("intermediate", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    roofline.add_arguments(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*functools.lru_cache.*")  # Dynamo on transformers' version checks
    if args.device == "cpu" and args.plot_only:
        seen = json.loads((args.output / "cpu.json").read_text())
        plot(seen["points"], seen["machine"], args.output / "cpu.png")
    elif args.device == "cuda" or args.plot_only or (args.device == "auto" and torch.cuda.is_available()):
        on_gpu(args)
    else:
        on_cpu(args)


def on_gpu(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available() and not (args.card and args.plot_only):
        raise SystemExit("torch finds no CUDA device; results of another machine are drawn with --plot-only --card NAME")
    path = roofline.file_of(args.card or torch.cuda.get_device_name(0), args.output)
    if not args.plot_only:
        import on_cuda  # a module named cuda would hide the one that torch imports

        on_cuda.measure(args, path)
    roofline.show(path)


def on_cpu(args: argparse.Namespace) -> None:
    args.tokens = args.tokens or list(TOKENS)
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = {name: getattr(args, name) for name in ("experts", "k", "hidden", "intermediate")}
    points = measure(args, shape)
    show(points)
    about = machine()
    args.output.mkdir(parents=True, exist_ok=True)
    result = {"machine": about, "shape": shape, "fused": args.fused, "points": points}
    (args.output / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(points, about, args.output / "cpu.png")


if __name__ == "__main__":
    main()
