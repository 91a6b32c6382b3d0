"""Codes that are packed into words, and what they stand for: read by running the operations on words and looking at every code.

A node is made of one tensor of words (`Leaf`) where nothing else than constants goes into it. The pass stops at such nodes: what an element
of theirs is needs no term, it is found out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..aten import names
from ..aten.element import fixed_number, reindex, shape_of, size_of
from ..aten.names import op_name
from ..terms import Term
from .codes import Reading, made_of, read
from .rows import WORDS, No, nodes_of, reads
from .shifts import is_list

_WORDS = (torch.uint8, torch.int32, torch.int8)
_BITS = frozenset("bitwise_and __and__ bitwise_or __or__ bitwise_xor bitwise_right_shift __rshift__ bitwise_left_shift __lshift__".split())
_POINTWISE = frozenset("add sub rsub mul div neg ldexp exp2 pow eq ne lt le gt ge where floor_divide remainder".split())
_MADE_OF_WORDS = names.VIEW | names.CAST | names.JOIN | names.LOOKUP | frozenset({"index_select", "getitem"}) | _BITS | _POINTWISE
_TABLES = (16, 256)
_READ = "readings of words"  # in a node's notes


def cuts(graph: fx.Graph) -> set[fx.Node]:
    """Nodes made of packed words alone that something else is made of; each knows the tensor of the words (`WORDS`)."""
    leaf: dict[fx.Node, fx.Node] = {}
    fixed: set[fx.Node] = set()
    packed: set[fx.Node] = set()
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr"):
            v = n.meta.get("val")
            if is_list(n):
                fixed.add(n)
            elif isinstance(v, Tensor) and v.dtype in _WORDS and v.ndim > 1:
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
        return ("list", x.meta["val"].shape) if is_list(x) else (x.name,) if x.op == "placeholder" else (str(x.target), how)

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
    if reading.shifts:
        lists = tuple(next(x for x in made_of(n) if is_list(x)) for n in nodes)
        reading = replace(reading, shifts=lists[:1] if len(set(lists)) == 1 else lists)
    row, column = reindex(tuple(inner), shape_of(nodes[0])[stack:], reading.shape)
    return Place(leaves[0] if len(set(leaves)) == 1 else tuple(leaves), row, column, reading)
