"""Builds the CPU kernels: one small shared library per direction and storage type, compiled once per machine, kept on disk.

The compiler is the one Inductor would use. Without one, or with one that fails, `library` returns None and the ops run in
plain torch. The cache is `$MOE_COMPILE_CACHE_DIR`, else `$XDG_CACHE_HOME/moe_compile`, else `~/.cache/moe_compile`.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "kernels"
STORAGE = {torch.float32: "STORAGE_F32", torch.bfloat16: "STORAGE_BF16", torch.float16: "STORAGE_F16"}
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
_TIMEOUT_S = 300

_lock = threading.Lock()
_builds: dict[tuple[str, torch.dtype], Future[ctypes.CDLL | None]] = {}


def start(direction: str, dtype: torch.dtype) -> None:
    """Begin building "forward" or "backward" for a dtype on another thread, unless it is built or has no kernels."""
    if dtype not in STORAGE:
        return
    with _lock:
        if (direction, dtype) in _builds:
            return
        future: Future[ctypes.CDLL | None] = Future()
        _builds[direction, dtype] = future
    threading.Thread(target=_fill, args=(future, direction, dtype), name="moe_compile kernel build", daemon=True).start()


def library(direction: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The loaded kernels; builds them or waits for the build. None when there is no way to have them."""
    future = _builds.get((direction, dtype))
    if future is None:
        start(direction, dtype)
        future = _builds.get((direction, dtype))
    return None if future is None else future.result()


def _fill(future: Future[ctypes.CDLL | None], direction: str, dtype: torch.dtype) -> None:
    try:
        future.set_result(_load(direction, dtype))
    except Exception as e:  # whatever goes wrong here, plain torch still works
        log.info("no CPU kernels for %s (%s), running in plain torch: %s", dtype, direction, e)
        future.set_result(None)


def _load(direction: str, dtype: torch.dtype) -> ctypes.CDLL:
    compiler = _compiler()
    flags = [*_FLAGS, *_machine_flags(), f"-D{STORAGE[dtype]}", str(SOURCES / f"{direction}.cpp")]
    path = _cache_dir() / f"{direction}-{_key(compiler, flags)}.so"
    if not path.exists():
        _compile(compiler, flags, path)
    return ctypes.CDLL(str(path))


def _compile(compiler: str, flags: list[str], path: Path) -> None:
    """Compile next to `path` and move into place, so that another process never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        command = [compiler, *flags, "-o", name]
        if subprocess.run(command[:1] + _openmp_flags() + command[1:], capture_output=True, timeout=_TIMEOUT_S).returncode:
            # a compiler without OpenMP still gives correct kernels, on one thread
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
            if done.returncode:
                raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _compiler() -> str:
    """Path of the C++ compiler: $CXX, else Inductor's choice."""
    wanted = os.environ.get("CXX")
    if not wanted:
        from torch._inductor.cpp_builder import get_cpp_compiler

        wanted = get_cpp_compiler()
    found = shutil.which(wanted)
    if found is None:
        raise RuntimeError(f"C++ compiler {wanted!r} not found")
    return found


def _openmp_flags() -> list[str]:
    # The runtime is found by name: torch has loaded its own libgomp, so both share one pool of threads.
    return [] if sys.platform == "darwin" else ["-fopenmp"]


def _machine_flags() -> list[str]:
    return ["-mcpu=native"] if platform.machine().lower() in ("aarch64", "arm64", "ppc64le") else ["-march=native"]


def _cache_dir() -> Path:
    named = os.environ.get("MOE_COMPILE_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_compile"


def _key(compiler: str, flags: list[str]) -> str:
    """Changes with the sources, the flags, the compiler and the processor (homes are shared between machines)."""
    h = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".h", ".cpp"):
            h.update(file.name.encode() + file.read_bytes())
    stat = os.stat(compiler)
    h.update(repr((flags, os.path.realpath(compiler), stat.st_size, stat.st_mtime_ns, _processor())).encode())
    return h.hexdigest()[:24]


@lru_cache(maxsize=1)
def _processor() -> str:
    """What decides which instructions there are."""
    try:
        with open("/proc/cpuinfo") as f:
            seen = {line.split(":")[0].strip(): line for line in f}
        return "".join(seen.get(name, "") for name in ("model name", "model", "flags", "Features", "CPU part"))
    except OSError:
        return platform.processor() + platform.machine() + platform.node()
