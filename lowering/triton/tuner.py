"""Measures the tiles of a problem on the card at hand: each kernel by itself, replayed from a CUDA graph over rotating inputs."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...ir import Form
from ...ir import scalar as act
from ...ir.operands import Operands
from ..reference.generic import Layout
from . import experts, tune
from .call import read
from .combine import combine
from .dispatch import dispatch
from .tune import Choice, Problem, Tile, Vector

TOKENS = tuple(1 << i for i in range(15))
_WAVES, _DEPTH = 10, 1024  # below so many waves of tiles the depth may be split, into parts of at least so much
_SECONDS = 0.06  # a candidate's share


@dataclass(frozen=True)
class Inputs:
    """Random weights of a problem and routings of one number of tokens."""

    problem: Problem
    layout: Layout
    up: Tensor
    down: Tensor
    sets: list[tuple[Tensor, Tensor, Tensor]]


def tiles(problem: Problem, tokens: int, down: bool) -> list[Tile]:
    """Candidates for a grouped GEMM at this many tokens."""
    rows = tokens * problem.k / problem.experts
    if problem.dtype == torch.float32:
        return [Tile(bm, bn, 32, 4, s) for bm, bn, s in itertools.product((16, 32, 64), (32, 64), (2, 3))]
    few = [Tile(64, bn, bk, 8, s, tma=True, hopper=True, group=8) for bn, bk, s in ((64, 128, 2), (32, 128, 4), (32, 256, 2))]
    if rows <= 12:
        found = [Tile(16, bn, bk, 4, s, tma=tma) for bn, bk, s in ((32, 256, 3), (64, 128, 4), (32, 128, 5)) for tma in (False, True)]
        return found + ([Tile(16, 128, 128, 4, 3, tma=True)] if down else []) + (few if rows >= 8 else [])
    wide = (128, 256) if down else (128,)
    found = few if rows <= 100 else []
    if rows <= 48:
        found += [Tile(32, 64, 128, 4, 3, tma=True), Tile(16, 64, 128, 4, 4, tma=True), Tile(16, 32, 256, 4, 3)]
        found += [Tile(32, 32, 256, 4, 3, tma=tma) for tma in (False, True)] + [Tile(32, 64, 256, 4, 2, tma=True)]
    if rows <= 160:
        found += [Tile(64, 64, 64, 4, 4, tma=True), Tile(64, 128, 64, 4, 3, tma=True), Tile(64, 128, 64, 8, 4, tma=True)]
        found += [Tile(64, 64, 128, 4, 3, tma=True), Tile(64, 64, 128, 8, 3, tma=True), Tile(64, 32, 256, 4, 2, tma=True)]
    groups = (1, 4, 8, 16) if rows >= 100 else (1, 8)
    if rows >= 24:
        found += [Tile(128, 128, 64, 8, 4, tma=True, hopper=True, group=g) for g in groups]
        found += [Tile(128, 64, 64, 8, 6, tma=True, hopper=True, group=8)]
        found += [Tile(128, 128, 128, 8, 2, tma=True, hopper=True, group=g) for g in groups]
    if 24 <= rows <= 160:  # 256 bytes side by side in memory at a time
        found += [Tile(128, bn, 64, 8, s, tma=True, hopper=True, group=8, together=2) for bn, s in ((128, 4), (64, 6))]
    if rows >= 48:
        found += [Tile(128, bn, 64, 8, 3 if bn > 128 else 4, tma=True, group=g) for bn in wide for g in groups]
    return found + ([replace(t, split=s) for t in found for s in (2, 4) if may_split(problem, tokens, t, s)] if down else [])


def may_split(problem: Problem, tokens: int, tile: Tile, split: int) -> bool:
    """Whether the last wave of the down projection's tiles is much of all, and a part of its depth still a long product."""
    usual = tile.hopper and tile.group == 8 and (tile.bm, tile.bk) == (128, 64)
    return usual and tune.waves(problem, tokens, tile) < _WAVES and problem.intermediate >= split * _DEPTH


def vectors(down: bool) -> list[Vector]:
    """Candidates for the few-token path."""
    sizes = ((1, 1024), (1, 2048), (1, 4096), (2, 512), (2, 1024)) if down else ((2, 2048), (4, 1024), (1, 4096), (2, 1024), (1, 2048))
    return [Vector(bn, bk, warps) for (bn, bk), warps in itertools.product(sizes, (2, 4))]


def prepare(problem: Problem, tokens: int, weights: tuple[Tensor, Tensor] | None = None) -> Inputs:
    """Random inputs on the current CUDA device; sets enough that weights come from memory, not from the cache."""
    p = problem
    form = Form.CONCAT if p.gated else Form.SINGLE
    ops, consts = act.encode(act.SWIGLU if p.gated else act.silu(act.G))
    layout = Layout(tuple(ops), tuple(consts), int(form), p.experts, True, False, False, False, 0)
    up, down = weights or random_weights(p)
    sets = []
    for i in range(8 if tokens <= 256 else 2):
        g = torch.Generator("cuda").manual_seed(1000 * tokens + i)
        x = torch.randn(tokens, p.hidden, device="cuda", generator=g).to(p.dtype)
        w, ids = torch.randn(tokens, p.experts, device="cuda", generator=g).softmax(-1).topk(p.k)
        sets.append((x, ids, w))
    return Inputs(p, layout, up, down, sets)


def random_weights(p: Problem) -> tuple[Tensor, Tensor]:
    """Up [E, 2I or I, H] and down [E, H, I], normal with unit gain."""
    width = p.intermediate * (2 if p.gated else 1)
    up = torch.empty(p.experts, width, p.hidden, device="cuda", dtype=p.dtype).normal_(std=p.hidden**-0.5)
    return up, torch.empty(p.experts, p.hidden, p.intermediate, device="cuda", dtype=p.dtype).normal_(std=p.intermediate**-0.5)


def microseconds(calls: list[Callable[[], object]], seconds: float = _SECONDS) -> float:
    """Median over replays of one CUDA graph that holds all calls, per call."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    seen: list[float] = []
    until = time.perf_counter() + seconds
    while len(seen) < 3 or (time.perf_counter() < until and len(seen) < 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seen.append(start.elapsed_time(end))
    return sorted(seen)[len(seen) // 2] * 1000 / len(calls)


def gemm_calls(inputs: Inputs, tile: Tile, down: bool, summed: bool = False) -> list[Callable[[], object]]:
    """One GEMM with one tile on every input set; the dispatch is made before. `summed`: down and the combine, which reads every part."""
    return [_gemm_call(inputs, tile, down, summed, *given) for given in inputs.sets]


def _gemm_call(inputs: Inputs, tile: Tile, down: bool, summed: bool, x: Tensor, ids: Tensor, w: Tensor) -> Callable[[], object]:
    p = inputs.problem
    c = read(x, ids, w, Operands((inputs.up,), (inputs.down,)), None, inputs.layout)
    assert c is not None
    rows = dispatch(c.ids, p.experts, (tile.bm,))
    a = torch.empty(c.slots, p.intermediate, device="cuda", dtype=p.dtype).normal_()
    tile = experts.runnable(*((a, c.down) if down else (c.x, c.up)), tile)  # what a call would run
    if not down:
        return functools.partial(experts.grouped_gemm, c.x, c.up, None, rows, a, tile, inputs.layout, gather=p.k)
    y = torch.empty(experts.depth_parts(a, c.down, tile) * c.slots, p.hidden, device="cuda", dtype=p.dtype)
    in_rows = experts.uses_hopper(a, c.down, tile)
    product = functools.partial(experts.grouped_gemm, a, c.down, None, rows, y, tile, None, scatter=not in_rows)
    if not summed:
        return product
    out, rank = torch.empty_like(x), rows.rank if in_rows else None
    total = functools.partial(combine, y, c.ids, c.weights, x, None, out, p.experts, 0, weighted=True, rank=rank)
    return lambda: (product(), total())


def whole_calls(inputs: Inputs, choice: Choice) -> list[Callable[[], object]]:
    """The routed experts as users get them, on every input set."""
    rest: Any = ([inputs.up], [inputs.down], [], [], None, inputs.layout, False, choice)
    return [functools.partial(experts.forward, *routed, *rest) for routed in inputs.sets]


def measure(inputs: Inputs, tokens: int) -> tuple[Choice, dict[str, list[tuple[float, str]]]]:
    """The best choice, and every candidate's microseconds, fastest first. A candidate that does not build is left out."""
    p = inputs.problem
    told: dict[str, list[tuple[float, str]]] = {}
    best: dict[str, Tile] = {}
    for name, down in (("up", False), ("down", True)):
        seen = sorted(_timed((t, gemm_calls(inputs, t, down, summed=down)) for t in tiles(p, tokens, down)), key=lambda pair: pair[0])
        best[name] = seen[0][1]
        told[name] = [(us, str(t)) for us, t in seen]
    choice = Choice(best["up"], best["down"], None)
    if tokens <= 16:
        grouped = microseconds(whole_calls(inputs, choice))
        vectors_, few = _few(inputs, choice)
        told["decode"] = [(few, str(vectors_)), (grouped, "grouped")]
        if few < grouped:
            choice = Choice(choice.up, choice.down, vectors_)
    return choice, told


def _few(inputs: Inputs, base: Choice) -> tuple[tuple[Vector, Vector], float]:
    """The best pair of the few-token path: up with a fixed down, then down with that up."""
    best = tune.rule(inputs.problem, 1).decode
    assert best is not None
    us = float("inf")
    for down in (False, True):
        pairs = [(best[0], v) if down else (v, best[1]) for v in vectors(down)]
        seen = sorted(_timed((pair, whole_calls(inputs, Choice(base.up, base.down, pair))) for pair in pairs), key=lambda s: s[0])
        us, best = seen[0]
    return best, us


def _timed(candidates: Iterator[tuple[Any, list[Callable[[], object]]]]) -> Iterator[tuple[float, Any]]:
    for candidate, calls in candidates:
        try:
            yield microseconds(calls), candidate
        except Exception as e:  # out of shared memory or registers on this card: not a candidate here
            if "out of memory" in str(e).lower():
                raise
