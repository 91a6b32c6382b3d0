"""A cheap look at Dynamo's graph: where something is selected or mixed at all. Other graphs cost nothing; only these places are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from ..aten import names
from ..aten.names import op_name
from ..aten.node import example_value
from .given_ids import choosers
from .mixture import routers, soft
from .selections import unviewed


@dataclass(frozen=True)
class Places:
    """Nodes that choose or look up experts, perhaps (`chosen`), and products that may weigh all of them (`routers`)."""

    chosen: list[fx.Node]
    routers: list[fx.Node]

    def first(self) -> fx.Node:
        return (self.chosen or self.routers)[0]

    def __bool__(self) -> bool:
        return bool(self.chosen or self.routers)


def places(graph: fx.Graph) -> Places:
    mixed = {n for pair in soft(graph) for n in pair}
    given = set(choosers(graph))
    return Places([n for n in graph.nodes if selects(n) or _looks_up_ids(n) or n in mixed or n in given], list(routers(graph)))


def selects(n: fx.Node) -> bool:
    name = op_name(n)
    if name == "max":  # the largest of all elements, or of two, says nothing of where it is; nor does one of a row whose place nobody reads
        return not isinstance(example_value(n), torch.Tensor) and not all(op_name(u) == "getitem" and u.args[1] == 0 for u in n.users)
    return name in names.ROUTED or "moe_compile" in str(n.target)


def _looks_up_ids(n: fx.Node) -> bool:
    """Whether a node reads rows of integers from a given table: expert ids perhaps."""
    if op_name(n) not in names.LOOKUP | {"getitem", "take_along_dim"}:
        return False
    return len(n.all_input_nodes) > 1 and _holds_ids(n) and any(_holds_ids(unviewed(x)) and _given(unviewed(x)) for x in n.all_input_nodes)


def _holds_ids(n: fx.Node) -> bool:
    v = example_value(n)
    return isinstance(v, torch.Tensor) and v.ndim >= 2 and v.dtype in (torch.int64, torch.int32)


def _given(n: fx.Node) -> bool:
    return n.op in ("placeholder", "get_attr")
