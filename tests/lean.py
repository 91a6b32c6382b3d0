"""What a process that compiles much can leave: most of Python's collections, and Dynamo's clock. No check is touched by it."""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """What is imported stays: the collector need not look at it again and again, which is a quarter of the time of a compilation."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def time_no_guards() -> None:
    """Dynamo times the guards of each graph, on caches that it empties before: 20 ms a graph, for a number that nobody reads here."""
    from torch._dynamo import guards

    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0
