"""A CUDA driver that launches nothing, so that the host's share of a call can be measured, and plans be made, on a machine without a GPU.

Triton compiles for a Hopper card as it would there; the driver's functions are C functions that return at once. Operands lie in
main memory and are never read.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_SOURCE = """
typedef unsigned long long u64;
int cuLaunchKernelEx(void *a, void *b, void *c, void *d) { return 0; }
int cuTensorMapEncodeTiled(void *m, int t, unsigned r, void *a, void *s, void *d, void *b, void *e, int i, int w, int l, int f) {
  return 0;
}
int cuEventCreate(void **e, unsigned f) { *e = (void *)1; return 0; }
int cuEventRecord(void *e, void *s) { return 0; }
int cuStreamWaitEvent(void *s, void *e, unsigned f) { return 0; }
int cuMemsetD32Async(u64 p, unsigned v, u64 n, void *s) { return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuDeviceGet(int *d, int i) { return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuGetErrorString(int code, const char **text) { *text = "stub"; return 0; }
"""
CARD = "nvidia_h100_80gb_hbm3"


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Triton:
    """What Triton asks of its driver to compile and to launch, for a Hopper card that is not there."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return 9, 0


def library() -> Any:
    """The stub as a loaded library. Raises FileNotFoundError without a C compiler."""
    folder = Path(tempfile.mkdtemp())
    source = folder / "stub.c"
    source.write_text(_SOURCE)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(folder / "stub.so"), str(source)], check=True)
    return ctypes.CDLL(str(folder / "stub.so"))


_pool: dict[Any, torch.Tensor] = {}


def _from_a_pool(shape: Any, strides: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As quick as a caching allocator."""
    key = (shape, dtype)
    if key not in _pool:
        _pool[key] = torch.empty_strided(shape, strides, dtype=dtype)
    return _pool[key].detach()


def install() -> None:
    """From here on, plans are made for a card that is not there, of operands in main memory. Once, before anything is called."""
    from triton.runtime.driver import driver as triton_driver

    from moe_compile.lowering.triton import calls, tune  # noqa: F401 (with all it needs)
    from moe_compile.lowering.triton.launch import driver, plan, plans, tape

    triton_driver.set_active(_Triton())
    made = driver.Driver(library())
    driver.found = lambda: made
    plans.current_stream = lambda index: 0
    plan._empty = _from_a_pool
    side = type("Stream", (), {"cuda_stream": 1})()
    plan.side_stream = tape.side_stream = lambda device, first=False: side
    tune.card = lambda device: CARD
    for module in [m for name, m in sys.modules.items() if name.startswith("moe_compile.lowering.triton.")]:
        for name, told in (("capability", (9, 0)), ("processors", 132)):
            if hasattr(module, name):
                setattr(module, name, lambda device, told=told: told)
    plans.device_of = lambda tensors: torch.device("cuda", 0)
