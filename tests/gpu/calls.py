"""Calls of the routed experts for the tests of this folder: operands in any layout, the kernels by either path, the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from conftest import bundle
from test_ops import Case
from torch import Tensor

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.lowering.triton import call
from moe_compile.lowering.triton import experts as kernels
from moe_compile.lowering.triton.tune import Choice, Tile, Vector

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-12}  # of the largest value
TILE = Tile(16, 32, 64, 4, 3) if ON_GPU else Tile(16, 16, 16, 4, 1)
GROUPED = Choice(TILE, TILE, None)
FEW = Choice(TILE, TILE, (Vector(4, 64, 4), Vector(2, 64, 4)) if ON_GPU else (Vector(16, 16, 4), Vector(16, 16, 4)))
PATHS = {"grouped": GROUPED, "few tokens": FEW}
FACTORS: dict[str, Sequence[Any]] = {
    "form": tuple(ir.Form),
    "stacked": (True, False),
    "up_transposed": (False, True),
    "down_transposed": (False, True),
    "up_bias": (False, True),
    "down_bias": (False, True),
    "weight_on_input": (False, True),
    "num_identity": (0, 2),
    "add": (False, True),
}


def cover(factors: Mapping[str, Sequence[Any]], strength: int) -> list[dict[str, Any]]:
    """Rows in which every combination of values of any `strength` factors occurs; greedy, so few and always the same."""
    names = list(factors)
    columns = list(itertools.combinations(range(len(names)), strength))
    rows = list(itertools.product(*factors.values()))
    held = [{(c, *(row[i] for i in c)) for c in columns} for row in rows]
    missing, chosen = set().union(*held), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(held[i] & missing))
        missing -= held[best]
        chosen.append(dict(zip(names, rows[best], strict=True)))
    return chosen


def covered(strength: int, sizes: tuple[int, int, int], dtype: torch.dtype = torch.float32, tokens: int = 9, k: int = 3) -> list[Case]:
    """The covering cases for (experts, hidden, intermediate); ids in and around the range of experts."""
    found = []
    for row in cover(FACTORS, strength):
        add, form = row.pop("add"), row.pop("form")
        experts, hidden, inter = sizes
        activation = act.relu(act.G) ** 2 if form is ir.Form.SINGLE else act.SWIGLU
        name = " ".join([form.name.lower(), *(n for n, v in row.items() if v), *["add"] * add])
        meaning = ir.Experts(experts, hidden, inter, hidden, form, activation, dtype=dtype, **row)
        found.append(Case(name, meaning, tokens, k, add, dtype=dtype, foreign=True))
    return found


def operands(case: Case, seed: int = 0) -> dict[str, Any]:
    """The tensors of a case where the kernels run, in the order of the op's schema; projections have unit gain."""
    e, gen = case.experts, torch.Generator().manual_seed(seed)

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=gen) * gain).to(DEVICE, case.dtype)

    def stored(shape: tuple[int, ...], parts: int, gain: float) -> list[Tensor]:
        if e.stacked:
            return [normal(e.num_experts, *shape, gain=gain) for _ in range(parts)]
        return [normal(*shape, gain=gain) for _ in range(parts * e.num_experts)]

    def matrices(out: int, inner: int, transposed: bool, parts: int) -> list[Tensor]:
        return stored((inner, out) if transposed else (out, inner), parts, inner**-0.5)

    parts = 2 if e.form is ir.Form.SEPARATE else 1
    rows = e.intermediate * (2 if e.form in (ir.Form.CONCAT, ir.Form.INTERLEAVED) else 1)
    low, high = (-1, e.num_experts + e.num_identity + 1) if case.foreign else (0, e.num_experts)
    return {
        "x": normal(case.tokens, e.hidden),
        "ids": torch.randint(low, high, (case.tokens, case.k), generator=gen).to(DEVICE, case.id_dtype),
        "weights": torch.rand(case.tokens, case.k, generator=gen).to(DEVICE),
        "up": matrices(rows, e.hidden, e.up_transposed, parts),
        "down": matrices(e.out_features, e.intermediate, e.down_transposed, 1),
        "up_bias": stored((rows,), parts, 1.0) if e.up_bias else [],
        "down_bias": stored((e.out_features,), 1, 1.0) if e.down_bias else [],
        "add": normal(case.tokens, e.out_features) if case.add else None,
    }


def layout_of(case: Case) -> Any:
    return ops.layout_of(ops.experts_args(case.experts))


def kernel(case: Case, t: Mapping[str, Any], choice: Choice, save: bool = False) -> tuple[Tensor, Tensor]:
    """(out, pre) by the kernels; fails where the call is beyond them."""
    assert call.read(*bundle(t), layout_of(case)) is not None, "the kernels do not take this call"
    return kernels.forward(*bundle(t), layout_of(case), save, choice)


def op(case: Case, t: Mapping[str, Any]) -> Tensor:
    """Through the dispatcher, as compiled graphs call it."""
    return torch.ops.moe_compile.experts(*t.values(), *ops.experts_args(case.experts))


def norm_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over all elements."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))
