"""The launches of one call: done at once on tensors, written down on `Later` ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from .later import Later, NotRecorded, packed


@dataclass(frozen=True)
class Launch:
    """kernel[grid](*args, **kwargs), on the side stream or the main one."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    side: bool

    def touches(self) -> list[Later]:
        """Its operands; a descriptor's is its base."""
        given = (a if isinstance(a, Later) else getattr(a, "base", None) for a in (*self.args, *self.kwargs.values()))
        return [a for a in given if isinstance(a, Later)]


@dataclass(frozen=True)
class Fill:
    """Every 32 bits of a contiguous tensor become `word`."""

    target: Later
    word: int
    side: bool

    def touches(self) -> list[Later]:
        return [self.target]


@dataclass(frozen=True)
class Product:
    """out = a b, by torch."""

    a: Later
    b: Later
    out: Later
    side: bool

    def touches(self) -> list[Later]:
        return [self.a, self.b, self.out]


@dataclass(frozen=True)
class GroupedProduct:
    """out = a b[e] for the rows of every expert e, or out[e] = a b over them, by torch, which allocates it."""

    a: Later
    b: Later
    ends: Later
    out: Later
    side: bool

    def touches(self) -> list[Later]:
        return [self.a, self.b, self.ends, self.out]


@dataclass(frozen=True)
class Fork:
    """What the side stream does from here on comes after what the main stream has so far."""

    def touches(self) -> list[Later]:
        return []


@dataclass(frozen=True)
class Begin(Fork):
    """The side stream waits for the fork."""


@dataclass(frozen=True)
class End(Fork):
    """What follows is on the main stream again."""


@dataclass(frozen=True)
class Join(Fork):
    """The main stream waits for the side stream."""


Step = Launch | Fill | Product | GroupedProduct | Fork


@dataclass
class Tape:
    """What a call does, in order, on roots 0 .. operands - 1 and on buffers of its own behind them."""

    operands: int
    device: torch.device
    buffers: list[Later] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    side: bool = False
    first: bool = False  # which side stream

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Later:
        made = Later(self.operands + len(self.buffers), shape, packed(shape), dtype, self.device)
        self.buffers.append(made)
        return made

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What this thread launches inside is written down here."""
        before, _now.tape = _now.tape, self
        try:
            yield
        finally:
            _now.tape = before


class _Now(threading.local):
    tape: Tape | None = None


_now = _Now()


# ---- what code that launches kernels calls -------------------------------------------------------------------------


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of any content on the device of `like`, in its dtype unless another is given."""
    if isinstance(like, Later):
        return cast(Tensor, _recorder().empty(shape, dtype or like.dtype))
    return like.new_empty(shape, dtype=dtype)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """kernel[grid](*args, **kwargs)."""
    tape = _now.tape
    if tape is None:
        kernel[grid](*args, **kwargs)
    else:
        tape.steps.append(Launch(kernel, grid, args, kwargs, tape.side))


def fill(target: Tensor, value: int | float) -> None:
    """0, or 1 in float32."""
    if not isinstance(target, Later):
        target.fill_(value)
        return
    if value != 0 and (value, target.dtype) != (1, torch.float32):
        raise NotRecorded(f"filling {target.dtype} with {value}")
    if not target.is_contiguous() or target.numel() * target.dtype.itemsize % 4 or target.start * target.dtype.itemsize % 4:
        raise NotRecorded("filling less than whole words")
    tape = _recorder()
    tape.steps.append(Fill(target, 0x3F800000 if value else 0, tape.side))


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, two matrices, as torch multiplies them."""
    if isinstance(out, Later):
        tape = _recorder()
        tape.steps.append(Product(cast(Later, a), cast(Later, b), out, tape.side))
    else:
        torch.mm(a, b, out=out)


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """[N, n]: rows [ends[e - 1], ends[e]) of a [N, k] times b[e], of b [E, k, n]; what lies behind the last expert's rows is anything.

    Or [E, m, n]: columns [ends[e - 1], ends[e]) of a [m, N] times the rows of b [N, n].
    """
    if not isinstance(a, Later):
        found: Tensor = torch._grouped_mm(a, b, offs=ends)
        return found
    tape = _recorder()
    shape = (a.shape[0], b.shape[2]) if b.ndim == 3 else (ends.shape[0], a.shape[0], b.shape[1])
    out = tape.empty(shape, a.dtype)
    tape.steps.append(GroupedProduct(a, cast(Later, b), cast(Later, ends), out, tape.side))
    return cast(Tensor, out)


def _recorder() -> Tape:
    if _now.tape is None:
        raise NotRecorded("nothing is recorded here")
    return _now.tape


# ---- the side stream -----------------------------------------------------------------------------------------------

_streams: dict[tuple[int, bool], torch.cuda.Stream] = {}


def side_stream(device: torch.device, first: bool = False) -> torch.cuda.Stream:
    """A device's side stream; `first`: the one whose kernels are given free processors before those of other streams."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, first) not in _streams:
        _streams[index, first] = torch.cuda.Stream(device, priority=-int(first))
    return _streams[index, first]


class Beside:
    """A branch on a side stream of a device, from here on the main stream until `join`. `first`: see `side_stream`."""

    def __init__(self, device: torch.device, first: bool = False) -> None:
        self.device, self.first = device, first
        if _now.tape is None:
            self.event = torch.cuda.current_stream(device).record_event()
        else:
            _now.tape.first = first
            _now.tape.steps.append(Fork())

    @contextmanager
    def issue(self) -> Iterator[None]:
        """What is launched inside runs on the side stream."""
        tape = _now.tape
        if tape is None:
            stream = side_stream(self.device, self.first)
            stream.wait_event(self.event)
            with torch.cuda.stream(stream):
                yield
            return
        tape.steps.append(Begin())
        tape.side = True
        try:
            yield
        finally:
            tape.side = False
            tape.steps.append(End())

    def join(self) -> None:
        """The main stream waits for the branch."""
        if _now.tape is None:
            torch.cuda.current_stream(self.device).wait_stream(side_stream(self.device, self.first))
        else:
            _now.tape.steps.append(Join())
