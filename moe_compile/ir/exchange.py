"""How rows reach experts that are divided over the ranks of a group, and come back."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Way(enum.Enum):
    """What travels. All ways give each rank the same: `evaluate_world`."""

    SHARED = "all ranks hold the same rows; results are summed by an all-reduce"
    GATHER = "rows of all ranks are gathered; sums come back by a reduce-scatter"
    ROWS = "rows travel to the ranks whose experts they chose and back, by all-to-all"


@dataclass(frozen=True)
class Exchange:
    """Rank `rank` of `size` holds some of a block's experts (or a part of each).

    `group`: the process group's name, as functional collectives call it.

    Whatever the way, out[r] = Σ_s experts[s](x[r]), the sum over the ranks s: `moe_compile.ir.evaluate_world`.
    """

    way: Way
    group: str
    size: int
    rank: int
