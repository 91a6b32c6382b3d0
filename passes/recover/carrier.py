"""Which tensor of the graph holds given rows: the experts' input and what their results are added to.

x[t, m] = n[row(t), m], n being the tensor that x reads or one that was made of it by views and copies (transposed, a chunk, a window).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from .. import terms as T
from ..aten import names
from ..aten.element import Puller, shape_of
from ..aten.names import op_name
from ..aten.node import reached
from ..terms import Term
from .rows import row_index, rows

_MANY = 400  # nodes that are looked at
_BY_DATA = ("topk", "sv", "nz", "a")
_MOVES = names.VIEW | names.MOVE | names.LOOKUP | names.CAST | {"getitem"}


def holds_rows(n: fx.Node, idx: tuple[Term, ...], t: Term, count: Any) -> bool:
    """Whether n, read at idx, is read at the row of the token t, all its rows being tokens."""
    return bool(idx) and T.same_size(rows(n), count) and idx[:-1] == row_of(n, t)


def row_of(n: fx.Node, t: Term) -> tuple[Term, ...]:
    """The index of token t into the leading dims of n."""
    lead = shape_of(n)[:-1]
    return tuple(T.const(0) if s == 1 and len(lead) > 1 else i for i, s in zip(row_index(t, lead), lead, strict=True))


def carrier(p: Puller, x: Term, t: Term, out: fx.Node) -> fx.Node | None:
    """The node whose flattened rows, one for each row of `out`, are x[t, ·]; None when no tensor holds them in that order."""
    node, idx = x.args
    count, m = rows(out), feature(x)
    if m is None:
        return None
    if isinstance(node, tuple):  # the tensors of a stack
        stacks = [u for u in node[0].users if op_name(u) in names.JOIN]
        wanted = T.canonical(x)
        return next((n for u in stacks for n in _moved(p, u, m, t, out) if _reads(p, n, m, t) is wanted), None)
    if not isinstance(node, fx.Node):
        return None
    if idx[-1].op == "v" and holds_rows(node, idx, t, count):
        return node
    if any(x.op in _BY_DATA for i in idx for x in T.walk(i)):  # the rows of one expert only
        return None
    made = list(_made_of(p, node, x, m, t, out))
    return next((n for n in made if _cuts(n, node, out)), made[0] if made else None)


def feature(x: Term) -> Term | None:
    """The feature that an atom x[t, .., f(m)] is read at: its last index, or what a shifted or turned one is made of."""
    last = x.args[1][-1] if x.args[1] else None
    found = [last] if last is not None and last.op == "v" else [] if last is None else [v for v in last.atoms if v.args[0] == "m"]
    return found[0] if len(found) == 1 else None


def _made_of(p: Puller, node: fx.Node, x: Term, m: Term, t: Term, out: fx.Node) -> Iterator[fx.Node]:
    """What is made of `node` by moving its elements and is x, in the graph's order."""
    wanted = T.canonical(p.at(node, x.args[1]))
    return (n for n in _moved(p, node, m, t, out) if _reads(p, n, m, t) is wanted)


def _reads(p: Puller, n: fx.Node, m: Term, t: Term) -> Term:
    """The element of n that is x[t, m] where n holds the rows in order."""
    return T.canonical(p.at(n, (*row_of(n, t), m)))


def _moved(p: Puller, node: fx.Node, m: Term, t: Term, out: fx.Node) -> Iterator[fx.Node]:
    """What is made of `node` by moving its elements, and has a row of the right width for each row of the result, in the graph's order."""
    seen, order = [node], {n: i for i, n in enumerate(out.graph.nodes)}
    for n in seen:
        moved = (u for u in n.users if op_name(u) in _MOVES and order[u] < order[out] and u not in p.walls)
        seen.extend(u for u in moved if u not in seen and len(seen) < _MANY)
    for n in sorted(seen, key=order.__getitem__):
        v = n.meta.get("val")
        if not isinstance(v, torch.Tensor) or v.ndim < 2 or v.dtype != node.meta["val"].dtype:
            continue
        if shape_of(n)[-1] == m.args[1] and T.same_size(rows(n), rows(out)):
            yield n


def _cuts(n: fx.Node, source: fx.Node, out: fx.Node) -> bool:
    """Whether `out` reads `source` through n only."""
    return source not in reached([out], lambda x: (y for y in x.all_input_nodes if y is not n))
