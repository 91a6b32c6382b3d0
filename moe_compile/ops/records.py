"""The plain arguments of the ops, as records and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from ..lowering.reference import generic, routing

# One object for equal arguments: what kernels derive from it is looked up, not made again
routing_of = functools.lru_cache(maxsize=1024)(routing.Routing)
_same_layout = functools.lru_cache(maxsize=1024)(generic.Layout)


def layout_of(args: Sequence[Any]) -> generic.Layout:
    """The plain arguments of `experts`, after the tensors."""
    act_ops, act_consts, *rest = args
    return _same_layout(tuple(act_ops), tuple(act_consts), *rest)


def route_args(gating: Any) -> list[Any]:
    """The plain arguments of `route`, after the tensors, for an `ir.Gating` (its normaliser must not be an expression)."""
    groups, norm = gating.groups, gating.norm
    return [
        gating.k,
        int(gating.score),
        gating.score_over_selected,
        int(gating.bias),
        gating.bias_in_weights,
        *((groups.count, groups.kept, groups.top, float(groups.fill)) if groups else (0, 0, 0, -math.inf)),
        *((int(norm.kind), float(norm.eps), float(norm.clamp_min), float(norm.p)) if norm else (0, 0.0, 0.0, 1.0)),
        float(gating.scale),
        gating.score_dtype,
        gating.weight_dtype,
    ]


def experts_args(experts: Any) -> list[Any]:
    """The plain arguments of `experts`, after the tensors, for an `ir.Experts`. Raises `activation.UnknownActivation`."""
    from ..ir.scalar import encode

    act_ops, act_consts = encode(experts.activation)
    return [
        act_ops,
        act_consts,
        int(experts.form),
        experts.num_experts,
        experts.stacked,
        experts.up_transposed,
        experts.down_transposed,
        experts.weight_on_input,
        experts.num_identity,
    ]


def scaled_args(experts: Any) -> list[Any]:
    """As `experts_args`, for `experts_scaled`."""
    return [*experts_args(experts), experts.row_bits, experts.row_floor]


def shared_args(shared: Any, overlap: int) -> list[Any]:
    """The plain arguments of `experts_shared` behind the gate, for the shared expert as an `ir.Experts` of one expert.

    `overlap`: an `ir.Overlap`, as an int.
    Raises `activation.UnknownActivation`.
    """
    from ..ir.scalar import encode

    return [*encode(shared.activation), int(shared.form), shared.up_transposed, shared.down_transposed, overlap]
