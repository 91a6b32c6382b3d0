"""The compilations of this process: which report a graph belongs to, and what was compiled of each model."""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import nn

from .findings import GraphBreak
from .ir import Rejection
from .kinds import Layer, alike
from .reported import Report, graph_break_of, skipped_frame
from .versions import Versions, modules_traced, tells


class _SkippedFrames:
    """Frames Dynamo gave up on entirely: no graph tells of them, only its counters (one key per message) do."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def new(self) -> list[GraphBreak]:
        found, self.seen = self.since()
        return found

    @contextmanager
    def of_others(self) -> Iterator[None]:
        """What Dynamo gives up on meanwhile is another backend's, and none of our reports tells of it."""
        before = self._now()
        try:
            yield
        finally:
            self.seen += self._now() - before

    def since(self) -> tuple[list[GraphBreak], Counter[str]]:
        """Those that were not told yet, and all that there are."""
        now = self._now()
        # after torch._dynamo.reset() the counters start from nothing
        fresh = [message for message, n in now.items() if n > self.seen[message] or n < self.seen[message]]
        # a frame that is tried again is given up again: told once
        frames = {b.source: b for b in map(skipped_frame, fresh) if b is not None}
        return list(frames.values()), now

    @staticmethod
    def _now() -> Counter[str]:
        from torch._dynamo.utils import counters

        return Counter(counters["unimplemented"])


@dataclass(frozen=True)
class _Call:
    """The outermost call of a compiled function that is under way in a thread, and whose model it is."""

    mark: object
    owner: Any


@dataclass(frozen=True)
class _Parts:
    """What was compiled of one module, by the frames of its code."""

    of: weakref.ref[Any]
    parts: dict[Any, Versions]


class _Thread(threading.local):
    """What one thread is compiling: the call under way, its report, and its root if that is one graph: the frame's id and whose it is."""

    report: Report | None = None
    call: object = None
    root: tuple[Any, frozenset[int]] | None = None
    collecting: Report | None = None
    part: Report | None = None


class _Store:
    """Groups graphs into compilations. A model that Dynamo cuts into pieces is one compilation of several graphs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last: Report | None = None
        self.skipped = _SkippedFrames()
        self.mine = _Thread()
        # model -> what came of each frame of its code, in the versions that it was compiled in
        self.models: weakref.WeakKeyDictionary[Any, dict[Any, Versions]] = weakref.WeakKeyDictionary()
        # the same by a module's class, newest last; a module that is gone has left its code
        self.kinds: weakref.WeakKeyDictionary[type, list[_Parts]] = weakref.WeakKeyDictionary()

    def report_for(self, gm: torch.fx.GraphModule | None) -> Report:
        """The report that a graph (or a frame that gave none) belongs to; a new one if it starts a compilation."""
        mine, call, compile_id = self.mine, _current_call(), _compile_id()
        mark = None if call is None else call.mark
        if mine.collecting is not None:
            mine.report = mine.collecting
        elif mine.report is None or mark is None or mark is not mine.call or self._restarts(compile_id):
            mine.report = Report()
            whole = compile_id is not None and gm is not None and graph_break_of(gm) is None
            mine.root = (compile_id[0], modules_traced()) if compile_id is not None and whole else None
        mine.call, self.last = mark, mine.report
        return mine.report

    def _restarts(self, compile_id: tuple[Any, int] | None) -> bool:
        """A whole-model graph that is compiled again (other shapes, after a reset) starts a new compilation; another layer's version of
        the same code does not."""
        root = self.mine.root
        return compile_id is not None and root is not None and (compile_id[0], modules_traced()) == root

    def keep(self, part: Report) -> None:
        """Note a part among those of the model that is being called, beside the other versions of the same code."""
        call, compile_id = _current_call(), _compile_id()
        if call is None or call.owner is None:
            return
        with self.lock:
            parts = self.models.setdefault(call.owner, {})
            parts.setdefault(compile_id[0] if compile_id is not None else None, Versions()).add(part)
            others = [p for p in self.kinds.get(type(call.owner), ()) if p.of() is not None and p.of() is not call.owner]
            self.kinds[type(call.owner)] = [*others, _Parts(weakref.ref(call.owner), parts)]

    def of(self, model: Any) -> Report | None:
        """Everything that was compiled of a model and of its parts. Parts that run what was compiled for another one of their class, as
        equal layers that are compiled one by one do, count as that one."""
        owners = list(model.modules()) if isinstance(model, nn.Module) else [model]
        compiled = {id(getattr(o, "_orig_mod", None)) for o in owners} | {id(o) for o in owners if getattr(o, "_compiled_call_impl", None)}
        places = {id(m): _place(path) for path, m in model.named_modules()} if isinstance(model, nn.Module) else {}
        with self.lock:
            found = [self.models.get(o) or (self._of_its_kind(o, places) if id(o) in compiled else None) or {} for o in owners]
            parts = [p for f in found for versions in f.values() for p in versions.told()]
        if not parts:
            return None
        report = Report()
        for p in parts:
            report.add(p)
        return report

    def _of_its_kind(self, module: nn.Module, places: dict[int, int]) -> dict[Any, Versions] | None:
        """The parts of a module that has none of its own: those of one that is alike, or what all of its class have in common. None where
        they differ, so that nobody knows which of them it runs."""
        others = self.kinds.get(type(module)) or []
        if not others or all(tells(p.parts) == tells(others[0].parts) for p in others):
            return others[-1].parts if others else None
        own = Layer("", places.get(id(module), 0), module)
        live = ((p.of(), p.parts) for p in others)
        return next((parts for m, parts in live if m is not None and alike(Layer("", places.get(id(m), 0), m), own)), None)

    def breaks(self, gm: torch.fx.GraphModule | None) -> list[GraphBreak]:
        with self.lock:
            cut = graph_break_of(gm) if gm is not None else None
            return ([cut] if cut else []) + self.skipped.new()


_store = _Store()


def _place(path: str) -> int:
    """A layer's number in the list that holds it; 0 outside of lists."""
    last = path.removesuffix("._orig_mod").rpartition(".")[2]
    return int(last) if last.isdigit() else 0


def _compile_id() -> tuple[Any, int] | None:
    current = torch._guards.CompileContext.current_compile_id()
    return None if current is None or current.frame_compile_id is None else (current.frame_id, current.frame_compile_id)


def _current_call() -> _Call | None:
    """Identifies the outermost call of a compiled function that is under way in this thread.

    Dynamo has no such id. Its outermost wrapper frame lives exactly as long as the call, so a mark is laid among that frame's locals. (The
    frame's address would not do: the next call's frame may get the same one.)
    """
    outermost: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("eval_frame.py") and "fn" in frame.f_code.co_freevars:
            outermost = frame
        frame = frame.f_back
    if outermost is None:
        return None
    fn = outermost.f_locals.get("fn")
    return _Call(outermost.f_locals.setdefault("moe_compile call", object()), _owner(fn))


def _owner(fn: Any) -> Any:
    """Whose code a compiled function is: the module that it is a method of, or the function itself."""
    for _ in range(8):
        if isinstance(fn, types.MethodType):
            fn = fn.__self__
        if isinstance(fn, nn.Module) or not isinstance(fn, types.FunctionType):
            break
        fn = getattr(fn, "moe_compile_calls", None) or getattr(fn, "__wrapped__", None) or fn
    return fn if isinstance(fn, (nn.Module, types.FunctionType)) else None


@contextmanager
def filling(part: Report) -> Iterator[None]:
    """A graph is being compiled, and `part` is what is told of it."""
    before, _store.mine.part = _store.mine.part, part
    try:
        yield
    finally:
        _store.mine.part = before


def remark(notes: Sequence[str]) -> None:
    """What a target has to say, while a graph is compiled or later."""
    for report in (_store.mine.part, None if _store.mine.part is not None else _store.mine.report):
        if report is not None:
            report.add_notes(notes)


def add(part: Report, gm: torch.fx.GraphModule | None) -> None:
    """Put what was found in a graph, which is compiled now, where `last_report` finds it. None: of a frame that gave no graph."""
    part.graph_count = 0 if gm is None else 1
    part.add_breaks(_store.breaks(gm))
    _store.report_for(gm).add(part)
    _store.keep(part)


def told_before(gm: torch.fx.GraphModule) -> list[Rejection]:
    """What was left as written in the graphs and frames of the same compilation that came before this graph."""
    return list(_store.report_for(gm).rejected)


def of_others() -> AbstractContextManager[None]:
    """While a frame is compiled for another backend."""
    return _store.skipped.of_others()


def untold() -> bool:
    """Whether Dynamo gave up on a frame of which no graph told."""
    return bool(_store.skipped.since()[0])


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
        report.add_breaks(_store.breaks(None))
        _store.last = report


def explaining() -> bool:
    """Whether what this thread compiles is compiled to be told about (`collecting`), not to be run."""
    return _store.mine.collecting is not None


def last_report(model: Callable[..., Any] | None = None) -> Report | None:
    """The report of the most recent compilation in this process; None before the first.

    model: everything that was compiled of this module or function and of its parts, each piece of code in all the versions that differ in
    what they fuse or leave. That is what tells of regional compilation, of a model that was cut into many graphs, or of several models.
    None if nothing was.
    """
    return _store.last if model is None else _store.of(_owner(original(model)))


def original(model: Any) -> Any:
    """The model inside what torch.compile returned."""
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        inner = getattr(model, name, None)
        if callable(inner):
            return inner
    return model
