"""CPU kernels that come with the package: shared objects for each level of instructions, built when a wheel is.

They know nothing of Python or torch (plain C functions, called by ctypes), so one file serves all versions of both. Its name has a hash
of the sources and flags: one of other sources is never loaded. Needs no torch: `setup.py` runs it too.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from . import levels

SOURCES = Path(__file__).parent / "kernels"
FOLDER = Path(__file__).parent / "prebuilt"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
variant: tuple[str, ...] = ()  # more flags for the torch that is there; a wheel is built for the others
TYPES = ("STORAGE_F32", "STORAGE_BF16", "STORAGE_F16")
KERNELS = tuple((d, t) for d in ("forward", "packed", "backward", "coded") for t in TYPES) + (("route", "STORAGE_F32"),)
TIMEOUT_S = 300


def flags(direction: str, storage: str, level: str) -> list[str]:
    """What a compiler is given, without its output."""
    return [*FLAGS, *variant, *levels.flags(level), f"-D{storage}", str(SOURCES / f"{direction}.cpp")]


def openmp() -> list[str]:
    """The runtime is found by name: torch has loaded its own libgomp, so both share one pool of threads."""
    return [] if sys.platform == "darwin" else ["-fopenmp"]


@lru_cache(maxsize=1)
def sources() -> bytes:
    """A digest of the kernels' sources."""
    h = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".h", ".cpp"):
            h.update(file.name.encode() + file.read_bytes())
    return h.digest()


def name(direction: str, storage: str, level: str) -> str:
    """File name of a kernel: of these sources and flags, for one level."""
    key = hashlib.sha256(sources() + repr((FLAGS + variant, levels.flags(level))).encode()).hexdigest()[:16]
    return f"{direction}-{storage.removeprefix('STORAGE_').lower()}-{level}-{key}.so"


def path(direction: str, storage: str, level: str) -> Path | None:
    """The file for a level, where there is one."""
    found = FOLDER / name(direction, storage, level)
    return found if found.is_file() else None


def best(direction: str, storage: str) -> tuple[Path | None, Path | None]:
    """For this processor: the file of its highest level, and that of the highest one that there is a file for."""
    *known, _ = levels.supported()
    files = [path(direction, storage, level) for level in reversed(known)]
    return files[0], next((f for f in files if f is not None), None)


def held() -> list[str]:
    """The levels that this package has kernels for."""
    return [level for level in levels.named() if any(path(d, t, level) for d, t in KERNELS)]


def build(
    folder: Path,
    compiler: str,
    wanted: Iterable[str],
    kernels: Iterable[tuple[str, str]] = KERNELS,
    run: Callable[[list[str]], object] = subprocess.check_call,
) -> Iterator[Path]:
    """Compile kernels for levels into a folder. Raises CalledProcessError where the compiler fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for level in wanted:
        for direction, storage in kernels:
            to = folder / name(direction, storage, level)
            if not to.exists():
                run([compiler, *openmp(), *flags(direction, storage, level), "-o", str(to)])
            yield to


def asked() -> list[str]:
    """The levels that `$MOE_COMPILE_PREBUILD` names ("all": every one). Raises ValueError for others."""
    words = [w for w in os.environ.get("MOE_COMPILE_PREBUILD", "").replace(",", " ").split() if w != "0"]
    if words == ["all"]:
        return list(levels.named())
    unknown = [w for w in words if w not in levels.named()]
    if unknown:
        raise ValueError(f"MOE_COMPILE_PREBUILD names {', '.join(unknown)}; allowed are {', '.join(levels.named())}, or all")
    return words
