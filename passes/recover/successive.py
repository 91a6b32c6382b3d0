"""Choices made one after another: an argmax, and another one of the scores that are left. Together they are a top-k, none alone is."""

from __future__ import annotations

import torch.fx as fx

from ...ir import Rejection
from ..aten import names
from ..aten.element import shape_of
from ..aten.names import op_name
from ..aten.node import reached

_MOST = 400  # nodes between one choice and the next
_ONE = "argmax", "max"


def successive(choice: fx.Node) -> Rejection | None:
    """What is told of a choice among several of that kind; None where it is the only one of its scores."""
    chain = [choice, *(n for n in choice.graph.nodes if n is not choice and (_leads(choice, n) or _leads(n, choice)))]
    if len(chain) < 2:
        return None
    first = min(chain, key=list(choice.graph.nodes).index)
    why = f"the experts are chosen one after another, the best of what is left each time ({len(chain)} times)"
    return Rejection(f"{why}: choose them at once, with torch.topk(scores, {len(chain)})", first, "find", code="in turn")


def _leads(first: fx.Node, later: fx.Node) -> bool:
    """Whether `later` chooses among the scores that are left when `first` has chosen."""
    sizes = [_experts(n) for n in (first, later)]
    if None in sizes or sizes[0] != sizes[1]:
        return False
    # not by way of products, which do not count either: another layer's router reads what experts gave
    made = reached([first], lambda n: (u for u in n.users if u is later or op_name(u) not in names.CONTRACTION), _MOST)
    return any(n is later for n in made if n is not first)


def _experts(n: fx.Node) -> object:
    """How many a choice of the best one has; None for other nodes."""
    if op_name(n) not in _ONE or not isinstance(n.args[0], fx.Node) or len(n.args) < 2 or isinstance(n.args[1], fx.Node):
        return None
    shape = shape_of(n.args[0])
    return shape[-1] if shape and n.args[1] in (-1, len(shape) - 1) else None
