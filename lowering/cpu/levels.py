"""Levels of instructions that the CPU kernels are built for, and which of them this processor runs.

A level is chosen when kernels are loaded: the processor's own (everything it has, tuned for it), or the one that
`$MOE_COMPILE_CPU_LEVEL` names, for tests and for comparing; one that the processor lacks falls back to its own, with a warning.
Tiles (`amx`) are taken where the processor has them and the system grants this process their state; kernels ask for it once more
themselves, and are AVX-512 where it is refused, and for few rows of an expert everywhere.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform

log = logging.getLogger("moe_compile")

NATIVE = "native"
# level -> (the compiler's flags, what /proc/cpuinfo must list)
_X86 = {
    "avx2": (("-march=x86-64-v3",), ("avx2", "fma", "f16c", "bmi2")),
    "avx512": (("-march=x86-64-v4",), ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
    "avx512_bf16": (("-march=x86-64-v4", "-mavx512bf16"), ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16")),
    "amx": (
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"),
    ),
}
_BASE = "base"  # whatever every processor of this kind has


def named() -> tuple[str, ...]:
    """The levels for this kind of processor that do not depend on the machine, from the least on."""
    return (_BASE, *(_X86 if _is_x86() else ()))


def supported() -> tuple[str, ...]:
    """The levels that run here, from the least to the processor's own."""
    has = _instructions()
    if "amx_tile" in has and not _tiles_granted():
        has -= {"amx_tile"}
    return (_BASE, *(name for name, (_, needs) in _X86.items() if _is_x86() and has.issuperset(needs)), NATIVE)


def chosen() -> str:
    """The level to build for."""
    wanted = os.environ.get("MOE_COMPILE_CPU_LEVEL") or NATIVE
    if wanted in supported():
        return wanted
    _tell(wanted)
    return NATIVE


def flags(level: str) -> list[str]:
    """The compiler's flags for a level."""
    if level == NATIVE:
        return ["-mcpu=native"] if platform.machine().lower() in ("aarch64", "arm64", "ppc64le") else ["-march=native"]
    return list(_X86[level][0]) if level in _X86 else []


def told() -> str:
    """The level that kernels are taken or built for, and what `native` comes to here."""
    level = chosen()
    return f"{level} ({supported()[-2]})" if level == NATIVE else level


@functools.cache
def _tell(wanted: str) -> None:
    log.warning("MOE_COMPILE_CPU_LEVEL is %r; this processor runs %s: taking %r", wanted, ", ".join(supported()), NATIVE)


@functools.cache
def _tiles_granted() -> bool:
    """Whether Linux grants all threads of this process the state of tiles: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""
    try:
        return bool(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)
    except (OSError, AttributeError):
        return False


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def _instructions() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as f:
            return frozenset(next((line.split(":", 1)[1] for line in f if line.startswith("flags")), "").split())
    except OSError:
        return frozenset()
