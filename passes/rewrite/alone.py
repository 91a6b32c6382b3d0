"""A shared expert in few bits as an op of its own: experts in few bits of which there is one, which all rows go to.

    shared(x) = experts_stored(x, ids = 0, weights = gate or 1, ...)

So its weights are read as they are stored. It stands where the graph computes the shared expert, at inference alone, and where the target's
kernels decode the scheme; else the graph goes on making floats of the one matrix that all tokens use.
"""

from __future__ import annotations

import math
from typing import Any

from ...ir import MoeBlock
from .. import terms as T
from ..aten.conditions import may_train
from ..aten.element import shape_of
from ..recover.match import ExpertsMatch
from ..recover.region import Block
from ..recover.shared import SharedMatch, SharedOperands
from .activations import MODEL
from .plan import ExpertsPlan
from .planner import Planner
from .target import Target


def stays(s: SharedMatch, planner: Planner, options: Any, target: Target) -> str:
    """Why a shared expert in few bits runs as written, in the user's terms; "" where an op may take its place."""
    if s.operands is None:
        return s.why
    if may_train(planner.shadow.dynamo.graph):
        return "a gradient may be wanted"
    if options.activations != MODEL:
        return f"activations={options.activations!r} is for the routed experts"
    if planner.overwritten(s.node):
        return "its result is written in place"
    most, sizes = target.alone_tokens, shape_of(s.node)[:-1]
    if most and not all(isinstance(d, int) for d in sizes) or math.prod(sizes) > most > 0:
        return f"with more than {most} tokens, or a number that is not known when compiling, a library's product is taken"
    block = block_of(s.operands)
    return target.decodes(block) or target.reason(block) or ""


def block_of(o: SharedOperands) -> MoeBlock:
    """The shared expert as a block, for a target."""
    return MoeBlock(None, o.experts)


def plan_alone(b: Block, o: SharedOperands, planner: Planner) -> ExpertsPlan:
    """Its op. Raises Rejection where the graph does not hold what that reads."""
    s = b.shared
    assert s is not None
    one = T.const(0)
    m = ExpertsMatch(o.experts, s.node, b.match.tokens, one, T.const(1), b.match.t, one, 1, o.operands)
    out, operands, gate = planner.alone(m, o.gate)
    return ExpertsPlan(
        out=out.name,
        same_tensor=tuple(n.name for n in planner.aliases(s.node)),
        tokens=planner.locate(m.tokens, s.node).name,
        ids=None,
        weights=None if gate is None else gate.name,
        constant=1.0,
        k=1,
        operands=operands,
        base=None,
        experts=o.experts,
        lead=planner.lead(m),
        only=True,
    )
