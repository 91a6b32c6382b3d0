"""The side stream in eager mode: what the nodes of the stream pass call, and nothing at all on a machine without an NPU."""

from __future__ import annotations

from typing import Any

import torch


class _Streams:
    """One side stream and its events in a process; nothing at all on a machine without an NPU."""

    def __init__(self) -> None:
        self.side: Any = None
        self.main: list[Any] = []
        self.events: dict[str, Any] = {}

    def npu(self) -> Any:
        module = getattr(torch, "npu", None)
        return module if module is not None and module.is_available() else None


_streams = _Streams()


def record_event(tag: str) -> None:
    """Record the event `tag` on the current stream."""
    npu = _streams.npu()
    if npu is not None:
        event = _streams.events.setdefault(tag, npu.Event())
        event.record(npu.current_stream())


def wait_event(tag: str) -> None:
    """Make the current stream wait for the event `tag`."""
    npu = _streams.npu()
    if npu is not None:
        npu.current_stream().wait_event(_streams.events[tag])


def enter_side(core_limit: tuple[int, int] | None) -> None:
    """Issue on the side stream from here on."""
    npu = _streams.npu()
    if npu is None:
        return
    _streams.side = _streams.side or npu.Stream()
    if core_limit is not None:
        npu.set_stream_limit(_streams.side, *core_limit)
    _streams.main.append(npu.current_stream())
    npu.set_stream(_streams.side)


def exit_side() -> None:
    """Back to the stream that was left."""
    npu = _streams.npu()
    if npu is not None:
        npu.set_stream(_streams.main.pop())
