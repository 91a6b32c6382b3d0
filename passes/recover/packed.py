"""Codes that are packed into words, and what they stand for: read by running the operations on words and looking at every code.

A node is made of one tensor of words (`Leaf`) where nothing else than constants goes into it. The pass stops at such nodes: what an element
of theirs is needs no term, it is found out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..aten import names
from ..aten.element import fixed_number, reindex, shape_of, size_of
from ..aten.names import op_name
from ..aten.node import reached
from ..terms import Term
from .rows import WORDS, No, nodes_of, reads

_WORDS = (torch.uint8, torch.int32, torch.int8)
_BITS = frozenset("bitwise_and __and__ bitwise_or __or__ bitwise_xor bitwise_right_shift __rshift__ bitwise_left_shift __lshift__".split())
_POINTWISE = frozenset("add sub rsub mul div neg ldexp exp2 pow eq ne lt le gt ge where floor_divide remainder".split())
_MADE_OF_WORDS = names.VIEW | names.CAST | names.JOIN | names.LOOKUP | frozenset({"index_select", "getitem"}) | _BITS | _POINTWISE
_TABLES = (16, 256)
_MOST = 1 << 25  # elements of a node that is looked at
_APART = 7  # words between the matrices of a stack
_FAR_FROM = 1 << 16  # between the seeds of two places of bytes in a word; words that are drawn at random beyond
_READ = "readings of words"  # in a node's notes
_NAN = 1e300  # what stands for it where values are compared


def cuts(graph: fx.Graph) -> set[fx.Node]:
    """Nodes made of packed words alone that something else is made of; each knows the tensor of the words (`WORDS`)."""
    leaf: dict[fx.Node, fx.Node] = {}
    fixed: set[fx.Node] = set()
    packed: set[fx.Node] = set()
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr"):
            v = n.meta.get("val")
            if isinstance(v, Tensor) and v.dtype in _WORDS and v.ndim > 1:
                leaf[n] = n
            elif n.op == "get_attr" or isinstance(v, Tensor) and v.ndim == 1 and v.is_floating_point() and v.shape[0] in _TABLES:
                fixed.add(n)
        elif fixed_number(n):
            fixed.add(n)
        elif n.op == "call_function" and all(x in leaf or x in fixed for x in n.all_input_nodes):
            of = {leaf[x] for x in n.all_input_nodes if x in leaf}
            if _spreads(n) and n.args[0] in packed:
                continue  # zero points spread over their groups: terms say that
            if not of and (n.all_input_nodes or op_name(n) in names.CREATION):
                fixed.add(n)
            elif len(of) == 1 and op_name(n) in _MADE_OF_WORDS:
                (leaf[n],) = of
                if _unpacks(n, leaf) or any(x in packed for x in n.all_input_nodes):
                    packed.add(n)
    found = {n for n in packed if isinstance(n.meta.get("val"), Tensor) and any(u not in leaf for u in n.users)}
    for n in found:
        n.meta[WORDS] = leaf[n]
    return found


def _spreads(n: fx.Node) -> bool:
    """Whether a node holds numbers more often than what it is made of."""
    v, source = n.meta.get("val"), n.args[0].meta.get("val") if n.args and isinstance(n.args[0], fx.Node) else None
    both = isinstance(v, Tensor) and isinstance(source, Tensor)
    return op_name(n) in names.REPEAT or op_name(n) in ("index", "index_select") and both and v.numel() > source.numel()  # type: ignore[union-attr]


def is_packed(a: Term) -> bool:
    """Whether an atom reads what is made of packed words."""
    return a.op == "a" and all(isinstance(n, fx.Node) and WORDS in n.meta for n in nodes_of(a))


def _unpacks(n: fx.Node, leaf: dict[fx.Node, fx.Node]) -> bool:
    """Whether an operation reads something else than whole numbers off words: bits, a table, another type's bits; arithmetic on bytes."""
    name, words = op_name(n), leaf[n].meta["val"].dtype
    if name in _BITS or name in ("index", "embedding", "index_select", "gather") and any(x in leaf for x in n.all_input_nodes[1:]):
        return True
    if name == "view" and isinstance(n.args[1], torch.dtype):
        return True
    return name in _POINTWISE and words is torch.uint8


@dataclass(frozen=True)
class Reading:
    """What a node made of words is: value(code) at every place of a matrix [rows, columns] of codes.

    axis: along which a word's codes lie, 1 for rows, 2 for columns, 0
    where a word is one code. order: the place, in its word, of each of its codes. values: of each code. table: the node they come from.
    """

    shape: tuple[int, int]
    axis: int
    order: tuple[int, ...]
    values: tuple[float, ...]
    table: fx.Node | None = None

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
    tables = [x for x in made_of(n) if x.op == "placeholder" and x is not leaf]
    drawn = (torch.randperm(t.meta["val"].shape[0], generator=_generator(i)) for i, t in enumerate(tables))  # no two tables alike
    given: dict[fx.Node, Any] = {t: numbers.double() + 0.5 for t, numbers in zip(tables, drawn, strict=True)}
    runs: list[tuple[Tensor, Tensor]] = []
    for turn in range(_turns(words, stacked)):
        given[leaf] = _words(tuple(words.shape), words.dtype, stacked, turn)
        out = _value(n, dict(given))
        for e in (0, words.shape[0] - 1) if expert is None else (expert,):
            own = given[leaf][e] if stacked else given[leaf]
            runs.append((own.flatten(1) if own.ndim > 1 else own[None], out[e] if expert is None else out))
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


def _spelling(n: fx.Node, leaf: fx.Node, expert: int | None) -> str:
    """How a node is made of its words: nodes with one spelling have one reading, whichever expert's words they are made of."""
    made = made_of(n)
    number = {x: i for i, x in enumerate(made)}

    def told(x: fx.Node) -> object:
        if x is leaf:
            return tuple(x.meta["val"].shape), x.meta["val"].dtype
        if x.op == "get_attr":
            v = getattr(x.graph.owning_module, str(x.target))
            return (v.tolist(), v.dtype) if isinstance(v, Tensor) and v.numel() <= max(_TABLES) else id(v)
        if fixed_number(x):
            return size_of(x)
        how = fx.map_arg((x.args, dict(x.kwargs)), lambda a: ("node", number[a]))
        return (x.name,) if x.op == "placeholder" else (str(x.target), how)

    own = expert if leaf.meta["val"].ndim > 2 else None
    return repr((own, [told(x) for x in made]))


def _read_once(n: fx.Node, leaf: fx.Node, expert: int | None, experts: int) -> Reading | None:
    """`read`, remembered: an element of the same weights is asked for in many places."""
    known: dict[tuple[fx.Node, int | None, int], Reading | None] = n.meta.setdefault(_READ, {})
    key = (leaf, expert, experts)
    if key not in known:
        known[key] = read(n, leaf, expert, experts)
    return known[key]


@dataclass(frozen=True)
class Place:
    """Where an element made of words is: the words (or E tensors of them), row and column of the matrix of codes, what the codes mean."""

    words: Any
    row: Term
    column: Term
    reading: Reading


def _why_not(n: fx.Node, leaf: fx.Node, stack: bool) -> str:
    """Why what a node is made of its words was not read."""
    v, words = n.meta["val"], leaf.meta["val"]
    of_one = stack or words.ndim < 3
    share = Fraction(v.numel() * (1 if of_one else words.shape[0]), words.numel()) if v.numel() and words.numel() else Fraction(1)
    if share > 1 and share.denominator > 1:
        return f"codes of a weight lie across words: {share.numerator} of them in {share.denominator}"
    return "packed weights are unpacked in an unknown way"


def in_rows(p: Place, width: int) -> Place:
    """The same element of a matrix that has so many columns; p itself where a word would lie in two rows or elements are not in a row."""
    (rows, columns), per = p.reading.shape, max(len(p.reading.order), 1)
    if columns == width or p.reading.axis == 1 or rows * columns % width or width % per:
        return p
    shape = (rows * columns // width, width)
    row, column = reindex((p.row, p.column), p.reading.shape, shape)
    return Place(p.words, row, column, replace(p.reading, shape=shape))


def place(a: Term, expert: Term) -> Place:
    """An atom made of words of its expert's. Raises No where it is something else."""
    nodes, count = nodes_of(a), expert.args[1]
    leaves = [n.meta[WORDS] for n in nodes]
    first, *inner = a.args[1]
    if first is not expert:
        raise No(f"packed weights are not indexed by their expert first{reads(a)}")
    stack = not isinstance(a.args[0], tuple)
    experts = [None] if stack else range(count)
    alike = {_spelling(n, leaf, e): (n, leaf, e) for n, leaf, e in zip(nodes, leaves, experts, strict=True)}
    readings = {_read_once(*case, count) for case in alike.values()}
    if len(readings) > 1 and None not in readings:
        tabled = [replace(r, values=(), table=None) for r in readings if r is not None and r.table is not None]
        if len(tabled) == len(readings) and len(set(tabled)) == 1:
            raise No("each expert's codes are looked up in a table of its own: give all of them one buffer, or the numbers as constants")
        raise No("packed weights of different experts are unpacked unlike each other")
    if None in readings:
        raise No(_why_not(nodes[0], leaves[0], stack))
    (reading,) = readings
    assert reading is not None
    row, column = reindex(tuple(inner), shape_of(nodes[0])[stack:], reading.shape)
    return Place(leaves[0] if len(set(leaves)) == 1 else tuple(leaves), row, column, reading)
