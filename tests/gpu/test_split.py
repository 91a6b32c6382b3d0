"""The depth of the down projection in parts: who splits, what the combine adds up, and the warp-specialised kernel on a GPU."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import bundle
from test_ops import Case, close

pytest.importorskip("triton")

from calls import GROUPED, TOLERANCE, kernel, layout_of, norm_error, operands
from test_cuda import LAYOUTS, WARP, on_hopper, swiglu
from test_cuda import SPLIT as COLUMNS
from test_experts import simple

from moe_compile.lowering.triton import call as call_of
from moe_compile.lowering.triton import experts
from moe_compile.lowering.triton.tune import Choice, Tile

# ---- on any device ------------------------------------------------------------------------------------------------

PARTS = replace(GROUPED, down=replace(GROUPED.down, bk=16, hopper=True, split=3))


def in_parts(p: experts.Product) -> None:
    """What the warp-specialised kernel does with a split depth, in torch."""
    a, w, bias, rows, out, tile = p.a, p.w, p.bias, p.rows, p.out, p.tile
    n, steps = a.shape[0], w.k // tile.bk
    parts = out.shape[0] // n
    assert parts == 3
    out.fill_(math.nan)
    ends = rows.offsets.tolist()
    for part in range(parts):
        depth = slice(part * steps // parts * tile.bk, (part + 1) * steps // parts * tile.bk)
        for e, (first, end) in enumerate(itertools.pairwise(ends)):
            y = a[first:end, depth].double() @ w.parts[0][e, :, depth].double().T
            out[part * n + first : part * n + end] = (y + bias.parts[0][e] if bias is not None and part == 0 else y).to(out.dtype)


@pytest.mark.parametrize(
    "properties", [{}, {"down_bias": True, "num_identity": 2}, {"down_transposed": True, "weight_on_input": True}], ids=str
)
def test_the_combine_adds_up_the_parts(properties: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffer, kernel and combine agree on the parts; 80 = 5 steps in parts of 1, 2 and 2."""
    dtype = torch.float32
    case = Case("", swiglu(6, 20, 80, dtype, **properties), 9, 3, add=True, dtype=dtype, foreign=True)
    t = operands(case)
    monkeypatch.setattr(experts, "hopper_fits", lambda *_: True)
    monkeypatch.setattr(experts, "warp_specialised", in_parts)
    close(kernel(case, t, PARTS)[0], case.experts.evaluate(**t), TOLERANCE[dtype])


def test_only_the_warp_specialised_kernel_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain kernel gives what it gives without `split`, in one part; nor is a part ever empty, a row beyond 32 bits, or in fp16."""
    case = Case("plain", simple(), tokens=5)
    t = operands(case)
    assert torch.equal(kernel(case, t, PARTS)[0], kernel(case, t, replace(PARTS, down=replace(PARTS.down, split=1)))[0])
    call = call_of.read(*bundle(t), layout_of(case))
    assert call is not None and experts.depth_parts(call.x, call.down, PARTS.down) == 1
    monkeypatch.setattr(experts, "hopper_fits", lambda *_: True)
    deep, many = replace(call.down, k=48), call.x.new_empty(1, 1).expand(2**30, 1)
    assert experts.depth_parts(call.x, deep, PARTS.down) == 3
    assert experts.depth_parts(call.x.half(), deep, PARTS.down) == 1
    assert experts.depth_parts(call.x, replace(deep, k=32), PARTS.down) == experts.depth_parts(many, deep, PARTS.down) == 1


def test_a_tile_suits_the_kernel_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the warp-specialised kernel does not take the operands, its tile of 64 rows gives way, and no other."""
    case = Case("plain", simple(), tokens=5)
    call = call_of.read(*bundle(operands(case)), layout_of(case))
    assert call is not None
    plain = replace(COLUMNS, hopper=False)
    for tile, runs in ((plain, plain), (COLUMNS, Tile(64, 128, 64, 8, 4, tma=True, group=8)), (WARP, replace(WARP, hopper=False))):
        monkeypatch.setattr(experts, "hopper_fits", lambda *_: False)
        assert experts.runnable(call.x, call.up, tile) == runs
        monkeypatch.setattr(experts, "hopper_fits", lambda *_: True)
        assert experts.runnable(call.x, call.up, tile) == tile


# ---- the warp-specialised kernel ---------------------------------------------------------------------------------

IN_PARTS = [
    *(replace(WARP, split=s) for s in (2, 3, 4)),
    replace(WARP, bn=64, stages=6, split=2),
    replace(WARP, split=2, together=2),
    replace(WARP, stages=3, group=1, split=7),
    replace(COLUMNS, split=2),
    replace(COLUMNS, bn=32, bk=128, stages=4, split=2),
]
DEEP: dict[str, Case] = {
    "more steps than claiming takes": Case("", swiglu(5, 64, 2112, down_bias=True), 200, 2, add=True),
    "more steps than claiming takes, transposed": Case("", swiglu(5, 64, 2112, down_transposed=True), 200, 2),
    "more tiles than programs": Case("", swiglu(12, 1024, 1088, down_bias=True), 3000, 3),
}
SPLITTABLE = ("transposed", "biases", "identity and foreign ids", "columns beyond the last block", "few rows an expert", "many tiles")


def check(case: Case, t: dict[str, Any], tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split depth: the parts have run, the same bits every time, no further from the oracle than the whole depth in one tile."""
    heights = []
    run = experts.warp_specialised
    monkeypatch.setattr(experts, "warp_specialised", lambda *a: (heights.append(a[0].out.shape[0]), run(*a)))
    out, _ = kernel(case, t, Choice(WARP, tile, None))
    slots = t["ids"].numel()
    assert heights == [slots, tile.split * slots], "the depth was not split"
    assert all(torch.equal(kernel(case, t, Choice(WARP, tile, None))[0], out) for _ in range(5))
    whole, _ = kernel(case, t, Choice(WARP, replace(tile, split=1), None))
    want = case.experts.evaluate(**t)
    close(out, want, TOLERANCE[case.dtype])
    error = norm_error(whole, want)  # rounding s parts of y is rounding y: parts have 1/√s of its norm each
    assert torch.equal(out, whole) or (norm_error(out, want) < 1.1 * error and norm_error(out, whole) < 2 * error)


@on_hopper
@pytest.mark.parametrize("tile", IN_PARTS, ids=lambda v: f"{v.bm}x{v.bn}x{v.bk}, {v.split} parts")
@pytest.mark.parametrize("name", [*SPLITTABLE, *DEEP])
def test_depth_in_parts(name: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even and uneven parts, of more and fewer steps than the ring has; a bias once; experts with few rows and with none."""
    case = replace({**LAYOUTS, **DEEP}[name], dtype=torch.bfloat16)
    depth = case.experts.intermediate
    narrow = case.experts.down_transposed and tile.bn < 64
    if narrow or depth % tile.bk or depth // tile.bk < tile.split:
        assert experts.depth_parts(torch.empty(8, depth, device="cuda", dtype=case.dtype), down_of(case), tile) == 1
    else:
        check(case, operands(case), tile, monkeypatch)


def down_of(case: Case) -> Any:
    call = call_of.read(*bundle(operands(case)), layout_of(case))
    assert call is not None
    return call.down


@on_hopper
@pytest.mark.parametrize("kind", ["one expert", "last", "65 rows", "none"])
def test_depth_in_parts_routings(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("", swiglu(6, 192, 320, down_bias=True), 130, 1, dtype=torch.bfloat16)
    t = operands(case)
    t["ids"].fill_({"one expert": 3, "last": 5, "none": -1}.get(kind, 2))
    if "rows" in kind:
        t["ids"][int(kind.split()[0]) :] = 4
    check(case, t, IN_PARTS[1], monkeypatch)
