"""The library of the ops: their schemas, and the way down from autograd to a device's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..ir.codec import place, schema
from ..ir.operands import ADAPTED, CHAINED, CODED, PLAIN, STORED_ADAPTED
from ..ir.records import AdaptedLayout, ChainedLayout, Layout, Routing, SharedLayout, Storage

_GATING, _LAYOUT = schema(Routing), schema(Layout)
ROUTED = 4 + len(PLAIN) + len(fields(Layout))  # arguments of `experts`, before those of the shared one
STORED = 4 + len(CODED) + len(fields(Layout)) + len(fields(Storage))  # likewise of `experts_stored`
IN_WEIGHTS = place(Routing, "bias_in_weights")  # among the plain arguments of `route`


def lists(names: Sequence[str], prefix: str = "") -> str:
    """The parameters of experts in a schema."""
    return ", ".join(f"Tensor[] {prefix}{name}" for name in names)


_ROUTED = "Tensor x, Tensor ids, Tensor weights"
_EXPERTS = f"{_ROUTED}, {lists(PLAIN)}, "
_CHAINED = f"{_ROUTED}, {lists(CHAINED)}"
_SHARED = f"{lists(PLAIN, 'shared_')}, Tensor? shared_gate, {schema(SharedLayout, 'shared_')}, int overlap"

SCHEMAS = (
    f"route(Tensor logits, Tensor? bias, Tensor? expert_scale, {_GATING}) -> (Tensor weights, Tensor ids)",
    f"route_linear(Tensor x, Tensor router, Tensor? router_bias, Tensor? bias, Tensor? expert_scale, {_GATING}, bool wide=False) "
    "-> (Tensor weights, Tensor ids)",
    f"route_fwd(Tensor logits, Tensor? bias, Tensor? expert_scale, {_GATING}) "
    "-> (Tensor weights, Tensor ids, Tensor kept_logits, Tensor kept_ids, Tensor kept_bias, Tensor kept_scale)",
    f"route_bwd(Tensor grad, Tensor ids, Tensor logits, Tensor? bias, Tensor? expert_scale, {_GATING}, bool[] needs) -> Tensor[]",
    f"experts({_EXPERTS}Tensor? add, {_LAYOUT}) -> Tensor",
    f"experts_fwd({_EXPERTS}Tensor? add, {_LAYOUT}) -> (Tensor out, Tensor pre, Tensor kept_ids, Tensor kept_weights)",
    f"experts_bwd(Tensor grad, Tensor pre, {_EXPERTS}{_LAYOUT}, bool[] needs) -> Tensor[]",
    f"experts_shared({_EXPERTS}Tensor? add, {_LAYOUT}, {_SHARED}) -> Tensor",
    f"experts_adapted({_ROUTED}, {lists(ADAPTED)}, Tensor? add, {schema(AdaptedLayout)}) -> Tensor",
    f"experts_adapted_fwd({_ROUTED}, {lists(ADAPTED)}, Tensor? add, {schema(AdaptedLayout)}) "
    "-> (Tensor out, Tensor pre, Tensor kept_ids, Tensor kept_weights)",
    f"experts_adapted_bwd(Tensor grad, Tensor pre, {_ROUTED}, {lists(ADAPTED)}, {schema(AdaptedLayout)}, bool[] needs) -> Tensor[]",
    f"experts_chained({_CHAINED}, Tensor? add, {schema(ChainedLayout)}) -> Tensor",
    f"experts_chained_fwd({_CHAINED}, Tensor? add, {schema(ChainedLayout)}) "
    "-> (Tensor out, Tensor pre, Tensor kept_ids, Tensor kept_weights)",
    f"experts_chained_bwd(Tensor grad, Tensor pre, {_CHAINED}, {schema(ChainedLayout)}, bool[] needs) -> Tensor[]",
    f"experts_stored({_ROUTED}, {lists(CODED)}, Tensor? add, {_LAYOUT}, {schema(Storage)}) -> Tensor",
    f"experts_stored_shared({_ROUTED}, {lists(CODED)}, Tensor? add, {_LAYOUT}, {schema(Storage)}, {_SHARED}) -> Tensor",
    f"experts_stored_adapted({_ROUTED}, {lists(STORED_ADAPTED)}, Tensor? add, {schema(AdaptedLayout)}, {schema(Storage)}) -> Tensor",
)
NAMES = tuple(s.partition("(")[0] for s in SCHEMAS)


def schema_of(name: str) -> str:
    """The arguments and result of an op, for another op with the same."""
    return next(s.removeprefix(name) for s in SCHEMAS if s.startswith(f"{name}("))


library = torch.library.Library("moe_compile", "DEF")
for _schema in SCHEMAS:
    library.define(_schema)


def _dispatched(name: str, *args: Any) -> Any:
    return getattr(torch.ops.moe_compile, name).default(*args)


_on_cuda: Callable[..., Any] = _dispatched


def straight_on_cuda(call: Callable[..., Any]) -> None:
    """Let `call(name, *args)` run an op on CUDA below autograd. A call through the dispatcher costs microseconds for each argument."""
    global _on_cuda
    _on_cuda = call


def below(name: str, *args: Any) -> Any:
    """An op below autograd, on CUDA by the shortest way there is."""
    x: Tensor = args[0]
    with torch._C._AutoDispatchBelowAutograd():
        return _on_cuda(name, *args) if x.is_cuda else getattr(torch.ops.moe_compile, name).default(*args)
