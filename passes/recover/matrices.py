"""How a matrix for each expert lies in a parameter: [E, r, in], [E · r, in], [out, r · E] ..., read off the index of an atom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import terms as T
from ..aten.element import shape_of
from ..terms import Term
from ..terms.arithmetic import constant_part
from .match import Param
from .rows import No, reads


@dataclass(frozen=True)
class Matrices:
    """Matrices [E, rows, columns] in one node, or one [rows, columns] in each of E: `view`, then `order`, make them of what is stored.

    stride, offset: of the row that is read, as an index into all rows.
    """

    nodes: Any
    view: tuple[int, ...] | None
    order: tuple[int, ...] | None
    stride: int
    offset: int

    @property
    def listed(self) -> bool:
        return isinstance(self.nodes, tuple)

    def params(self, rows: int | None = None, columns: int | None = None) -> list[Param]:
        """As operands; raises No where there are other rows or columns than are used."""
        found = [Param(n, self.view, self.order) for n in (self.nodes if self.listed else (self.nodes,))]
        for q in found:
            shape = q.shape()[-2:]
            if rows not in (None, shape[0]) or columns not in (None, shape[1]):
                raise No(f"expert parameter {q.node} has shape {shape_of(q.node)}, used as {[rows, columns]}")
        return found


@dataclass(frozen=True)
class LowRank:
    """s · b (a x) of a projection; `more`: others that are added to it."""

    scale: float
    a: Matrices
    b: Matrices
    more: tuple[LowRank, ...] = ()

    @property
    def all(self) -> tuple[LowRank, ...]:
        return (self, *self.more)


def matrices(a: Term, expert: Term, row: Term, column: Term) -> Matrices:
    """The layout of an atom that is read at [expert, row, column] in any order, dims flattened or not. Raises No where it is another."""
    listed = isinstance(a.args[0], tuple)
    nodes = a.args[0] if listed else (a.args[0],)
    index = a.args[1]
    if listed and index[0] is not expert:
        raise No(f"a weight is not indexed by its expert first{reads(a)}")
    view: list[int] = []
    names: list[Term] = []
    stride, offset = 1, 0
    for i, size in zip(index[listed:], shape_of(nodes[0]), strict=True):
        if size == 1 and T.is_c(i, 0):
            continue
        k, c, digits = _digits(i, size, a)
        if (k, c) != (1, 0):
            if digits[0][0] is not row or len(digits) > 1:
                raise No(f"an expert weight is indexed in an unknown way{reads(a)}")
            stride, offset = k, c
        names += [v for v, _ in digits]
        view += [n for _, n in digits]
    wanted = [row, column] if listed else [expert, row, column]
    if len(names) != len(wanted) or any(v not in names for v in wanted):
        raise No(f"an expert weight is no matrix{reads(a)}")
    order = tuple(names.index(v) for v in wanted)
    shape = tuple(view)
    plain = all(shape_of(n) == shape for n in nodes)
    return Matrices(a.args[0], None if plain else shape, None if order == tuple(sorted(order)) else order, stride, offset)


def _digits(i: Term, size: Any, a: Term) -> tuple[int, int, list[tuple[Term, int]]]:
    """An index into a dim as (stride, offset, [(variable, extent), ...]): one variable, or several as the digits of a number."""
    c, rest = constant_part(i)
    pieces = sorted((T.coefficient(x) for x in (rest.args if rest.op == "add" else (rest,))), key=lambda kv: -kv[0])
    if not isinstance(size, int) or any(v.op != "v" or not isinstance(k, int) for k, v in pieces):
        raise No(f"an expert weight is indexed in an unknown way{reads(a)}")
    if len(pieces) == 1:
        ((k, v),) = pieces
        return k, c, [(v, size)]
    digits, left = [], size
    for k, v in pieces:
        if left % k or v.args[1] != left // k:
            raise No(f"an expert weight is indexed in an unknown way{reads(a)}")
        digits.append((v, left // k))
        left = k
    if left != 1 or c != 0:
        raise No(f"an expert weight is indexed in an unknown way{reads(a)}")
    return 1, 0, digits
