"""Guards on what a reading that was declined had read: code that was compiled around a loop as it stands is for that loop alone.

Dynamo stops before such a loop, or in its middle, and guards on what it traced up to there. That is the same for another module of the
same classes whose experts differ, which would get the code of the first and never be read. So whatever the reading asked is guarded in
each frame in which it was declined, however often Dynamo traces that anew: from the start, with sizes that depend on data or without.
These guards only keep modules apart. Where one cannot be made it is left out, and no code object gets more than `MOST` versions by them:
of what changes with every call, or every layer, the next version is for all.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ir import Rejection
from .guards import Guards
from .places import HOOKS, MODULE, PLAIN, Place, find

log = logging.getLogger("moe_compile")
MOST = 4

_now = threading.local()
_versions: weakref.WeakKeyDictionary[types.CodeType, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Left:
    """A reading that was declined: what is at the roots of its places, Dynamo's sources for them, and the places."""

    roots: Mapping[str, Any]
    sources: Mapping[str, Any]
    reads: tuple[Place, ...]


@dataclass
class _Frame:
    code: types.CodeType
    left: list[_Left] = field(default_factory=list)


class _Apart(Guards):
    """Guards that keep modules apart: one that cannot be made, when Dynamo makes them, is left out."""

    def _absent(self, place: Place, name: str) -> None:
        """What an object of the same class may get later under a name of the class is not watched."""

    def _guard(self, place: Place, kind: Any) -> None:
        super()._guard(place, functools.partial(_where_true, kind, find(place, self.roots)))


def _where_true(kind: Any, value: Any, builder: Any, guard: Any) -> None:
    """A guard of some kind, where what Dynamo finds there is the value that was read: one that fails at once is an error to it."""
    try:
        found = builder.get(guard)
        if found is value or isinstance(value, PLAIN) and type(found) is type(value) and found == value:
            kind(builder, guard)
    except Exception as e:
        log.debug("capture: no guard on %s: %s: %s", getattr(guard, "name", guard), type(e).__name__, e)


@contextlib.contextmanager
def frame(code: types.CodeType) -> Iterator[None]:
    """A frame of `code` is compiled, in one or more attempts."""
    was, _now.frame = getattr(_now, "frame", None), _Frame(code)
    try:
        yield
        if _now.frame.left:
            _versions[code] = _count(code) + 1
    finally:
        _now.frame = was


def keeps_apart() -> bool:
    """Whether a reading was declined in the frame that is compiled, and what it asked can be guarded in one more version of its code."""
    here: _Frame | None = getattr(_now, "frame", None)
    return here is not None and bool(here.left) and _count(here.code) < MOST


def again(tx: Any) -> None:
    """Dynamo (`tx`, of the frame itself) begins to trace: what was declined in an earlier attempt may not be met in this one."""
    here: _Frame | None = getattr(_now, "frame", None)
    if here is not None:
        for left in here.left:
            _install(tx, here, left)


def note(tx: Any, roots: Mapping[str, Any], sources: Mapping[str, Any], reads: Iterable[Place], r: Rejection) -> None:
    """Keep other modules from what is compiled for this one, whose reading gave `r` after the places it asked."""
    here: _Frame | None = getattr(_now, "frame", None)
    if here is None:
        return
    left = _Left(roots, sources, (*reads, *_state(roots.get(MODULE), r)))
    if any(known.sources == left.sources and set(known.reads) == set(left.reads) for known in here.left):
        return
    here.left.append(left)
    _install(tx, here, left)


def _state(module: Any, r: Rejection) -> Iterator[Place]:
    """The hooks that kept a module from being copied, which are asked for by no code."""
    if r.stage != "hooks" or module is None:
        return
    for path, part in module.named_modules():
        place = functools.reduce(Place.attr, path.split("."), Place(MODULE)) if path else Place(MODULE)
        yield from (place.attr(h) for h in HOOKS if path and getattr(part, h, None))


def _install(tx: Any, here: _Frame, left: _Left) -> None:
    if _count(here.code) >= MOST:
        return
    guards = _Apart(tx, left.roots, left.sources)
    for place in left.reads:
        try:
            guards.install([place])
        except Exception as e:  # of ours (`Unguarded`), or whatever Dynamo has against the way there
            log.debug("capture: no guard on %s: %s: %s", place, type(e).__name__, e)


def _count(code: types.CodeType) -> int:
    """How many versions of some code these guards have made, since Dynamo forgot its last."""
    try:
        kept = bool(torch._dynamo.eval_frame._debug_get_cache_entry_list(code))
    except (AttributeError, TypeError):
        kept = True
    return _versions.get(code, 0) if kept else 0
