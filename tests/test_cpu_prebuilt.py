"""Kernels that come with the package: taken by level and by their sources' hash, without a compiler; built and plain torch after them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import have_compiler

from moe_compile.lowering.cpu import build as cpu_build
from moe_compile.lowering.cpu import levels, prebuilt, told

ROUTE = ("route", "STORAGE_F32")
needs_kernels = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler on this machine")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a compiler, with nothing built; the folder of kernels that came with the package."""
    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MOE_COMPILE_CPU_LEVEL", raising=False)
    monkeypatch.setenv("CXX", "/no/where/c++")
    monkeypatch.setattr(cpu_build, "_builds", {})
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path / "prebuilt")
    return tmp_path / "prebuilt"


def fill(folder: Path, *wanted: str) -> None:
    compiler = next(c for c in ("g++", "clang++", "c++") if shutil.which(c))
    list(prebuilt.build(folder, compiler, wanted, [ROUTE]))


@needs_kernels
def test_the_highest_level_needs_no_compiler(bare: Path) -> None:
    highest = levels.supported()[-2]
    fill(bare, highest)
    assert cpu_build.library("route", torch.float32) is not None and cpu_build.failure("route", torch.float32) is None
    assert prebuilt.held() == [highest] and highest in told.missing()
    assert not (bare.parent / "cache").exists()  # nothing was built


@needs_kernels
def test_a_lower_level_is_what_is_left(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a higher one could be built it is; "native" asks for it."""
    fill(bare, "base")
    assert cpu_build.library("route", torch.float32) is not None
    built: list[str] = []
    monkeypatch.setattr(cpu_build, "_builds", {})
    monkeypatch.setattr(cpu_build, "_built", lambda direction, *_: built.append(direction))
    cpu_build.library("route", torch.float32)
    assert built == ["route"] or levels.supported()[-2] == "base"


def test_other_sources_are_never_loaded(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of older sources lies there: its name is another."""
    bare.mkdir()
    for level in levels.named():
        (bare / prebuilt.name(*ROUTE, level)).write_bytes(b"no kernel")
    names = {f.name for f in bare.iterdir()}
    monkeypatch.setattr(prebuilt, "sources", lambda: b"newer")
    assert not names & {prebuilt.name(*ROUTE, level) for level in levels.named()}
    assert prebuilt.best(*ROUTE) == (None, None) and prebuilt.held() == []
    assert cpu_build.library("route", torch.float32) is None and "not found" in str(cpu_build.failure("route", torch.float32))


def test_one_that_cannot_be_loaded_is_passed_over(bare: Path) -> None:
    bare.mkdir()
    for level in levels.named():
        (bare / prebuilt.name(*ROUTE, level)).write_bytes(b"no kernel")
    assert cpu_build.library("route", torch.float32) is None


def test_levels_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, found in (("", []), ("0", []), ("base", ["base"]), ("all", list(levels.named()))):
        monkeypatch.setenv("MOE_COMPILE_PREBUILD", words)
        assert prebuilt.asked() == found
    monkeypatch.setenv("MOE_COMPILE_PREBUILD", "avx3")
    with pytest.raises(ValueError, match=r"avx3; allowed are base"):
        prebuilt.asked()


def test_a_compiler_that_fails_is_no_wheel(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        list(prebuilt.build(tmp_path, "false", ["base"], [ROUTE]))
