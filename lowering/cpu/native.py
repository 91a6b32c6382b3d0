"""The experts op as C++ calls it (kernels/call.cpp): what was seen before goes to its kernel without any Python.

A library of its own, built against torch's headers in the background when an experts op first runs; until it is loaded, and where it
cannot be built, the op runs through Python: the same kernels, some microseconds later. Its key in the cache tells torch's version.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..reference.generic import Layout
from . import build, experts, frozen, prebuilt
from .call import Call

log = logging.getLogger(__name__)

_called = torch.ops.moe_compile
_lock = threading.Lock()


@dataclass
class _State:
    """The library: who builds it, where it is once built."""

    thread: threading.Thread | None = None
    path: Path | None = None
    loaded: bool = False
    failed: bool = False


_state = _State()
_run: Callable[..., Tensor]


def define(run: Callable[..., Tensor]) -> None:
    """Define what C++ calls, and let `run`, the experts op in Python, run it while C++ does not."""
    global _run
    _run = run
    for name in ("cpu_experts_first", "cpu_experts_gradient"):
        ops.library.define(name + ops.schema_of("experts"))
        ops.library.impl(name, _first, "CompositeExplicitAutograd")
    ops.library.impl("cpu_experts_gradient", ops.autograd.experts, "Autograd")
    ops.library.define("cpu_remember(int args, int kernel, int consts, Tensor[] sources, int[] versions, Tensor[] packed) -> ()")
    ops.library.define("cpu_forget() -> ()")
    ops.anywhere.until_loaded("cpu", _in_python)


def _in_python(*args: Any) -> Tensor:
    load(wait=False)
    return _run(*args)


def load(wait: bool) -> bool:
    """Whether C++ runs the op from now on; starts the build, and waits for it if asked to."""
    if _state.loaded or _state.failed:
        return _state.loaded
    with _lock:
        if _state.thread is None:
            _state.thread = build.began(_build, _state, name="moe_compile call build")
            _state.thread.start()
    if wait:
        _state.thread.join()
    with _lock:
        if _state.path is not None and not _state.loaded:
            torch.ops.load_library(str(_state.path))
            _state.loaded = True
    return _state.loaded


def _build(state: _State) -> None:
    try:
        compiler = build._compiler()
        torch_folder = Path(torch.__file__).parent
        flags = ["-O2", "-std=c++20", "-fPIC", "-shared", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
        flags += [f"-I{torch_folder / 'include'}", str(prebuilt.SOURCES / "call.cpp"), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        path = build._cache_dir() / f"call-{build._key(compiler, [*flags, torch.__version__])}.so"
        build.ensure(compiler, flags, path)
        state.path = path
    except Exception as e:  # Python does the same
        state.failed = True
        log.info("the experts op is called through Python: %s", e)


def _first(*args: Any) -> Tensor:
    """The op for operands that C++ does not know (any more): run it, and let C++ know what they come to."""
    x, _, _, p, (_, *plain) = ops.bundled(args)
    layout = ops.layout_of(plain)
    out = _run(*args)
    if x.ndim == 2 and all(b.is_contiguous() for b in (*p.up_bias, *p.down_bias)):
        found = experts._kernel("inference", x, layout, p)
        if found is not None:
            _remember(*found, layout)
    return out


def _remember(library: ctypes.CDLL, call: Call, layout: Layout) -> None:
    kernel = ctypes.cast(library.moe_experts_forward, ctypes.c_void_p).value
    watched = [] if call.sources is None else call.sources.parameters()
    packed = [] if call.sources is None else [t for t in call.keep if isinstance(t, Tensor)]
    parameters, versions = [p for p, _ in watched], [v for _, v in watched]
    _called.cpu_remember(ctypes.addressof(call.args), kernel, len(layout.act_consts), parameters, versions, packed)


def _forget(_: int | None) -> None:
    if _state.loaded:
        _called.cpu_forget()


frozen.changed.append(_forget)
