"""Accumulation in place onto a tensor that is more than zeros: y = shared(x); y.index_add_(0, t, f(x[t])).

The op makes a tensor of its own of y and the experts' rows, y + Σ f, so that nothing writes y any more. The user's writes go, which is
right where all who read y after the first of them read the finished sum, or are themselves a part of it (y[t] += f(x[t]) reads y[t]).
"""

from __future__ import annotations

import torch
import torch.fx as fx

from ...calls import is_write
from ...ir import Rejection
from ..aten.effects import has_effect, mutated_args, storage_of, targets_of, writers
from ..aten.names import CREATION, op_name
from ..aten.node import example_value
from ..aten.shadow import Shadow
from ..recover.match import ExpertsMatch


def writes_onto_base(m: ExpertsMatch, shadow: Shadow, result: fx.Node, names: list[fx.Node]) -> list[fx.Node]:
    """Dynamo nodes that write the block's sum onto its base, in order; none where something else writes it or sees it half done.

    `result`: the Dynamo node after which the sum is there; `names`: those that are the tensor it stands in.
    """
    base = None if m.base is None else next(iter(shadow.origin.get(m.base, ())), None)
    if base is None or m.base not in _chain(m.out) or shadow.memory.root[m.base].op != "call_function":
        return []
    found = [w for w in writers(base) if base < w and not result < w]
    own = {shadow.statement.get(w, d) for w in _chain(m.out)[:-1] for d in shadow.origin.get(w, (None,))}
    if not found or not own.issuperset(found):
        return []
    storage = storage_of(base)
    others = [n for n in base.graph.nodes if n in own or storage_of(n) == storage]
    readers = [u for n in others for u in n.users if found[0] < u and u not in found]
    seen_whole = all(not result < u or set(u.all_input_nodes).intersection(others) <= set(names) for u in readers)
    return found if seen_whole and all(result < u or _only_for(u, found, result) for u in readers) else []


def check_writes(m: ExpertsMatch, shadow: Shadow, result: fx.Node, names: list[fx.Node]) -> None:
    """Raises Rejection where the op's own tensor cannot take the place of one that was written in place.

    The op runs where the last write stood: under its gradient mode. What is written to the tensor afterwards goes to the op's, so that
    other names of the old storage (a view, x.detach()) would no longer show it.
    """
    steps = _chain(m.out)
    modes = {s in shadow.no_grad for s in steps[:-1]} | {s in shadow.no_grad for s in steps[-1:] if op_name(s) not in CREATION}
    if len(modes) > 1 or len(steps) > 1 and _inference_changes(names, result):
        reason = "what experts are added to in place has a gradient where the additions have none, or the other way round"
        raise Rejection(reason, m.out, "rewrite", code="gradients")
    storages = {s for s in map(storage_of, names) if s is not None}
    old = [n for n in result.graph.nodes if n < result and n not in names and storage_of(n) in storages]
    late = [u for n in old for u in n.users if result < u and not isinstance(example_value(u), (int, torch.SymInt, torch.Size))]
    if not late:
        return
    written = any(result < w for n in names for w in writers(n))
    if written or any(u.op == "output" or storage_of(u) in storages for u in late):
        reason = "the result is written again, or handed on, while another view of it is read"
        raise Rejection(reason, m.out, "rewrite", code="aliased")


def _inference_changes(names: list[fx.Node], result: fx.Node) -> bool:
    """Whether inference mode begins or ends between the first of some names and the result."""
    first = min(names, key=lambda n: n._sort_key)
    return any("inference_mode" in str(n.target) and first < n < result for n in result.graph.nodes)


def _chain(out: fx.Node) -> list[fx.Node]:
    """A result, what it was written onto in place, and so on to the tensor that was there first."""
    found = [out]
    while written := mutated_args(found[-1]):
        found.append(written[0])
    return found


def _only_for(reader: fx.Node, writes: list[fx.Node], last: fx.Node) -> bool:
    """Whether what is made of a reader goes into these writes, and nowhere else."""
    seen = {reader}
    stack = [reader]
    while stack:
        n = stack.pop()
        if n.op == "output" or has_effect(n) or last < n or is_write(n) and not seen.issuperset(targets_of(n)):
            return False
        new = [u for u in n.users if u not in seen and u not in writes]
        seen.update(new)
        stack.extend(new)
    return True
