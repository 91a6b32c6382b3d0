"""What a node that is made of packed words alone holds of them: read by running its operations on words and looking at every code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..aten.element import fixed_number, size_of
from ..aten.node import reached
from .shifts import is_list

_MOST = 1 << 25  # elements of a node that is looked at
_APART = 7  # words between the matrices of a stack
_FAR_FROM = 1 << 16  # between the seeds of two places of bytes in a word; words that are drawn at random beyond
_NAN = 1e300  # what stands for it where values are compared


@dataclass(frozen=True)
class Reading:
    """What a node made of words is: value(code) at every place of a matrix [rows, columns] of codes.

    axis: along which a word's codes lie, 1 for rows, 2 for columns, 0
    where a word is one code. order: the place, in its word, of each of its codes. values: of each code. table: the node they come from.
    shifts: what says by how much codes are shifted, of all matrices or of each; `order` counts its numbers.
    """

    shape: tuple[int, int]
    axis: int
    order: tuple[int, ...]
    values: tuple[float, ...]
    table: fx.Node | None = None
    shifts: tuple[fx.Node, ...] = ()

    @property
    def bits(self) -> int:
        return len(self.values).bit_length() - 1

    @property
    def powers(self) -> bool:
        """Whether bytes b are exponents b - 127, or 2^(b - 127) where 0 may be 0; 255, which no scale has, may be something else."""
        inner = list(self.values[1:-1])
        if self.axis or self.bits != 8:
            return False
        if inner == [float(b - 127) for b in range(1, 255)]:
            return self.values[0] == -127
        return inner == [2.0 ** (b - 127) for b in range(1, 255)] and self.values[0] in (0.0, 2.0**-127)

    @property
    def wraps(self) -> int | None:
        """c > 0 where every code's value is the code and c, modulo their number; None where there is no such number."""
        first, count = self.values[0], len(self.values)
        return int(first) if first and self.values == tuple((code + first) % count for code in range(count)) else None

    @property
    def offset(self) -> float | None:
        """c where every code's value is the code and c, None where there is no such number."""
        first = self.values[0]
        return first if self.values == tuple(code + first for code in range(len(self.values))) else None


def read(n: fx.Node, leaf: fx.Node, expert: int | None, experts: int) -> Reading | None:
    """The reading of a node, which holds one matrix (that of `expert` where the leaf is a stack) or with `expert` None a stack of them.

    None where it is no such thing, or too large to look at.
    """
    v, words = n.meta["val"], leaf.meta["val"]
    if v.numel() > _MOST or not all(isinstance(s, int) for s in (*v.shape, *words.shape)):
        return None
    if expert is None and v.shape[0] != words.shape[0]:
        return None
    # [E, words of a whole matrix] is a stack too, and [rows, groups, words of a group] a matrix
    ways = (True,) if expert is None else (True, False) if words.ndim > 2 else (False, True)
    found = (_read(n, leaf, expert, stacked and words.shape[0] >= experts) for stacked in ways)
    return next((f for f in found if f is not None), None)


def _read(n: fx.Node, leaf: fx.Node, expert: int | None, stacked: bool) -> Reading | None:
    """The reading of a node where its leaf is a stack, or is none."""
    v, words = n.meta["val"], leaf.meta["val"]
    if stacked and expert is not None and v.numel() * words.shape[0] % words.numel():
        return None
    given_too = [x for x in made_of(n) if x.op == "placeholder" and x is not leaf]
    lists = [x for x in given_too if is_list(x)]
    if lists:
        return _read_shifted(n, leaf, expert, stacked, lists, [x for x in given_too if x not in lists])
    return _read_by(n, leaf, expert, stacked, given_too, {})


def _read_shifted(
    n: fx.Node, leaf: fx.Node, expert: int | None, stacked: bool, lists: list[fx.Node], tables: list[fx.Node]
) -> Reading | None:
    """The reading of codes that are shifted by what a list says: the same for any order of its numbers, and for any numbers."""
    width, v = 8 * leaf.meta["val"].dtype.itemsize, lists[0].meta["val"]
    count = v.numel()
    found = []
    for turn in range(3):
        by = torch.randperm(count, generator=_generator(turn)) * (width // count)
        one = _read_by(n, leaf, expert, stacked, tables, {lists[0]: by.view(v.shape).to(v.dtype)}) if len(lists) == 1 else None
        if one is None or len(one.order) != count or one.table is not None:
            return None
        at = by.tolist()
        found.append(replace(one, order=tuple(at.index(place * one.bits) for place in one.order), shifts=(lists[0],)))
    reading = found[0]
    by = torch.randint(0, width - reading.bits + 1, (count,), generator=_generator(3))
    values = torch.tensor(reading.values, dtype=torch.float64)
    for words, out in _runs(n, leaf, expert, stacked, 0, {lists[0]: by.view(v.shape).to(v.dtype)}):
        codes = [values[((words >> by[place].to(words.dtype)) & (len(values) - 1)).long()] for place in reading.order]
        if not torch.equal(torch.stack(codes, -1 if reading.axis == 2 else 1).flatten(), out.flatten().double()):
            return None
    return reading if len(set(found)) == 1 else None


def _runs(
    n: fx.Node, leaf: fx.Node, expert: int | None, stacked: bool, turn: int, given: dict[fx.Node, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Words [rows, columns] of a matrix, and what a node holds of them."""
    words = leaf.meta["val"]
    drawn = _words(tuple(words.shape), words.dtype, stacked, turn)
    out = _value(n, {**given, leaf: drawn})
    for e in (0, words.shape[0] - 1) if expert is None else (expert,):
        own = drawn[e] if stacked else drawn
        yield own.flatten(1) if own.ndim > 1 else own[None], out[e] if expert is None else out


def _read_by(
    n: fx.Node, leaf: fx.Node, expert: int | None, stacked: bool, tables: list[fx.Node], shifts: dict[fx.Node, Tensor]
) -> Reading | None:
    """The reading where codes are shifted by given numbers, those of each list (`shifts`)."""
    drawn = (torch.randperm(t.meta["val"].shape[0], generator=_generator(i)) for i, t in enumerate(tables))  # no two tables alike
    given: dict[fx.Node, Any] = {t: numbers.double() + 0.5 for t, numbers in zip(tables, drawn, strict=True)} | shifts
    turns = range(_turns(leaf.meta["val"], stacked))
    runs = [run for turn in turns for run in _runs(n, leaf, expert, stacked, turn, given)]
    found = _looked_at(runs)
    if found is None:
        return None
    axis, order, codes = found
    (rows, columns), per = runs[0][0].shape, max(len(order), 1)
    shape = (rows * per if axis == 1 else rows, columns * per if axis == 2 else columns)
    table = next((t for t in tables if tuple(given[t].tolist()) == codes), None)
    reading = Reading(shape, axis, order, codes, table)
    if reading.powers:  # what 255 stands for may be no number, which equals no other
        reading = replace(reading, values=(*codes[:-1], math.inf))
    return None if tables and table is None else reading


def _looked_at(runs: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, tuple[int, ...], tuple[float, ...]] | None:
    """(axis, order, value of every code) where each element that came out is a function of one code of a word in its own place."""
    words = torch.cat([w for w, _ in runs])
    rows, columns = runs[0][0].shape
    per, rest = divmod(runs[0][1].numel(), rows * columns)
    if rest or per not in (1, 2, 4, 8, 16) or 8 * words.dtype.itemsize // per > 8:
        return None
    bits = 8 * words.dtype.itemsize // per
    fields = [(words.long() >> (bits * p)) & ((1 << bits) - 1) for p in range(per)]
    along = torch.cat([out.reshape(rows, columns, per) for _, out in runs]).unbind(-1)
    across = torch.cat([out.reshape(rows, per, columns) for _, out in runs]).unbind(1)
    for axis, seen in ((2, along), (1, across)):
        found = [f for part in seen if (f := _function(fields, bits, part)) is not None]
        order = tuple(place for place, _ in found)
        if sorted(order) == list(range(per)) and len({codes for _, codes in found}) == 1:
            return (0, (), found[0][1]) if per == 1 else (axis, order, found[0][1])
    return None


def _function(fields: Sequence[Tensor], bits: int, out: Tensor) -> tuple[int, tuple[float, ...]] | None:
    """(place, value of every code): which of the codes an element is a function of. Every code must occur."""
    out = out.double()
    for place, codes in enumerate(fields):
        table = torch.zeros(1 << bits, dtype=torch.float64)
        table[codes.flatten()] = out.flatten()
        every = bool(codes.flatten().bincount(minlength=1 << bits).all())
        if every and torch.equal(table[codes].nan_to_num(nan=_NAN), out.nan_to_num(nan=_NAN)):
            return place, tuple(table.tolist())
    return None


def _turns(words: Tensor, stacked: bool) -> int:
    """So many runs that every byte occurs, wherever among the blocks of 256 a matrix starts."""
    own = words.numel() // (words.shape[0] if stacked else 1)
    return -(-512 // max(own, 2))


def _generator(turn: int) -> torch.Generator:
    return torch.Generator().manual_seed(11 + turn)


def _words(shape: tuple[int, ...], dtype: torch.dtype, stacked: bool, turn: int) -> Tensor:
    """Words with all their bits in use, each of their bytes having all values in turn (of many words at random); the matrices of a stack
    start a few words apart in one buffer."""
    rest = shape[1:] if stacked else shape
    numel = math.prod(rest) + (_APART * shape[0] if stacked else 0)
    start = turn * math.prod(rest)

    def bytes_at(place: int) -> Tensor:
        blocks = range(start // 256, (start + numel) // 256 + 1)
        every = torch.cat([torch.randperm(256, generator=_generator(b + _FAR_FROM * place)) for b in blocks])
        return every[start % 256 :][:numel].to(torch.uint8)

    if dtype.itemsize > 1 and numel > _FAR_FROM:
        info = torch.iinfo(dtype)
        flat = torch.randint(info.min, info.max + 1, (numel,), generator=_generator(turn)).to(dtype)
    else:
        flat = torch.stack([bytes_at(place) for place in range(dtype.itemsize)], -1).view(dtype).flatten()
    strides = torch.empty(rest, device="meta").stride()
    return flat.as_strided(shape, (_APART, *strides)) if stacked else flat.reshape(shape)


def made_of(n: fx.Node) -> list[fx.Node]:
    """What a node is computed from, itself included, in no order. A number of the user's that Dynamo keeps variable is what it is now."""
    return list(reached([n], lambda x: () if fixed_number(x) else x.all_input_nodes))


def _value(n: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """A node's value, computed with the types that the graph has. `env`: values that are known, and come to be."""

    def load(a: Any) -> Any:
        return _value(a, env) if isinstance(a, fx.Node) else torch.device("cpu") if isinstance(a, torch.device) else a

    if n not in env:
        if fixed_number(n):
            env[n] = size_of(n)
        elif n.op == "get_attr":
            env[n] = getattr(n.graph.owning_module, str(n.target))
        else:
            args, kwargs = fx.node.map_aggregate((n.args, n.kwargs), load)
            env[n] = n.target(*args, **kwargs)  # type: ignore[operator]
    return env[n]
