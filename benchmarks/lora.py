"""A LoRA training step of one MoE layer: fused, under Inductor, and eager, in one interleaved run; milliseconds and peak memory.

    python benchmarks/lora.py                                # on a GPU: the widths of Qwen3-30B-A3B
    python benchmarks/lora.py --hidden 64 --inter 32 --experts 8 --tokens 64 --device cpu

Prediction, bf16, frozen base: forward and the gradient of tokens each read every touched weight once; a pair of rank r adds
r (1/in + 1/out) of their work; no gradient of a base weight is made, so a step is 2/3 of one with them, and memory is that of weights,
rows and pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile


class Lora(nn.Module):
    def __init__(self, a: int, b: int, r: int) -> None:
        super().__init__()
        self.base = nn.Linear(a, b, bias=False).requires_grad_(False)
        self.low, self.high = nn.Linear(a, r, bias=False), nn.Linear(r, b, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.high(self.low(x)) * 2.0


class Expert(nn.Module):
    def __init__(self, h: int, i: int, r: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = Lora(h, i, r), Lora(h, i, r), Lora(i, h, r)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Layer(nn.Module):
    def __init__(self, experts: int, h: int, i: int, k: int, r: int) -> None:
        super().__init__()
        self.k, self.gate = k, nn.Linear(h, experts, bias=False).requires_grad_(False)
        self.experts = nn.ModuleList(Expert(h, i, r) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1, dtype=torch.float32).topk(self.k, -1)
        w = (w / w.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * w[token, slot, None])
        return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(experts=128, hidden=2048, inter=768, k=8, rank=16, tokens=4096, runs=10).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--device", default="cuda")
    p.add_argument("--paths", nargs="+", default=["fused", "inductor", "eager"])
    a = p.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    layer = Layer(a.experts, a.hidden, a.inter, a.k, a.rank).to(a.device, dtype)
    x = torch.randn(a.tokens, a.hidden, device=a.device, dtype=dtype)
    grad = torch.randn_like(x)
    models: dict[str, Callable[[Tensor], Tensor]] = {}
    if "fused" in a.paths:
        models["fused"] = torch.compile(layer, backend="moe_fused")
    if "inductor" in a.paths:
        models["inductor"] = torch.compile(layer)
    if "eager" in a.paths:
        models["eager"] = layer
    step = {name: _step(layer, model, x, grad) for name, model in models.items()}
    seen: dict[str, list[float]] = {name: [] for name in step}
    memory = {}
    for name, run in step.items():
        for _ in range(3):
            run()
        memory[name] = _peak(run)
        if name == "fused":
            print(moe_compile.last_report())
    for _ in range(a.runs):
        for name, run in step.items():
            seen[name].append(_timed(run))
    for name, times in seen.items():
        ratio = statistics.median(times) / statistics.median(seen["fused"]) if "fused" in seen else float("nan")
        print(f"{name:10} {statistics.median(times):9.2f} ms  {ratio:6.2f} x  peak {memory[name] / 2**20:8.0f} MiB")


def _step(layer: nn.Module, model: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        model(leaf).backward(grad)

    return run


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(run: Callable[[], None]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return (time.perf_counter() - start) * 1e3


def _peak(run: Callable[[], None]) -> int:
    if not torch.cuda.is_available():
        return 0
    _wait()
    torch.cuda.reset_peak_memory_stats()
    run()
    _wait()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
