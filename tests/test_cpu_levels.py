"""Levels of instructions: each that this machine has computes the same, one that it lacks falls back."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from conftest import bundle, have_compiler
from test_cpu_lowering import LAYOUTS, ROUTINGS, grads_of, layout, make, relative
from test_cpu_packed import frozen, packed

from moe_compile.lowering.cpu import build as cpu_build
from moe_compile.lowering.cpu import experts as cpu
from moe_compile.lowering.cpu import frozen as cpu_frozen
from moe_compile.lowering.cpu import levels as cpu_levels
from moe_compile.lowering.reference import generic

needs_kernels = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler on this machine")
LEVELS = ("base", "avx2", "avx512", "avx512_bf16", "amx", "native")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_found", {})
    monkeypatch.setattr(cpu_frozen, "_frozen", {})


# Each level builds kernels for 15 to 25 s: the newest in both dtypes, another in one (`make zoo`'s ZOO_ALL: all)
_BOTH = [(level, dtype) for level in LEVELS for dtype in (torch.float32, torch.bfloat16)]
_HERE = [("avx2", torch.bfloat16), ("native", torch.float32), ("native", torch.bfloat16)]


@needs_kernels
@pytest.mark.parametrize(("level", "dtype"), _BOTH if "ZOO_ALL" in os.environ else _HERE, ids=str)
def test_every_level_of_this_machine(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values against float64, as the model holds the weights and packed; gradients against plain torch."""
    if level not in cpu_levels.supported():
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("MOE_COMPILE_CPU_LEVEL", level)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    for name in ("concat", "odd sizes", "transposed"):
        for routing in ("one token", "few", "many"):
            e = LAYOUTS[name]
            t = make(e, ROUTINGS[routing](e.num_experts), dtype)
            want, pre = e.evaluate(**t), generic.forward(*bundle(t), layout(e))[1]
            assert relative(cpu.forward(*bundle(t), layout(e), save=False)[0], want) < tolerance
            grad = torch.ones_like(t["x"])
            for g, w in zip(grads_of(cpu.backward, t, pre, e, grad), grads_of(generic.backward, t, pre, e, grad), strict=True):
                assert relative(g, w) < 2 * tolerance
            module = frozen(t)
            with torch.no_grad():
                assert relative(cpu.forward(*bundle(t), layout(e), save=False)[0], want) < tolerance
            assert packed() > 0
            del module
    assert {key[2] for key in cpu_build._builds if key[0] == "packed"} >= {level}


def test_the_least_and_the_own_level_are_always_there() -> None:
    assert cpu_levels.supported()[0] == "base" and cpu_levels.supported()[-1] == "native"
    assert cpu_levels.flags("base") == [] and cpu_levels.flags("avx2") == ["-march=x86-64-v3"]


@pytest.mark.parametrize("wanted", ["avx512", "no-such"])
def test_a_level_that_is_not_there_falls_back(wanted: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu_levels, "_instructions", lambda: frozenset({"avx2", "fma", "f16c", "bmi2"}))
    monkeypatch.setenv("MOE_COMPILE_CPU_LEVEL", wanted)
    cpu_levels._tell.cache_clear()
    with caplog.at_level(logging.WARNING, logger="moe_compile"):
        assert cpu_levels.chosen() == "native"
    assert wanted in caplog.text and "base" in caplog.text


@pytest.mark.parametrize("granted", [True, False])
def test_tiles_are_a_level_where_the_system_grants_them(granted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = frozenset(need for _, needs in cpu_levels._X86.values() for need in needs)
    monkeypatch.setattr(cpu_levels, "_instructions", lambda: flags)
    monkeypatch.setattr(cpu_levels, "_tiles_granted", lambda: granted)
    monkeypatch.setattr(cpu_levels, "_is_x86", lambda: True)
    monkeypatch.delenv("MOE_COMPILE_CPU_LEVEL", raising=False)
    highest = "amx" if granted else "avx512_bf16"
    assert cpu_levels.supported()[-2] == highest and cpu_levels.told() == f"native ({highest})"
