"""What rules say of shapes: no size is guarded on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


def same(a: Any, b: Any) -> bool:
    """Whether two sizes may be equal; a symbolic size is never guarded on."""
    return not statically_known_true(a != b)


def has_shape(t: Tensor | None, *sizes: Any) -> bool:
    """None, or of these sizes (None: any)."""
    if t is None:
        return True
    return t.ndim == len(sizes) and all(s is None or same(n, s) for n, s in zip(t.shape, sizes))


def of_groups(t: Tensor | None, index: Tensor | None, width: Any, dtypes: Sequence[torch.dtype]) -> bool:
    """None, or [groups, width] of one of these types, beside the index of the groups."""
    return t is None or index is not None and t.dtype in dtypes and has_shape(t, index.shape[0], width)


def expected_rows(config: Sequence[int] | None, rows: Tensor) -> bool:
    """Nothing, or one number of rows that are there."""
    return not config or (len(config) == 1 and config[0] >= 0 and not statically_known_true(config[0] > rows.shape[0]))
