"""Scales of blocks of a weight, which stay in the sum over the inputs: Σ_m x[t,m] q[e,i,m] s[e, i // rows, m // columns]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.fx as fx

from .. import terms as T
from ..aten.element import shape_of
from ..terms import Term
from .codes import Reading
from .match import Param
from .packed import is_packed, place
from .rows import No, factors, nodes_of, outer_atoms, reads
from .scales import block_of, is_coded, is_whole


@dataclass(frozen=True)
class Lookup:
    """An index that says the block of each row (`dim` 1) or column (2) of a matrix as stored: its node (or E nodes), whether each expert
    has its own, how many blocks there are."""

    node: Any
    dim: int
    own: bool
    blocks: int


@dataclass(frozen=True)
class Grid:
    """The scales of a weight: an atom's node (or E nodes), and how many rows and columns of the matrix as stored share one.

    `dims`: those of one matrix's scales that run over its rows and over its columns; None where there is one for all of them.
    `words`: what packed zero points mean. `by_bits`: exponents are bits of a float32. `lookup`: what says the block of each row or column.
    `flat`: those of a row's blocks lie behind those of the row before.
    """

    node: Any
    rows: int
    columns: int
    dims: tuple[int | None, int | None]
    words: Reading | None = None
    by_bits: bool = False
    lookup: Lookup | None = None
    flat: bool = False


@dataclass(frozen=True)
class Parts:
    """A weight as a product has it: what is read (codes, or floats), scales, zero points; whether scales are exponents of
    two, or divide; whether zero points are added to what is scaled."""

    factors: tuple[Term, ...]
    codes: Term
    scale: Term | None = None
    zero: Term | None = None
    exponents: bool = False
    divided: bool = False
    added: bool = False


def belongs(f: Term, expert: Term) -> bool:
    """Whether a factor is a weight or a part of one: a parameter's element, or something that is made of packed codes."""
    inner = _divisor(f)
    if inner is not None:
        return T.uses(f, expert)
    if f.op == "a" or not T.uses(f, expert):
        return f.op == "a" and T.uses(f, expert)
    return f.op in ("add", "fn") and any(is_packed(x) for x in outer_atoms(f))


def _divisor(f: Term) -> Term | None:
    """s of 1 / s[e, ..]."""
    return f.args[0] if f.op == "pow" and f.args[1] == -1 and f.args[0].op == "a" else None


def split(weights: Sequence[Term]) -> Parts | None:
    """The parts of a weight; None where a product reads other things."""
    whole = tuple(weights)
    if len(whole) == 1 and whole[0].op == "a":
        return Parts(whole, whole[0])
    if len(whole) == 1 and (affine := _and_zero(whole[0])) is not None:
        return replace(affine, factors=whole)
    scale = zero = None
    codes: list[Term] = []
    exponents = divided = False
    for f in whole:
        if (inner := _divisor(f)) is not None and scale is None:
            scale, divided, exponents = inner, True, is_packed(inner)
        elif f.op == "fn" and f.args[0] == "exp2" and is_packed(f.args[1][0]) and scale is None:
            scale, exponents = f.args[1][0], True
        elif f.op == "add" and (taken := _less_zero(f)) is not None and zero is None:
            codes.append(taken[0])
            zero = taken[1]
        elif f.op == "a" and is_coded(f):
            codes.append(f)
        elif f.op == "a" and scale is None:
            scale = f
        else:
            return None
    if len(codes) == 2 and scale is None:  # the scales are made of words too
        codes.sort(key=lambda a: math.prod(shape_of(nodes_of(a)[0])[not isinstance(a.args[0], tuple) :]))  # of one expert
        scale = codes.pop(0)
        exponents = is_packed(scale)
    return Parts(whole, codes[0], scale, zero, exponents, divided) if len(codes) == 1 else None


def _and_zero(f: Term) -> Parts | None:
    """The parts of codes · scales + zero points (tinygemm)."""
    if f.op != "add" or len(f.args) != 2:
        return None
    for scaled, zero in (f.args, f.args[::-1]):
        parts = split(factors(scaled)) if zero.op == "a" and not is_coded(zero) else None
        if parts is not None and parts.scale is not None and parts.zero is None and is_packed(parts.codes):
            return replace(parts, zero=zero, added=True)
    return None


def _less_zero(f: Term) -> tuple[Term, Term] | None:
    """(codes, zero points) of codes - zero points."""
    parts = [T.coefficient(a) for a in f.args]
    codes = [a for c, a in parts if c == 1 and is_packed(a)]
    zeros = [a for c, a in parts if c == -1 and a.op == "a" and (is_packed(a) or not is_coded(a))]
    return (codes[0], zeros[0]) if len(parts) == 2 and codes and zeros else None


def grid(a: Term, matrix: Sequence[Term], expert: Term, zeros: bool = False) -> Grid:
    """An atom as the scales (or zero points) of the blocks of a weight that is read at `matrix`, (row, column) as stored.

    Raises No where it is none.
    """
    words, by_bits = None, False
    if is_packed(a):
        p = place(a, expert)
        node, idx, sizes = p.words, [p.row, p.column], p.reading.shape
        if not (p.reading.powers or zeros) or zeros and p.reading.offset is None and p.reading.wraps is None:
            raise No(f"{'zero points' if zeros else 'scales'} are made of words in an unknown way")
        words, by_bits = (p.reading if zeros else None), p.reading.values[0] == 0
    else:
        first, *idx = a.args[1]
        if first is not expert:
            raise No(f"a scale is not indexed by its expert first{reads(a)}")
        node, sizes = a.args[0], shape_of(nodes_of(a)[0])[0 if isinstance(a.args[0], tuple) else 1 :]
    if len(idx) == 1 and (rows := _in_rows(idx[0], sizes[0], matrix)) is not None:
        return Grid(node, 1, rows, (0, None), words, by_bits, flat=True)
    running = [d for d, x in enumerate(idx) if not (T.is_c(x, 0) and sizes[d] == 1)]
    blocks = [[block_of(idx[d], at) for at in matrix] for d in running]
    if (found := _looked_up(idx, sizes, running, matrix, expert)) is not None:
        lookup, other = found
        rows, columns = (1, other) if lookup.dim == 1 else (other, 1)
        return Grid(node, rows, columns, (running[0], running[1]), words, by_bits, lookup)
    if len(running) == 2 and None not in (blocks[0][0], blocks[1][1]):
        return Grid(node, blocks[0][0] or 1, blocks[1][1] or 1, (running[0], running[1]), words, by_bits)
    if len(running) == 2 and None not in (blocks[0][1], blocks[1][0]):
        raise No("the scales of a weight's blocks lie with rows and columns exchanged")
    if len(running) == 1 and any(block_of(idx[running[0]], at) is not None for at in matrix):
        raise No("a scale is over an input channel, or in groups of them, for all output channels")
    raise No(f"a scale belongs to no block of its weight{reads(a)}")


def _in_rows(index: Term, size: Any, matrix: Sequence[Term]) -> int | None:
    """b where scales of runs of b numbers are read at f // b, f being an element's number in the whole matrix; rows are whole runs."""
    width = matrix[1].args[1] if matrix[1].op == "v" else None
    blocks = {x.args[1].args[0] for x in T.walk(index) if x.op == "fdiv" and T.is_c(x.args[1])}
    for b in sorted(b for b in blocks if isinstance(b, int)):
        if not isinstance(width, int) or width % b or size % (width // b):
            continue
        if T.canonical(index) is T.canonical(T.add(T.mul(T.const(width // b), matrix[0]), T.fdiv(matrix[1], b))):
            return b
    return None


def _looked_up(
    idx: Sequence[Term], sizes: Sequence[Any], running: Sequence[int], matrix: Sequence[Term], expert: Term
) -> tuple[Lookup, int] | None:
    """(the index, how many of the other dim share a number) of scales read at s[g[i], j // n] or s[i // n, g[j]]; None for others."""
    if len(running) != 2:
        return None
    for d, here in enumerate(running):
        block = block_of(idx[running[1 - d]], matrix[1 - d])
        index = idx[here].args[0] if idx[here].op == "mod" and T.is_c(idx[here].args[1], sizes[here]) else idx[here]
        if block is not None and index.op == "a" and not is_packed(index) and is_whole(nodes_of(index)[0].meta["val"].dtype):
            own = index.args[1][:-1] == (expert,)
            if index.args[1] == ((expert, matrix[d]) if own else (matrix[d],)):
                return Lookup(index.args[0], d + 1, own, sizes[here]), block
    return None


def params(g: Grid, experts: int, shape: tuple[int, int]) -> list[Param]:
    """The scales as an operand [E, R / rows, C / columns] of matrices of `shape`; a list: without E."""
    per = [1, 1] if g.words is None else [len(g.words.order) if g.words.axis == d + 1 else 1 for d in range(2)]
    blocks = [g.lookup.blocks if g.lookup is not None and g.lookup.dim == d else n for d, n in enumerate(shape, 1)]
    want = (-(-blocks[0] // g.rows) // per[0], -(-blocks[1] // g.columns) // per[1])
    nodes: tuple[fx.Node, ...] = g.node if isinstance(g.node, tuple) else (g.node,)
    lead = () if isinstance(g.node, tuple) else (experts,)
    for n in nodes:
        own = shape_of(n)
        sizes = own[len(lead) :]
        if g.flat and sizes == (want[0] * want[1],) and own[: len(lead)] == lead:
            continue
        if tuple(sizes[d] for d in g.dims if d is not None) != want or lead and own[0] < experts:
            raise No(f"expert parameter {n} has shape {own}, used as the scales of {want[0]} x {want[1]} blocks")
        if len(sizes) != 2 and lead and own[0] != experts:
            raise No(f"expert parameter {n} has shape {own}, used for {experts} experts")
    return [Param(n, None if len(shape_of(n)) == len(lead) + 2 else (*lead, *want)) for n in nodes]
