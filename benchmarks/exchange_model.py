"""What an exchange of rows would cost for 2 to 512 ranks: an analytic model, and a simulation of skewed routing. Nothing here is measured.

    python benchmarks/exchange_model.py        # writes results/exchange_model.json and .png, about a minute

Every rank has T tokens that choose k of E experts, without repeats, with the popularity of an expert ~ rank^-s (s = 0: uniform; experts
are placed at random). Ranks: eight a node. A way to exchange is what a token's row travels to:

    gather      every rank
    rows        each rank that holds an expert it chose, once
    two levels  each node that does, once over the network, then each such rank inside of the node
    pairs       the rank of each expert it chose, once for each of them

A rank's time is max(bytes over NVLink / 366 GB/s, bytes over the network / 45 GB/s) + 20 µs a node it talks to (at most 8 at a time), of
the bytes that it takes in; the exchange is as slow as the slowest rank. 366 GB/s: a peer's 64 MiB by copy engine on two H100 of one
host; 45 GB/s: nine tenths of a 400 Gb/s card for each GPU (assumed); latency assumed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
NODE, NVLINK, NETWORK, LATENCY = 8, 366e9, 45e9, 20e-6
WAYS = ("gather", "rows", "two levels", "pairs")
SKEWS = (0.0, 0.5, 1.0)
SIZES = (2, 4, 8, 16, 64, 512)


@dataclass(frozen=True)
class Shape:
    """E experts, k of them for a token, rows of H in bf16, T tokens a rank."""

    name: str
    experts: int
    k: int
    hidden: int
    tokens: int


SHAPES = (Shape("Trinity-Mini: E 128, k 8, H 2048", 128, 8, 2048, 4096), Shape("512 experts, k 8, H 7168", 512, 8, 7168, 4096))


def needed(shape: Shape, ranks: int) -> float:
    """The probability that a token needs a given rank: 1 - C(E - E/P, k) / C(E, k), uniform routing."""
    e, n = shape.experts, shape.experts // ranks
    return 1.0 - float(np.prod([(e - n - i) / (e - i) for i in range(shape.k)]))


def analytic(shape: Shape, ranks: int) -> dict[str, float]:
    """Rows that a rank takes in, a token, one direction, uniform routing."""
    p, others = needed(shape, ranks), ranks - 1
    return {"gather": others, "rows": p * others, "pairs": shape.k * others / ranks}


def seconds(taken: np.ndarray, outside: np.ndarray, row: int, nodes: int) -> float:
    """Of the slowest rank. taken, outside: rows that each rank takes in over NVLink and over the network."""
    return float(np.maximum(taken * row / NVLINK, outside * row / NETWORK).max()) + LATENCY * max(1, min(nodes - 1, 8))


def simulate(shape: Shape, ranks: int, skew: float, seed: int = 0) -> dict[str, dict[str, float]]:
    """Way -> the slowest rank's µs, its rows over the mean, and the share of rows behind a static capacity of 1.25 x the mean."""
    rng = np.random.default_rng(seed)
    tokens = shape.tokens if ranks <= 64 else shape.tokens // 8
    scale = shape.tokens / tokens
    logits = -skew * np.log(np.arange(1, shape.experts + 1))[rng.permutation(shape.experts)]
    each, nodes = shape.experts // ranks, max(1, ranks // NODE)
    node_of = np.arange(ranks) // NODE
    near, far, twice, far_twice, near_pairs, far_pairs = (np.zeros(ranks) for _ in range(6))
    for source in range(ranks):
        noise = rng.gumbel(size=(tokens, shape.experts)).astype(np.float32)
        ids = np.argpartition(-(noise + logits), shape.k, axis=1)[:, : shape.k]
        pairs = np.zeros((tokens, ranks), dtype=np.int32)
        np.add.at(pairs, (np.arange(tokens)[:, None], ids // each), 1)
        rows = pairs > 0
        rows[:, source] = pairs[:, source] = 0
        inside = node_of == node_of[source]
        near += rows.sum(0) * inside
        far += rows.sum(0) * ~inside
        near_pairs += pairs.sum(0) * inside
        far_pairs += pairs.sum(0) * ~inside
        by_node = rows.reshape(tokens, nodes, -1).any(2).sum(0)  # lands on the rank of the same number in the node, then goes on
        for node in range(nodes):
            twin = node * NODE + source % NODE if nodes > 1 else source
            if node != node_of[source]:
                far_twice[twin] += by_node[node]
        twice += rows.sum(0)
    every = np.full(ranks, float(tokens * (ranks - 1)))
    outside = np.full(ranks, float(tokens * max(0, ranks - NODE))) / NODE  # a node's cards share what comes from other nodes
    taken = {"gather": (every, outside), "rows": (near, far), "two levels": (twice, far_twice), "pairs": (near_pairs, far_pairs)}
    return {way: _told(*(t * scale for t in both), shape.hidden * 2, nodes) for way, both in taken.items()}


def _told(near: np.ndarray, far: np.ndarray, row: int, nodes: int) -> dict[str, float]:
    rows = near + far
    return {"us": seconds(near, far, row, nodes) * 1e6, "most": float(rows.max() / rows.mean()), "over": _overflow(rows)}


def _overflow(rows: np.ndarray) -> float:
    """The share of rows behind a static capacity of 1.25 x the mean."""
    return float(np.maximum(rows - 1.25 * rows.mean(), 0).sum() / rows.sum())


def all_of_it() -> dict[str, object]:
    cells = []
    for shape in SHAPES:
        for ranks in (p for p in SIZES if p <= shape.experts):
            for skew in SKEWS:
                cells.append({"shape": shape.name, "ranks": ranks, "skew": skew, "ways": simulate(shape, ranks, skew)})
                print(shape.name, ranks, skew, {w: round(v["us"]) for w, v in cells[-1]["ways"].items()}, flush=True)  # type: ignore[attr-defined]
    plain = [{"shape": s.name, "ranks": p, **analytic(s, p)} for s in SHAPES for p in SIZES if p <= s.experts]
    assumed = {"node": NODE, "NVLink B/s": NVLINK, "network B/s": NETWORK, "latency s": LATENCY, "shapes": [asdict(s) for s in SHAPES]}
    return {"kind": "model and simulation, not measured", "assumed": assumed, "analytic": plain, "simulated": cells}


def draw(found: dict[str, object], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells: list[dict[str, object]] = found["simulated"]  # type: ignore[assignment]
    figure, axes = plt.subplots(1, len(SHAPES), figsize=(11, 4.2), constrained_layout=True)
    for axis, shape in zip(axes, SHAPES, strict=True):
        for way, colour in zip(WAYS, ("#4477aa", "#228833", "#66ccee", "#ee6677"), strict=True):
            for skew, line in zip((SKEWS[0], SKEWS[-1]), ("-", ":"), strict=True):
                mine = [c for c in cells if c["shape"] == shape.name and c["skew"] == skew]
                us = [c["ways"][way]["us"] for c in mine]  # type: ignore[index]
                axis.plot([c["ranks"] for c in mine], us, line, color=colour, marker="o", ms=3, label=way if skew == 0 else None)
        axis.set(xscale="log", yscale="log", title=shape.name, xlabel="ranks (eight a node)", ylabel="µs one way, slowest rank (model)")
        axis.set_xticks(SIZES, [str(p) for p in SIZES])
        axis.grid(alpha=0.3)
    axes[0].legend(title="solid: uniform, dotted: popularity ~ 1/rank", fontsize=8, title_fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    found = all_of_it()
    (RESULTS / "exchange_model.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, RESULTS / "exchange_model.png")


if __name__ == "__main__":
    main()
