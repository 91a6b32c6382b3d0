"""What a backward pass of the routed experts is made of: the tiles of its products, and where gradients that are asked for go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.operands import Operands
from ..reference.generic import Layout
from . import hopper_calls
from .call import Call
from .dispatch import Dispatch
from .experts import precision
from .launch.tape import empty, fill
from .tune import Tile

PAD = 64  # rows in a group


@dataclass(frozen=True)
class Tiles:
    """Tiles of the four products: `bm` rows of the left operand, `bn` columns, `bk` of what is summed over.

    `padded`: tokens and incoming gradients are first copied in row order, every expert's rows filled up with zeros to whole groups of 64,
    and all products take both operands through the copy engine; else rows are gathered as they are read. Needs row tiles of 64 or more.
    `hopper`: the products run warp-specialised where they fit (padded, row tiles of 128).
    """

    hidden: Tile
    input: Tile
    up: Tile
    down: Tile
    padded: bool = False
    hopper: bool = False


def choose(slots: int, num_experts: int, dtype: torch.dtype, cuda: bool, hopper: bool = False) -> Tiles:
    """By rows an expert sees on average. `hopper`: for the warp-specialised kernels, which gain from fewer rows on."""
    rows = slots / max(num_experts, 1)
    if not cuda:
        tile = Tile(16, 16, 16, 4, 1)
        return Tiles(tile, tile, tile, tile)
    if dtype == torch.float32:
        by_row, by_weight = Tile(16 if rows <= 16 else 64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)
        return Tiles(by_row, by_row, by_weight, by_weight)
    bm = 16 if rows <= 16 else 32 if rows <= 40 else 64 if rows <= 96 and not hopper else 128
    hidden = Tile(bm, 128, 64, 8 if bm >= 64 else 4, 3, tma=True)
    to_input = Tile(bm, 256, 64, 8, 4 if bm == 128 else 3, tma=True) if bm >= 64 else hidden
    padded = bm == 128
    stages = 3 if padded else 5  # rows are gathered through loaded indices: two stages more for as many copies under way
    few = rows <= 512  # short sums: two small programs a processor, one multiplies while the other stores
    by_weight = Tile(128, 128 if few else 256, 64 if rows > 32 else 32, 4 if few else 8, stages)
    return Tiles(hidden, to_input, by_weight, by_weight, padded, hopper=padded)


class Gradients:
    """The tensors asked for, in the order x, weights, the parameters in theirs."""

    def __init__(self, p: Operands[Tensor], needs: Sequence[bool], layout: Layout) -> None:
        self.x, self.weights, *asked = needs
        self.of_x: Tensor | None = None
        self.of_weights: Tensor | None = None
        self.given, self.layout = p, layout
        self.needs = p.filled(asked)
        self.found: dict[tuple[str, int], Tensor] = {}

    def _places(self, part: int) -> range:
        each = 1 if self.layout.stacked else self.layout.num_experts
        return range(part * each, (part + 1) * each)

    def wants(self, name: str, part: int | None = None) -> bool:
        needs = getattr(self.needs, name)
        return any(needs) if part is None or not needs else any(needs[i] for i in self._places(part))

    def empty(self, name: str, part: int) -> list[Tensor]:
        """Contiguous targets of one part: one tensor [E, ., .], or one per expert. What no kernel writes is zero."""
        given: Sequence[Tensor] = getattr(self.given, name)
        out = [empty(given[i], *given[i].shape) for i in self._places(part)]
        if self.layout.stacked and out[0].shape[0] > self.layout.num_experts:
            fill(out[0][self.layout.num_experts :], 0)
        self.found.update(((name, i), t) for i, t in zip(self._places(part), out))
        return out

    def asked(self) -> list[Tensor]:
        first = [t for t in (self.of_x, self.of_weights) if t is not None]
        named = [(name, i) for name, needs in self.needs.by_name().items() for i, need in enumerate(needs) if need]
        return [*first, *(self.found[place] for place in named)]


@dataclass(frozen=True)
class Pass:
    """One backward pass: operands, the dispatch, and the tiles."""

    call: Call
    grad: Tensor
    pre: Tensor
    rows: Dispatch
    tiles: Tiles
    out: Gradients

    @property
    def layout(self) -> Layout:
        return self.call.layout

    @property
    def k(self) -> int:
        return self.call.ids.shape[1]

    @property
    def pad(self) -> int:
        return PAD if self.tiles.padded else 0

    @property
    def starts(self) -> Tensor | None:
        """The first group of 64 rows of every expert."""
        return self.rows.tile_starts[PAD] if self.tiles.padded else None

    @property
    def length(self) -> int:
        """Rows of what is kept in row order."""
        return self.rows.tiles[PAD].shape[1] * PAD if self.tiles.padded else self.call.slots

    @property
    def precision(self) -> str:
        return precision(self.call.x.dtype)

    @property
    def hopper(self) -> bool:
        """Whether products run warp-specialised where they fit."""
        return self.tiles.hopper and self.tiles.padded and self.tiles.hidden.bm == hopper_calls.ROWS and hopper_calls.capable(self.call.x)
