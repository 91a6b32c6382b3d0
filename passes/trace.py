"""What each pass was given, made and refused, as text, while somebody wants to know. `moe_compile.trace` shows it.

Nothing is recorded, and nothing costs anything, outside of `collecting()`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
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
    """One thing that a pass looked at: a node, a block or the whole graph. `refused`: the first predicate that failed, "" if none did."""

    title: str
    source: str = ""
    before: str = ""
    after: str = ""
    refusal: str = ""
    notes: list[str] = field(default_factory=list)
    shows: Any = None

    def became(self, c: Candidate) -> None:
        self.after = self.shows(c)

    def refused(self, r: Rejection) -> None:
        self.refusal, self.source = r.reason, r.source or self.source


@dataclass
class Stage:
    """One pass over one graph. `rules`: how often each rule fired; `skipped`: reasons of places where nothing looked like experts."""

    name: str
    says: str
    entries: list[Entry] = field(default_factory=list)
    rules: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


@dataclass
class Unit:
    """One graph, or one loop that was read by example."""

    title: str
    stages: list[Stage] = field(default_factory=list)
    refusal: str = ""

    def ends(self, refusal: Rejection | None) -> None:
        self.refusal = "" if refusal is None else refusal.reason


@dataclass
class Trace:
    units: list[Unit] = field(default_factory=list)

    def stage_names(self) -> list[str]:
        return list(dict.fromkeys(s.name for u in self.units for s in u.stages))


class _Now(threading.local):
    trace: Trace | None = None
    unit: Unit | None = None
    stage: Stage | None = None
    entry: Entry | None = None


_now = _Now()
_NOBODY = Entry("")
_NOBODY.shows = lambda c: ""


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


@contextmanager
def loop(gm: fx.GraphModule) -> Iterator[Unit]:
    """A recorded function."""
    if _now.trace is None:
        yield Unit("")
        return
    where = next((s for n in gm.graph.nodes if (s := source_of(n))), "")
    with _within(Unit(f"a loop read by example {where}".rstrip())) as u, _staged(Stage("record", "what the loop does on probes")) as s:
        s.entries.append(Entry("recorded operations", where, after=shown.graph(gm.graph.nodes)))
        yield u


@contextmanager
def _staged(stage: Stage) -> Iterator[Stage]:
    assert _now.unit is not None
    _now.unit.stages.append(stage)
    before, _now.stage = _now.stage, stage
    try:
        with T.tracing() as t:
            yield stage
        stage.rules += t.fired
    finally:
        _now.stage = before


@contextmanager
def stage(name: str, says: str, work: Work) -> Iterator[Stage | None]:
    """One pass. Passes of the whole graph show the graph; those of blocks have an entry for each (`entry`)."""
    if _now.unit is None:
        yield None
        return
    before = shown.graph(work.gm.graph.nodes) if name in _GRAPHS else ""
    with _staged(Stage(name, says)) as s:
        yield s
    s.seconds = work.out.seconds.get(name, 0.0)
    if name in _GRAPHS:
        after = work.shadow.graph if name == "shadow" else work.gm.graph
        s.entries.append(Entry("the whole graph", "", before, shown.graph(after.nodes)))


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
    if _now.entry is None:
        return
    for c in found:
        kinds, parts = ", ".join(k.name for k in c.kinds), len(c.region.nodes)
        gradients = f", gradients of {len(c.leaves)} tensors" if c.leaves else ""
        holds = refusal is None or refusal.part != c.part
        _now.entry.notes.append(f"claim: {c.part}, {parts} operations, probes {kinds}{gradients}: {'holds' if holds else 'does not hold'}")
        if not holds:
            break


def finder(*args: Any, **kwargs: Any) -> Finder:
    """What looks for experts, watched where somebody wants to know."""
    return Finder(*args, **kwargs) if _now.stage is None else _Watched(_now.stage, *args, **kwargs)


class _Watched(Finder):
    """A finder that notes each node it tried: what it read, the element it came to, and the first predicate that failed."""

    def __init__(self, stage: Stage, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage = stage

    def _match(self, n: fx.Node, p: Puller, label: int) -> ExpertsMatch | Rejection:
        out = super()._match(n, p, label)
        if isinstance(out, Rejection) and out.code == NO_EXPERTS:
            self.stage.skipped[out.reason] += 1
            return out
        name, term = shown.element(n, p)
        e = Entry(f"{name} of {code_of(n) or n.name}", source_of(n), shown.graph(shown.read(p, n)), f"{name} =\n{term}")
        if isinstance(out, Rejection):
            e.refused(out)
        else:
            e.notes.append(shown.match(out))
        self.stage.entries.append(e)
        return out
