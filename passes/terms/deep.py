"""Room for recursion: a loop over hundreds of experts is a chain of hundreds of nodes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deep_recursion(limit: int = 12_000) -> Iterator[None]:
    """Raise Python's recursion limit while the passes run (Python 3.11 and later keep Python calls off the C stack)."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, before))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
