"""Where part i of n elements begins, for every op that gives parts: against torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_compile.passes.aten import names

CALLS: dict[str, list[dict[str, Any]]] = {
    "chunk": [{"chunks": c} for c in (1, 2, 3, 5)],
    "split": [{"split_size": s} for s in (1, 2, 3, 5)],
    "split_with_sizes": [{"split_sizes": [1, 2, 4]}, {"split_sizes": [7]}],
    "tensor_split": [*({"sections": s} for s in (1, 2, 3, 5)), {"indices": [2, 5]}, {"indices": [-3, 6]}],
}


@pytest.mark.parametrize("op", names.SPLIT)
def test_where_parts_begin(op: str) -> None:
    for given in CALLS[op]:
        for n in [7] if op == "split_with_sizes" else range(7, 14):
            parts = getattr(torch, op)(torch.arange(n), *given.values())
            starts = [names.SPLIT[op](SimpleNamespace(**given), i, n) for i in range(len(parts))]
            assert all(start == int(part[0]) for start, part in zip(starts, parts, strict=True) if len(part)), (given, n)
