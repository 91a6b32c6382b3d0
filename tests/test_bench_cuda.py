"""The GPU benchmark without a GPU: floor, table, results file, plot, and a run in which time is made up."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import roofline
from roofline import SHAPES, Shape, floor

LIMITS = {"bandwidth": 3.15e12, "peak": 788e12}


@pytest.mark.parametrize(
    ("shape", "tokens", "hit", "us", "by"),
    [
        ("Trinity-mini", 1, 8, 32.0, "bytes"),
        ("Trinity-mini", 1024, 128, 514, "bytes"),
        ("Trinity-mini", 4096, 128, 523, "flops"),
        ("Trinity-mini", 16384, 128, 2093, "flops"),
        ("Qwen3-30B-A3B", 64, 126, 377, "bytes"),
        ("Mixtral-8x7B", 1, 2, 224, "bytes"),
        ("Mixtral-8x7B", 1024, 8, 916, "flops"),
        ("DeepSeek-V3", 4096, 256, 7196, "bytes"),
    ],
)
def test_floor_of_the_experts(shape: str, tokens: int, hit: float, us: float, by: str) -> None:
    """Against figures worked out by hand."""
    got, name = floor("experts", SHAPES[shape], tokens, hit, **LIMITS)
    assert got == pytest.approx(us, rel=0.01) and name == by


def test_floor_of_the_other_parts() -> None:
    s = SHAPES["Trinity-mini"]
    assert floor("backward", s, 4096, 128, **LIMITS) == (pytest.approx(1570, rel=0.01), "flops")
    assert floor("backward", s, 16384, 128, **LIMITS)[0] == pytest.approx(6279, rel=0.01)
    alone, block = floor("experts", s, 1, 8, **LIMITS)[0], floor("block", s, 1, 8, **LIMITS)[0]
    assert block - alone == pytest.approx((s.expert_bytes + 128 * 2048 * 2) / 3.15e6, rel=1e-6)
    assert floor("route", s, 16384, 0, **LIMITS)[1] == "bytes"


POINTS: list[dict[str, Any]] = [
    {"part": "experts", "shape": "Trinity-mini", "tokens": 4096, "hit": 128.0, "floor_us": 523.2, "floor_by": "flops", "ours_us": 690.0}
    | {"inductor_us": 1336.0, "vllm_us": None, "error": 0.00402},
    {"part": "experts", "shape": "Trinity-mini", "tokens": 1, "hit": 8.0, "floor_us": 32.0, "floor_by": "bytes", "ours_us": 39.5},
    {"part": "block", "shape": "Trinity-mini", "tokens": 1, "floor_us": 36.0, "floor_by": "bytes", "ours_us": 46.0, "inductor_us": 107.0},
]


def test_table_lines() -> None:
    head, first, second, third = (line.split() for line in roofline.table(POINTS).splitlines())
    assert head == list(roofline.HEAD)
    assert first == ["experts", "Trinity-mini", "1", "8", "32B", "39.5", "1.23", "40", "-", "-", "-", "-"]
    assert second == ["experts", "Trinity-mini", "4096", "128", "523F", "690", "1.32", "680*", "1336", "1.94", "-", "0.0040"]
    assert third[0] == "block" and third[5:10] == ["46", "1.28", "47", "107", "2.33"]
    assert max(map(len, roofline.table(POINTS).splitlines())) < 100


def test_results_are_merged(tmp_path: Path) -> None:
    """Another part, another point, another figure of a point: each run adds; what it did not measure stays."""
    path = tmp_path / "results" / "card.json"
    noted = {**POINTS[0], "note": "on a busy host"}
    roofline.store(path, {"machine": {"card": "A"}, "limits": LIMITS, "points": [noted, POINTS[1]]})
    again = {**POINTS[0], "ours_us": 650.0, "inductor_us": None}
    data = roofline.store(path, {"machine": {"card": "A", "torch": "2"}, "limits": LIMITS, "points": [again, POINTS[2]]})
    assert data == roofline.load(path) and data["machine"]["torch"] == "2"
    assert [(p["part"], p["tokens"]) for p in data["points"]] == [("experts", 1), ("experts", 4096), ("block", 1)]
    assert data["points"][1]["ours_us"] == 650.0 and data["points"][1]["inductor_us"] == 1336.0
    assert "note" not in data["points"][1], "what was said of the old figure is not true of the new one"


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = roofline.file_of("NVIDIA H100 80GB HBM3", tmp_path)
    assert path.name == "nvidia_h100_80gb_hbm3.json"
    assert not roofline.plot({"points": POINTS[2:]}, path.with_suffix(".png"))
    roofline.store(path, {"machine": {}, "limits": LIMITS, "points": [*POINTS, {**POINTS[0], "shape": "DeepSeek-V3"}]})
    roofline.show(path)
    assert path.with_suffix(".png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="no results"):
        roofline.show(tmp_path / "other.json")


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """on_cuda.py on the CPU: a tiny shape, every call made once, a microsecond each."""
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    import on_cuda

    from moe_compile.lowering.triton import tune, tuner

    def once(calls: list[Any], seconds: float) -> float:
        for call in calls:
            call()
        return 1.0

    def elapsed(f: Any) -> float:
        f()
        return float(on_cuda.STEPS)

    def weights(p: tune.Problem) -> tuple[torch.Tensor, torch.Tensor]:
        up = torch.randn(p.experts, 2 * p.intermediate, p.hidden) * p.hidden**-0.5
        down = torch.randn(p.experts, p.hidden, p.intermediate) * p.intermediate**-0.5
        return up.to(p.dtype), down.to(p.dtype)

    tiny = {"Trinity-mini": Shape(4, 2, 32, 16)}
    monkeypatch.setattr(on_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(on_cuda, "SHAPES", tiny)
    monkeypatch.setattr(on_cuda, "elapsed", elapsed)
    monkeypatch.setattr(on_cuda, "bandwidth", lambda: LIMITS["bandwidth"])
    monkeypatch.setattr(on_cuda, "peak", lambda: LIMITS["peak"])
    monkeypatch.setattr(tuner, "microseconds", once)
    monkeypatch.setattr(tuner, "random_weights", weights)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    return on_cuda


def test_a_run(dry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some_card.json"
    args = argparse.Namespace(
        parts=["experts", "route", "backward"], shapes=["Trinity-mini"], tokens=[1, 16], no_peers=True, peer_seconds=0
    )
    monkeypatch.setitem(dry.AT, "backward", (dry.backward, ("Trinity-mini",), (16,)))
    dry.measure(args, path)
    data = roofline.load(path)
    assert data["machine"]["card"] == "Some Card" and data["limits"] == LIMITS
    found = {(p["part"], p["tokens"]): p for p in data["points"]}
    assert set(found) == {("experts", 1), ("experts", 16), ("route", 1), ("backward", 16)}
    assert all(p["ours_us"] == 1.0 and p["floor_us"] > 0 for p in found.values())
    assert found["experts", 16]["hit"] > 1 and found["experts", 16]["error"] < 0.02


def test_axes_in_round_numbers_and_no_line_over_what_was_not_measured() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    import axes

    assert axes.round_numbers(0.3, 70) == [0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    assert axes.round_numbers(20, 20) == [20] and axes.round_numbers(1, 1.5) == [1, 2]
    figure, axis = pyplot.subplots()
    axes.line(axis, [1, 4, 16], {1: 2.0, 4: None, 16: 3.0}, "o-")
    axes.scales(axis, [1, 4, 16], [2.0, 3.0])
    assert [math.isnan(y) for y in axis.lines[0].get_ydata()] == [False, True, False]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["1", "4", "16"] and [t.get_text() for t in axis.get_yticklabels()] == [
        "2",
        "5",
    ]
    pyplot.close(figure)
