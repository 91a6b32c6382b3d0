"""Scales of blocks of a weight, which stay in the sum over the inputs: Σ_m x[t,m] q[e,i,m] s[e, i // rows, m // columns]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from .. import terms as T
from ..aten.element import shape_of
from ..terms import Term
from .match import Param
from .rows import No, clip
from .scales import block_of, is_coded, nodes_of


@dataclass(frozen=True)
class Grid:
    """The scales of a weight: an atom's node (or E nodes), and how many rows and columns of the matrix as stored share one.

    `dims`: those of one matrix's scales that run over its rows and over its columns; None where there is one for all of them.
    """

    node: Any
    rows: int
    columns: int
    dims: tuple[int | None, int | None]


def split(weights: Sequence[Term]) -> tuple[Term, ...] | None:
    """(the weight,), or (the codes, their scales); None where a product reads other things."""
    if len(weights) == 1:
        return (weights[0],)
    codes = [w for w in weights if is_coded(w)]
    if len(weights) != 2 or len(codes) != 1:
        return None
    return codes[0], next(w for w in weights if w is not codes[0])


def grid(a: Term, matrix: Sequence[Term], expert: Term) -> Grid:
    """An atom as the scales of the blocks of a weight that is read at `matrix`, (row, column) as stored. Raises No where it is none."""
    first, *idx = a.args[1]
    if first is not expert:
        raise No(f"a scale is not indexed by its expert first: {clip(a)}")
    sizes = shape_of(nodes_of(a)[0])[0 if isinstance(a.args[0], tuple) else 1 :]
    running = [d for d, x in enumerate(idx) if not (T.is_c(x, 0) and sizes[d] == 1)]
    blocks = [[block_of(idx[d], at) for at in matrix] for d in running]
    if len(running) == 2 and None not in (blocks[0][0], blocks[1][1]):
        return Grid(a.args[0], blocks[0][0] or 1, blocks[1][1] or 1, (running[0], running[1]))
    if len(running) == 2 and None not in (blocks[0][1], blocks[1][0]):
        raise No("the scales of a weight's blocks lie with rows and columns exchanged")
    if len(running) == 1 and any(block_of(idx[running[0]], at) is not None for at in matrix):
        raise No("a scale is over an input channel, or in groups of them, for all output channels")
    raise No(f"a scale belongs to no block of its weight: {clip(a)}")


def params(g: Grid, experts: int, shape: tuple[int, int]) -> list[Param]:
    """The scales as an operand [E, R / rows, C / columns] of matrices of `shape`; a list: without E."""
    want = (-(-shape[0] // g.rows), -(-shape[1] // g.columns))
    nodes: tuple[fx.Node, ...] = g.node if isinstance(g.node, tuple) else (g.node,)
    lead = () if isinstance(g.node, tuple) else (experts,)
    for n in nodes:
        own = shape_of(n)
        sizes = own[len(lead) :]
        if tuple(sizes[d] for d in g.dims if d is not None) != want or lead and own[0] < experts:
            raise No(f"expert parameter {n} has shape {own}, used as the scales of {want[0]} x {want[1]} blocks")
        if len(sizes) != 2 and lead and own[0] != experts:
            raise No(f"expert parameter {n} has shape {own}, used for {experts} experts")
    return [Param(n, None if len(shape_of(n)) == len(lead) + 2 else (*lead, *want)) for n in nodes]
