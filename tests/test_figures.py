"""Sums of benchmark results that the documents quote are those of the committed files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def points(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "benchmarks/results" / name).read_text())["points"]
    return found


def ratios(rows: list[dict[str, Any]], how: str) -> list[float]:
    return [p[f"{how}_moe_fused"] / p[f"{how}_inductor"] for p in rows if p.get(f"{how}_moe_fused") and p.get(f"{how}_inductor")]


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def test_never_slower() -> None:
    rows = points("never_slower_nvidia_h200.json")
    bf16, fp16 = ([p for p in rows if p["dtype"] == dtype] for dtype in ("bfloat16", "float16"))
    called, graph, half = ratios(bf16, "called"), ratios(bf16, "graph"), ratios(fp16, "called")
    assert len(bf16) + len(fp16) == len(rows) and len(called) == len(bf16)
    said = [
        f"Over the {len(bf16)} rows in bf16 of that file",
        f"{mean(called):.2f} of Inductor's time as called, by the geometric mean, and at most {max(called):.2f}",
        f"over the {len(fp16)} in fp16 {mean(half):.2f}",
        f"({len(graph)} rows) {mean(graph):.2f}, and at most {max(graph):.2f}",
    ]
    for doc in ("README.md", "docs/performance.md"):
        text = " ".join((ROOT / doc).read_text(encoding="utf-8").split())
        assert not [s for s in said if s not in text], doc
