"""What a process that compiles much can leave: most of Python's collections, Dynamo's clock, stacks that nobody reads. No check is
touched by it."""

from __future__ import annotations

import gc
import logging
import types
from typing import Any

import torch


def collect_seldom() -> None:
    """What is imported stays: the collector need not look at it again and again, which is a quarter of the time of a compilation."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def time_no_guards() -> None:
    """Dynamo times the guards of each graph, on caches that it empties before: 20 ms a graph, for a number that nobody reads here."""
    from torch._dynamo import guards

    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


def seed_without_stacks() -> None:
    """`torch.manual_seed` formats the whole stack three times, once for each kind of device that has not been started."""
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if hasattr(device, "traceback"):
            device.traceback = types.SimpleNamespace(format_stack=list)


def log_warnings_only(config: Any) -> None:
    """As pytest's `log_level = "WARNING"`: torch's records of its own tracing are not kept for the report of a failure.

    That setting changes the root's level twelve times a test, and each time all loggers forget what they are enabled for.
    """
    plugin = config.pluginmanager.get_plugin("logging-plugin")
    for handler in (plugin.caplog_handler, plugin.report_handler) if plugin is not None else ():
        handler.setLevel(logging.WARNING)
