"""What the passes hand on: the work on one graph, and each block on its way through it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch.fx as fx

from ..ir import MoeBlock, Rejection
from .aten.element import Puller
from .aten.shadow import Shadow
from .aten.sources import source_of
from .recover.glance import Places
from .recover.match import ExpertsMatch
from .recover.region import Block
from .rewrite import recall
from .rewrite.plan import BlockPlan
from .rewrite.planner import Planner
from .rewrite.target import Target


@dataclass
class Recovered:
    """One fused block. `source`: file:line of the user's code; `note`: what was left as written inside it.

    `overlapped`: the shared expert is in the op, which may run it beside the routed experts. `own`: the shared expert in few bits as a
    block of one expert, where an op of its own runs it.
    """

    ir: MoeBlock
    source: str
    validated: bool
    lowering: str
    note: str = ""
    overlapped: bool = False
    own: MoeBlock | None = None


@dataclass
class Outcome:
    """What came of a graph. `seconds`: by the name of a pass; "validate" is the time of those that prove something."""

    blocks: list[Recovered] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: Outcome) -> None:
        self.blocks.extend(part.blocks)
        self.rejected.extend(part.rejected)
        for name, spent in part.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


def _names(v: Any) -> Any:
    if isinstance(v, dict):
        return {k: _names(x) for k, x in v.items()}
    return v.name if isinstance(v, fx.Node) else [_names(x) for x in v] if isinstance(v, list) else v


def _bare(r: Rejection, node: fx.Node | None = None) -> Rejection:
    return Rejection(r.reason, node, r.stage, r.source, code=r.code, part=r.part)


@dataclass(frozen=True)
class Candidate:
    """A block on its way: its experts, what they were read with, then all of it, then how it is rewritten, then what is told of it.

    `stays`: why its shared expert in few bits runs as written.
    """

    match: ExpertsMatch
    puller: Puller
    found: Block | None = None
    how: BlockPlan | None = None
    told: Recovered | None = None
    stays: str = ""

    @property
    def block(self) -> Block:
        assert self.found is not None
        return self.found

    @property
    def plan(self) -> BlockPlan:
        assert self.how is not None
        return self.how


@dataclass
class Work:
    """One Dynamo graph, and what the passes made of it so far.

    `options`: `moe_compile.options.Options`; `target`: whose kernels do it; `seen`: where something is selected, perhaps.
    """

    gm: fx.GraphModule
    options: Any
    target: Target
    seen: Places
    out: Outcome = field(default_factory=Outcome)
    candidates: list[Candidate] = field(default_factory=list)
    plans: list[BlockPlan] = field(default_factory=list)
    read: Shadow | None = None
    plans_with: Planner | None = None

    @property
    def shadow(self) -> Shadow:
        assert self.read is not None
        return self.read

    @property
    def planner(self) -> Planner:
        if self.plans_with is None:
            self.plans_with = Planner(self.shadow)
        return self.plans_with

    def kept(self) -> tuple[Any, ...]:
        """Plans, blocks and rejections without graph nodes, for an equal graph that other code may have made."""
        graph = self.gm.graph
        blocks = [(replace(b, ir=replace(b.ir, boundary=_names(b.ir.boundary))), recall.anchor(b.source, graph)) for b in self.out.blocks]
        calls = map(self._captured, self.out.rejected)
        return recall.lines(graph), self.plans, blocks, [*zip(map(_bare, self.out.rejected), calls, strict=True)]

    def _captured(self, r: Rejection) -> str | None:
        """The node of the captured graph that a rejection is about, or whose operation it is: its calls tell which loop holds it."""
        origin = () if self.read is None else self.read.origin.get(r.node, ())
        captured = [n for n in (r.node, *origin) if isinstance(n, fx.Node) and n.graph is self.gm.graph]
        return next((n.name for n in captured if source_of(n) == r.source), captured[0].name if captured else None)

    def recall(self, kept: tuple[Any, ...] | None) -> bool:
        """Take over what was kept, with this graph's own lines. What was left as written is told in the words of the code that it was
        found in: other code is looked at anew."""
        if kept is None:
            return False
        lines, plans, blocks, rejected = kept
        same = lines == recall.lines(self.gm.graph)
        if rejected and not same:
            return False
        named = {n.name: n for n in self.gm.graph.nodes}
        self.plans, self.out.rejected = plans, [_bare(r, named.get(call)) for r, call in rejected]
        self.out.blocks = [b if same else replace(b, source=recall.source_at(at, self.gm.graph)) for b, at in blocks]
        return True

    def reject(self, rejected: Iterable[Rejection]) -> None:
        self.out.rejected.extend(located(r, self.read) for r in rejected)


def located(r: Rejection, shadow: Shadow | None) -> Rejection:
    """The rejection with the line of the user's code that it is about."""
    n = r.node
    if shadow is not None and n in shadow.transformed:
        r = Rejection("a transform of torch.func (vmap, grad, jvp, ...) is on around it", n, r.stage, code="transform")
    if not r.source and isinstance(n, fx.Node):
        origin = () if shadow is None else shadow.origin.get(n, ())
        r.source = source_of(n) or next((source_of(d) for d in origin if source_of(d)), "")
    if shadow is not None and n in shadow.inside:
        r.node = shadow.inside[n]  # the call stands in the captured graph
    return r
