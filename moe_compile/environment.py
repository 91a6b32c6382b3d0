"""What this machine has for the compiler: versions, devices, caches, and what each target lacks. For bug reports."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "torch_npu", "transformers", "torchao", "sympy", "numpy")


def describe() -> str:
    """One `name: value` a line. Leaves nothing behind; raises nothing that a machine can cause."""
    return "\n".join(f"{name + ':':<14} {value}" for name, value in _lines())


def _lines() -> Iterator[tuple[str, str]]:
    from . import __version__
    from .lowering import targets
    from .lowering.cpu import levels

    yield "moe_compile", f"{__version__} in {Path(__file__).parent}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    for name in PACKAGES:
        yield name, _version(name)
    yield "processor", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    yield "C++ compiler", _compiler()
    yield "devices", ", ".join(_devices()) or "none but the CPU"
    yield "cache", _cache()
    yield "CPU kernels", levels.told()
    for name, t in targets().items():
        yield f"target {name}", t.missing() or "ready"
    for name in sorted(n for n in os.environ if n.startswith("MOE_COMPILE_")):
        yield name, os.environ[name]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    """What Inductor and the CPU kernels are compiled with."""
    from torch._inductor import cpp_builder

    try:
        return f"{cpp_builder.get_cpp_compiler()}, CXX={os.environ['CXX']}" if "CXX" in os.environ else cpp_builder.get_cpp_compiler()
    except Exception as e:  # whatever a compiler, or its absence, does
        return f"none: {(str(e).strip() or type(e).__name__).splitlines()[0]}"


def _devices() -> Iterator[str]:
    for i in range(torch.cuda.device_count()):
        yield f"{torch.cuda.get_device_name(i)} (compute capability {'.'.join(map(str, torch.cuda.get_device_capability(i)))})"


def _cache() -> str:
    """The folder of compiled kernels and plans, and whether it can be written."""
    given = os.environ.get("MOE_COMPILE_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given) if given else Path(base) / "moe_compile"
    return f"{folder}" + (f" (cannot be written: {why})" if (why := _unwritable(folder)) else "")


def _unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder that may not be there yet; "" if it can. Permissions do not tell: root has all of them in
    /proc and on a disk that is read-only. So a file is made where it would be, and is gone again."""
    try:
        there = next(p for p in (folder, *folder.parents) if p.exists())
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as e:
        return e.strerror or type(e).__name__
