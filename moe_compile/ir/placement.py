"""Logical experts that have replicas: a table says in how many places each is, and where; a rule says which of them a token goes to.

table [E, 1 + R]: row e is its number of places n >= 1, then the places. physical = table[e, 1 + turn]

    by token:  turn = t mod n                   the tokens of an expert take its places in turn
    by rank:   turn = rank // ceil(world / n)   each place serves neighbouring ranks
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """Which of its places a logical expert is at. world: 0 for tokens in turn, else how many ranks share the places; rank: this one."""

    world: int = 0
    rank: int = 0

    def turn(self, n: Tensor) -> Tensor:
        """n [T, k], the places of each slot's expert -> the one taken, counted from 0."""
        if not self.world:
            return torch.arange(n.shape[0], device=n.device)[:, None] % n
        return self.rank // ((self.world + n - 1) // n)


def physical(ids: Tensor, table: Tensor, world: int, rank: int) -> Tensor:
    """ids [T, k] of logical experts, table [E, 1 + R] of whole numbers -> ids of physical ones [T, k], in the table's dtype."""
    return table[ids, 1 + Placement(world, rank).turn(table[:, 0][ids])]
