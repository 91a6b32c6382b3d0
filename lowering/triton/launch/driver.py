"""The CUDA driver's launches, events and tensor maps, called by ctypes: no compiler is needed, and a call costs about a microsecond.

Everything here is the driver's public interface (cuda.h); structures are laid out as it declares them since CUDA 12.0.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from ctypes import POINTER, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

import torch

_NAMES = ("cuLaunchKernelEx", "cuTensorMapEncodeTiled", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent", "cuMemsetD32Async")
_CONTEXT = ("cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")
_EARLY_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_L2_128 = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton asks for
MAP_BYTES, _MAP_ALIGNED = 128, 64


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and 64 bytes of value of which the first int is all that is used here."""

    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_int), ("rest", c_int * 15))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(Attribute)),
        ("count", c_uint),
    )


_early = (Attribute * 1)(Attribute(id=_EARLY_LAUNCH, value=1))


def config(grid: tuple[int, ...], threads: int, shared: int, early: bool) -> Config:
    """How a kernel is launched. `early`: it may start while the kernel before it still runs."""
    made = Config(shared=shared, count=int(early))
    made.grid[:] = (*grid, 1, 1)[:3]
    made.block[:] = (threads, 1, 1)
    made.attributes = ctypes.cast(_early, POINTER(Attribute))
    return made


class Driver:
    """A loaded libcuda. Its functions give 0, or an error number for `check`."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.launch, self.encode, create, self.record, self.wait, self.memset = (getattr(library, name) for name in _NAMES)
        self.launch.argtypes = (POINTER(Config), c_void_p, c_void_p, c_void_p)
        self.encode.argtypes = (
            *(c_void_p, c_int, c_uint32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
            *(c_int, c_int, c_int, c_int),
        )
        self.record.argtypes, self.wait.argtypes = (c_void_p, c_void_p), (c_void_p, c_void_p, c_uint)
        self.memset.argtypes = (c_uint64, c_uint, c_size_t, c_void_p)
        self._create = create
        self._create.argtypes = (POINTER(c_void_p), c_uint)
        self._current, self._device, self._retain, self._set_current = (getattr(library, name) for name in _CONTEXT)
        self._set_current.argtypes = (c_void_p,)

    def bind(self, index: int) -> None:
        """Give this thread the context that torch uses on a device, where it has none: a thread that has only just begun."""
        context, device = c_void_p(), c_int()
        self.check(self._current(ctypes.byref(context)))
        if not context:
            self.check(self._device(ctypes.byref(device), index))
            self.check(self._retain(ctypes.byref(context), device))
            self.check(self._set_current(context))

    def event(self) -> int:
        """A new event that keeps no time."""
        made = c_void_p()
        self.check(self._create(ctypes.byref(made), _NO_TIMING))
        return made.value or 0

    def check(self, code: int) -> None:
        """Raises RuntimeError for an error number, with the driver's text."""
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {code} while launching a kernel of moe_compile: {(text.value or b'').decode()}")


class TensorMap:
    """A CUtensorMap over a tensor of which all but the address is known; `place` makes it for an address.

    Sizes, boxes [elements] and strides [bytes] are given outermost first, as tensors have them; the driver wants them innermost first.
    """

    def __init__(self, driver: Driver, kind: int, swizzle: int, sizes: list[int], strides: list[int], box: list[int]) -> None:
        rank = len(sizes)
        memory = ctypes.create_string_buffer(MAP_BYTES + _MAP_ALIGNED)
        self.address = -(-ctypes.addressof(memory) // _MAP_ALIGNED) * _MAP_ALIGNED
        self._kept: tuple[Any, ...] = (
            memory,
            (c_uint64 * rank)(*reversed(sizes)),
            (c_uint64 * rank)(*reversed(strides[:-1])),
            (c_uint32 * rank)(*reversed(box)),
            (c_uint32 * rank)(*[1] * rank),
        )
        arrays: tuple[Any, ...] = self._kept[1:]
        self._before = (self.address, kind, rank)
        self._behind = (*(ctypes.addressof(a) for a in arrays), 0, swizzle, _L2_128, 0)
        self._driver = driver

    def place(self, pointer: int) -> None:
        """Raises RuntimeError where the driver does not take the address."""
        code = self._driver.encode(*self._before, pointer, *self._behind)
        if code:
            self._driver.check(code)


@functools.cache
def found() -> Driver | None:
    """The driver of an NVIDIA card; None without one, with one too old, and where Triton interprets its kernels."""
    from triton import knobs

    if knobs.runtime.interpret or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    try:
        return Driver(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    except (OSError, AttributeError):
        return None
