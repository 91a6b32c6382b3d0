"""Plans by what a call is known by: which op, its plain numbers, its operands' layout, the device. Nothing else decides what is launched.

A plan's pointers are put in place anew at each call, so weights may move, and equal layers share a plan. What a plan rests on besides is
in its key: shapes, strides and dtypes, each address modulo 16, the precision of float32 products (given by the caller). Measured
tiles are not: `forget` drops the plans when they change.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import driver
from .later import Later, NotRecorded
from .plan import Plan
from .tape import Tape

log = logging.getLogger(__name__)

MOST = 4096  # plans; each holds some ten kilobytes
Build = Callable[[Any, list[Any]], Any]  # (the op's plain numbers, operands or None) -> a tensor, or a tuple or list of them
_plans: dict[Hashable, tuple[Plan, type | None] | None] = {}
_compiling: dict[Hashable, Sequence[Future[None]]] = {}
_enabled = True


class _Thread(threading.local):
    """Whether this thread has a context of the driver."""

    bound = False


_thread = _Thread()


def call(build: Build, how: Any, tensors: Sequence[Tensor | None]) -> Any:
    """build(how, tensors), by its plan where it has one. `how` is hashable; the first operand is on the device of all."""
    found = driver.found() if _enabled else None
    if found is None or hooked():
        return build(how, list(tensors))
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    together = 0
    for p in pointers:
        together |= p
    first = tensors[0]
    assert first is not None
    index = first.get_device()
    key = key_of(build, how, tensors, tuple([p & 15 for p in pointers]) if together & 15 else 0)
    try:
        kept = _plans[key]
    except KeyError:
        wait(_compiling.get(key, ()))
        kept = _make(build, how, tensors, pointers, found)
        _keep(key, kept)
    if kept is None:
        return build(how, list(tensors))
    plan, kind = kept
    if not _thread.bound:
        found.bind(index)
        _thread.bound = True
    results = plan.run(tensors, pointers, current_stream(index))
    return results[0] if kind is None else kind(results)


def key_of(build: Build, how: Any, tensors: Sequence[Tensor | None], residues: Hashable = 0) -> Hashable:
    """What a plan is known by. `residues`: addresses modulo 16, or 0 where all are."""
    layouts = tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])
    first = tensors[0]
    return build, how, None if first is None else first.get_device(), layouts, residues


def known(key: Hashable) -> bool:
    """Whether a plan is there, or its kernels are being compiled, or were."""
    return key in _plans or key in _compiling


def expect(key: Hashable, kernels: Sequence[Future[None]]) -> None:
    """The kernels of a call are being compiled: whoever makes its plan waits for them."""
    _compiling[key] = kernels


def current_stream(index: int) -> int:
    """Handle of a device's current stream."""
    return torch._C._cuda_getCurrentRawStream(index)


def device_of(tensors: Sequence[Tensor | None]) -> torch.device:
    """Where a call's operands are."""
    return next(t.device for t in tensors if t is not None)


def hooked() -> bool:
    """Whether someone listens to Triton's launches: then Triton does them."""
    hook = _knobs().runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


@functools.cache
def _knobs() -> Any:
    from triton import knobs

    return knobs


def forget() -> None:
    """Drop all plans."""
    _plans.clear()
    _compiling.clear()


@contextmanager
def step_by_step() -> Iterator[None]:
    """Inside, calls run without plans."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def record(build: Build, how: Any, tensors: Sequence[Tensor | None], pointers: Sequence[int]) -> tuple[Tape, Any]:
    """The tape of a call and what it gives back, on `Later` tensors. Raises NotRecorded."""
    device = device_of(tensors)
    tape = Tape(len(tensors), device)
    operands = [
        None if t is None else Later(i, t.shape, t.stride(), t.dtype, device, residue=p % 16)
        for i, (t, p) in enumerate(zip(tensors, pointers))
    ]
    with tape.recording():
        return tape, build(how, operands)


def _make(
    build: Build, how: Any, tensors: Sequence[Tensor | None], pointers: Sequence[int], found: driver.Driver
) -> tuple[Plan, type | None] | None:
    """A plan and how its results are held together; None where the call runs step by step."""
    try:
        tape, results = record(build, how, tensors, pointers)
        kind = None if isinstance(results, Later) else type(results)
        flat = [results] if kind is None else list(results)
        if not all(isinstance(r, Later) and r.root >= tape.operands and r.is_contiguous() and r.start == 0 for r in flat):
            raise NotRecorded("a result that is no buffer of the call")
        return Plan(tape, flat, found), kind
    except NotRecorded as e:
        log.debug("%s runs step by step: %s", getattr(build, "__name__", build), e)
    except Exception as e:  # a private part of Triton that is not as expected: launching as everybody does still works
        log.info("%s is not prepared: %s: %s", getattr(build, "__name__", build), type(e).__name__, e)
    return None


def _keep(key: Hashable, kept: tuple[Plan, type | None] | None) -> None:
    if len(_plans) >= MOST:
        for old in list(_plans)[: MOST // 2]:
            _plans.pop(old, None)
    _plans[key] = kept
