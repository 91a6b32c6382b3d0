"""The fractal format: which weights may have it, what is said of those that may not, and that the cast happens once."""

from __future__ import annotations

import pytest
import torch
from ascend_blocks import ENTRIES, compiled, first, relative, zoo

import moe_compile
from moe_compile.lowering.ascend import formats, register, store
from moe_compile.lowering.ascend.store import Store

register.ensure()
BF, I8 = torch.bfloat16, torch.int8


@pytest.mark.parametrize(("shape", "dtype", "reason"), [
    ((8, 16, 16), BF, None),
    ((8, 2048, 2880), torch.float16, None),
    ((8, 16, 32), I8, None),
    ((8, 2880, 360), BF, "16 x 16"),  # gpt-oss over 8 ranks: a crash in the kernel
    ((8, 360, 2880), BF, "16 x 16"),
    ((8, 16, 16), I8, "16 x 32"),
    ((8, 8, 32), I8, "16 x 32"),
    ((8, 16, 16), torch.float32, "no fractal format"),
])  # fmt: skip
def test_what_the_format_takes(shape: tuple[int, ...], dtype: torch.dtype, reason: str | None) -> None:
    told = formats.refuses_nz(shape, dtype)
    assert told is None if reason is None else reason in str(told)


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The cast itself exists on an NPU only: here it is a copy that is counted."""
    made: list[tuple[int, ...]] = []

    def cast(t: torch.Tensor) -> torch.Tensor:
        made.append(tuple(t.shape))
        return t.clone()

    monkeypatch.setattr(store, "to_nz", cast)
    return made


def test_there_is_no_cast_without_an_npu() -> None:
    t = torch.zeros(2, 16, 16, dtype=BF)
    assert formats.to_nz(t) is t


@torch.no_grad()
def test_weights_are_cast_once_biases_never(casts: list[tuple[int, ...]], store: Store) -> None:
    entry = ENTRIES["gpt_oss"]
    model = zoo.dataclasses.replace(entry, kwargs={**entry.kwargs, "intermediate_size": 48}).build()
    module = next(m for m in model.modules() if hasattr(m, "experts")).to(BF)
    x = torch.randn(2, 5, zoo.HIDDEN, dtype=BF)
    up, down = module.experts.gate_up_proj, module.experts.down_proj
    fn = compiled(module, weight_format="nz")
    for _ in range(2):
        assert relative(first(fn(x)), first(module(x))) <= 0.05
    assert sorted(casts) == sorted((tuple(up.shape), tuple(down.shape)))


@pytest.mark.parametrize(("inner", "dtype", "reason"), [(24, BF, "blocks of 16 x 16"), (32, torch.float32, "float32")])
@torch.no_grad()
def test_what_does_not_fit_stays_and_is_told(
    casts: list[tuple[int, ...]], store: Store, inner: int, dtype: torch.dtype, reason: str
) -> None:
    from test_quant import block as sized

    module, x = sized("qwen3_moe", moe_intermediate_size=inner).to(dtype), torch.randn(2, 5, zoo.HIDDEN, dtype=dtype)
    assert relative(first(compiled(module, weight_format="nz")(x)), first(module(x))) <= 0.05
    notes = moe_compile.last_report().notes
    assert any("weight_format='nz'" in n and reason in n for n in notes), notes
    assert [c for c in casts if formats.refuses_nz(c, dtype)] == []


@torch.no_grad()
def test_bytes_under_rows_of_floats_stay_as_they_are(casts: list[tuple[int, ...]]) -> None:
    import test_int8

    module, x, _ = test_int8.made(test_int8.Dense, BF)
    compiled(module, weight_format="nz")(x)
    assert not casts and any("under rows of floats" in n for n in moe_compile.last_report().notes)
