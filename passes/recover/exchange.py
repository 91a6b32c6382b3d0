"""Collectives around experts in Dynamo's graph: how rows came to this rank's experts, and how results go back.

They stay as they are written; what is read here is told (`MoeBlock.exchange`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
import torch.fx as fx

from ...ir import Exchange, Way
from ..aten.names import CAST, RESHAPE, SAME, op_name
from ..aten.sharded import group_called

_TRANSPARENT = RESHAPE | SAME | CAST  # a row of the result is a row of what goes in
_SPACES = ("_c10d_functional", "_c10d_functional_autograd", "moe_compile")
_OURS = ("rows_out", "rows_back")  # `moe_compile.ops.rows`
# ops that are a collective, or peers' memory in its place: its name and its arguments but for the group
_AS = {"summed": ("all_reduce", "sum"), "summed_rows": ("reduce_scatter_tensor", "sum"), "rows_gathered": ("all_gather_into_tensor",)}


def exchange_of(tokens: fx.Node, out: fx.Node) -> Exchange | None:
    """Of experts that read `tokens` and give `out`: results are all-reduced; or rows gathered and results reduce-scattered; or rows came
    by an all-to-all, which results go back by. In one group."""
    back = next((c for n in _onwards(out) if (c := _collective(n)) is not None), None)
    if back is None or len(back[1]) < 2:
        return None
    name, (first, *splits, group) = back
    if name == "all_reduce" and first == "sum":
        return _exchange(Way.SHARED, str(group))
    came = next((c for n in _backwards(tokens) if (c := _collective(n)) is not None), None)
    if came is None or came[1][-1] != group:
        return None
    if name == "rows_back" and came[0] == "rows_out":
        return _exchange(Way.ROWS, str(group))
    if name == "all_to_all_single" and came == (name, (*splits, first, group)):  # what each rank sends is what the other one takes
        return _exchange(Way.ROWS, str(group))
    gathered = came[0] == "all_gather_into_tensor"
    return _exchange(Way.GATHER, str(group)) if name == "reduce_scatter_tensor" and first == "sum" and gathered else None


def _exchange(way: Way, name: str) -> Exchange | None:
    """None for a group that this process has not: the graph came from elsewhere."""
    group = group_called(name)
    return None if group is None else Exchange(way, name, group.size(), group.rank())


def _collective(n: fx.Node) -> tuple[str, tuple[object, ...]] | None:
    """The name of a collective and its arguments behind the tensor; of a custom function, what its forward does to its only tensor."""
    if "autograd_function_apply" in str(n.target):
        return _inside(n)
    space, _, name = _target(n).rpartition(".")
    if space == "moe_compile" and name in _AS:
        return _AS[name][0], (*_AS[name][1:], n.args[-1])
    if space not in _SPACES or name == "wait_tensor" or space == "moe_compile" and name not in _OURS:
        return None
    return name, n.args[1:]


def _target(n: fx.Node) -> str:
    """`namespace.name` of a torch op, whichever way it is called."""
    t = n.target
    if isinstance(t, torch._ops.OpOverload):
        t = t.overloadpacket
    return str(t).removeprefix("torch.ops.") if isinstance(t, torch._ops.OpOverloadPacket) else ""


def _inside(n: fx.Node) -> tuple[str, tuple[object, ...]] | None:
    owner = n.graph.owning_module
    body = getattr(owner, str(n.args[0].target), None) if isinstance(n.args[0], fx.Node) else None
    if not isinstance(body, fx.GraphModule):
        return None
    taken = next(x for x in body.graph.nodes if x.op == "placeholder")
    return next((c for x in _onwards(taken) if (c := _collective(x)) is not None), None)


def _passes_on(n: fx.Node) -> bool:
    return op_name(n) in _TRANSPARENT or _target(n).endswith(".wait_tensor") or n.target is operator.getitem


def _onwards(n: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, through what passes it on as it is."""
    return _walk(n, lambda x: list(x.users))


def _backwards(n: fx.Node) -> Iterator[fx.Node]:
    """What a value comes from, through what passes it on as it is."""
    yield n
    yield from _walk(n, lambda x: [a for a in x.args[:1] if isinstance(a, fx.Node)] if _passes_on(x) else [])


def _walk(start: fx.Node, steps: Callable[[fx.Node], list[fx.Node]]) -> Iterator[fx.Node]:
    left = steps(start)
    while left:
        n = left.pop(0)
        yield n
        if _passes_on(n):
            left.extend(steps(n))
