"""A LoRA fine-tuning step of a Qwen3-MoE: fused, under Inductor, and eager, in one interleaved run; milliseconds and peak memory.

    python benchmarks/lora.py                                # on a GPU: the widths of Qwen3-30B-A3B, 6 layers
    python benchmarks/lora.py --hidden 64 --inter 32 --experts 8 --tokens 64 --layers 2 --device cpu

Every expert's weights have a pair of rank r and are parametrised as W + s B A, the base is frozen; a step is the loss of next tokens, its
gradient and AdamW on the pairs. Written so, W + s B A of all experts is made once an access (1.6 GB a layer at the widths above) and its
gradient in the backward pass; fused, neither is.

Prediction, bf16, frozen base: forward and the gradient of tokens each read every touched weight once; a pair of rank r adds
r (1/in + 1/out) of their work; no gradient of a base weight is made, so a step is 2/3 of one with them, and memory is that of weights,
rows and pairs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import moe_compile


class Pair(nn.Module):
    """W [E, out, in] -> W + s B A, with A [E, r, in] and B [E, out, r]."""

    def __init__(self, w: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        experts, n, k = w.shape
        self.scale = scale
        self.a = nn.Parameter(torch.randn(experts, rank, k, device=w.device).mul_(k**-0.5).to(w.dtype))
        self.b = nn.Parameter(torch.randn(experts, n, rank, device=w.device).mul_(0.01).to(w.dtype))

    def forward(self, w: Tensor) -> Tensor:
        return torch.baddbmm(w, self.b, self.a, alpha=self.scale)


def build(a: argparse.Namespace) -> Any:
    """The model, its base frozen, pairs on both stacks of every layer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32000, hidden_size=a.hidden, moe_intermediate_size=a.inter, intermediate_size=3 * a.hidden, num_hidden_layers=a.layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=a.experts, num_experts_per_tok=a.k, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device(a.device):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16 if a.device == "cuda" else torch.float32)
    model.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(layer.mlp.experts, name)
            parametrize.register_parametrization(layer.mlp.experts, name, Pair(stack, a.rank, 2.0))
    return model.train()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(layers=6, experts=128, hidden=2048, inter=768, k=8, rank=16, tokens=4096, runs=10).items():
        p.add_argument(f"--{name}", type=int, default=value)
    p.add_argument("--device", default="cuda")
    p.add_argument("--paths", nargs="+", default=["fused", "inductor", "eager"])
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    model = build(a)
    ids = torch.randint(0, 32000, (1, a.tokens), device=a.device)
    paths: dict[str, Callable[[], Any]] = {
        "fused": lambda: torch.compile(_entered(model, "fused"), backend="moe_fused", dynamic=False),
        "inductor": lambda: torch.compile(_entered(model, "inductor"), dynamic=False),
        "eager": lambda: _entered(model, "eager"),
    }
    steps = {name: _step(model, paths[name](), ids) for name in a.paths}
    seen: dict[str, list[float]] = {name: [] for name in steps}
    found: dict[str, dict[str, float]] = {}
    for name, run in steps.items():
        start = time.perf_counter()
        loss = run()
        first = time.perf_counter() - start
        run()
        found[name] = {"peak_mib": _peak(run) / 2**20, "loss": loss, "first_call_s": first}
        if name == "fused":
            print(moe_compile.last_report(), flush=True)
    for _ in range(a.runs):
        for name, run in steps.items():
            seen[name].append(_timed(run))
    for name, times in seen.items():
        found[name]["ms"] = statistics.median(times)
        ratio = found[name]["ms"] / statistics.median(seen["fused"]) if "fused" in seen else float("nan")
        print(f"{name:10} {found[name]['ms']:9.2f} ms  {ratio:6.2f} x  peak {found[name]['peak_mib']:8.0f} MiB  "
              f"first loss {found[name]['loss']:.4f}, call {found[name]['first_call_s']:.0f} s", flush=True)  # fmt: skip
    if a.json:
        _store(a, found)


def _entered(model: Any, name: str) -> Any:
    """The loss by a function of its own: what Dynamo keeps of one side does not lengthen the other's guards."""
    space: dict[str, Any] = {"model": model}
    exec(f"def {name}(ids):\n    return model(ids, labels=ids, use_cache=False).loss", space)
    return space[name]


def _step(model: nn.Module, loss_of: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[], float]:
    """A step; the rate is zero, so that every step of every side meets the same model. The loss, read when it is done."""
    pairs = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(pairs, lr=0.0, fused=ids.is_cuda)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(ids)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


def _store(a: argparse.Namespace, found: dict[str, dict[str, float]]) -> None:
    about = {
        "card": torch.cuda.get_device_name(0) if a.device == "cuda" else "CPU",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "model": f"Qwen3-MoE, {a.layers} layers, E {a.experts}, k {a.k}, H {a.hidden}, I {a.inter}, rank {a.rank}, {a.tokens} tokens",
    }
    plain = {name: {k: float(f"{v:.5g}") for k, v in figures.items()} for name, figures in found.items()}
    a.json.write_text(json.dumps({"machine": about, "sides": plain}, indent=1) + "\n")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(run: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return (time.perf_counter() - start) * 1e3


def _peak(run: Callable[[], object]) -> int:
    if not torch.cuda.is_available():
        return 0
    _wait()
    torch.cuda.reset_peak_memory_stats()
    run()
    _wait()
    return torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    main()
