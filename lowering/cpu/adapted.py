"""Experts with low-rank pairs on the CPU: the kernels on W + s b a, made for the call, where rows are many and in bf16; else plain torch.

With W' = W + s b a (stored as W is):  d/da = s bᵀ dW',  d/db = s dW' aᵀ,  d/dW = dW'. W' is rounded to bf16 once, an error of the size
that a result's own rounding is; sums of products are not rounded in between, as they are where W x and s b (a x) are two products.
The rule: from ROWS rows an expert on what the kernels gain over products in torch is more than making W' costs
(docs/cpu.md). In fp32 torch's products are ahead of Inductor as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ...ir.operands import ADAPTED, PLAIN, Operands
from ...ir.records import AdaptedLayout, Layout
from ...ops import bundled
from ...ops.records import adapted_of
from ..reference import generic
from . import experts

ROWS = 64  # of an expert, on average
Place = tuple[str, int, int, float]  # of a pair: up or down, which of its weights, which of its pairs, s


def experts_adapted_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    x, ids, weights, p, (add, *plain) = bundled(args, ADAPTED)
    layout = adapted_of(plain)
    if not _merges(x, ids, p, layout):
        return generic.forward(x, ids, weights, p, add, layout)
    return experts.forward(x, ids, weights, _merged(p, layout), add, _plain(layout), save=True)


def experts_adapted(*args: Any) -> Tensor:
    return experts_adapted_fwd(*args)[0]


def experts_adapted_bwd(grad: Tensor, pre: Tensor, *args: Any) -> list[Tensor]:
    x, ids, weights, p, (*plain, needs) = bundled(args, ADAPTED)
    layout = adapted_of(plain)
    if not _merges(x, ids, p, layout):
        return generic.backward(grad, pre, x, ids, weights, p, layout, needs)
    asked = p.filled(needs[2:])
    both = [*needs[:2], *_wanted(asked, layout)]
    found = iter(experts.backward(grad, pre, x, ids, weights, _merged(p, layout), _plain(layout), both))
    first = [next(found) for need in needs[:2] if need]
    given: Operands[Tensor | None] = _base(p).filled(next(found) if need else None for need in both[2:])
    return first + [g for g in _parted(given, p, asked, layout) if g is not None]


def _merges(x: Tensor, ids: Tensor, p: Operands[Tensor], layout: AdaptedLayout) -> bool:
    alike = layout.stacked and all(t.dtype == torch.bfloat16 for t in (x, *p))
    return alike and ids.numel() >= ROWS * layout.num_experts


def _base(p: Operands[Any]) -> Operands[Any]:
    return Operands.read(p.lists(PLAIN))


def _plain(layout: AdaptedLayout) -> Layout:
    return Layout(**{f.name: getattr(layout, f.name) for f in fields(Layout)})


def _places(layout: AdaptedLayout) -> list[Place]:
    parts = [("up", part) for part in range(layout.halves())] + [("down", 0)]
    return [(name, part, layout.pairs_before(name, part), s) for name, part in parts if (s := layout.pair(name, part))]


def _transposed(layout: Layout, name: str) -> bool:
    return layout.up_transposed if name == "up" else layout.down_transposed


def _merged(p: Operands[Tensor], layout: AdaptedLayout) -> Operands[Tensor]:
    """W + s b a in the place of each W that has a pair."""
    made = {name: list(getattr(p, name)) for name in ("up", "down")}
    for name, part, pair, s in _places(layout):
        a, b, w = getattr(p, f"{name}_a")[pair], getattr(p, f"{name}_b")[pair], made[name][part]
        left, right = (a.mT, b.mT) if _transposed(layout, name) else (b, a)
        made[name][part] = torch.baddbmm(w, left, right, alpha=s)
    return replace(_base(p), up=tuple(made["up"]), down=tuple(made["down"]))


def _wanted(asked: Operands[bool], layout: AdaptedLayout) -> list[bool]:
    """Of W': where W, a or b wants a gradient."""
    wanted = {name: list(getattr(asked, name)) for name in PLAIN}
    for name, part, pair, _ in _places(layout):
        wanted[name][part] |= getattr(asked, f"{name}_a")[pair] or getattr(asked, f"{name}_b")[pair]
    return list(Operands.named(**wanted))


def _parted(given: Operands[Tensor | None], p: Operands[Tensor], asked: Operands[bool], layout: AdaptedLayout) -> Sequence[Tensor | None]:
    """Gradients of the parameters in their order, from those of W' and of the biases."""
    grads: dict[str, list[Tensor | None]] = {name: [None] * len(group) for name, group in p.by_name().items()}
    for name in PLAIN:
        grads[name] = [g if n else None for g, n in zip(getattr(given, name), getattr(asked, name), strict=True)]
    for name, part, pair, s in _places(layout):
        g, a, b = getattr(given, name)[part], getattr(p, f"{name}_a")[pair], getattr(p, f"{name}_b")[pair]
        g = g.mT if g is not None and _transposed(layout, name) else g
        if g is not None and getattr(asked, f"{name}_a")[pair]:
            grads[f"{name}_a"][pair] = torch.bmm(b.mT, g).mul_(s)
        if g is not None and getattr(asked, f"{name}_b")[pair]:
            grads[f"{name}_b"][pair] = torch.bmm(g, a.mT).mul_(s)
    return list(Operands.named(**grads))
