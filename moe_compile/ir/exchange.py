"""How rows reach experts that are divided over the ranks of a group, and come back; and the oracle of any such exchange."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .experts import Experts
from .operands import Operands


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


def evaluate_world(
    experts: Sequence[Experts],
    parameters: Sequence[Operands[Tensor]],
    x: Sequence[Tensor],
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """out[r] = Σ_s experts[s](x[r]): every rank's rows through the experts of all ranks, in one process and in the ranks' order.

    By rank: its experts (`first`: the number of its first one), their parameters, x [T, H], ids and weights [T, k] of its own rows, ids as
    the router numbers them. T may differ. However rows travel, each rank is to get this. Raises ValueError where the lists differ in
    length, or where two ranks hold the same expert.
    """
    sizes = {len(part) for part in (experts, parameters, x, ids, weights)}
    if len(sizes) != 1:
        raise ValueError(f"experts, parameters, x, ids and weights are lists of one entry a rank; their lengths are {sorted(sizes)}")
    held = sorted((e.first, e.first + e.num_experts) for e in experts)
    if any(a[1] > b[0] for a, b in itertools.pairwise(held)):
        raise ValueError(f"two ranks hold the same expert: first and last numbers of the ranks' experts are {held}")
    return [
        sum((e.run(t, i, w, p, None, dtype) for e, p in zip(experts, parameters, strict=True)), start=torch.zeros((), dtype=dtype))
        for t, i, w in zip(x, ids, weights, strict=True)
    ]
