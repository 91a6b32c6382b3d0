"""Where part i of n elements begins, for every op that gives parts: against torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from moe_compile.passes.aten import definitions_views as views
from moe_compile.passes.aten import names
from moe_compile.passes.aten.element import Opaque

CALLS: dict[str, list[dict[str, Any]]] = {
    "chunk": [{"chunks": c} for c in (1, 2, 3, 5)],
    "split": [{"split_size": s} for s in (1, 2, 3, 5)],
    "split_with_sizes": [{"split_sizes": [1, 2, 4]}, {"split_sizes": [7]}],
    "tensor_split": [*({"sections": s} for s in (1, 2, 3, 5)), *({"indices": i} for i in ([2, 5], [-3, 6], [-20, 4], [2, 20]))],
}


@pytest.mark.parametrize("op", names.SPLIT)
def test_where_parts_begin(op: str) -> None:
    for given in CALLS[op]:
        for n in [7] if op == "split_with_sizes" else range(7, 14):
            parts = getattr(torch, op)(torch.arange(n), *given.values())
            starts = [names.SPLIT[op](SimpleNamespace(**given), i, n) for i in range(len(parts))]
            assert all(start == int(part[0]) for start, part in zip(starts, parts, strict=True) if len(part)), (given, n)


def test_parts_whose_bounds_are_in_a_tensor_are_not_known() -> None:
    g = fx.Graph()
    parts = g.call_function(torch.ops.aten.tensor_split.tensor_indices_or_sections, (g.placeholder("x"), g.placeholder("at"), -1))
    with pytest.raises(Opaque, match="in a tensor"):
        views.TUPLES["tensor_split"](None, parts, 1, parts, ())
