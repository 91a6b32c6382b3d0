"""Lines of the user's code that come from no file: `python -c`, `exec`, what was shipped by value.

Dynamo leaves every frame of a file named "<string>" out of the stack that a node was made in, for its own generated code has that name.
While it traces for this backend they stay in: the user's `exec` has that name too.
"""

from __future__ import annotations

import os
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NAMELESS = "<string>"
_TORCH = os.path.dirname(torch.__file__) + os.sep
_now = threading.local()
_given_up: dict[str, str] = {}
_for_one: set[str] = set()  # frames that run as written for some modules of their class


@contextmanager
def kept() -> Iterator[None]:
    """Frames without a file stay in the stacks of the nodes that this thread makes inside."""
    was, _now.on = getattr(_now, "on", False), True
    try:
        yield
    finally:
        _now.on = was


def install() -> None:
    """Raises AttributeError where Dynamo has no such list of files."""
    from torch._dynamo import output_graph

    original = output_graph.uninteresting_files

    def uninteresting_files() -> set[str]:
        found = original()
        return found - {_NAMELESS} if getattr(_now, "on", False) else found

    output_graph.uninteresting_files = uninteresting_files


def span(code: types.CodeType) -> tuple[int, int]:
    """The first and last line of code, with the functions inside it: of what has no source text, too."""
    inner = [span(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    own = [line for _, _, line in code.co_lines() if line]
    return code.co_firstlineno, max([code.co_firstlineno, *own, *(last for _, last in inner)])


def given_up(code: types.CodeType, e: Exception, for_good: bool = True) -> None:
    """Dynamo gives up a frame (its code `for_good`): its error knows the line that it could not go on from, its counters do not tell it."""
    frame = f"{code.co_filename}:{code.co_firstlineno}"
    (_for_one.discard if for_good else _for_one.add)(frame)
    stack = [f for f in getattr(e, "real_stack", None) or () if not f.filename.startswith(_TORCH)]
    if stack:
        _given_up[frame] = f"{stack[-1].filename}:{stack[-1].lineno}"


def line_given_up(frame: str) -> str:
    """file:line of what a frame (file:line of its first line) was given up for; "" where that is not known."""
    return _given_up.get(frame, "")


def is_given_up_for_one(frame: str) -> bool:
    """Whether a frame (file:line of its first line) was given up for modules that are like one, not for all of its class."""
    return frame in _for_one
