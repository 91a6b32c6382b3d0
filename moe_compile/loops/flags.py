"""Static expert loops: ops whose output size depends on data stay in the graphs of frames that hold one, and of no others.

Two of Dynamo's own flags do that. They let sizes into a graph that no one knows at compile time; where Dynamo then has to assume something
of them that Python does not (that two of them are equal, for one of them might have been 1 and broadcast), the frame is compiled without.
"""

from __future__ import annotations

import operator
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from ..ir import Rejection
from .libraries import home, is_library
from .looks import ASKS, asks, compares, has_loop, selects
from .places import MISSING, of_class
from .sealed_code import codes

_SELECTS = {"topk", "argmax", "sort", "argsort", "one_hot", "bincount", "unique", "histc", "multinomial", "max", "kthvalue"}
_SCORES = {"softmax", "sigmoid", "relu"}
_CHOOSES = {"topk", "argmax", "sort", "argsort", "max"}
_OF_DATA = {"bincount", "grouped_mm", "_grouped_mm"}  # what counts ids, and products whose rows a mask may have picked
_TOLD = {"find", "lower", "internal"}  # what reading by example would not change: these stages, and what is said of the maths
# words of errors that sizes without a value cause, the last ones where an op takes no such number
_UNKNOWN = ("data-dependent", "data dependent", "unbacked", "Unbacked", "SymInt", "SymFloat", "SymBool")
MATHS = {"inside", "unlike", "capacity", "expert choice", "dense", "soft", "subclass", "in turn"}
_now = threading.local()


@dataclass
class Tried:
    """Functions whose reading was tried, and those of them that were left for Dynamo, which can do without a reading of theirs."""

    tried: set[types.CodeType] = field(default_factory=set)
    spared: set[types.CodeType] = field(default_factory=set)

    def for_good(self) -> set[types.CodeType]:
        """Those of which nothing else would come where Dynamo cannot do without."""
        return self.tried - self.spared


class Again(Exception):
    """The frame is to be compiled again: without the flags, or with whole blocks read by example."""


@contextmanager
def on(outer: Callable[[], frozenset[types.CodeType]] = frozenset, last: bool = False) -> Iterator[Tried]:
    """The flags, for a frame that is compiled inside. `outer`: whole blocks that may be read, though their loops are in other functions;
    last: they are what this time is for. Yields the functions that are `tried`, as it goes."""
    known = Tried()
    was, _now.state = getattr(_now, "state", None), (outer, last, known)
    try:
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
            yield known
    finally:
        _now.state = was


def blocks() -> frozenset[types.CodeType]:
    """The functions of whole blocks that are to be read this time."""
    outer, last, _ = getattr(_now, "state", None) or (frozenset, False, None)
    return outer() if last else frozenset()


def tried(code: types.CodeType) -> None:
    """Reading this function was tried: whatever came of it, it would come of it another time."""
    if (state := getattr(_now, "state", None)) is not None:
        state[2].tried.add(code)


def spared(code: types.CodeType) -> None:
    """This function was tried, and left for Dynamo to unroll: where it cannot, reading it may still do."""
    if (state := getattr(_now, "state", None)) is not None:
        state[2].spared.add(code)


def check(gm: fx.GraphModule, missed: Sequence[Rejection]) -> None:
    """Raise `Again` if a graph that has such sizes through our flags asserts what the user's code does not, or if whole blocks of its frame
    that were not tried yet may be read in place of what was `missed`."""
    outer, last, known = getattr(_now, "state", None) or (None, False, Tried())
    if outer is None:
        return
    if not last and any(r.stage not in _TOLD and r.code not in MATHS for r in missed) and outer() - known.tried:
        raise Again("whole blocks are read by example")
    for n in gm.graph.nodes:
        if n.target is torch.ops.aten._assert_scalar.default and _equates(n.args[0]):
            raise Again(str(n.args[1]))


def _equates(n: Any) -> bool:
    """Whether a condition sets one size equal to another, or to a number. Sums of sizes are those of a split, which Python asserts too."""
    if not isinstance(n, fx.Node) or n.target not in (operator.eq, operator.ne):
        return False
    return all(_sizes(side) <= 1 for side in n.args) and any(_sizes(side) for side in n.args)


def _sizes(n: Any) -> int:
    """How many sizes that depend on data a number is made of."""
    value = n.meta.get("example_value", n.meta.get("val")) if isinstance(n, fx.Node) else None
    symbols = value.node.expr.free_symbols if isinstance(value, torch.SymInt) else ()
    return sum(str(s).startswith("u") for s in symbols)


def wanted(code: types.CodeType, names: Mapping[str, Any], values: Iterable[Any]) -> bool:
    """Whether a frame of `code`, with the globals `names` and the locals and closure `values`, may reach an expert loop, or a selection
    beside an op that has as many counts as the data wants, or beside grouped products, whose rows a mask may pick."""
    if has_loop(code) and asks(code):
        return True
    found = list(reached(code, names, values))
    return _loops(found) or _thresholds(found) or _counts(found) or _unrolled(found)


def _loops(reached: Iterable[types.CodeType]) -> bool:
    found = list(reached)
    loops = any(has_loop(c) and (asks(c) or compares(c)) for c in found) or any(map(has_loop, found)) and any(map(asks, found))
    return loops and any(_SELECTS & set(i.co_names) for c in found for i in codes(c))


def _thresholds(found: Iterable[types.CodeType]) -> bool:
    return any(map(scored, found))


def scored(code: types.CodeType) -> bool:
    """Whether a loop is in a function that scores experts itself and picks rows by a mask, such as ``probs > 0.1``, without a selection."""
    return has_loop(code) and compares(code) and bool(_SCORES & set(code.co_names))


def _unrolled(found: Iterable[types.CodeType]) -> bool:
    """Whether code that a graph was printed as, such as what torch.export gives, holds a loop that was unrolled."""
    printed = [c for c in found if c.co_filename.startswith("<eval_with_key>")]
    return any(_SELECTS & set(c.co_names) and ASKS & set(c.co_names) for c in printed)


def _counts(found: Iterable[types.CodeType]) -> bool:
    called = {n for c in found for i in codes(c) for n in i.co_names}
    return bool(_OF_DATA & called) and bool(_CHOOSES & called)


def whole_blocks(values: Iterable[Any]) -> frozenset[types.CodeType]:
    """The `forward`s of modules that reach both the choice of experts and a loop over them, and of whose parts none does so."""
    known: dict[Any, bool] = {}

    def holds(m: nn.Module) -> bool:
        forward = of_class(type(m), "forward")
        key = frozenset(type(x) for x in m.modules()), type(m)
        if key not in known:
            user = isinstance(forward, types.FunctionType) and not is_library(home(forward))
            known[key] = user and _loops(reached(forward.__code__, forward.__globals__, [m]))
        return known[key]

    modules = list(_modules(values))
    inner = [m for m in modules if holds(m) and not any(holds(x) for x in m.modules() if x is not m)]
    return frozenset(of_class(type(m), "forward").__code__ for m in inner)


def _modules(values: Iterable[Any]) -> Iterator[nn.Module]:
    """Modules at hand, those whose methods are, and inside; one whose `__init__` is at work has none yet, not even the table for them."""
    held = (getattr(v, "__self__", v) for v in values)
    return (m for v in held if isinstance(v, nn.Module) and "_modules" in vars(v) for m in v.modules())


def reached(code: types.CodeType, names: Mapping[str, Any], values: Iterable[Any], inside: bool = True) -> Iterator[types.CodeType]:
    """Code, and what it may call: the user's functions by a global's name, methods of the modules at hand (and `inside`) by theirs."""
    values = list(values)
    modules = list(_modules(values)) if inside else [v for v in values if isinstance(v, nn.Module)]
    classes = dict.fromkeys(c for m in modules for c in type(m).__mro__ if not is_library(home(c)))
    own = [f for m in modules for f in vars(m).values() if callable(f)]  # a forward set on the instance
    todo: list[tuple[types.CodeType, Mapping[str, Any]]] = [(code, names)]
    found = [v for v in (*values, *own) for v in _functions(v)]
    seen = set()
    while todo or found:
        todo += [(f.__code__, f.__globals__) for f in found if not is_library(home(f))]
        found.clear()
        if not todo:
            return
        c, g = todo.pop()
        if c in seen:
            continue
        seen.add(c)
        yield c
        called = {n for i in codes(c) for n in i.co_names}
        found += [f for n in called if n in g for f in _functions(g[n])]
        found += [f for cls in classes for n in (*called, "forward") for f in _functions(of_class(cls, n))]


def chooses(code: types.CodeType, names: Mapping[str, Any], values: Iterable[Any], inside: bool = True) -> bool:
    """Whether code chooses experts, itself or in what it calls, such as a method `route`; without `inside` not in modules that it calls:
    a loop over a model's layers chooses none."""
    return selects(code) or any(map(selects, reached(code, names, values, inside)))


def _functions(v: Any) -> list[types.FunctionType]:
    """The functions behind a value: methods, wrappers and what they wrap."""
    found = []
    for _ in range(8):
        v = getattr(v, "__func__", None) or (v.fget if isinstance(v, property) else v)
        if v is MISSING or not isinstance(v, types.FunctionType):
            break
        found.append(v)
        v = getattr(v, "__wrapped__", None)
    return found


def from_data_dependence(e: BaseException | None) -> bool:
    """Whether a failed compilation may have failed only because sizes that depend on data were allowed in."""
    seen = 0
    while e is not None and seen < 8:
        if isinstance(e, BackendCompilerFailed) or type(e).__name__ in ("GuardOnDataDependentSymNode", "DataDependentOutputException"):
            return True  # what Inductor raises is a kind of the first
        if any(word in str(e) for word in _UNKNOWN):
            return True
        e, seen = e.__cause__ or e.__context__, seen + 1
    return False
