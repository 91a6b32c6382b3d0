"""A recorded launch as the driver takes it: the compiled kernel, its arguments in memory, where pointers go.

A kernel's parameters are its arguments in order without those that are compiled in, a descriptor as map, sizes and strides, and behind
them two pointers to scratch memory, which no kernel here has. That is how Triton 3.6 and 3.7 build them; what another version
builds is read off the PTX and compared, so that a kernel is never handed a parameter of another size.
"""

from __future__ import annotations

import ctypes
import re
import struct
from dataclasses import dataclass
from typing import Any

from .driver import MAP_BYTES, Config, Driver, TensorMap, config
from .later import Later, NotRecorded
from .tape import Launch

_FORMATS = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"},
    **{"fp32": "f", "f32": "f", "fp64": "d"},
}
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(?P<type>[a-z]\d+)[^,()\[]*?\w+_param_\d+\s*(?:\[(?P<size>\d+)\])?")


@dataclass(frozen=True)
class Pointer:
    """An address `offset` bytes behind a root's first one."""

    root: int
    offset: int


@dataclass(frozen=True)
class Map:
    """A tensor map over memory that starts at `at`."""

    at: Pointer
    map: TensorMap


Value = Pointer | Map | bytes


@dataclass(frozen=True)
class Packed:
    """A kernel ready to launch but for the pointers: function handle, launch configuration, parameters in order."""

    function: int
    config: Config
    values: tuple[Value, ...]


def compiled(step: Launch) -> Any:
    """The kernel compiled for these arguments on the current device; nothing is launched."""
    return step.kernel.run(*step.args, grid=step.grid, warmup=True, **step.kwargs)


def pack(step: Launch, driver: Driver) -> Packed:
    """Raises NotRecorded where the kernel needs more of a launch than is prepared here."""
    kernel = compiled(step)
    if hasattr(kernel, "result"):  # compiled in the background
        kernel = kernel.result()
    about = kernel.metadata
    plain = about.num_ctas == 1 and not about.launch_cooperative_grid
    if not plain or about.global_scratch_size or about.profile_scratch_size:
        raise NotRecorded("a launch in clusters, of a cooperative grid, or with scratch memory")
    values = tuple(_values(step, kernel, driver))
    check(kernel.asm["ptx"], values)
    made = config(step.grid, 32 * about.num_warps, about.shared, bool(about.launch_pdl))
    return Packed(_loaded(kernel), made, values)


def _loaded(kernel: Any) -> Any:
    """The handle of a compiled kernel on the current device.

    Triton would have a C compiler build a launcher for it first, 0.3 s a kernel, which a plan has no use for. It loads a kernel that
    somebody has asked it to tell of, and one that the card has too little for, of which it says what.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    if kernel in _loaded_here:
        return _loaded_here[kernel]
    hooks = (knobs.runtime.kernel_load_start_hook, knobs.runtime.kernel_load_end_hook)
    told = any(h is not None and getattr(h, "calls", True) for h in hooks)
    about, device, utils = kernel.metadata, driver.active.get_current_device(), driver.active.utils
    if kernel.function is None and not told and about.shared <= utils.get_device_properties(device)["max_shared_mem"]:
        _, function, _, _, threads = utils.load_binary(kernel.name, kernel.kernel, about.shared, device)
        if 32 * about.num_warps <= threads:
            return _loaded_here.setdefault(kernel, function)
    _ = kernel.run
    return kernel.function


_loaded_here: dict[Any, Any] = {}  # kernels are a device's own, and Triton keeps them for good


def _values(step: Launch, kernel: Any, driver: Driver) -> list[Value]:
    """Parameters in order."""
    names = step.kernel.arg_names
    given = dict(zip(names, step.args)) | step.kwargs
    maps = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    found: list[Value] = []
    for name, kind in kernel.src.signature.items():
        if kind == "constexpr":
            continue
        v = given[name]
        if kind.startswith("*"):
            found.append(_pointer(v))
        elif kind.startswith("tensordesc"):
            found += _described(v, next(maps), driver)
        elif kind in _FORMATS:
            found.append(struct.pack(_FORMATS[kind], v))
        else:
            raise NotRecorded(f"an argument of type {kind}")
    return [*found, bytes(8), bytes(8)]


def _pointer(v: Any) -> Pointer:
    if not isinstance(v, Later):
        raise NotRecorded("a pointer to something else than an operand")
    return Pointer(v.root, v.start * v.dtype.itemsize)


def _described(d: Any, about: Any, driver: Driver) -> list[Value]:
    """A descriptor: map, sizes (int32), strides (int64, elements)."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST as KINDS

    if about is None or about["fp4_padded"] or d.padding != "zero" or getattr(d, "round_f32_to_tf32", False):
        raise NotRecorded("a descriptor of another kind")
    sizes, strides = list(d.shape), list(d.strides)
    made = TensorMap(
        driver, KINDS[about["elem_type"]], about["swizzle"], sizes, [s * about["elem_size"] for s in strides], list(about["block_size"])
    )
    plain = [*(struct.pack("i", n) for n in sizes), *(struct.pack("q", s) for s in strides)]
    return [Map(_pointer(d.base), made), *plain]


def check(ptx: str, values: tuple[Value, ...]) -> None:
    """Raises NotRecorded where the kernel's parameters are not of these sizes."""
    mine = [8 if isinstance(v, Pointer) else MAP_BYTES if isinstance(v, Map) else len(v) for v in values]
    if parameters(ptx) != mine:
        raise NotRecorded(f"parameters of other sizes than expected: {parameters(ptx)}, not {mine}")


def parameters(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel in a PTX text."""
    head = ptx[ptx.index(".entry") :]
    head = head[: head.index(")")]
    return [int(m["size"]) if m["size"] else int(m["type"][1:]) // 8 for m in _PARAMETER.finditer(head)]


def cell(v: bytes) -> Any:
    """Memory of its own for a value."""
    return ctypes.create_string_buffer(v, max(len(v), 8))
