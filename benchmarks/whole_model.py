"""A whole model as users call it: decoding step by step and a prefill, eager, under Inductor and under moe_fused, in both modes.

    python benchmarks/whole_model.py            # Qwen3-30B-A3B's widths, 6 layers, random weights, on a CUDA device

A decoding step has a static cache and one new token a sequence; steps follow each other without waiting. Milliseconds a step, the sides
taking turns. Results are written to benchmarks/results/whole_model_<card>.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moe_compile  # noqa: F401 (a checkout that is not installed registers the backend)

RESULTS = Path(__file__).parent / "results"
MODES = ("default", "reduce-overhead")
STEPS, ROUNDS, PAST = 16, 24, 64


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
        out = self.model(ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
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


class Side:
    """A model under one backend and mode at a point: its own cache, entered by a function of its own, so that what Dynamo keeps of one
    side does not lengthen another's guards."""

    def __init__(self, model: Any, point: Point, backend: str, mode: str) -> None:
        device = model.lm_head.weight.device
        self.point, self.past = point, PAST if point.tokens == 1 else 0
        length = PAST + STEPS * 4 if point.tokens == 1 else point.tokens
        self.cache = new_cache(model, length, point.batch)
        g = torch.Generator(device).manual_seed(1)
        for layer in self.cache.layers:
            for t in (layer.keys, layer.values):
                t.normal_(generator=g)
        name = f"{backend}_{mode}_{point.batch}_{point.tokens}".replace("-", "_")
        space: dict[str, Any] = {"step": Step(model, self.cache, length)}
        exec(f"def {name}(ids, positions):\n    return step(ids, positions)", space)
        self.step: Any = space[name]
        if backend != "eager":
            self.step = torch.compile(self.step, backend=backend, dynamic=False, **({} if mode == "default" else {"mode": mode}))
        self.ids = torch.randint(0, model.config.vocab_size, (point.batch, point.tokens), device=device, generator=g)
        places = [self.past + i + torch.arange(point.tokens, device=device) for i in range(STEPS)]
        self.places = [p.expand(self.ids.shape).contiguous() for p in places]

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.past)

    @torch.no_grad()
    def first(self) -> float:
        """Seconds of the first call; a few more follow, in which CUDA graphs are captured."""
        start = time.perf_counter()
        self.rewind()
        self.step(self.ids, self.places[0])
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        for _ in range(4):
            self.milliseconds()
        return seconds

    @torch.no_grad()
    def milliseconds(self) -> float:
        """A step, over steps that follow each other without waiting."""
        steps = STEPS if self.point.tokens == 1 else 2
        self.rewind()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(steps):
            if self.point.tokens > 1:
                self.rewind()
            self.step(self.ids, self.places[i if self.point.tokens == 1 else 0])
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps * 1000


def prepared(model: Any, point: Point, sides: list[tuple[str, str]]) -> tuple[dict[Any, Side], dict[Any, float]]:
    """All sides at a point, compiled, and the seconds of their first calls."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    ready = {side: Side(model, point, *side) for side in sides}
    return ready, {side: s.first() for side, s in ready.items()}


def measured(point: Point, ready: dict[Any, Side], first: dict[Any, float]) -> list[dict[str, Any]]:
    """All sides in turns, the lower quartile of each: a machine that is busy for a while slows all of them."""
    seen: dict[tuple[str, str], list[float]] = {side: [] for side in ready}
    for _ in range(ROUNDS):
        for side, s in ready.items():
            seen[side].append(s.milliseconds())
    best = {side: sorted(v)[len(v) // 4] for side, v in seen.items()}
    rows = []
    for (backend, mode), ms in best.items():
        row = {"point": point.name, "backend": backend, "mode": mode, "ms": round(ms, 3), "first_call_s": round(first[backend, mode], 1)}
        ratio = ms / best["inductor", mode] if backend == "moe_fused" and ("inductor", mode) in best else None
        told = "" if ratio is None else f"{ratio:.2f} x"
        print(f"{point.name:24s} {backend:10s} {mode:16s} {ms:9.3f} ms {told:8s} first call {row['first_call_s']:.0f} s", flush=True)
        rows.append(row)
    return rows


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
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    model = build(args.layers, "cuda")
    sides = [("eager", "default")] * (not args.no_eager) + [(b, m) for m in args.modes for b in ("inductor", "moe_fused")]
    store([row for i in args.points for row in measured(POINTS[i], *prepared(model, POINTS[i], sides))], args.layers)


def store(rows: list[dict[str, Any]], layers: int) -> None:
    """Into the card's file."""
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
