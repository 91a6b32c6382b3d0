"""Contracts of ops that add rows at places (`contracts`): combines which a library has wrapped, for instance to fix the order of its sums.

out'[index[i, h], h] += src[i, h]
"""

from __future__ import annotations

from torch import Tensor

from .contracts import Contract, own


def _scatter_add(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    return out.scatter_add(0, index, src)


own(Contract("deterministic_scatter_add", _scatter_add, own=True))
