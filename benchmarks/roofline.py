"""What the CUDA benchmark measures against: shapes, the physical floor, the targets; its table, its JSON file and its plot. No GPU here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import axes as axes_of

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
PARTS = ("experts", "route", "block", "backward")
Point = dict[str, Any]  # part, shape, tokens, then figures: *_us, hit, floor_by, error


@dataclass(frozen=True)
class Shape:
    """Routed experts of a model: experts, experts a token, hidden size, an expert's intermediate size."""

    experts: int
    k: int
    hidden: int
    intermediate: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert's three matrices in bf16."""
        return 3 * self.hidden * self.intermediate * 2


SHAPES = {
    "Trinity-mini": Shape(128, 8, 2048, 1024),
    "Qwen3-30B-A3B": Shape(128, 8, 2048, 768),
    "Mixtral-8x7B": Shape(8, 2, 4096, 14336),
    "DeepSeek-V3": Shape(256, 8, 7168, 2048),
}
# microseconds to reach on an H100, by (part, shape) and tokens: below the best kernel measured there
_EXPERTS = (1, 16, 64, 256, 1024, 4096, 16384)
TARGETS: dict[tuple[str, str], dict[int, float]] = {
    ("experts", "Trinity-mini"): dict(zip(_EXPERTS, (40, 345, 528, 545, 560, 680, 2500), strict=True)),
    ("experts", "Qwen3-30B-A3B"): dict(zip(_EXPERTS, (32, 262, 400, 415, 425, 530, 1980), strict=True)),
    ("experts", "Mixtral-8x7B"): dict(zip(_EXPERTS, (238, 920, 940, 980, 1200, 4200, 16000), strict=True)),
    ("experts", "DeepSeek-V3"): dict(zip(_EXPERTS, (242, 2900, 6300, 7330, 7500, 8400, 18000), strict=True)),
    ("route", "Trinity-mini"): {1: 8, 16384: 20},
    ("block", "Trinity-mini"): {1: 47, 64: 550},
    ("backward", "Trinity-mini"): {4096: 2900, 16384: 8500},
}


def floor(part: str, s: Shape, tokens: int, hit: float, bandwidth: float, peak: float) -> tuple[float, str]:
    """(microseconds, "bytes" or "flops"): max(bytes / bandwidth, FLOPs / peak), bandwidth in B/s and peak in FLOP/s.

    Bytes: each of the `hit` experts once, tokens in, results out, no intermediates.
    block: one more (shared) expert and the router. backward: weights twice, their gradients once, and gradients in and out.
    """
    rows, tensor = tokens * s.k, tokens * s.hidden * 2
    moved, flops = hit * s.expert_bytes + 2 * tensor, 6 * rows * s.hidden * s.intermediate
    if part == "block":
        moved += s.expert_bytes + s.experts * s.hidden * 2
        flops += 6 * tokens * s.hidden * s.intermediate + 2 * tokens * s.experts * s.hidden
    elif part == "backward":
        moved, flops = 3 * hit * s.expert_bytes + 4 * tensor, 3 * flops
    elif part == "route":  # logits read, weights and ids written
        moved, flops = tokens * s.experts * 4 + rows * 12, 0
    by = {"bytes": moved / bandwidth * 1e6, "flops": flops / peak * 1e6}
    name = max(by, key=lambda n: by[n])
    return by[name], name


# ---- the file ----------------------------------------------------------------------------------------------------


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A run's results over those that a file holds: point by point and figure by figure; what was not measured again stays."""
    points: dict[Any, Point] = {_key(p): p for p in old.get("points", [])}
    for p in new["points"]:
        known = {name: value for name, value in points.get(_key(p), {}).items() if name != "note"}  # how the old figure came about
        points[_key(p)] = {**known, **{name: value for name, value in p.items() if value is not None}}
    return {**old, **new, "points": sorted(points.values(), key=_order)}


def _key(p: Point) -> tuple[str, str, int]:
    return p["part"], p["shape"], p["tokens"]


def _order(p: Point) -> tuple[int, int, int]:
    names = list(SHAPES)
    return PARTS.index(p["part"]), names.index(p["shape"]) if p["shape"] in names else len(names), p["tokens"]


def load(path: Path) -> dict[str, Any]:
    """What a file holds; nothing when it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def store(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Merge a run into the file; the whole content."""
    data = merge(load(path), new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return data


# ---- the table ---------------------------------------------------------------------------------------------------

HEAD = ("part", "shape", "T", "hit", "floor", "ours", "/floor", "target", "inductor", "x", "vllm", "error")


def row(p: Point) -> list[str]:
    """One line's cells; microseconds. A floor ends in B or F: set by bytes or by FLOPs. `*`: the target is missed."""
    ours, limit, target = p.get("ours_us"), p.get("floor_us"), TARGETS.get((p["part"], p["shape"]), {}).get(p["tokens"])
    missed = "*" if ours and target and ours > target else ""
    return [
        p["part"],
        p["shape"],
        str(p["tokens"]),
        _number(p.get("hit")),
        _number(limit) + (p.get("floor_by", "")[:1].upper() if limit else ""),
        _number(ours),
        f"{ours / limit:.2f}" if ours and limit else "-",
        _number(target) + missed,
        _number(p.get("inductor_us")),
        f"{p['inductor_us'] / ours:.2f}" if ours and p.get("inductor_us") else "-",
        _number(p.get("vllm_us")),
        f"{p['error']:.4f}" if p.get("error") is not None else "-",
    ]


def _number(v: float | None) -> str:
    return "-" if v is None else f"{v:.1f}" if v < 100 and v != int(v) else f"{v:.0f}"


def table(points: Iterable[Point]) -> str:
    rows: list[Sequence[str]] = [HEAD, *(row(p) for p in sorted(points, key=_order))]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows)


# ---- the plot ----------------------------------------------------------------------------------------------------


def plot(data: dict[str, Any], path: Path) -> bool:
    """Microseconds of the routed experts over tokens, log-log, one panel a shape. False without matplotlib or points."""
    experts = [p for p in data.get("points", []) if p["part"] == "experts"]
    shapes = [s for s in SHAPES if any(p["shape"] == s for p in experts)]
    if not shapes or not importlib.util.find_spec("matplotlib"):
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(shapes))
    rows = -(-len(shapes) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 3.9 * rows), squeeze=False)
    for axis in axes.flat[len(shapes) :]:
        axis.axis("off")
    for axis, shape in zip(axes.flat, shapes):
        s, mine = SHAPES[shape], [p for p in experts if p["shape"] == shape]
        tokens = sorted({p["tokens"] for p in mine})
        for key, label, style in (
            ("inductor_us", "transformers + Inductor", "o-"),
            ("ours_us", "moe_fused", "s-"),
            ("floor_us", "floor", "k--"),
        ):
            if any(p.get(key) for p in mine):
                axes_of.line(axis, tokens, {p["tokens"]: p.get(key) for p in mine}, style, label=label, markersize=4)
        axes_of.scales(axis, tokens, (p.get(key) for p in mine for key in ("inductor_us", "ours_us", "floor_us")))
        axis.set(title=f"{shape}: E={s.experts} k={s.k} H={s.hidden} I={s.intermediate}", xlabel="tokens", ylabel="µs")
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
    axes.flat[0].legend(fontsize=8)
    machine, limits = data.get("machine", {}), data.get("limits", {})
    measured = f"{limits['bandwidth'] / 1e12:.2f} TB/s, {limits['peak'] / 1e12:.0f} TFLOP/s measured" if limits else ""
    figure.suptitle(
        f"Routed experts, bf16, CUDA graphs: {machine.get('card', '')} ({measured}), torch {machine.get('torch', '')}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


# ---- the command line --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on a GPU")
    group.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    group.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    group.add_argument("--no-peers", action="store_true", help="measure nothing but this project")
    group.add_argument("--peer-seconds", type=float, default=25, help="a shape's time for Inductor's side (default: %(default)s)")
    group.add_argument("--plot-only", action="store_true", help="table and plot of the results that are there")
    group.add_argument("--card", help="name of the results file (default: this machine's card)")


def file_of(card: str, folder: Path) -> Path:
    """NVIDIA H100 80GB HBM3 -> nvidia_h100_80gb_hbm3.json."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', card).strip('_').lower()}.json"


def show(path: Path) -> None:
    """The table of a results file, and its plot beside it. Exits where there is no such file."""
    data = load(path)
    if not data:
        raise SystemExit(f"no results in {path}")
    print(table(data["points"]))
    if not plot(data, path.with_suffix(".png")):
        print("no plot: it needs matplotlib and points of the routed experts")
