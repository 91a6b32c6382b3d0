"""How a projection's weights lie in memory (`ir.Stored`), from the atoms of its codes and of its scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...ir import Form
from ...ir.stored import ALL, Exponent, Scale, Stored, Zero
from ..aten.element import dtype_of, shape_of
from . import grids
from . import scales as channels
from .codes import Reading
from .linear import Linear
from .match import Param
from .rows import No


def stored(linears: Sequence[Linear]) -> Stored | None:
    """The record of one projection, gate and up being alike; None for plain floats."""
    found = {_stored(x) for x in linears}
    if len(found) > 1:
        raise No("gate and up projections are stored differently")
    (one,) = found
    return one


def _stored(x: Linear) -> Stored | None:
    dtypes = {dtype_of(n) for n in _nodes(x.weight)}
    if len(dtypes) > 1:
        raise No(f"expert weights are of different types: {', '.join(sorted(map(str, dtypes)))}")
    (dtype,) = dtypes
    if _scaling(x) is Scale.NONE and dtype.is_floating_point and dtype.itemsize > 1:
        return None
    how = Stored(8 * dtype.itemsize, dtype, _scaling(x), *_block(x))
    if x.grid is not None and x.grid.lookup is not None:
        how = replace(how, indexed=x.grid.lookup.dim, groups=x.grid.lookup.blocks)
    if x.grid is not None and x.channel is not None:
        rows, columns = _of_channels(x)
        second = Scale.DIVIDES if x.channel.divides else Scale.TIMES
        how = replace(how, second=second, second_rows=rows, second_columns=columns)
    if x.exponents:
        how = replace(how, exponents=Exponent.BITS if x.grid is not None and x.grid.by_bits else Exponent.VALUE)
    if x.words is None:
        return how
    w, tabled = x.words, x.words.table is not None
    how = replace(how, bits=w.bits, axis=w.axis, order=w.order, tabled=tabled, shifted=bool(w.shifts), **_zeroed(x, w))
    return how if tabled else replace(how, values=w.values) if w.offset is None else replace(how, offset=w.offset)


def _scaling(x: Linear) -> Scale:
    if x.grid is None and x.channel is None:
        return Scale.NONE
    divides = x.divided if x.grid is not None else x.channel is not None and x.channel.divides
    return Scale.DIVIDES if divides else Scale.TIMES


def _zeroed(x: Linear, words: Reading) -> dict[str, Any]:
    """How the zero points lie."""
    if x.zero is None or x.zero.words is None:
        return {"zeroed": Zero.NONE if x.zero is None else Zero.ADDED if x.added else Zero.PLAIN}
    z = x.zero.words
    if z.bits != words.bits or not z.axis:
        raise No("zero points have other bits than the codes")
    if bool(z.shifts) != bool(words.shifts):
        raise No("of codes and zero points one is shifted by numbers that a tensor holds, and the other by constants")
    wraps = z.offset is None
    zeroed = {"zeroed": Zero.ROWS if z.axis == 1 else Zero.COLUMNS, "zero_order": z.order}
    return zeroed | {"zero_offset": float(z.wraps or 0) if wraps else float(z.offset or 0), "zero_wraps": wraps}


def words(x: Linear, experts: int, shape: tuple[int, int]) -> list[Param]:
    """The packed codes as operands [E, R, C] of words (a list: [R, C]); `shape`: (out, in) of the projection. Raises No for other sizes."""
    assert x.words is not None
    matrix = shape[::-1] if x.transposed else shape
    if x.words.shape != matrix:
        raise No(f"packed weights are {x.words.shape[0]} x {x.words.shape[1]} codes, used as {matrix[0]} x {matrix[1]}")
    per = len(x.words.order)
    own = (matrix[0] // (per if x.words.axis == 1 else 1), matrix[1] // (per if x.words.axis == 2 else 1))
    lead = () if isinstance(x.weight, tuple) else (experts,)
    if lead and any(shape_of(n)[0] != experts for n in _nodes(x.weight)):
        raise No(f"packed weights of other than {experts} experts")
    return [Param.shaped(n, (*lead, *own)) for n in _nodes(x.weight)]


def tables(store: Sequence[Linear], experts: int) -> list[Param]:
    """The table that codes are looked up in; or by how much they are shifted, of each tensor of codes, then of its zero points."""
    words = [x.words for x in store if x.words is not None]
    if words and words[0].table is not None:
        return [Param(words[0].table)]
    zeros = [x.zero.words for x in store if x.zero is not None and x.zero.words is not None]
    each = experts if any(isinstance(x.weight, tuple) for x in store) else 1
    return [Param(n) for w in (*words, *zeros) if w.shifts for n in (w.shifts * each if len(w.shifts) == 1 else w.shifts)]


def groups(x: Linear, experts: int, shape: tuple[int, int]) -> list[Param]:
    """The index of blocks as an operand [R] or [C] of all experts, [E, R] of each its own; a list: E of them."""
    lookup = None if x.grid is None else x.grid.lookup
    if lookup is None:
        return []
    size = (shape[::-1] if x.transposed else shape)[lookup.dim - 1]
    nodes = _nodes(lookup.node)
    if isinstance(x.weight, tuple):
        nodes = nodes if len(nodes) == experts else nodes * experts
    for n in nodes:
        if shape_of(n) != ((experts, size) if lookup.own and not isinstance(lookup.node, tuple) else (size,)):
            raise No(f"expert parameter {n} has shape {shape_of(n)}, used to say the groups of {size} inputs or outputs")
    return [Param(n) for n in nodes]


def zeros(x: Linear, experts: int, shape: tuple[int, int]) -> list[Param]:
    """The zero points as operands, laid out as the scales."""
    return [] if x.zero is None else grids.params(x.zero, experts, shape[::-1] if x.transposed else shape)


def _block(x: Linear) -> tuple[int, int]:
    """Rows and columns, of the matrix as it is stored, that share a scale."""
    if x.grid is not None:
        return x.grid.rows, x.grid.columns
    return _of_channels(x)


def _of_channels(x: Linear) -> tuple[int, int]:
    """Rows and columns that share a number of the projection's output channels."""
    if x.channel is None or x.channel.dim is None:
        return ALL, ALL
    return (ALL, x.channel.rows) if x.transposed else (x.channel.rows, ALL)


def scales(x: Linear, experts: int, shape: tuple[int, int]) -> list[Param]:
    """The scales as operands; `shape`: (out, in) of the projection."""
    if x.grid is not None:
        return grids.params(x.grid, experts, shape[::-1] if x.transposed else shape)
    return [] if x.channel is None else channels.params(x.channel, experts, shape[0])


def seconds(x: Linear, experts: int, shape: tuple[int, int]) -> list[Param]:
    """Scales of channels, or of matrices, beside those of blocks, as operands."""
    return [] if x.grid is None or x.channel is None else channels.params(x.channel, experts, shape[0])


def check(ups: Sequence[Linear], down: Linear, form: Form) -> None:
    """Scales are stored as the weights are that they belong to, and gate and up of one weight have one scale tensor."""
    for x in (*ups, down):
        if x.grid is not None and x.flat:
            raise No("a weight has scales of blocks, and is no stack of matrices")
        if any(s is not None and isinstance(s.node, tuple) != isinstance(x.weight, tuple) for s in (x.grid, x.channel, x.zero)):
            raise No("scales are not stored as their weights are")
        if (lookup := None if x.grid is None else x.grid.lookup) is not None and lookup.own:
            if isinstance(lookup.node, tuple) != isinstance(x.weight, tuple):
                raise No("an index of groups is not stored as its weights are")
    if len({(x.channel is None, x.grid is None) for x in ups}) > 1:
        raise No("gate and up projections are scaled differently")
    if form is not Form.SEPARATE and len({x.zero for x in ups}) > 1:
        raise No("the zero points of gate and up are not stored as their weights are")
    if form is not Form.SEPARATE and any(len(set(found)) > 1 for found in ([x.channel for x in ups], [x.grid for x in ups])):
        raise No("the scales of gate and up are not stored as their weights are")


def _nodes(weight: Any) -> tuple[Any, ...]:
    return weight if isinstance(weight, tuple) else (weight,)
