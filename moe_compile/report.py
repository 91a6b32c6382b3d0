"""What the compiler did, as data: one `Report` per compilation, kept for `last_report()` and collected by `explain()`."""

from __future__ import annotations

import ast
import dataclasses
import linecache
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch

from .findings import BlockReport, Findings, GraphBreak
from .ir import MoeBlock, Rejection
from .ir.text import experts_text, formula, shared_text
from .table import render


class RecoveredLike(Protocol):
    """One block as the passes hand it over (`moe_compile.passes.pipeline.Recovered`)."""

    ir: MoeBlock
    source: str
    validated: bool
    lowering: str
    note: str


@dataclass
class Report(Findings):
    """What one compilation found, filled graph by graph; `str()` is a table, `to_dict()` is JSON-ready."""

    def __str__(self) -> str:
        return render(self)

    # -- filled by the backend ------------------------------------------------------------------------------------------

    def add_blocks(self, recovered: Iterable[RecoveredLike], target: str) -> None:
        """Take over what the passes recovered; graph nodes become their names, so that no graph is kept alive."""
        for r in recovered:
            ir = dataclasses.replace(r.ir, boundary={k: _names(v) for k, v in r.ir.boundary.items()})
            self.blocks.append(
                BlockReport(
                    ir=ir,
                    formula=formula(ir.gating) if ir.gating is not None else f"as written: {ir.routing_note or 'routing not recovered'}",
                    experts=experts_text(ir.experts),
                    shared=shared_text(ir.shared) + (", overlapped" if getattr(r, "overlapped", False) else ""),
                    target=target,
                    lowering=r.lowering,
                    validated=r.validated,
                    source=r.source,
                    note=r.note,
                )
            )

    def add_rejected(self, rejected: Iterable[Rejection]) -> None:
        """Take over rejections without the graph nodes they point at."""
        self.rejected.extend(Rejection(r.reason, None, r.stage, r.source) for r in rejected)

    def add_seconds(self, seconds: dict[str, float]) -> None:
        for k, v in seconds.items():
            self.seconds[k] = self.seconds.get(k, 0.0) + v

    def add_notes(self, notes: Iterable[str]) -> None:
        """What a target has to say; every remark once."""
        self.notes.extend(n for n in dict.fromkeys(notes) if n not in self.notes)

    def add_breaks(self, breaks: Iterable[GraphBreak]) -> None:
        """Layers share code, so the same break comes again for each of them: told once."""
        self.graph_breaks.extend(b for b in dict.fromkeys(breaks) if b not in self.graph_breaks)


def _names(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_names(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def same_function(definition: str, source: str) -> bool:
    """Whether file:line `source` lies in the body of the function defined (or decorated) at file:line `definition`."""
    path, _, first = definition.rpartition(":")
    other, _, line = source.rpartition(":")
    if path != other or not first.isdigit() or not line.isdigit():
        return False
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except SyntaxError:
        return False
    for f in ast.walk(tree):
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = min([f.lineno, *(d.lineno for d in f.decorator_list)])
            if start <= int(first) <= f.body[0].lineno and f.lineno <= int(line) <= (f.end_lineno or 0):
                return True
    return False


# -- graph breaks -----------------------------------------------------------------------------------------------------------


def graph_break_of(gm: torch.fx.GraphModule) -> GraphBreak | None:
    """Why Dynamo ended this graph, if it was a break.

    Read from the graph itself: Dynamo's own counters miss the breaks that come from data-dependent sizes.
    """
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    stack = list(why.user_stack or [])
    # "step_unsupported" is Dynamo's word for "the rest of this frame runs in Python"
    reason = "the frame is left to Python from here on" if why.reason == "step_unsupported" else _headline(why.reason)
    return GraphBreak(reason, f"{stack[-1].filename}:{stack[-1].lineno}" if stack else "")


def _headline(reason: str) -> str:
    """Dynamo's title and explanation on one line, without hints and links."""
    lines = [line.strip() for line in reason.split("\n\n")[0].splitlines() if line.strip()]
    kept = [lines[0]] + [line.removeprefix("Explanation: ") for line in lines[1:] if line.startswith("Explanation:")]
    return ": ".join(kept)


class _SkippedFrames:
    """Frames Dynamo gave up on entirely: no graph tells of them, only its counters (one key per message) do."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def new(self) -> list[GraphBreak]:
        from torch._dynamo.utils import counters

        now = Counter(counters["unimplemented"])
        # after torch._dynamo.reset() the counters start from nothing
        fresh = [message for message, n in now.items() if n > self.seen[message] or n < self.seen[message]]
        self.seen = now
        return [b for b in map(_skipped_frame, fresh) if b is not None]


def _skipped_frame(message: str) -> GraphBreak | None:
    marker = "frame skipped: "
    if marker not in message:
        return None
    where = message.split(marker, 1)[1].split("\n", 1)[0]  # "forward (/path/file.py line 523)"
    name, _, place = where.partition(" (")
    path, _, line = place.rstrip(")").rpartition(" line ")
    return GraphBreak(f"{name} holds a break inside a loop: it runs in plain Python, nothing in it is compiled", f"{path}:{line}")


# -- the last compilation of this process -----------------------------------------------------------------------------------


class _Thread(threading.local):
    """What one thread is compiling: the call under way, its report, and the id of its root graph if that is whole."""

    report: Report | None = None
    call: tuple[int, int] | None = None
    root: tuple[Any, int] | None = None
    collecting: Report | None = None


class _Store:
    """Groups graphs into compilations. A model that Dynamo cuts into pieces is one compilation of several graphs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last: Report | None = None
        self.skipped = _SkippedFrames()
        self.mine = _Thread()

    def report_for(self, gm: torch.fx.GraphModule) -> Report:
        """The report that this graph belongs to; a new one if it starts a compilation."""
        mine, call, compile_id = self.mine, _current_call(), _compile_id()
        if mine.collecting is not None:
            mine.report = mine.collecting
        elif mine.report is None or call is None or call != mine.call or self._restarts(compile_id):
            mine.report = Report()
            mine.root = compile_id if graph_break_of(gm) is None else None
        mine.call, self.last = call, mine.report
        return mine.report

    def _restarts(self, compile_id: tuple[Any, int] | None) -> bool:
        """A whole-model graph that is compiled again (other shapes, after a reset) starts a new compilation."""
        root = self.mine.root
        return compile_id is not None and root is not None and compile_id[0] == root[0]

    def record_breaks(self, report: Report, gm: torch.fx.GraphModule | None) -> None:
        with self.lock:
            cut = graph_break_of(gm) if gm is not None else None
            report.add_breaks(([cut] if cut else []) + self.skipped.new())


_store = _Store()


def _compile_id() -> tuple[Any, int] | None:
    current = torch._guards.CompileContext.current_compile_id()
    return None if current is None or current.frame_compile_id is None else (current.frame_id, current.frame_compile_id)


def _current_call() -> tuple[int, int] | None:
    """Identifies the outermost call of a compiled function that is under way in this thread.

    Dynamo has no such id. Its outermost wrapper frame lives exactly as long as the call; its address plus the wrapped
    function's is unique among calls under way and almost always between one call and the next.
    """
    outermost: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("eval_frame.py") and "fn" in frame.f_code.co_freevars:
            outermost = frame
        frame = frame.f_back
    return None if outermost is None else (id(outermost), id(outermost.f_locals.get("fn")))


def report_for(gm: torch.fx.GraphModule) -> Report:
    """The report to fill for the graph that is being compiled; also the one `last_report` returns from now on."""
    report = _store.report_for(gm)
    report.graph_count += 1
    _store.record_breaks(report, gm)
    return report


@contextmanager
def collecting() -> Iterator[Report]:
    """Gather everything this thread compiles inside the block into one report."""
    mine, report = _store.mine, Report()
    before, mine.collecting = mine.collecting, report
    with _store.lock:
        _store.skipped.new()  # what was skipped earlier is not part of this
    try:
        yield report
    finally:
        mine.collecting, mine.report, mine.call = before, None, None
        _store.record_breaks(report, None)
        _store.last = report


def explaining() -> bool:
    """Whether what this thread compiles is compiled to be told about (`collecting`), not to be run."""
    return _store.mine.collecting is not None


def current() -> Report | None:
    """The report of what this thread is compiling."""
    return _store.mine.report


def last_report() -> Report | None:
    """The report of the most recent compilation in this process; None before the first."""
    return _store.last
