"""Wheels with CPU kernels in them: MOE_COMPILE_PREBUILD=all (or levels: avx2,avx512_bf16) pip wheel . All else is in pyproject.toml."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _prebuilt() -> Any:
    """`lowering/cpu/prebuilt.py`, without the package around it, which needs torch."""
    package = types.ModuleType("_moe_cpu")
    package.__path__ = [str(Path(__file__).parent / "lowering" / "cpu")]
    sys.modules["_moe_cpu"] = package
    return importlib.import_module("_moe_cpu.prebuilt")


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise SystemExit(f"MOE_COMPILE_PREBUILD is set and there is no C++ compiler ({', '.join(names)}; CXX names one)")
    return found


class WithKernels(build_py):
    """Puts kernels beside their sources, where they are asked for."""

    def run(self) -> None:
        super().run()
        prebuilt = _prebuilt()
        levels = prebuilt.asked()
        if levels and not self.editable_mode:
            folder = Path(self.build_lib) / "moe_compile" / "lowering" / "cpu" / "prebuilt"
            compiler = _compiler()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                todo = [([kernel], level) for level in levels for kernel in prebuilt.KERNELS]
                list(pool.map(lambda t: list(prebuilt.build(folder, compiler, [t[1]], t[0], subprocess.check_call)), todo))


class ForThisMachine(bdist_wheel):
    """A wheel with kernels is for one platform, and for any Python 3."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not _prebuilt().asked()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(cmdclass={"build_py": WithKernels, "bdist_wheel": ForThisMachine})
