"""Expert ids of which the graph does not tell where they come from: inputs, what came out of a collective or an opaque region.

They are found from what they choose: rows of a stack of weights, the groups of a grouped product, one expert after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx

from ..aten import names
from ..aten.definitions_views import SMALL, TUPLES
from ..aten.element import RULES
from ..aten.names import op_name, through
from ..aten.node import example_value, reached
from ..aten.sharded import is_collective, leaf
from ..aten.sorted_rows import EXCHANGED, is_mark
from ..terms import Term
from .selections import is_selection

_MOST = 200  # nodes looked at behind one product
_INTEGERS = (torch.int64, torch.int32)


def given_ids(graph: fx.Graph, walls: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes of a shadow that hold such ids, and those of them that weights are read by; others may be compared for other reasons."""
    readers = {s for n in _readers(graph) for s in _sources(n, walls)}
    return readers | {s for n in _compared(graph) for s in _sources(n, walls)}, readers


def choosers(graph: fx.Graph) -> Iterator[fx.Node]:
    """Whole numbers that choose experts, perhaps, whatever made them: of Dynamo's graph or of a shadow."""
    yield from _readers(graph)
    yield from _compared(graph)


def _readers(graph: fx.Graph) -> Iterator[fx.Node]:
    """offs of a grouped product; i of W[i] where W [E, ·, ·] is given."""
    for n in graph.nodes:
        name = op_name(n)
        if name in names.GROUPED:
            yield from (x for x in (n.kwargs.get("offs"), *n.args[2:3]) if _holds_integers(x))
        elif name in names.LOOKUP | {"index_select", "getitem"} and n.args and _is_stack(n.args[0]):
            yield from (x for x in n.all_input_nodes if x is not n.args[0] and _holds_integers(x))


def _compared(graph: fx.Graph) -> Iterator[fx.Node]:
    """ids where [ids = e] is asked for several e, or for all of them."""
    compared: dict[fx.Node, set[object]] = {}
    for n in graph.nodes:
        name = op_name(n)
        if name == "one_hot" and _holds_integers(n.args[0]):
            yield n.args[0]  # type: ignore[misc]
        elif name == "eq" and len(n.args) == 2 and _holds_integers(n.args[0]) and type(n.args[1]) is int:
            compared.setdefault(n.args[0], set()).add(n.args[1])  # type: ignore[arg-type]
    yield from (n for n, numbers in compared.items() if len(numbers) > 1)


def _holds_integers(n: object) -> bool:
    v = example_value(n) if isinstance(n, fx.Node) else None
    return isinstance(v, torch.Tensor) and v.dtype in _INTEGERS and v.ndim > 0


def _is_stack(n: object) -> bool:
    """Whether a tensor is weights of several experts, [E, ·, ·], given or made of codes, or such and another added or multiplied."""
    made = (through(x, names.VIEW | names.CAST) for x in reached(filter(_has_matrices, [n]), _adapted_from, _MOST))  # type: ignore[arg-type]
    return any(_is_given(x) or _is_made_of_codes(x) for x in made)


def _has_matrices(n: object) -> bool:
    v = example_value(n) if isinstance(n, fx.Node) else None
    return isinstance(v, torch.Tensor) and v.ndim == 3 and v.dtype.is_floating_point


def _adapted_from(n: fx.Node) -> Iterable[Any]:
    n = through(n, names.VIEW | names.CAST)
    return filter(_has_matrices, n.args[:2]) if op_name(n) in _ADAPTED else ()


def _is_given(n: fx.Node) -> bool:
    return n.op in ("placeholder", "get_attr") or n.target is leaf or op_name(n) == "to_local"


def _is_made_of_codes(n: fx.Node) -> bool:
    """Whether a tensor is codes that the graph is given times scales, less zero points, looked up in a table; or a stack of such."""
    return any(map(_holds_codes, reached([n], _made_from, _MOST)))


def _made_from(n: fx.Node) -> Iterable[fx.Node]:
    n = through(n, names.VIEW | names.CAST)
    return n.all_input_nodes if op_name(n) in _MADE else ()


def _holds_codes(n: fx.Node) -> bool:
    n = through(n, names.VIEW | names.CAST)
    v = example_value(n)
    return n.op in ("placeholder", "get_attr") and isinstance(v, torch.Tensor) and v.ndim > 1 and v.dtype in _CODES


_ADAPTED = frozenset("add sub baddbmm mul".split())  # weights and their low-rank pairs, masks or scales
_CODES = frozenset({torch.uint8, torch.int8, torch.int32, *SMALL})
_MADE = frozenset("mul div true_divide sub add ldexp stack cat index select getitem".split()) | frozenset(
    "bitwise_and __and__ and_ bitwise_right_shift __rshift__ rshift".split()
)


def _sources(chooser: fx.Node, walls: set[fx.Node]) -> set[fx.Node]:
    """The whole numbers that a chooser is made of and that are made of nothing; none where a selection is among what it is made of."""
    found: set[fx.Node] = set()
    waiting, seen = [chooser], {chooser}
    while waiting:
        n = waiting.pop()
        if is_selection(n) or len(seen) > _MOST:
            return set()
        ends = n.op in ("placeholder", "get_attr") or n in walls or is_collective(n)
        if ends or not _has_rule(n):
            found |= {n} if _holds_integers(n) else set()
        if ends:
            continue
        new = [x for x in _inputs(n) if x not in seen]
        seen.update(new)
        waiting += new
    return found


def _has_rule(n: fx.Node) -> bool:
    return op_name(n) in RULES or op_name(n) in TUPLES or op_name(n) == "getitem"


def _inputs(n: fx.Node) -> Iterable[fx.Node]:
    """What an element's value depends on."""
    return () if op_name(n) in names.CREATION | names.SIZE else n.all_input_nodes


def is_last(n: fx.Node) -> bool:
    """Whether a grouped product is the last one of its groups: rows that came in order are done with there."""
    return op_name(n) in names.GROUPED and not any(
        op_name(u) in names.GROUPED for u in reached([n], lambda x: x.users, _MOST) if u is not n
    )


def rows_in_order(product: fx.Node) -> frozenset[fx.Node]:
    """The rows that the first product of these groups reads, before casts, where other devices made the groups: nothing tells the
    rows' ids but the groups' ends.
    """
    if op_name(product) not in names.GROUPED:
        return frozenset()
    rows = [u.args[1] for ends in product.all_input_nodes for u in ends.users if is_mark(u) and u.meta[EXCHANGED]]
    return frozenset(through(x, names.CAST) for x in rows if isinstance(x, fx.Node))


def ends_of(ids: Term) -> fx.Node | None:
    """The group ends of rows that came in the order of their experts, where that is what says their ids."""
    return ids.args[0].args[0] if ids.op == "a" and is_mark(ids.args[0]) else None
