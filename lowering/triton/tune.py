"""The choice of tiles for a grouped GEMM: measured defaults, the user's own measurements, or a rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """A grouped GEMM's tile and launch: rows, columns (of each projection), depth, warps, pipeline stages, programs an SM.

    `tma`: weights through the copy engine. `flatten`: one pipelined loop over all tiles of a program.
    `hopper`: the warp-specialised kernel where it fits (128 rows, `bn` columns twice), else the plain one with the same tile.
    `ahead`: there, how many steps before its copy a weight is asked into L2.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    per_sm: int = 2
    tma: bool = False
    flatten: bool = False
    hopper: bool = False
    ahead: int = 0


@dataclass(frozen=True)
class Vector:
    """Tiles of the few-token path: columns and depth of a program, warps."""

    bn: int
    bk: int
    warps: int


@dataclass(frozen=True)
class Choice:
    """How a call runs. `decode` None: through the grouped GEMM."""

    up: Tile
    down: Tile
    decode: tuple[Vector, Vector] | None


def choose(tokens: int, k: int, experts: int, hidden: int, intermediate: int, dtype: torch.dtype, dual: bool, cuda: bool) -> Choice:
    """By rows an expert sees on average; no measurement, never waits."""
    rows = tokens * k / max(experts, 1)
    if not cuda:
        tile = Tile(16, 16, 16, 4, 1)
        return Choice(tile, tile, (Vector(16, 16, 4), Vector(16, 16, 4)) if tokens <= 2 else None)
    if dtype == torch.float32:
        tile = Tile(16 if rows <= 16 else 64, 64, 32, 4, 3)
        return Choice(tile, tile, _decode(tokens, hidden, intermediate, 4))
    if rows <= 10:
        up, down = Tile(16, 32, 256, 4, 3, per_sm=0), Tile(16, 64, 128, 4, 4, per_sm=0)
    elif rows <= 40:
        up = down = Tile(32, 64, 128, 4, 3, per_sm=0, tma=True)
    elif rows <= 128:
        up, down = Tile(64, 128, 64, 8, 4, per_sm=0, tma=True), Tile(64, 128, 64, 4, 3, per_sm=0, tma=True)
    else:
        up = down = Tile(128, 128, 64, 8, 4, per_sm=0, tma=True, hopper=True, ahead=8)
    return Choice(up, down, _decode(tokens, hidden, intermediate, 2))


def _decode(tokens: int, hidden: int, intermediate: int, size: int) -> tuple[Vector, Vector] | None:
    """A program's weights: 4 to 16 KB a projection, in one go."""
    if tokens > 4:
        return None
    return Vector(4, 2048 * 2 // size, 4), Vector(2, 1024 * 2 // size, 4)
