"""Products in tiles (AMX): the kernels' own source on emulated tiles, and on real ones where the processor has them.

The product alone runs everywhere that has pairs of bf16; whole kernels (20 s of a compiler) in `make zoo`, and on processors with tiles.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import bundle, have_compiler
from test_cpu_coded import SCHEMES, WIDE, call, operands
from test_cpu_lowering import LAYOUTS, ROUTINGS, balanced, block, layout, make, relative
from test_cpu_packed import frozen, packed
from torch import Tensor

from moe_compile.lowering.cpu import build as cpu_build
from moe_compile.lowering.cpu import coded, levels, prebuilt
from moe_compile.lowering.cpu import experts as cpu
from moe_compile.lowering.cpu import frozen as cpu_frozen

PAIRS = have_compiler() and "avx512_bf16" in levels.supported()
REAL = have_compiler() and "amx" in levels.supported()
pytestmark = pytest.mark.skipif(not PAIRS, reason="no pairs of bf16 on this processor, or no C++ compiler")

_PRODUCT = r"""
#include "amx.h"
extern "C" int product(
    const unit* panel, i64 stride, i64 lanes, const element* rows, i64 apart, i64 n, i64 readable, i64 units, float* out, i64 os) {
  const element* at[64];
  for (i64 r = 0; r < n; r++) at[r] = rows + r * apart;
  const Tiles tiles(true);
  return tile_product(panel, stride, lanes, Spaced{at, n, readable}, units, out, os, Stream{}, false);
}
"""


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "product.cpp").write_text(_PRODUCT)
    flags = [
        "-std=c++17",
        "-fPIC",
        "-shared",
        "-w",
        "-DSTORAGE_BF16",
        f"-I{prebuilt.SOURCES}",
        *levels.flags("amx" if REAL else "avx512_bf16"),
    ]
    emulated = [] if REAL else ["-DMOE_AMX_EMULATED"]
    subprocess.check_call([cpu_build._compiler(), *flags, *emulated, str(folder / "product.cpp"), "-o", str(folder / "product.so")])
    return ctypes.CDLL(str(folder / "product.so"))


def test_product_of_any_size(product: ctypes.CDLL) -> None:
    """Sums of rows, depths and lanes that fill no tile; what lies behind the rows, and lanes past them, is not touched."""
    gen = torch.Generator().manual_seed(0)
    for n, units, lanes in [(1, 16, 16), (3, 5, 32), (15, 40, 48), (16, 16, 64), (17, 33, 16), (33, 48, 64), (50, 100, 48)]:
        readable, apart, stride = max(n, 16), 2 * units + 6, lanes + 16
        rows = torch.randn(readable, apart, generator=gen).bfloat16()
        rows[:, 2 * units :], rows[n:] = torch.nan, torch.nan
        panel = torch.randn(units, stride, 2, generator=gen).bfloat16()
        panel[:, lanes:] = torch.nan
        out = torch.full((n + 1, lanes + 3), 7.0)
        sizes = [ctypes.c_int64(v) for v in (apart, n, readable, units)]
        at = [ctypes.c_void_p(t.data_ptr()) for t in (panel, rows, out)]
        assert product.product(at[0], ctypes.c_int64(stride), ctypes.c_int64(lanes), at[1], *sizes, at[2], ctypes.c_int64(lanes + 3))
        want = torch.einsum("rkp,klp->rl", rows[:n, : 2 * units].double().reshape(n, units, 2), panel[:, :lanes].double())
        assert relative(out[:n, :lanes], want) < 1e-6
        assert np.array_equal(out[n:].numpy(), np.full((1, lanes + 3), 7.0)) and bool((out[:, lanes:] == 7).all())


def test_rows_that_are_not_evenly_spaced_are_left(product: ctypes.CDLL) -> None:
    """Fewer rows than a tile has of which no more may be read."""
    rows, panel, out = torch.zeros(3, 32).bfloat16(), torch.zeros(16, 16, 2).bfloat16(), torch.zeros(3, 16)
    at = [ctypes.c_void_p(t.data_ptr()) for t in (panel, rows, out)]
    sizes = [ctypes.c_int64(v) for v in (32, 3, 3, 16)]
    assert not product.product(at[0], ctypes.c_int64(16), ctypes.c_int64(16), at[1], *sizes, at[2], ctypes.c_int64(16))


# ---- whole kernels ---------------------------------------------------------------------------------------------------

whole = pytest.mark.skipif(not REAL and "ZOO_ALL" not in os.environ, reason="whole kernels on emulated tiles: make zoo")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that run in tiles from two rows of an expert on."""
    monkeypatch.setattr(cpu, "_found", {})
    monkeypatch.setattr(cpu_frozen, "_frozen", {})
    monkeypatch.setattr(cpu_build, "_builds", {})
    monkeypatch.delenv("MOE_COMPILE_CPU_LEVEL", raising=False)
    if not REAL:
        monkeypatch.setattr(prebuilt, "variant", (*prebuilt.variant, "-DMOE_AMX_EMULATED"))
    monkeypatch.setattr(coded, "_found", {})
    monkeypatch.setattr(coded, "_seen", {})
    libraries = [cpu_build.library(direction, torch.bfloat16) for direction in ("forward", "packed")]
    assert all(library is not None and library.moe_tiles_from(ctypes.c_int64(2)) for library in libraries)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for library, rows in zip(libraries, (5, 2), strict=True):
        library.moe_tiles_from(ctypes.c_int64(rows))  # type: ignore[union-attr]


def both(t: dict[str, object], e: object) -> list[Tensor]:
    """Outputs on weights as they are held and on packed ones."""
    held = cpu.forward(*bundle(t), layout(e), save=False)[0]
    module = frozen(t)
    with torch.no_grad():
        ours = cpu.forward(*bundle(t), layout(e), save=False)[0]
    assert packed() > 0
    del module
    return [held.detach(), ours]


@whole
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", LAYOUTS, ids=str)
def test_kernels_against_the_oracle(name: str) -> None:
    e = LAYOUTS[name]
    for routing in ROUTINGS.values():
        t = make(e, routing(e.num_experts), torch.bfloat16, add=name == "concat")
        want = e.evaluate(**t)
        for out in both(t, e):
            assert relative(out, want) < 1e-2


@whole
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", ["concat", "transposed", "odd sizes", "odd sizes transposed"])
def test_any_number_of_rows_on_any_number_of_threads(name: str) -> None:
    """One to seventy rows of an expert, the same bits on one, two and three threads, pre-activations too."""
    e = LAYOUTS[name]
    for rows in range(1, 71):
        t = make(e, torch.full((rows, 1), 1), torch.bfloat16)
        want, runs = e.evaluate(**t), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, pre = cpu.forward(*bundle(t), layout(e), save=True)
            runs.append((out, pre, *both(dict(t), e)))
        assert relative(runs[0][0], want) < 1e-2 > relative(runs[0][3], want)
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@whole
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("tokens", [16, 128, 700])
def test_numerics_contract(tokens: int) -> None:
    """No more than 1.25 x the error of the same block run expert by expert in bf16."""
    e = block(sizes=(8, 128, 64, 128))
    t = make(e, balanced(tokens, 4, 8), torch.bfloat16)
    oracle, eager = e.evaluate(**t), torch.zeros_like(t["x"])
    for expert in range(8):
        token, slot = torch.where(t["ids"] == expert)
        gate, up = torch.nn.functional.linear(t["x"][token], t["up"][0][expert]).chunk(2, -1)
        y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, t["down"][0][expert])
        eager.index_add_(0, token, y * t["weights"][token, slot, None].bfloat16())
    for out in both(t, e):
        assert relative(out, oracle) <= 1.25 * relative(eager, oracle)


@whole
@pytest.mark.usefixtures("tiles")
def test_few_rows_run_in_vectors() -> None:
    """Sums of tiles have bits of their own."""
    e = block(sizes=(2, 1024, 256, 1024))
    t = make(e, balanced(40, 1, 2), torch.bfloat16)
    with torch.no_grad():
        outs = []
        for rows in (2, 1000):
            for direction in ("forward", "packed"):
                assert cpu_build.library(direction, torch.bfloat16).moe_tiles_from(ctypes.c_int64(rows))  # type: ignore[union-attr]
            outs.append(both(dict(t), e))
    assert all(not torch.equal(a, b) for a, b in zip(*outs, strict=True))


@whole
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_in_few_bits(name: str) -> None:
    """Scales for fewer numbers than a tile is deep, for more and for whole rows; sizes that fill no tile; rows that become floats first."""
    how = SCHEMES[name]
    for hidden, intermediate, columns in ((72, 40, how.columns), (200, 168, how.columns), (192, 128, 64 if how.columns else 0)):
        sized = replace(how, columns=columns)
        e = replace(
            WIDE, hidden=hidden, intermediate=intermediate, out_features=hidden, up_stored=sized, down_stored=sized, dtype=torch.bfloat16
        )
        for tokens in (14, 70):
            t, runs = operands(e, tokens, torch.bfloat16), []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                runs.append(call(e, t))
            assert runs[0] is not None and relative(runs[0], e.evaluate(**t)) < 6e-3
            assert all(torch.equal(run, runs[0]) for run in runs[1:])  # type: ignore[arg-type]


@whole
@pytest.mark.skipif(REAL, reason="a processor with tiles")
def test_kernels_with_tiles_run_in_vectors_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a wheel brings for tiles, where the processor, or the system, has none."""
    monkeypatch.setattr(cpu_build, "library", lambda direction, dtype: cpu_build._load(direction, dtype, "amx"))
    monkeypatch.setattr(cpu, "_found", {})
    t = make(block(), balanced(150, 2, 6), torch.bfloat16)
    assert not cpu_build.library("forward", torch.bfloat16).moe_tiles_from(ctypes.c_int64(0))  # type: ignore[union-attr]
    assert relative(cpu.forward(*bundle(t), layout(block()), save=False)[0], block().evaluate(**t)) < 1e-2
