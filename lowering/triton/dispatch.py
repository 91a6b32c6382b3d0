"""Dispatch metadata of a routing: rows ordered by expert, and the row tiles that the grouped GEMMs walk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The (token, slot) pairs of ids [T, k] ordered by expert, stable by position; ids outside [0, E) are left out. N = T * k.

    order: int32 [N], sorted row -> slot t * k + j; valid up to offsets[E].
    offsets: int32 [E + 1], first sorted row of each expert.
    tiles: row-tile height BM -> int32 [2, E + N // BM] of (expert, first sorted row), expert -1 behind the last tile.
    num_tiles: row-tile height BM -> int32 [1], how many tiles there are (read by persistent kernels on the device).
    """

    order: Tensor
    offsets: Tensor
    tiles: dict[int, Tensor]
    num_tiles: dict[int, Tensor]


def dispatch(ids: Tensor, num_experts: int, blocks: tuple[int, ...]) -> Dispatch:
    """Sort the pairs of ids [T, k] (any int dtype) by expert, with a tile list for every BM in `blocks` (at most two)."""
    raise NotImplementedError
