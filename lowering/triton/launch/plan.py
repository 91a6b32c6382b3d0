"""A tape ready to run: pointers are put in place where they changed, then each kernel is handed to the driver."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import memory
from .driver import Driver
from .later import Later
from .packing import Map, Packed, Pointer, cell, pack
from .tape import Begin, End, Fill, Fork, GroupedProduct, Join, Launch, Product, Step, Tape, side_stream

_reinterpret: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_reinterpret_tensor", None)
_empty_strided: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)  # skips the dispatcher


class Plan:
    """One call's launches for operands of one layout on one device, with memory for their arguments.

    Pointers live in one table, which kernels' parameters point into; what changed since the last call is written there. A plan is run by
    one thread at a time, on the device that was current when it was made. It holds no operand between calls.
    """

    def __init__(self, tape: Tape, results: Sequence[Later], driver: Driver) -> None:
        self._driver, self._device, self._lock = driver, tape.device, threading.Lock()
        self._results = [r.root for r in results]
        self._buffers = {b.root: b for b in tape.buffers}
        self._memory = memory.plan(tape, self._results)
        self._workspace = tape.operands + len(tape.buffers)  # the root behind all others
        self._tensors: list[Any] = []  # by root, while it runs
        self._placed: list[int] = [0] * (self._workspace + 1)
        self._pointers: dict[int, list[tuple[int, int]]] = defaultdict(list)  # root -> (entry of the table, bytes behind the root)
        self._maps: dict[int, list[tuple[Any, int]]] = defaultdict(list)
        self._entries: dict[Pointer, int] = {}
        self._configs: list[tuple[Any, bool]] = []  # and whether on the side stream
        self._stream: int | None = None
        self._side, self._first_side = 0, tape.first
        packed = {i: pack(s, driver) for i, s in enumerate(tape.steps) if isinstance(s, Launch)}
        fills = [Pointer(s.target.root, s.target.start * s.target.dtype.itemsize) for s in tape.steps if isinstance(s, Fill)]
        count = sum(isinstance(v, Pointer) for p in packed.values() for v in p.values) + len(fills)
        self._table = (ctypes.c_uint64 * max(count, 1))()
        self._kept: list[Any] = [packed]
        self._event = driver.event() if any(isinstance(s, Fork) for s in tape.steps) else 0
        self._by_torch = any(isinstance(s, (Product, GroupedProduct)) and s.side for s in tape.steps)  # on the side stream
        self._main: Any = None  # torch's current stream, while another one is: id, device, kind
        self._made = {s.out.root for s in tape.steps if isinstance(s, GroupedProduct)}  # buffers that torch allocates
        self._run_steps = self._with_memory(tape, [self._step(s, packed.get(i)) for i, s in enumerate(tape.steps)])
        self._first = [root for root, span in self._memory.alone.items() if span.first < 0 and root not in self._made]

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, tensors: Sequence[Tensor | None], pointers: Sequence[int], stream: int) -> list[Tensor]:
        """The results for operands of this plan's layout; `pointers`: their addresses, 0 of what is None.

        Raises RuntimeError where the driver refuses a launch.
        """
        with self._lock:
            if stream != self._stream:
                self._on(stream)
            held = self._tensors = [*tensors, *[None] * len(self._buffers)]
            placed = self._placed
            for root, pointer in enumerate(pointers):
                if placed[root] != pointer:
                    self._place(root, pointer)
            if self._memory.size:
                workspace = _empty((self._memory.size,), (1,), torch.uint8, self._device)
                pointer = workspace.data_ptr()
                if placed[-1] != pointer:
                    self._place(self._workspace, pointer)
            for root in self._first:
                self._allocate(root)
            try:
                for step in self._run_steps:
                    code = step()
                    if code:
                        self._driver.check(code)
            finally:
                self._tensors = []
                if self._main is not None:
                    self._end()
            return [held[root] for root in self._results]

    def _on(self, stream: int) -> None:
        self._stream = stream
        if self._event:
            self._side = side_stream(self._device, self._first_side).cuda_stream
        for config, side in self._configs:
            config.stream = self._side if side else stream

    def _place(self, root: int, pointer: int) -> None:
        for entry, offset in self._pointers[root]:
            self._table[entry] = pointer + offset
        for made, offset in self._maps[root]:
            made.place(pointer + offset)
        self._placed[root] = pointer

    def _allocate(self, root: int) -> None:
        b = self._buffers[root]
        made = self._tensors[root] = _empty(b.shape, b.strides, b.dtype, self._device)
        pointer = made.data_ptr()
        if self._placed[root] != pointer:
            self._place(root, pointer)

    def _free(self, root: int) -> None:
        self._tensors[root] = None

    def _view(self, t: Later) -> Tensor:
        whole: Tensor = self._tensors[t.root]
        return whole if t.shape == whole.shape and t.strides == whole.stride() else _within(whole, t)

    # ---- making it -------------------------------------------------------------------------------------------------

    def _with_memory(self, tape: Tape, steps: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
        """The steps, with large buffers allocated before they are first touched and given back behind the last step that does."""
        before: dict[int, list[Callable[[], Any]]] = defaultdict(list)
        behind: dict[int, list[Callable[[], Any]]] = defaultdict(list)
        for root, span in self._memory.alone.items():
            if span.first >= 0 and root not in self._made:
                before[span.first].append(partial(self._allocate, root))
            if span.last < len(tape.steps) and root not in self._results:
                behind[span.last].append(partial(self._free, root))
        return [f for i, step in enumerate(steps) for f in (*before[i], step, *behind[i])]

    def _step(self, step: Step, packed: Packed | None) -> Callable[[], Any]:
        """What gives 0, None or an error number."""
        if packed is not None and isinstance(step, Launch):
            self._configs.append((packed.config, step.side))
            return partial(self._driver.launch, packed.config, packed.function, self._parameters(packed), None)
        if isinstance(step, Fill):
            return partial(self._fill, step, self._entry(Pointer(step.target.root, step.target.start * step.target.dtype.itemsize)))
        if isinstance(step, Product):
            return partial(self._product, step)
        if isinstance(step, GroupedProduct):
            return partial(self._grouped_product, step)
        if isinstance(step, (Begin, End)):
            return self._begin if isinstance(step, Begin) else self._end
        return partial(self._signal, isinstance(step, Join))

    def _parameters(self, packed: Packed) -> Any:
        """The array of addresses of a kernel's parameters."""
        array = (ctypes.c_void_p * len(packed.values))()
        table = ctypes.addressof(self._table)
        for i, v in enumerate(packed.values):
            if isinstance(v, Pointer):
                array[i] = table + 8 * self._entry(v)
            elif isinstance(v, Map):
                self._maps[self._root(v.at)].append((v.map, self._offset(v.at)))
                array[i] = v.map.address
            else:
                own = cell(v)
                self._kept.append(own)
                array[i] = ctypes.addressof(own)
        return array

    def _entry(self, at: Pointer) -> int:
        """Where in the table an address stands."""
        if at not in self._entries:
            self._entries[at] = len(self._entries)
            self._pointers[self._root(at)].append((self._entries[at], self._offset(at)))
        return self._entries[at]

    def _root(self, at: Pointer) -> int:
        return self._workspace if at.root in self._memory.offsets else at.root

    def _offset(self, at: Pointer) -> int:
        return self._memory.offsets.get(at.root, 0) + at.offset

    # ---- steps that are no kernels of ours ---------------------------------------------------------------------------

    def _fill(self, step: Fill, entry: int) -> Any:
        stream = self._side if step.side else self._stream
        return self._driver.memset(self._table[entry], step.word, memory.bytes_of(step.target) // 4, stream)

    def _product(self, step: Product) -> None:
        torch.mm(self._view(step.a), self._view(step.b), out=self._view(step.out))

    def _grouped_product(self, step: GroupedProduct) -> None:
        made = torch._grouped_mm(self._view(step.a), self._view(step.b), offs=self._view(step.ends))
        self._tensors[step.out.root] = made
        self._place(step.out.root, made.data_ptr())

    def _signal(self, join: bool) -> Any:
        """The event: of the main stream, for the side stream to wait for, or the other way round."""
        code = self._driver.record(self._event, self._side if join else self._stream)
        return code or (self._driver.wait(self._stream, self._event, 0) if join else 0)

    def _begin(self) -> Any:
        """On the side stream, torch's products too."""
        if self._by_torch:
            side = side_stream(self._device, self._first_side)
            self._main = current_stream(side.device_index)
            set_stream(side.stream_id, side.device_index, side.device_type)
        return self._driver.wait(self._side, self._event, 0)

    def _end(self) -> None:
        if self._main is not None:
            set_stream(*self._main)
            self._main = None


def set_stream(stream: int, device: int, kind: int) -> None:
    """torch's current stream, as torch tells it by three numbers."""
    torch._C._cuda_setStream(stream_id=stream, device_index=device, device_type=kind)


def current_stream(device: int) -> tuple[int, int, int]:
    """The three numbers of torch's current stream."""
    return torch._C._cuda_getCurrentStream(device)


def _empty(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the current device, which is `device`."""
    if _empty_strided is not None and device.type == "cuda":
        return _empty_strided(shape, strides, dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _within(whole: Tensor, t: Later) -> Tensor:
    """A view of a root."""
    if _reinterpret is not None:
        return _reinterpret(whole, t.shape, t.strides, t.start)
    return whole.as_strided(t.shape, t.strides, whole.storage_offset() + t.start)
