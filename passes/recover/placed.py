"""Logical experts that become physical ones by a table of replicas (`ir.placement`), between a selection and the experts.

ids[t, j] = table[e, 1 + t mod table[e, 0]]                          e = the j-th choice of token t
ids[t, j] = table[e, 1 + rank // ceil(world / table[e, 0])]          rank and world numbers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from ...ir.placement import Placement
from .. import terms as T
from ..aten.element import Puller, call_args, shape_of
from ..aten.names import op_name
from ..terms import Term
from .match import ExpertsMatch
from .rows import row_index, rows

OTHERWISE = "the column that is read is not 1 + (turn among as many as column 0 says)"


@dataclass(frozen=True)
class Placed:
    """Ids that are read from a table [E, F] of whole numbers at a selection's.

    chosen: the selection's as a term in a match's token and slot, raw: the tensor that holds them. how: which of an expert's places is
    read, None where that is by another rule, or cannot be relied on: `why`.
    """

    chosen: Term
    raw: fx.Node
    table: fx.Node
    how: Placement | None
    why: str = ""


def placed(m: ExpertsMatch, ids: fx.Node, walls: set[fx.Node]) -> Placed | None:
    """What these ids are read from, None where that is no table with a row for each of the experts that a selection has."""
    if m.j.op != "v" and m.k > 1 or len(shape_of(ids)) < 2:
        return None
    slot = m.j if m.j.op == "v" else T.const(0)
    read = Puller(lambda n: False, walls).at(ids, (*row_index(m.t, shape_of(ids)[:-1]), slot))
    if read.op != "a" or not isinstance(read.args[0], fx.Node) or len(read.args[1]) != 2:
        return None
    chosen = read.args[1][0]
    if chosen.op != "topk" or chosen.args[1][-1] is not slot:
        return None
    raw = next((u for u in chosen.args[0].users if op_name(u) == "getitem" and u.args[1] == 1), None)
    alike = raw is not None and shape_of(raw)[-1] == m.k and T.same_size(rows(raw), rows(m.tokens))
    if raw is None or not alike:
        return None
    table, width = read.args[0], shape_of(read.args[0])[1]
    if table.meta["val"].dtype not in (torch.int64, torch.int32):
        return Placed(chosen, raw, table, None, "the table is of another dtype than int32 and int64")
    count = T.mk("a", table, (chosen, T.const(0)))
    turn = _unwrapped(T.add(_unwrapped(read.args[1][1], width), T.const(-1)), width - 1)
    how = _by_token(m, turn, count) or _by_rank(turn, count)
    return Placed(chosen, raw, table, how, "" if how else OTHERWISE)


def _unwrapped(column: Term, width: object) -> Term:
    """A column without what indexing below zero would make of it: a table of replicas has room for as many as it says."""
    return column.args[0] if column.op == "mod" and T.is_c(column.args[1], width) else column


def _by_token(m: ExpertsMatch, turn: Term, count: Term) -> Placement | None:
    n = _made_by(turn, "remainder", "fmod")
    if n is None:
        return None
    x, y = _operands(n, turn)
    return Placement() if x is m.t and y is count else None


def _by_rank(turn: Term, count: Term) -> Placement | None:
    """rank // each, each = ceil(world / count): written (world + count - 1) // count, or -(-world // count)."""
    n = _made_by(turn, "floor_divide", "div")
    if n is None or not _floors(n):
        return None
    rank, each = _operands(n, turn)
    world = _ceiled(each, count)
    if world is None or rank.op != "c" or not isinstance(rank.args[0], int) or not 0 <= rank.args[0] < world:
        return None
    return Placement(world, rank.args[0])


def _ceiled(each: Term, count: Term) -> int | None:
    negative = T.mul(T.const(-1), each)
    for t, sign in ((each, 1), (negative, -1)):
        n = _made_by(t, "floor_divide", "div")
        if n is None or not _floors(n):
            continue
        x, y = _operands(n, t)
        world = T.add(x, T.const(1), T.mul(T.const(-1), count)) if sign == 1 else T.mul(T.const(-1), x)
        if y is count and world.op == "c" and isinstance(world.args[0], int) and world.args[0] > 0:
            return world.args[0]
    return None


def _made_by(t: Term, *ops: str) -> fx.Node | None:
    """The node that a term is an element of, where that node is one of these ops on whole numbers."""
    n = t.args[0] if t.op == "a" else None
    return n if isinstance(n, fx.Node) and op_name(n) in ops and not n.meta["val"].dtype.is_floating_point else None


def _floors(n: fx.Node) -> bool:
    """Whether a division rounds down."""
    return op_name(n) == "floor_divide" or getattr(call_args(n), "rounding_mode", None) == "floor"


def _operands(n: fx.Node, at: Term) -> tuple[Term, Term]:
    """Dividend and divisor of the element that a term is."""
    p = Puller(lambda x: False)
    return p.broadcast(n.args[0], at.args[1]), p.broadcast(call_args(n).other, at.args[1])
