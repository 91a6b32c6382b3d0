"""Grouped products of rows that came in order: which expert a row is of, said by a line of its own in the shadow.

Where the group sizes of a product are no count of ids of the graph, nothing in it holds the rows' experts. `mark` puts a tensor into
the shadow that does: expert_of_row(ends, rows)[r] = |{e : ends[e] <= r}|.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from .. import terms as T
from . import names
from .element import rule, size_of
from .names import op_name
from .sharded import is_collective

MARK = "expert_of_row"
EXCHANGED = "exchanged"  # of a mark: whether the group sizes came from other devices
_MOST = 200  # nodes looked at behind the group sizes


def mark(graph: fx.Graph) -> None:
    """Put in the experts of the rows of every grouped product whose group sizes no selection or sorting is behind."""
    for n in list(graph.nodes):
        ends = _ends(n) if op_name(n) in names.GROUPED else None
        if ends is None or marked(ends, n) is not None:
            continue
        chosen, exchanged = _behind(ends)
        if chosen:
            continue
        x = n.args[0]
        with graph.inserting_before(n):
            new = graph.call_function(torch.ops.moe_compile.expert_of_row.default, (ends, x))
        v = x.meta["val"]  # type: ignore[union-attr]
        new.meta = {EXCHANGED: exchanged, "val": v.new_empty(v.shape[:1], dtype=torch.int64, device=ends.meta["val"].device)}


def marked(ends: fx.Node, product: fx.Node) -> fx.Node | None:
    """The line that says of which expert each row of a product is."""
    rows = size_of(product.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
    return next((u for u in ends.users if is_mark(u) and T.same_size(size_of(u.meta["val"].shape[0]), rows)), None)


def is_mark(n: object) -> bool:
    return isinstance(n, fx.Node) and op_name(n) == MARK


def _ends(n: fx.Node) -> fx.Node | None:
    """The group ends of a product of rows [R, ·] with a stack [E, ·, ·]."""
    ends = n.kwargs.get("offs") or next(iter(n.args[2:3]), None)
    x, w = (getattr(a, "meta", {}).get("val") for a in n.args[:2])
    plain = isinstance(x, torch.Tensor) and isinstance(w, torch.Tensor) and (x.ndim, w.ndim) == (2, 3)
    return ends if plain and isinstance(ends, fx.Node) else None


def _behind(ends: fx.Node) -> tuple[bool, bool]:
    """Whether a selection or sorting is behind group ends, and whether an exchange is: what is behind that is other devices'."""
    seen, waiting, exchanged = {ends}, [ends], False
    while waiting and len(seen) < _MOST:
        n = waiting.pop()
        if op_name(n) in names.SELECTION:
            return True, exchanged
        if is_collective(n):
            exchanged = True
            continue
        new = [x for x in n.all_input_nodes if x not in seen]
        seen.update(new)
        waiting += new
    return bool(waiting), exchanged


rule(MARK)(lambda p, n, a, idx: T.atom(n, idx))
