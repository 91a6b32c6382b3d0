"""The CPU kernels: one small shared library per direction and storage type, from the package or compiled once per machine and kept on disk.

A wheel may bring some (`prebuilt`): one for the highest level of the processor is taken as it is; else they are built, and a lower one
is what is left where they cannot be.
The compiler is the one Inductor would use. Without one, or with one that fails, `library` returns None, the ops run in plain torch, a
warning says so and `failure` why. Instructions: `levels`.
The cache is `$MOE_COMPILE_CACHE_DIR`, else `$XDG_CACHE_HOME/moe_compile`, else `~/.cache/moe_compile`.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path

import torch

from ...ir.scalar import LIMITS_PASS
from . import levels, prebuilt
from .lock import locked

log = logging.getLogger(__name__)

if not LIMITS_PASS:
    prebuilt.variant = ("-DOPEN_CLAMP",)

STORAGE = {torch.float32: "STORAGE_F32", torch.bfloat16: "STORAGE_BF16", torch.float16: "STORAGE_F16"}

_Key = tuple[str, torch.dtype, str]  # direction, dtype, level of instructions
_lock = threading.Lock()
_builds: dict[_Key, Future[ctypes.CDLL | str]] = {}  # of the kernels, or of why there are none
_told: set[str] = set()
_threads: list[threading.Thread] = []
_compilers: set[subprocess.Popen[str]] = set()
_ending = threading.Event()


def start(direction: str, dtype: torch.dtype) -> None:
    """Begin building "forward", "packed", "backward" or "route" for a dtype on another thread, unless it is built or has no kernels."""
    if dtype in STORAGE:
        _begun(direction, dtype)


def library(direction: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The loaded kernels; builds them or waits for the build. None when there is no way to have them."""
    if dtype not in STORAGE:
        return None
    found = _begun(direction, dtype).result()
    return None if isinstance(found, str) else found


def failure(direction: str, dtype: torch.dtype, patience: float | None = None) -> str | None:
    """Why there are no kernels for a dtype that has some, in one sentence; None where there are, or none are meant to be.

    Waits for the build; `patience`: so many seconds at most, and what is not known by then is no failure.
    """
    if dtype not in STORAGE:
        return None
    try:
        found = _begun(direction, dtype).result(patience)
    except TimeoutError:
        return None
    return found if isinstance(found, str) else None


def _begun(direction: str, dtype: torch.dtype) -> Future[ctypes.CDLL | str]:
    key = direction, dtype, levels.chosen()
    with _lock:
        future = _builds.get(key)
        if future is not None:
            return future
        future = _builds[key] = Future()
        thread = began(_fill, future, key, name="moe_compile kernel build")
    thread.start()
    return future


def began(work: Callable[..., None], *args: object, name: str) -> threading.Thread:
    """A thread that builds, not started yet, whose compiler and itself are stopped when the process ends."""
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    _threads.append(thread)
    return thread


@atexit.register
def _end() -> None:
    """Stop what is still being built: the interpreter would take its threads away in the middle of what they do."""
    _ending.set()
    for compiler in list(_compilers):
        _kill(compiler)
    for thread in _threads:
        thread.join(timeout=5)


def _forked() -> None:
    """A forked process has none of the building threads: what they have not built is begun again, and their compilers are not its own."""
    global _lock
    _lock = threading.Lock()
    for key in [key for key, future in _builds.items() if not future.done()]:
        del _builds[key]
    _threads.clear()
    _compilers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _kill(compiler: subprocess.Popen[str]) -> None:
    """With the processes it has started itself, which hold the pipe it is listened to by."""
    try:
        os.killpg(compiler.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError):  # no process groups here, or ended already
        compiler.kill()


def _fill(future: Future[ctypes.CDLL | str], key: _Key) -> None:
    try:
        future.set_result(_load(*key))
    except Exception as e:  # whatever goes wrong here, plain torch still works
        reason = str(e) if isinstance(e, _NoKernels) else f"{type(e).__name__}: {e}"
        if reason not in _told and not _ending.is_set():
            _told.add(reason)
            log.warning("no CPU kernels, the experts run in plain torch: %s", reason)
        future.set_result(reason)


class _NoKernels(RuntimeError):
    """Kernels cannot be had on this machine; the message says why, to its owner."""


def _load(direction: str, dtype: torch.dtype, level: str) -> ctypes.CDLL:
    best, other = _prebuilt(direction, STORAGE[dtype], level)
    if (found := _opened(best)) is not None:
        return found
    try:
        return _built(direction, dtype, level)
    except _NoKernels:
        if (found := _opened(other)) is not None:
            return found
        raise


def _prebuilt(direction: str, storage: str, level: str) -> tuple[Path | None, Path | None]:
    """The file to take, and the one to take where none can be built."""
    if level != levels.NATIVE:
        return prebuilt.path(direction, storage, level), None
    best, other = prebuilt.best(direction, storage)
    return None if os.environ.get("MOE_COMPILE_CPU_LEVEL") == levels.NATIVE else best, other


def _opened(file: Path | None) -> ctypes.CDLL | None:
    if file is None:
        return None
    try:
        return ctypes.CDLL(str(file))
    except OSError as e:  # an older C library than that of the machine it was built on
        log.info("%s cannot be loaded here: %s", file.name, e)
        return None


def _built(direction: str, dtype: torch.dtype, level: str) -> ctypes.CDLL:
    compiler = _compiler()
    flags = prebuilt.flags(direction, STORAGE[dtype], level)
    path = _cache_dir() / f"{direction}-{_key(compiler, flags)}.so"
    ensure(compiler, flags, path)
    return ctypes.CDLL(str(path))


def ensure(compiler: str, flags: list[str], path: Path) -> None:
    """Have a file of the cache: the processes of a machine (ranks, workers) that want it at once wait for the first of them, which builds.

    Raises _NoKernels where it cannot be built.
    """
    if path.exists():
        return
    _folder(path)
    with locked(path.with_suffix(".lock"), _ending.is_set):
        if not path.exists():
            _compile(compiler, flags, path)


def _folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise _unwritable(path, e) from e


def _unwritable(path: Path, e: OSError) -> _NoKernels:
    return _NoKernels(f"the kernel cache {path.parent} cannot be written ({e.strerror}); MOE_COMPILE_CACHE_DIR names another")


def _compile(compiler: str, flags: list[str], path: Path) -> None:
    """Compile next to `path` and move into place, so that another process never sees half a file."""
    try:
        handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    except OSError as e:
        raise _unwritable(path, e) from e
    os.close(handle)
    try:
        command = [compiler, *flags, "-o", name]
        if _said(command[:1] + prebuilt.openmp() + command[1:]) is not None:
            # a compiler without OpenMP still gives correct kernels, on one thread
            said = _said(command)
            if said is not None:
                raise _NoKernels(f"the C++ compiler {compiler} failed: {said.strip()[-2000:] or 'it says nothing'}")
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _said(command: list[str]) -> str | None:
    """Run a compiler; None where it succeeds, else what it printed. Raises _NoKernels when the process ends meanwhile."""
    if _ending.is_set():
        raise _NoKernels("the process ended while the kernels were built")
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as compiler:
        _compilers.add(compiler)
        try:
            if _ending.is_set():  # between the question above and the set
                _kill(compiler)
            _, said = compiler.communicate(timeout=prebuilt.TIMEOUT_S)
        except BaseException:
            _kill(compiler)
            raise
        finally:
            _compilers.discard(compiler)
    return said if compiler.returncode else None


def _compiler() -> str:
    """Path of the C++ compiler: $CXX, else Inductor's choice."""
    wanted = os.environ.get("CXX")
    if not wanted:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            wanted = get_cpp_compiler()
        except Exception as e:  # Inductor's own InvalidCxxCompiler, under several names
            raise _NoKernels("no C++ compiler found (CXX names one)") from e
    found = shutil.which(wanted)
    if found is None:
        raise _NoKernels(f"C++ compiler {wanted!r} not found{' (CXX)' if os.environ.get('CXX') else ''}")
    return found


def _cache_dir() -> Path:
    named = os.environ.get("MOE_COMPILE_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_compile"


def _key(compiler: str, flags: list[str]) -> str:
    """Changes with the sources, the flags, the compiler and the processor (homes are shared between machines).

    Where the package lies does not matter: another environment, or another checkout of the same sources, finds what this one built.
    """
    h = hashlib.sha256(prebuilt.sources())
    stat = os.stat(compiler)
    said = [flag.replace(f"{prebuilt.SOURCES}{os.sep}", "") for flag in flags]
    h.update(repr((said, os.path.realpath(compiler), stat.st_size, stat.st_mtime_ns, _processor())).encode())
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
