"""Tiles of the kernels for weights in few bits, and which are chosen by the rows an expert sees on average: as measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth (codes) of a program of the grouped GEMM, warps, pipeline stages; row tiles walked together.

    early: scales go to the numbers even where they could go to the sums. hopper: the kernel with warps that decode (128 rows, 2 x 128
    columns) where it takes the operands. float8: the kernel that multiplies codes by codes, likewise.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 1
    early: bool = False
    hopper: bool = False
    float8: bool = False

    @property
    def by_row(self) -> bool:
        """Whether results lie by the dispatch's rows, else by the slots."""
        return self.hopper or self.float8


@dataclass(frozen=True)
class Vector:
    """Columns and bytes of depth of a program of the few-token pair, warps."""

    bn: int
    bb: int
    warps: int


@dataclass(frozen=True)
class Choice:
    """How a call runs: tiles of the up and the down projection."""

    up: Tile
    down: Tile
    few: tuple[Vector, Vector] | None = None


FEW_OF_ONE = 8  # tokens of the few-token pair where there is one expert: a grid of tiles of one expert leaves processors idle
DECODING = Tile(128, 128, 64, 4, 3, 8, hopper=True)
FLOAT8 = Tile(128, 128, 64, 8, 3, 8, float8=True)
TWO_PARTS_FROM = 12  # rows an expert from which hidden rows in two parts pay: they cost a launch; tokens do always
_FROM = {False: 24, True: 12}  # rows an expert from which a warp group that decodes is faster: codes of a byte, of half a byte


def decoding(rows: float, packed: bool) -> bool:
    """Whether the kernel with warps that decode is the faster one, where it takes the operands."""
    return rows > _FROM[packed]


def of_bytes(rows: float) -> tuple[Tile, Tile]:
    """Tiles of codes of a byte."""
    if rows <= 40:
        tile = Tile(16 if rows <= 12 else 32, 64, 128, 4, 3, early=True)
        return tile, tile
    if rows <= 100:
        return Tile(64, 64, 128, 4, 3, 8, early=True), Tile(64, 128, 128, 8, 3, 8, early=True)
    tile = Tile(128, 128, 64, 8, 3, 8, early=True)
    return tile, tile


def of_halves(rows: float) -> tuple[Tile, Tile]:
    """Tiles of codes of half a byte."""
    if rows <= 40:
        tile = Tile(16 if rows <= 12 else 32, 64, 128, 4, 3)
        return tile, tile
    return Tile(64 if rows <= 90 else 128, 64, 64, 4, 3, 8), Tile(64, 128, 64, 8, 3, 8)
