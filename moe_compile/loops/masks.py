"""Masks of tokens beside a comparison of ids: [ids = e] · m  is  [(m ? ids : none) = e], so that the ids alone say who goes where."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

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
    stack, seen = [mask], {mask}
    while stack:
        n = stack.pop()
        if n.target is _aten.eq.Scalar and not n.args[0].meta["val"].is_floating_point():  # type: ignore[union-attr]
            return True
        new = [i for i in n.all_input_nodes if i not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _masked_ids(graph: fx.Graph, ids: fx.Node, mask: fx.Node, none: int, before: fx.Node) -> fx.Node:
    """``where(mask, ids, none)``, as early as its inputs allow."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max(ids, mask, key=order.__getitem__)
    after = last if last.op != "placeholder" else next(n for n in reversed(list(graph.nodes)) if n.op == "placeholder")
    with graph.inserting_after(after):
        new = graph.call_function(_aten.where.ScalarOther, (mask, ids, none))
    new.meta = {"val": mask.meta["val"] + ids.meta["val"], "grad": before.meta.get("grad", True)}
    return new
