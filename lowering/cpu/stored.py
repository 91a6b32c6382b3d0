"""Experts in few bits on the CPU: decoded in the kernels (`coded`), or, codes that those do not take, in turns.

In turns matrices of the experts that tokens were sent to become floats in torch, `CHUNK` at a time, for the kernels of floats; with more
than one turn in fp32, so that no sum is rounded between them. What these do not take either (float16, whose range a weight may leave;
float64; no compiler) runs in plain torch, an expert at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...ir import Stored
from ...ir.operands import CODED, Operands
from ...ir.records import Layout, Storage
from ...ops import bundled, storage_of
from ..reference import generic, stored
from ..reference.stored import Held
from . import coded, experts

CHUNK = 16  # experts whose matrices are floats at the same time


def experts_stored(*args: Any) -> Tensor:
    """As the op of this name."""
    key = coded.key_of(args)
    x, ids, weights = args[:3]
    found = coded.again(key) if ids.numel() else None
    if found is not None:
        return coded.run(found, x, ids, weights, args[3 + len(CODED)])
    x, ids, weights, p, (add, *plain) = bundled(args, CODED)
    layout, storage = storage_of(plain)
    out = forward(x, ids, weights, p, add, layout, storage)
    coded.remember(key, x, p, layout, storage)
    return out


def forward(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], add: Tensor | None, layout: Layout, storage: Storage) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H_out] in x.dtype. Raises ValueError where a parameter holds too few experts."""
    generic.check_sizes(layout, p.of_experts())
    done = coded.forward(x, ids, weights, p, add, layout, storage) if ids.numel() else None
    if done is not None:
        return done
    hit = ids[(ids >= 0) & (ids < layout.num_experts)].unique()
    if any(storage.rows()) or layout.num_identity or x.dtype not in experts.CODED_TYPES or not len(hit):
        return stored.forward(x, ids, weights, p, add, layout, storage)
    if len(hit) > CHUNK and x.dtype != torch.float32:
        wide = replace(p, up_bias=tuple(b.float() for b in p.up_bias), down_bias=tuple(b.float() for b in p.down_bias))
        return forward(x.float(), ids, weights, wide, None if add is None else add.float(), layout, storage).to(x.dtype)
    out = add
    for some in hit.split(CHUNK):
        place = torch.full((layout.num_experts + 1,), -1)
        place[some] = torch.arange(len(some))
        here = place[torch.where((ids >= 0) & (ids < layout.num_experts), ids, -1)]
        own = replace(layout, num_experts=len(some), stacked=True)
        one = experts.once(x, here, weights, _floats(p, some.tolist(), x.dtype, layout, storage), out, own)
        if one is None:
            return stored.forward(x, ids, weights, p, add, layout, storage)
        out = one
    assert out is not None
    return out


def _floats(p: Operands[Tensor], some: list[int], dtype: torch.dtype, layout: Layout, storage: Storage) -> Operands[Tensor]:
    """Stacks of the matrices and biases of some experts."""
    up, down = storage.stored()

    def matrices(name: str, how: Stored | None, parts: int) -> list[Tensor]:
        codes = getattr(p, name)
        if how is None:
            return [_taken(codes, part, some, layout) for part in range(parts if codes else 0)]
        held = Held.of(p, name, how)
        return [_made(held, part, some, dtype, layout) for part in range(parts)]

    halves = layout.halves()
    return Operands.named(
        up=matrices("up", up, halves),
        down=matrices("down", down, 1),
        up_bias=matrices("up_bias", None, halves),
        down_bias=matrices("down_bias", None, 1),
    )


def _taken(tensors: Any, part: int, some: list[int], layout: Layout) -> Tensor:
    return tensors[part][some] if layout.stacked else torch.stack([tensors[part * layout.num_experts + e] for e in some])


def _made(held: Held, part: int, some: list[int], dtype: torch.dtype, layout: Layout) -> Tensor:
    words = held.codes[0].shape[-2:]
    out = torch.empty(len(some), *held.how.shape((words[0], words[1])), dtype=dtype)
    for i, e in enumerate(some):
        out[i] = held.floats(part, e, torch.float32) if layout.stacked else held.floats(part * layout.num_experts + e, ..., torch.float32)
    return out
