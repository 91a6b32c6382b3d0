"""Whether a table of replicas is read as it was recovered: the graph's own operations on whole numbers, at their true size.

Nothing is made small here. What is compared are a few thousand whole numbers, equal to the last one, on tables of all counts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Rejection
from ...ir.placement import physical
from ..aten.element import shape_of
from ..recover.placed import Placed
from .region import TROUBLE, Region

MOST = 1 << 16  # ids that are looked at
UNFIXED = "the number of tokens is not fixed"


def disproved(p: Placed, ids: fx.Node) -> str:
    """Why `ids` are not `physical` of the selection's and the table, "" where they are."""
    assert p.how is not None
    sizes = (*shape_of(p.raw), *shape_of(p.table))
    if not all(isinstance(s, int) for s in sizes):
        return UNFIXED
    region = Region.between([p.raw, p.table], [ids])
    if isinstance(region, Rejection):
        return region.reason
    chosen = p.raw.meta["val"]
    if chosen.numel() > MOST:
        return f"{chosen.numel()} ids are more than are compared"
    raw, table = _probe(chosen, p.table.meta["val"])
    try:
        seen = _run(region, {p.raw: raw, p.table: table})[ids]
    except TROUBLE as e:
        return f"it cannot be run on a table of replicas: {e}"
    meant = physical(raw.reshape(-1, raw.shape[-1]), table, p.how.world, p.how.rank)
    return "" if torch.equal(seen.reshape(meant.shape), meant) else "it reads other places than recovered"


def _probe(ids: Any, table: Any) -> tuple[Tensor, Tensor]:
    """Ids of experts, and a table in which no number stands twice: a count in every row, then places above all counts."""
    g = torch.Generator().manual_seed(0)
    experts, width = table.shape
    counts = torch.randint(1, width, (experts, 1), generator=g)
    places = torch.randperm(experts * (width - 1), generator=g).reshape(experts, width - 1) + width
    raw = torch.randint(0, experts, tuple(ids.shape), generator=g)
    return raw.to(ids.dtype), torch.cat([counts, places], 1).to(table.dtype)


def _run(region: Region, given: dict[fx.Node, Tensor]) -> dict[fx.Node, Any]:
    env: dict[fx.Node, Any] = dict(given)

    def load(a: Any) -> Any:
        return torch.device("cpu") if isinstance(a, torch.device) else a

    for n in region.nodes:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), env.__getitem__)
        args, kwargs = fx.node.map_aggregate((args, kwargs), load)
        env[n] = n.target(*args, **kwargs)  # type: ignore[operator]
    return env
