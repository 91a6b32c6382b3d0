"""Kernels that could not be built: the report, a warning and `strict` say so, and the results stand."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import small
import torch
from test_cpu_lowering import relative

import moe_compile
from moe_compile.lowering.cpu import build as cpu_build
from moe_compile.lowering.cpu import experts as cpu
from moe_compile.lowering.cpu import levels, prebuilt


def unwritable(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    """A cache below a file: no one can make it, root neither."""
    (folder / "file").write_text("")
    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(folder / "file" / "cache"))
    return "cannot be written"


def no_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    from torch._inductor import cpp_builder

    def missing() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    return "no C++ compiler"


def wrong_name(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("CXX", "no-such-compiler")
    return "'no-such-compiler' not found (CXX)"


def failing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    bad = folder / "bad-compiler"
    bad.write_text("#!/bin/sh\necho 'cannot do this' >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", os.fspath(bad))
    return "cannot do this"


FAULTS = (unwritable, no_compiler, wrong_name, failing)


@pytest.fixture(params=FAULTS, ids=lambda f: f.__name__)
def words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A machine on which kernels cannot be built; what is to be said about it."""
    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_build, "_builds", {})
    monkeypatch.setattr(cpu_build, "_told", set())
    monkeypatch.setattr(cpu, "_found", {})
    fault: str = request.param(monkeypatch, tmp_path)
    return fault


def test_report_and_warning(words: str, caplog: pytest.LogCaptureFixture) -> None:
    block, x = small.Block().eval(), torch.randn(small.T, small.H)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="moe_compile"):
        out = small.compiled(block, inner="eager")(x)
        assert relative(out, block.double()(x.double())) < 1e-6
    report = moe_compile.last_report()
    assert report is not None
    assert [b.lowering for b in report.blocks] == ["cpu torch (float32)"]
    (note,) = report.notes
    assert words in note and "plain torch" in note and "".join(note.split()) in "".join(str(report).split())
    assert words in caplog.text


def test_strict(words: str) -> None:
    with torch.no_grad(), pytest.raises(moe_compile.NotFused, match="plain torch") as e:
        small.compiled(small.Block().eval(), inner="eager", strict=True)(torch.randn(small.T, small.H))
    assert words in str(e.value) and "small.py" in str(e.value)


def test_explain(words: str) -> None:
    report = moe_compile.explain(small.Block().eval(), torch.randn(small.T, small.H))
    assert [b.lowering for b in report.blocks] == ["cpu torch (float32)"] and words in str(report.notes)


ENDS = """
import sys, time, torch
from moe_compile.lowering.cpu import build
build.start("forward", torch.float32)
while not build._compilers:
    time.sleep(0.01)
print(next(iter(build._compilers)).pid)
"""


def slow_compiler(folder: Path) -> dict[str, str]:
    """One that would take an hour, in a process of its own as that of a real compiler is."""
    slow = folder / "slow-compiler"
    slow.write_text("#!/bin/sh\nsleep 3600\n")
    slow.chmod(0o755)
    return {**os.environ, "CXX": str(slow), "MOE_COMPILE_CACHE_DIR": str(folder / "cache")}


def alive(group: int) -> list[str]:
    """The processes of a group that still run: what was killed may wait for its parent to ask after it."""
    said = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in said if line.split()[0] == str(group) and not line.split()[1].startswith("Z")]


@pytest.mark.skipif(shutil.which("ps") is None, reason="no ps here")
def test_a_process_that_ends_meanwhile_takes_the_compiler_along(tmp_path) -> None:
    """It ends at once and as if nothing were built; neither the compiler nor half a file is left."""
    done = subprocess.run([sys.executable, "-c", ENDS], env=slow_compiler(tmp_path), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert alive(int(done.stdout)) == []
    assert list((tmp_path / "cache").iterdir()) == []


FORKS = """
import os
import subprocess
import sys
child = os.fork()
if child == 0:
    assert not build._builds and not build._compilers and build._lock.acquire(blocking=False)
    sys.exit(0)  # ends as its parent does, whose compiler goes on
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert next(iter(build._compilers)).poll() is None
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_waits_for_no_thread_of_its_parent(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS + FORKS], env=slow_compiler(tmp_path), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_wants_the_same_kernels_at_once_builds_them_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks of a job, workers of these tests: all wait for the first, and load what it built. (A lock is one of an opened file.)"""
    built: list[Path] = []

    def compile_(compiler: str, flags: list[str], path: Path) -> None:
        time.sleep(0.2)
        path.touch()
        built.append(path)

    monkeypatch.setattr(cpu_build, "_compile", compile_)
    path = tmp_path / "cache" / "route.so"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: cpu_build.ensure("c++", [], path), range(3)))
    assert built == [path] and list(path.parent.iterdir()) == [path]


def test_a_lock_that_cannot_be_taken_away_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of others, a disk that became read-only: who comes next takes the lock that was left."""
    monkeypatch.setattr(cpu_build, "_compile", lambda compiler, flags, path: path.touch())
    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", lambda *_, **__: os.rmdir(tmp_path / "cache"))  # OSError
        cpu_build.ensure("c++", [], tmp_path / "cache" / "route.so")
    (tmp_path / "cache" / "route.so").unlink()
    cpu_build.ensure("c++", [], tmp_path / "cache" / "route.so")
    assert [f.name for f in (tmp_path / "cache").iterdir()] == ["route.so"]


def test_the_key_does_not_tell_where_the_sources_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def key() -> str:
        return cpu_build._key(sys.executable, prebuilt.flags("route", "STORAGE_F32", levels.NATIVE))

    here = key()
    monkeypatch.setattr(prebuilt, "SOURCES", shutil.copytree(prebuilt.SOURCES, tmp_path / "kernels"))
    prebuilt.sources.cache_clear()
    assert key() == here
    with (tmp_path / "kernels" / "route.cpp").open("a") as f:
        f.write("// another\n")
    prebuilt.sources.cache_clear()
    changed = key()
    prebuilt.sources.cache_clear()
    assert changed != here
