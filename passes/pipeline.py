"""The way through the passes, which are values in a list behind one wrapper. `run` is what the backend calls."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from ..ir import Rejection
from . import steps, trace
from . import terms as T
from .aten.conditions import no_saving_hooks
from .aten.own_gradients import opened
from .aten.spelled import spell
from .aten.wrapped import unwrapped
from .recorded import recover_recorded as recover_recorded
from .recover.glance import places
from .recover.odd import explained
from .rewrite import overlap, recall
from .rewrite.target import Target
from .terms import unify
from .terms.budget import BUDGET, deep_recursion
from .work import Candidate, Outcome, Recovered, Work

__all__ = ["PASSES", "Outcome", "Pass", "Recovered", "recover_recorded", "run"]


@dataclass(frozen=True)
class Pass:
    """One pass: of the whole graph (`run`), or of each block that is left (`each`: the block goes on as what comes back, and no further
    where Rejection is raised). `says`: what it does, in a line. `proves`: its time counts as validation.
    """

    name: str
    says: str
    run: Callable[[Work], None] | None = None
    each: Callable[[Work, Candidate], Candidate] | None = None
    proves: bool = False

    def __call__(self, work: Work) -> None:
        with _timed(work.out.seconds, self.name, "validate" if self.proves else ""), trace.stage(self.name, self.says, work) as seen:
            if self.run is not None:
                self.run(work)
                return
            work.candidates = [c for before in work.candidates if (c := self._one(work, before, seen)) is not None]

    def _one(self, work: Work, c: Candidate, seen: trace.Stage | None) -> Candidate | None:
        assert self.each is not None
        with trace.entry(seen, c) as entry:
            try:
                out = self.each(work, c)
            except (Rejection, T.TooLarge) as e:
                r = explained(c.match, work.shadow.walls, e if isinstance(e, Rejection) else Rejection(str(e), c.match.out, code=BUDGET))
                work.reject([r])
                entry.refused(work.out.rejected[-1])
                return None
            entry.became(out)
            return out


SEARCH = (
    Pass("shadow", "the graph once more, as ATen ops that can be read element by element", run=steps.shadow),
    Pass("find", "experts at every node that could be their combined result: what is one element of it?", run=steps.find),
    Pass("assemble", "the routing that made ids and weights, the shared expert, the tensors at the boundary", each=steps.assemble),
    Pass("lower", "whether the target has kernels for this meaning", each=steps.lower),
    Pass("prove", "the formulas hold on probes, run against the user's own operations", each=steps.hold, proves=True),
    Pass("plan", "which nodes of the captured graph become which fused ops", each=steps.plan),
    Pass("emit", "what the plan emits, run against the user's own operations", each=steps.emit, proves=True),
    Pass("share", "the shared expert goes into the op where that is wanted, and proved", each=steps.share, proves=True),
    Pass("keep", "what is told of the block", each=steps.keep),
)
REWRITE = Pass("rewrite", "the plans, carried out on the captured graph", run=steps.rewrite)
PASSES = (*SEARCH, REWRITE)


@contextmanager
def _timed(seconds: dict[str, float], *names: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        for name in filter(None, names):
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def run(gm: fx.GraphModule, options: Any, target: Target) -> Outcome:
    """Recover, prove and replace every MoE block of a Dynamo graph, in place. What is not proved stays as it is.

    `options`: `moe_compile.options.Options`; `target`: the `Target` that lowers it. Raises nothing that a user's model can cause.
    """
    out, told = Outcome(), set[fx.Node]()
    for body, calls in bodies(gm).items():
        found = run(body, options.with_(overlap_shared=False), target)
        told |= calls if any(b.ir.gating is None for b in found.blocks) else set()
        out.add(found)
    seen = places(gm.graph)
    if not seen:
        return out
    spell(gm)
    with trace.unit(gm), unwrapped(gm), opened(gm):
        work = Work(gm, options, target, seen)
        _searched(work)
        for b in work.out.blocks:
            for ir in filter(None, (b.ir, b.own)):
                target.begin(ir)
        REWRITE(work)
    # selections whose experts alone stand in a checkpoint's own graph are told there, and not again at its call
    work.out.rejected = [r for r in work.out.rejected if r.code != "opaque" or r.node not in told]
    out.add(work.out)
    return out


def _searched(work: Work) -> None:
    """Plans, blocks and rejections: those of an equal graph, or what the passes find; a trace shows the passes themselves."""
    gm, options, target = work.gm, work.options, work.target
    with _timed(work.out.seconds, "recall"):
        how = (bool(options.validate), options.activations, overlap.mode(gm.graph, options, target))
        key = recall.key_of(gm.graph, (target.name, target.digest, target.machine(), *how))
        if not trace.on() and work.recall(recall.load(key)):
            return
    with deep_recursion(), no_saving_hooks(), _no_collector(), T.limited(len(work.seen.chosen)) as limit:
        _fresh_terms()
        try:
            for p in SEARCH:
                p(work)
        except T.TooLarge as e:  # in a pass over the whole graph
            work.candidates = []
            work.reject([Rejection(str(e), work.seen.first(), "budget")])
        _fresh_terms()
    if not limit.over:  # what another machine, or this one on another day, may have time for is not kept
        recall.save(key, work.kept)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Terms are many small objects without cycles, bounded in number: looking for garbage among them would take a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _fresh_terms() -> None:
    T.reset()
    unify.reset()


def bodies(gm: fx.GraphModule) -> dict[fx.GraphModule, set[fx.Node]]:
    """Graphs inside this one that are called by a checkpoint (the same code, run once more in the backward pass), with the calls."""
    found: dict[fx.GraphModule, set[fx.Node]] = {}
    for n in gm.graph.nodes:
        body = getattr(gm, str(n.target), None) if n.op == "get_attr" else None
        calls = {u for u in n.users if "checkpoint" in str(u.target)}
        if isinstance(body, fx.GraphModule) and calls:
            found.setdefault(body, set()).update(calls)
    return found
