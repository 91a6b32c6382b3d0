"""A driver that runs what a plan launches through Triton's interpreter, from nothing but the addresses that the plan has put in place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compile.lowering.triton.launch import driver, packing, plan, plans
from moe_compile.lowering.triton.launch.later import Later
from moe_compile.lowering.triton.launch.packing import Map, Packed, Pointer
from moe_compile.lowering.triton.launch.tape import Launch


class Place:
    """A tensor map: where it was last put."""

    def __init__(self) -> None:
        self._kept = ctypes.c_uint64(0)
        self.address = ctypes.addressof(self._kept)

    def place(self, pointer: int) -> None:
        self._kept.value = pointer


class Driver:
    """What `driver.Driver` offers. `seen`: the stream of each launch, and what happened on streams besides."""

    def __init__(self) -> None:
        self.steps: list[Launch] = []
        self.seen: list[Any] = []
        self.fail_at: int | None = None

    def pack(self, step: Launch, _: Any) -> Packed:
        """As `packing.pack`, with every argument a parameter, and nothing compiled."""
        self.steps.append(step)
        values: list[Any] = []
        for a in (*step.args, *step.kwargs.values()):
            if isinstance(a, Later):
                values.append(Pointer(a.root, a.start * a.dtype.itemsize))
            elif isinstance(getattr(a, "base", None), Later):
                values.append(Map(Pointer(a.base.root, a.base.start * a.base.dtype.itemsize), Place()))  # type: ignore[arg-type]
        return Packed(len(self.steps), driver.config(step.grid, 32, 0, False), tuple(values))

    def launch(self, config: Any, function: int, params: Any, _: Any) -> int:
        self.seen.append(config.stream or 0)
        if self.fail_at == len(self.seen):
            return 1
        step, at = self.steps[function - 1], iter(params)

        def real(a: Any) -> Any:
            if isinstance(a, Later):
                return tensor_at(_word(next(at)), a)
            if isinstance(getattr(a, "base", None), Later):
                return type(a)(tensor_at(_word(next(at)), a.base), *(getattr(a, n) for n in ("shape", "strides", "block_shape")))
            return a

        args = [real(a) for a in step.args]
        step.kernel[step.grid](*args, **{n: real(a) for n, a in step.kwargs.items()})
        return 0

    def bind(self, index: int) -> None:
        pass

    def event(self) -> int:
        return 7

    def record(self, event: int, stream: int) -> int:
        self.seen.append(("record", stream))
        return 0

    def wait(self, stream: int, event: int, flags: int) -> int:
        self.seen.append(("wait", stream))
        return 0

    def memset(self, pointer: int, word: int, count: int, stream: int) -> int:
        (ctypes.c_uint32 * count).from_address(pointer)[:] = [word] * count
        return 0

    def check(self, code: int) -> None:
        raise RuntimeError(f"refused: {code}")


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def tensor_at(pointer: int, like: Later) -> Tensor:
    """The tensor that lies at an address."""
    first, end = like.reach()
    if end == first:
        return torch.empty(like.shape, dtype=like.dtype)
    memory = (ctypes.c_char * (end - first)).from_address(pointer)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.strides)


@contextmanager
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Inside, calls go by plans whose kernels are interpreted."""
    made = Driver()
    monkeypatch.setattr(driver, "found", lambda: made)
    monkeypatch.setattr(plan, "pack", made.pack)
    monkeypatch.setattr(plans, "current_stream", lambda index: 3)
    assert packing.pack is not made.pack
    plans.forget()
    try:
        yield made
    finally:
        plans.forget()
