"""Sums of benchmark results that the documents quote are those of the committed files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

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


def data(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / name).read_text())
    return found


def table(doc: str, head: str) -> list[list[str]]:
    """The cells of the first table of a document whose first line begins so, without that line."""
    lines = (ROOT / doc).read_text(encoding="utf-8").split("\n" + head, 1)[1].splitlines()[2:]
    rows = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in rows]


@pytest.mark.parametrize("doc", ["README.md", "docs/performance.md"])
def test_whole_blocks(doc: str) -> None:
    cpu = {
        (p["dtype"], p["kind"] == "inference", p["tokens"]): [f"{p[n]:.2f}" for n in ("inductor_ms", "fused_ms", "speedup")]
        for p in points("cpu.json")
    }
    for what, tokens, *said in table(doc, "| | tokens | Inductor |"):
        assert said == cpu[what.partition(",")[0], "," not in what, int(tokens)], what
    rows = [p for p in points("never_slower_nvidia_h200.json") if p["dtype"] == "bfloat16" and p["kind"] == "inference"]
    known = {(p["block"], p["tokens"]): [p.get(f"{how}_{side}") for how, side in ORDER] for p in rows}
    for block, *cells in table(doc, "| block | 1 token |"):
        for tokens, cell in zip((1, 8, 64, 512, 4096), cells, strict=True):
            said = cell.replace(" · ", " / ").split(" / ")  # the README has what is as called alone
            assert said == [f"{v:,.0f}" if v else "–" for v in known[block, tokens]][: len(said)], (block, tokens)


ORDER = [("called", "moe_fused"), ("called", "inductor"), ("graph", "moe_fused"), ("graph", "inductor")]


def test_whole_models_and_compile_time() -> None:
    doc = "docs/performance.md"
    ms = {(p["point"], p["mode"], p["backend"]): p["ms"] for p in points("whole_model_nvidia_h200.json")}
    for point, *cells in table(doc, "| | default mode | `reduce-overhead` |"):
        name = point.replace("decoding", "decode").replace(" of ", ", ")
        for mode, cell in zip(("default", "reduce-overhead"), cells, strict=True):
            assert cell == f"{ms[name, mode, 'moe_fused']:.2f} / {ms[name, mode, 'inductor']:.2f}", (point, mode)
    took = {r["model"]: r for r in data("compile_time.json")["results"]}
    for model, *cells in table(doc, "| | Inductor cold |"):
        s, ratio = took[model]["seconds"], took[model]["ratio"]
        want = [v for when in ("cold", "warm") for v in (s["inductor"][when], s["moe_fused"][when], ratio[when])]
        assert cells == [f"{v:.2f}" for v in want], model
    took = {(p["block"], p["backend"]): p for p in points("compile_time_cuda_nvidia_h200.json")}
    for block, *cells in table(doc, "| | cold | warm |"):
        for when, cell in zip(("cold", "warm"), cells, strict=True):
            assert cell == f"{took[block, 'inductor'][when]:.2f} / {took[block, 'moe_fused'][when]:.2f}", (block, when)


def test_routed_experts_of_an_h100() -> None:
    known = {(p["shape"], p["tokens"]): p for p in points("nvidia_h100_80gb_hbm3.json") if p["part"] == "experts"}
    for shape, *cells in table("docs/performance.md", "| tokens | 1 | 4 |"):
        for tokens, cell in zip((1, 4, 16, 64, 256, 1024, 4096, 16384), cells, strict=True):
            for said, name in zip(cell.split(" / "), ("ours_us", "floor_us", "inductor_us"), strict=True):
                found = known[shape, tokens].get(name)
                assert found is None if said == "–" else abs(float(said) - found) < 0.006 * found, (shape, tokens, name)


def test_kernels_of_the_cpu_beside_others() -> None:
    known = {(p["shape"], p["tokens"]): p for p in points("cpu_experts.json")}
    for shape, tokens, *cells in table("docs/cpu.md", "| | tokens | as held |"):
        p = known[shape, int(tokens)]
        want = [*(p["least_ms"][side] for side in ("ours", "packed", "sglang", "zentorch")), *p["to_best_peer"].values()]
        assert all(abs(float(said) - v) <= max(0.006 * v, 0.0051) for said, v in zip(cells, want, strict=True)), (shape, tokens)
    coded = {r["tokens"]: r for r in data("cpu_stored.json")["rows"]}
    for what, *cells in table("docs/cpu.md", "| S | bf16, ms |"):
        if not what.endswith("before"):  # earlier runs, of which no file was kept
            row = coded[int(what.split()[0])]
            assert cells == [f"{row['ms']['bf16']:.3f}", *(f"{v:.2f}" for v in row["bf16 over it"].values())], what
    chained = {(r["dtype"], r["tokens"]): f"{r['loop over op']:.2f}" for r in data("cpu_chained.json")["rows"]}
    for dtype, *cells in table("docs/cpu.md", "| S | 1 token |"):
        assert cells == [chained[dtype, tokens] for tokens in (1, 4, 16, 128)], dtype


def test_a_shared_expert_in_few_bits_on_a_gpu() -> None:
    known: dict[tuple[str, int], dict[str, float]] = {}
    for p in points("cuda_shared_stored_nvidia_h200.json"):  # the first run, then the second
        known[p["scheme"], p["tokens"]] = p["us"] if p["run"] == 2 else known.get((p["scheme"], p["tokens"]), p["us"])
    for what, *cells in table("docs/kernels.md", "| | T = 1 | 4 | 8 |"):
        scheme = {"float8": "fp8", "int4": "int4", "W8A8": "w8a8"}[what.partition(",")[0]]
        for tokens, cell in zip((1, 4, 8, 16, 64, 128, 256), cells, strict=True):
            us = known.get((scheme, tokens))
            said = [float(v.strip(" *")) for v in cell.split("/")] if cell != "–" else None
            assert (
                said is None
                if us is None
                else said and all(abs(v - us[n]) <= 0.051 for v, n in zip(said, ("ours", "inductor"), strict=True))
            )


HALVES = "divided, half of the batch on each rank"
# run, stage, part of what was measured, side, decimals, what one of the unit is in µs, and run and stage of one card where they are others
TWO_CARDS = [
    ("C", "one", "", "divided", 1, 1),
    ("C", "few", "", "divided", 0, 1),
    ("C", "block", "", "divided", 0, 1),
    ("C", "block_grad", "", "divided", 0, 1),
    ("A", "block_deepseek", "", "divided", 0, 1),
    ("D", "travel", "dispatch", "gather", 0, 1),
    ("D", "travel", "dispatch", ("  arriving", "  leaving"), 0, 1),
    ("E", "travel_few", "T=16", "gather", 0, 1),
    ("E", "sums", "", "op", 1, 1),
    ("E", "decode_ways", "", HALVES, 2, 1e3, "C", "decode_own"),
    ("A", "layers", "decode", "divided", 2, 1e3),
    ("E", "prefill_ways", "", HALVES, 1, 1e3, "D", "prefill_own"),
    ("A", "layers", "prefill", "divided", 1, 1e3),
]


def test_two_cards() -> None:
    rows = data("two_cards_nvidia_h200.json")["rows"]
    said = table("docs/distributed.md", "| | one card | two, peers' memory | two, NCCL | target |")
    for line, (run, stage, what, side, digits, unit, *one) in zip(said, TWO_CARDS, strict=False):

        def us(side: str, tokens: str = "", key: tuple[str, str, str] = (run, stage, what)) -> float:
            matching = (r for r in rows if (r["run"], r["stage"], r.get("side")) == (*key[:2], side))
            return next(float(r["us"]) for r in matching if key[2] in r["what"] and r["what"].endswith(tokens))

        divided = line[2].replace("**", "")
        if stage == "sums":
            wanted = [f"{us(side, f'T={t}'):.{digits if t < 100 else 0}f}" for t in (1, 64, 1024, 4096)]
            assert divided.split(", ") == wanted, line
        elif isinstance(side, tuple):
            assert divided == " / ".join(f"{us(s):.0f}" for s in side), line
        elif line[1]:
            alone = us("undivided", key=(*one, what) if one else (run, stage, what))
            assert line[1] == f"{alone / unit:,.{digits}f}", line
            assert divided == f"{us(side) / unit:,.{digits}f} ({us(side) / alone:.2f} x)", line
        else:
            assert divided == f"{us(side):.0f}", line
