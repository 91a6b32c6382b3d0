"""Rewrites of a recording before the passes read it.

- Masks of tokens: [ids = e] · m  is  [(m ? ids : none) = e], so that the ids alone say who goes where.
- Stacks in a list: (w_0[0], w_0[1], w_1[0], ...) are the experts' matrices, each one a parameter of its own.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.fx as fx

from ..passes.aten.effects import aliased_arg, mutated_args
from ..passes.aten.node import reached
from .cleaning import schema_name

_AND = {"logical_and", "bitwise_and", "__and__", "mul", "logical_and_", "bitwise_and_"}
_aten = torch.ops.aten


def fold_masks(gm: fx.GraphModule, experts: int) -> None:
    """Replace ``(ids == e) & mask``, with a mask that knows nothing of `e`, by a comparison of masked ids, in place.

    experts: their number, or a number above it: the id that means none of them.
    """
    made: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for n in list(gm.graph.nodes):
        found = _masked(n)
        if found is None:
            continue
        compared, mask = found
        ids, e = compared.args
        if (ids, mask) not in made:
            made[ids, mask] = _masked_ids(gm.graph, ids, mask, experts, n)
        with gm.graph.inserting_before(n):
            new = gm.graph.call_function(_aten.eq.Scalar, (made[ids, mask], e))
        new.meta = dict(n.meta)
        n.replace_all_uses_with(new)
    if made:
        gm.graph.eliminate_dead_code()
        gm.recompile()


def split_stacks(gm: fx.GraphModule) -> None:
    """Make a parameter of each matrix where the stacks of a list hold the experts', in place: ``meta["index"]`` says which.

    A list has numbers for names (``w1.0``, ``w1.1``): ``w1``, ``w2`` and ``w3`` beside each other are three tensors, not a list of three.
    """
    stacks: dict[str, list[fx.Node]] = {}
    for n in gm.graph.nodes:
        if n.op == "placeholder" and "param_path" in n.meta and n.meta["real"].ndim > 2:
            stacks.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", n.meta["param_path"]), []).append(n)
    for group in stacks.values():
        users = [u for n in group for u in n.users]
        if len(group) < 2 or not all(u.target is _aten.select.int and u.args[1] == 0 for u in users):
            continue
        for n in group:
            _split(gm, n)
        gm.recompile()


def _split(gm: fx.GraphModule, stack: fx.Node) -> None:
    for i in sorted({int(u.args[2]) for u in stack.users}):  # type: ignore[call-overload]
        with gm.graph.inserting_before(stack):
            one = gm.graph.placeholder(f"{stack.target}_{i}")
        users = [u for u in stack.users if u.args[2] == i]
        one.meta = {**stack.meta, "index": i, "val": users[0].meta["val"], "real": stack.meta["real"][i]}
        for u in users:
            u.replace_all_uses_with(one)
            gm.graph.erase_node(u)
    gm.graph.erase_node(stack)


def cast_stacks(gm: fx.GraphModule) -> None:
    """cast(P[e]) = cast(P)[e], in place, where code casts every matrix that it takes of a stack P to one wider type, and writes none."""
    for stack in [n for n in gm.graph.nodes if n.op == "placeholder" and "param_path" in n.meta]:
        takes = list(stack.users)
        casts = [u for n in takes for u in n.users]
        to = {u.args[1] for u in casts if u.target is _aten.to.dtype and len(u.args) == 2}
        if len(to) != 1 or not all(u.target is _aten.to.dtype and len(u.args) == 2 for u in casts):
            continue
        (dtype,) = to
        if not all(u.target is _aten.select.int and u.args[1] == 0 and u.users for u in takes) or not _widens(stack, dtype):
            continue
        if any(map(_is_written, casts)):
            continue  # a copy of its own each time, where cast(P)[e] is one memory for all who take e
        _cast_whole(gm.graph, stack, dtype, casts)
        gm.recompile()


def _is_written(n: fx.Node) -> bool:
    """Whether something writes to a tensor, or to a view of it."""
    return any(n in mutated_args(u) or aliased_arg(u) is n and _is_written(u) for u in n.users)


def _widens(stack: fx.Node, dtype: torch.dtype) -> bool:
    own = stack.meta["val"].dtype
    plain = own.is_floating_point and dtype.is_floating_point and 1 < own.itemsize < dtype.itemsize  # no codes, for which torch has no rule
    return plain and torch.promote_types(own, dtype) is dtype


def _cast_whole(graph: fx.Graph, stack: fx.Node, dtype: torch.dtype, casts: list[fx.Node]) -> None:
    last = next(n for n in reversed(list(graph.nodes)) if n.op == "placeholder")
    with graph.inserting_after(last):
        whole = graph.call_function(_aten.to.dtype, (stack, dtype))
    whole.meta = {"val": stack.meta["val"].to(dtype), "grad": casts[0].meta.get("grad", True)}
    for cast in casts:
        take = cast.all_input_nodes[0]
        with graph.inserting_before(take):
            one = graph.call_function(_aten.select.int, (whole, *take.args[1:]))
        one.meta = {**take.meta, "val": cast.meta["val"]}
        cast.replace_all_uses_with(one)
        graph.erase_node(cast)
    for take in [u for u in stack.users if u is not whole]:
        graph.erase_node(take)


def _masked(n: fx.Node) -> tuple[fx.Node, Any] | None:
    """(comparison, mask) of a conjunction, if the mask is the same for all experts."""
    if schema_name(n).removeprefix("aten::") not in _AND or n.meta["val"].dtype is not torch.bool or len(n.args) != 2:
        return None
    for compared, mask in (n.args, n.args[::-1]):
        if not isinstance(compared, fx.Node) or not isinstance(mask, fx.Node) or compared.target is not _aten.eq.Scalar:
            continue
        same = compared.meta["val"].shape == n.meta["val"].shape and mask.meta["val"].dtype is torch.bool
        if same and not compared.args[0].meta["val"].is_floating_point() and not _compares(mask):  # type: ignore[union-attr]
            return compared, mask
    return None


def _compares(mask: fx.Node) -> bool:
    """Whether a mask is itself made by comparing integers with a number."""
    made = reached([mask], lambda n: n.all_input_nodes)
    return any(n.target is _aten.eq.Scalar and not n.args[0].meta["val"].is_floating_point() for n in made)  # type: ignore[union-attr]


def _masked_ids(graph: fx.Graph, ids: fx.Node, mask: fx.Node, none: int, before: fx.Node) -> fx.Node:
    """``where(mask, ids, none)``, as early as its inputs allow."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max(ids, mask, key=order.__getitem__)
    after = last if last.op != "placeholder" else next(n for n in reversed(list(graph.nodes)) if n.op == "placeholder")
    with graph.inserting_after(after):
        new = graph.call_function(_aten.where.ScalarOther, (mask, ids, none))
    new.meta = {"val": mask.meta["val"] + ids.meta["val"], "grad": before.meta.get("grad", True)}
    return new
