"""The ops in plain torch, differentiable any number of times: what stands behind gradients asked for with `create_graph`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...ir import Experts
from ...ir.codec import decode
from ...ir.operands import Operands
from ...ir.records import ChainedLayout
from . import routing
from .generic import Layout, accumulate_dtype


def experts(x: Tensor, ids: Tensor, weights: Tensor, p: Operands[Tensor], layout: Layout | ChainedLayout) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, out] in x.dtype, as the IR says it."""
    if isinstance(layout, ChainedLayout):
        others = layout.others
    else:
        others = {"intermediate": layout.intermediate(p.down), "out_features": layout.out_features(p.down)}
    meaning = decode(Experts, layout, hidden=x.shape[1], **others)
    return meaning.run(x, ids, weights, p, None, accumulate_dtype(x.dtype)).to(x.dtype)


def route(logits: Tensor, ids: Tensor, bias: Tensor | None, expert_scale: Tensor | None, r: routing.Routing) -> Tensor:
    """The weights [T, k] of given ids."""
    wide = logits.to(torch.promote_types(r.score_dtype, torch.float32))
    return routing.weights_of(wide, ids, bias, expert_scale, r)


def gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Gradients of f(*inputs) where they are needed, with a graph of their own.

    They are taken at views of the inputs: one input may be computed from another, which is not f's affair.
    """
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, n in zip(own, needs, strict=True) if n and t is not None]
        found = iter(torch.autograd.grad(f(*own), wanted, grad, create_graph=True, allow_unused=True) if wanted else ())
    return [next(found) if n and t is not None else None for t, n in zip(own, needs, strict=True)]
