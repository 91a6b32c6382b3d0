"""A whole model as users call it: decoding step by step and a prefill, eager, under Inductor and under moe_fused, in both modes.

    python benchmarks/whole_model.py            # Qwen3-30B-A3B's widths, 6 layers, random weights, on a CUDA device

A decoding step has a static cache and one new token a sequence; steps follow each other without waiting. Milliseconds a step, the median
of rounds. Results are written to benchmarks/results/whole_model_<card>.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import re
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
MODES = ("default", "reduce-overhead")
STEPS, ROUNDS, PAST = 16, 7, 64


@dataclass(frozen=True)
class Point:
    """`batch` sequences of `tokens` new tokens a step."""

    batch: int
    tokens: int

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}" if self.tokens == 1 else f"prefill, {self.tokens:,} tokens"


POINTS = (Point(1, 1), Point(32, 1), Point(1, 512), Point(1, 4096))


class Step(nn.Module):
    """ids [B, S] at positions [B, S] -> logits [B, V] of the last one; the mask is made inside."""

    def __init__(self, model: Any, cache: Any, length: int) -> None:
        super().__init__()
        self.model, self.cache, self.length = model, cache, length

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        key = torch.arange(self.length, device=ids.device)
        mask = (key <= positions[0, :, None])[None, None]
        out = self.model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = out.logits
        return logits[:, -1]


def build(layers: int, device: str) -> Any:
    """Qwen3-30B-A3B's widths with seeded random weights, made on the device."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32000, hidden_size=2048, moe_intermediate_size=768, intermediate_size=6144, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    return model.eval()


def new_cache(model: Any, length: int, batch: int) -> Any:
    from transformers.cache_utils import Cache, StaticLayer

    config, weight = model.config, model.lm_head.weight
    cache = Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(config.num_hidden_layers)])
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, weight.dtype, weight.device)
    return cache


@torch.no_grad()
def milliseconds(model: Any, point: Point, backend: str, mode: str) -> tuple[float, float, Tensor]:
    """(a step, seconds of the first call, logits of the first step)."""
    device = model.lm_head.weight.device
    past = PAST if point.tokens == 1 else 0
    length = past + STEPS * 4 if point.tokens == 1 else point.tokens
    cache = new_cache(model, length, point.batch)
    g = torch.Generator(device).manual_seed(1)
    for layer in cache.layers:
        for t in (layer.keys, layer.values):
            t.normal_(generator=g)
    step: Any = Step(model, cache, length)
    if backend != "eager":
        step = torch.compile(step, backend=backend, dynamic=False, **({} if mode == "default" else {"mode": mode}))
    ids = torch.randint(0, model.config.vocab_size, (point.batch, point.tokens), device=device, generator=g)
    places = [(past + i + torch.arange(point.tokens, device=device)).expand(ids.shape).contiguous() for i in range(STEPS)]
    steps = STEPS if point.tokens == 1 else 2

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(past)

    rewind()
    start = time.perf_counter()
    first = step(ids, places[0]).float().clone()
    seconds = time.perf_counter() - start
    seen = []
    for _ in range(ROUNDS + 2):
        rewind()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(steps):
            if point.tokens > 1:
                rewind()
            step(ids, places[i if point.tokens == 1 else 0])
        torch.cuda.synchronize()
        seen.append((time.perf_counter() - start) / steps * 1000)
    return statistics.median(seen[2:]), seconds, first


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=6)
    p.add_argument("--points", nargs="+", type=int, default=list(range(len(POINTS))), help="which of the points, by number")
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    p.add_argument("--no-eager", action="store_true")
    args = p.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device")
    warnings.filterwarnings("ignore")
    model = build(args.layers, "cuda")
    rows = []
    for point in (POINTS[i] for i in args.points):
        sides = [("eager", "default")] * (not args.no_eager) + [(b, m) for m in args.modes for b in ("inductor", "moe_fused")]
        for backend, mode in sides:
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            ms, seconds, _ = milliseconds(model, point, backend, mode)
            known = {r["mode"]: r["ms"] for r in rows if r["point"] == point.name and r["backend"] == "inductor"}
            rows.append({"point": point.name, "backend": backend, "mode": mode, "ms": round(ms, 3), "first_call_s": round(seconds, 1)})
            told = f"{ms / known[mode]:.2f} x" if backend == "moe_fused" and mode in known else ""
            print(f"{point.name:24s} {backend:10s} {mode:16s} {ms:9.3f} ms {told:8s} first call {seconds:.0f} s", flush=True)
    store(rows, args.layers)


def store(rows: list[dict[str, Any]], layers: int) -> None:
    import transformers
    import triton

    card = torch.cuda.get_device_name(0)
    about = {
        "card": card,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "model": f"Qwen3-30B-A3B's widths, {layers} layers",
    }
    path = RESULTS / f"whole_model_{re.sub(r'[^A-Za-z0-9]+', '_', card).strip('_').lower()}.json"
    path.write_text(json.dumps({"machine": about, "points": rows}, indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
