"""What each pass was given, made and refused, as text, while somebody wants to know. `moe_compile.trace` shows it.

Nothing is recorded, and nothing costs anything, outside of `collecting()`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from ..ir import Rejection
from . import shown
from . import terms as T
from .aten.element import Puller
from .aten.sources import code_of, source_of
from .prove.engine import Claim
from .recover.find import Finder
from .recover.match import ExpertsMatch
from .recover.rows import NO_EXPERTS
from .work import Candidate, Work


@dataclass
class Entry:
    """One thing that a pass looked at: a node, a block or the whole graph. `refusal`: the first predicate that failed, "" if none did.

    `before`, `after`: what the pass was given and what it made; `changes`: they are two states of one graph.
    """

    title: str
    source: str = ""
    before: str = ""
    after: str = ""
    refusal: str = ""
    notes: list[str] = field(default_factory=list)
    changes: bool = False
    shows: Callable[[Candidate], str] = lambda c: ""

    def became(self, c: Candidate) -> None:
        self.after = self.shows(c)

    def refused(self, r: Rejection) -> None:
        self.refusal, self.source = r.reason, r.source or self.source


@dataclass
class Stage:
    """One pass over one graph. `rules`: how often each rule fired; `skipped`: reasons of places where nothing looked like experts.

    `refusals`: (first predicate that failed, line of the user's code) of each place that got no further.
    """

    name: str
    says: str
    entries: list[Entry] = field(default_factory=list)
    rules: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Unit:
    """One graph, or one loop that was read by example. `source`: the loop's line in the user's code."""

    title: str
    source: str = ""
    stages: list[Stage] = field(default_factory=list)


@dataclass
class Trace:
    units: list[Unit] = field(default_factory=list)


class _Now(threading.local):
    trace: Trace | None = None
    unit: Unit | None = None
    stage: Stage | None = None
    entry: Entry | None = None


_now = _Now()
_NOBODY = Entry("")


def on() -> bool:
    """Whether this thread's passes are being traced."""
    return _now.trace is not None


@contextmanager
def collecting() -> Iterator[Trace]:
    """Trace what this thread compiles inside the block."""
    before, _now.trace = _now.trace, Trace()
    try:
        yield _now.trace
    finally:
        _now.trace = before


@contextmanager
def _within(unit: Unit) -> Iterator[Unit]:
    assert _now.trace is not None
    _now.trace.units.append(unit)
    before, _now.unit = _now.unit, unit
    try:
        yield unit
    finally:
        _now.unit = before


def unit(gm: fx.GraphModule) -> Any:
    """The passes over one graph of Dynamo's."""
    if _now.trace is None:
        return nullcontext()
    number = sum(u.title.startswith("graph") for u in _now.trace.units) + 1
    return _within(Unit(f"graph {number}, {len(gm.graph.nodes)} nodes"))


def loop(gm: fx.GraphModule) -> Any:
    """A loop that is read by example: the passes over what it did on probes."""
    if _now.trace is None:
        return nullcontext()
    where = next((s for n in gm.graph.nodes if (s := source_of(n))), "")
    operations = Entry("operations of the loop", where, after=shown.graph(gm.graph.nodes))
    return _within(Unit("a loop, read by example", where, [Stage("record", "what the loop does on probes", [operations])]))


@contextmanager
def phase(name: str, says: str) -> Iterator[None]:
    """One pass over a loop's operations; a Rejection that leaves it is its refusal."""
    if _now.unit is None:
        yield
        return
    with _staged(Stage(name, says)) as s:
        try:
            yield
        except Rejection as r:
            s.refusals.append((r.reason, r.source))
            raise


@contextmanager
def _staged(new: Stage) -> Iterator[Stage]:
    assert _now.unit is not None
    _now.unit.stages.append(new)
    before, _now.stage = _now.stage, new
    start = time.perf_counter()
    try:
        with T.tracing() as t:
            yield new
    finally:
        new.rules += t.fired
        new.seconds = time.perf_counter() - start
        _now.stage = before


@contextmanager
def stage(name: str, says: str, work: Work) -> Iterator[Stage | None]:
    """One pass. Passes of the whole graph show the graph; those of blocks have an entry for each (`entry`)."""
    if _now.unit is None:
        yield None
        return
    before, known = shown.graph(work.gm.graph.nodes) if name in _GRAPHS else "", len(work.out.rejected)
    with _staged(Stage(name, says)) as s:
        yield s
    s.refusals += [(r.reason, r.source) for r in work.out.rejected[known:]]
    if name in _GRAPHS:
        after = work.shadow.graph if name == "shadow" else work.gm.graph
        s.entries.append(Entry("the whole graph", "", before, shown.graph(after.nodes), changes=name != "shadow"))


_GRAPHS = ("shadow", "rewrite")
_SHOWS = {
    "assemble": lambda c: shown.match(c.match) if c.found is None else shown.block(c.found),
    "lower": lambda c: shown.block(c.block),
    "prove": lambda c: shown.block(c.block),
    "plan": lambda c: shown.block(c.block) if c.how is None else shown.plan(c.how),
    "emit": lambda c: shown.plan(c.plan),
    "share": lambda c: shown.plan(c.plan),
    "keep": lambda c: "" if c.told is None else f"{c.told.lowering}\n{c.told.note}".rstrip(),
}


@contextmanager
def entry(s: Stage | None, c: Candidate) -> Iterator[Entry]:
    """One block in a pass over blocks."""
    if s is None:
        yield _NOBODY
        return
    n, shows = c.match.out, _SHOWS[s.name]
    e = Entry(code_of(n) or n.name, source_of(n), shows(c), shows=shows)
    s.entries.append(e)
    before, _now.entry = _now.entry, e
    try:
        yield e
    finally:
        _now.entry = before


def claims(found: Sequence[Claim], refusal: Rejection | None) -> None:
    """Note which claims were run on which probes."""
    if _now.stage is None:
        return
    notes = _now.entry.notes if _now.entry is not None else _noted(_now.stage)
    for c in found:
        kinds, parts = ", ".join(k.name for k in c.kinds), len(c.region.nodes)
        gradients = f", gradients of {len(c.leaves)} tensors" if c.leaves else ""
        holds = refusal is None or refusal.part != c.part
        notes.append(f"claim: {c.part}, {parts} operations, probes {kinds}{gradients}: {'holds' if holds else 'does not hold'}")
        if not holds:
            break


def _noted(s: Stage) -> list[str]:
    s.entries.append(Entry("the block"))
    return s.entries[-1].notes


def finder(*args: Any, **kwargs: Any) -> Finder:
    """What looks for experts, watched where somebody wants to know."""
    return Finder(*args, **kwargs) if _now.stage is None else _Watched(_now.stage, *args, **kwargs)


class _Watched(Finder):
    """A finder that notes each node it tried: what it read, the element it came to, and the first predicate that failed.

    It is written down after the search has paid for its steps, from what the search remembers: being watched changes no verdict.
    """

    def __init__(self, seen: Stage, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage, self.tried = seen, list[Puller]()

    def _match(self, n: fx.Node, p: Puller, label: int) -> ExpertsMatch | Rejection:
        self.tried.append(p)
        return super()._match(n, p, label)

    def _attempt(self, n: fx.Node, label: int) -> tuple[ExpertsMatch, Puller] | Rejection:
        out = super()._attempt(n, label)
        p = self.tried.pop()
        if isinstance(out, Rejection) and out.code == NO_EXPERTS:
            self.stage.skipped[out.reason] += 1
            return out
        name, term = shown.element(n, p)
        e = Entry(f"{name} of {code_of(n) or n.name}", source_of(n), shown.graph(shown.read(p, n)), f"{name} =\n{term}" if term else "")
        e.notes += [f"not looked into: {x.name}: {why}" for x, why in p.unknown.items()]
        if isinstance(out, Rejection):
            e.refused(out)
        else:
            e.notes.append(shown.match(out[0]))
        self.stage.entries.append(e)
        return out
