"""Experts of a whole block read by example: the router is in the recording, so the ids come from its own selection."""

from __future__ import annotations

import torch.fx as fx

from ..ir import MoeBlock, Rejection
from .deep import deep_recursion
from .find import Finder
from .pipeline import Recovered, _fresh_terms
from .region import Block, routing_nodes
from .shadow import stale_views
from .validate import validate


def recover_block(gm: fx.GraphModule) -> Recovered | Rejection:
    """As `pipeline.recover_recorded`, for a recording of a function of tokens alone."""
    with deep_recursion():
        _fresh_terms()
        found = Finder(gm.graph, set(), stale_views(gm.graph)).run()
        if len(found.matches) != 1:
            return found.rejected[0] if found.rejected else Rejection("the recorded function holds no one block of experts", None, "record")
        ((m, p),) = found.matches
        ids, weights, _ = routing_nodes(m, p)
        if ids is None or weights is None:
            return Rejection("no tensor of the recorded function holds the ids or the weights", m.out, "record")
        ir = MoeBlock(None, m.experts, None, "")
        ir.boundary.update(tokens=m.tokens, ids=ids, weights=weights, out=m.out, base=m.base)
        for name in ("up", "down", "up_bias", "down_bias"):
            ir.boundary[name] = [q.node for q in getattr(m, name)]
        ir.boundary["views"] = {q.node: q.view for q in (*m.up, *m.down, *m.up_bias, *m.down_bias) if q.view is not None}
        refusal = validate(Block(m, None, ir, ids, weights, ids))
        return refusal if refusal is not None else Recovered(ir, "", True, "")
