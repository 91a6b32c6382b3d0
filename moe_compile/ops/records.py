"""The plain arguments of the ops for the IR, and their records."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ..ir import Experts, Gating, Norm
from ..ir.codec import encode
from ..ir.families import family_of as family_of
from ..ir.operands import PLAIN, Operands
from ..ir.records import AdaptedLayout, ChainedLayout, Layout, Routing, SharedLayout, Storage

# One object for equal arguments: what kernels derive from it is looked up, not made again
routing_of = functools.lru_cache(maxsize=1024)(Routing)
_same_layout = functools.lru_cache(maxsize=1024)(Layout)
_same_storage = functools.lru_cache(maxsize=1024)(Storage)
_same_adapted = functools.lru_cache(maxsize=1024)(AdaptedLayout)
_same_chained = functools.lru_cache(maxsize=1024)(ChainedLayout)


def layout_of(args: Sequence[Any]) -> Layout:
    """The record of the plain arguments of `experts`, after the tensors."""
    act_ops, act_consts, *rest = args
    return _same_layout(tuple(act_ops), tuple(act_consts), *rest)


def storage_of(args: Sequence[Any]) -> tuple[Layout, Storage]:
    """The records of the plain arguments of `experts_stored`, after the tensors."""
    rest = args[len(fields(Layout)) :]
    return layout_of(args[: len(fields(Layout))]), _same_storage(*[tuple(a) if isinstance(a, (list, tuple)) else a for a in rest])


def adapted_of(args: Sequence[Any]) -> AdaptedLayout:
    """The record of the plain arguments of `experts_adapted`, after the tensors."""
    act_ops, act_consts, *rest = args
    return _same_adapted(tuple(act_ops), tuple(act_consts), *rest)


def stored_adapted_of(args: Sequence[Any]) -> tuple[AdaptedLayout, Storage]:
    """The records of the plain arguments of `experts_stored_adapted`, after the tensors."""
    own = len(fields(AdaptedLayout))
    return adapted_of(args[:own]), _same_storage(*[tuple(a) for a in args[own:]])


def chained_of(args: Sequence[Any]) -> ChainedLayout:
    """The record of the plain arguments of `experts_chained`, after the tensors."""
    ints, consts, *rest = args
    return _same_chained(tuple(ints), tuple(consts), *rest)


def route_args(gating: Gating) -> list[Any]:
    """The plain arguments of `route`, after the tensors. A normaliser that is an expression follows outside: the op has none then."""
    outside = gating.norm is not None and gating.norm.kind is Norm.EXPR
    return encode(Routing, replace(gating, norm=None) if outside else gating)


def product_of(args: Sequence[Any]) -> tuple[Sequence[Any], bool]:
    """The plain arguments of `route_linear` -> those of `route`, and whether the product is one in float32 of narrower operands."""
    own = len(fields(Routing))
    return args[:own], bool(args[own:] and args[own])


def bundled(args: Sequence[Any], names: Sequence[str] = PLAIN) -> tuple[Any, Any, Any, Operands[Any], Sequence[Any]]:
    """(x, ids, weights, *lists, *rest) of an op with those parameters -> x, ids, weights, the lists in one bundle, the rest."""
    end = 3 + len(names)
    x, ids, weights = args[:3]
    return x, ids, weights, Operands.read(args[3:end], names), args[end:]


def experts_args(experts: Experts) -> list[Any]:
    """The plain arguments of the op that runs them, after the tensors. Raises `scalar.UnknownActivation`."""
    return family_of(experts).plain(experts)


def shared_args(shared: Experts, overlap: int) -> list[Any]:
    """The plain arguments of `experts_shared` behind the gate, for the shared expert as an `Experts` of one.

    `overlap`: an `ir.Overlap`, as an int. Raises `scalar.UnknownActivation`.
    """
    return [*encode(SharedLayout, shared), overlap]
