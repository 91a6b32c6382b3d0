"""The ops of `moe_compile.ops` on CUDA: their operands in one row, their plain arguments read once, the kernels called by plans.

Kernels that not every model has are imported where they are called: each module of them takes a first call tens of milliseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ir.codec import record_of
from ...ir.operands import CODED, PLAIN, Operands
from ...ir.records import Storage
from ...ops.records import product_of, storage_of
from ..reference import routing
from ..reference.generic import Layout
from . import experts as routed
from . import route as kernels
from .launch import plans, warm
from .short import plain

_LAYOUT = len(fields(Layout))  # plain arguments of the routed experts; those of a shared one stand behind them
_STORED = _LAYOUT + len(fields(Storage))  # likewise in few bits


# ---- what a text says ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def routing_of(how: str) -> routing.Routing:
    return routing.Routing(*product_of(plain(how))[0])


@functools.lru_cache(maxsize=4096)
def layout_of(how: str) -> Layout:
    return record_of(Layout, plain(how)[:_LAYOUT])


class How(NamedTuple):
    """What a plan of an op is for, besides its operands: the op's text, how many tensors each list has, and what else decides."""

    text: str
    sizes: tuple[int, ...] = ()
    needs: tuple[bool, ...] = ()
    precision: str = ""


def _bundles(how: How, flat: Sequence[Any]) -> list[Operands[Any]]:
    """The parameters of the routed experts; behind them those of a shared one."""
    it = iter(flat)
    lists = [[next(it) for _ in range(size)] for size in how.sizes]
    return [Operands.read(lists[i : i + len(PLAIN)]) for i in range(0, len(lists), len(PLAIN))]


Described = tuple[plans.Build, Any, tuple[Tensor | None, ...]]


def _op(describe: Callable[..., Described]) -> Callable[..., Any]:
    """The op that runs what `describe` makes of its arguments: how it is built, what besides operands decides, operands in one row."""

    def run(*args: Any) -> Any:
        return plans.call(*describe(*args))

    run.describe = describe  # type: ignore[attr-defined]
    return run


def compile_ahead(name: str, args: Sequence[Any]) -> None:
    """Begin to compile the kernels of an op whose (fake) operands are known."""
    warm.start(*OPS[name].describe(*args))  # type: ignore[attr-defined]


# ---- routing -------------------------------------------------------------------------------------------------------


@_op
def route(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, how: str) -> Described:
    return _route, how, (logits, bias, expert_scale)


def _route(how: str, tensors: list[Any], behind: bool = False) -> tuple[Tensor, Tensor]:
    logits, bias, expert_scale = tensors
    r = routing_of(how)
    if kernels.can_route(r, logits.shape[1]) is not None:
        return routing.forward(logits, bias, expert_scale, r)
    return kernels.forward(logits, bias, expert_scale, r, behind)


@_op
def route_linear(
    x: Tensor, weight: Tensor, weight_bias: Tensor | None, bias: Tensor | None, expert_scale: Tensor | None, how: str
) -> Described:
    return _route_linear, how, (x, weight, weight_bias, bias, expert_scale)


def _route_linear(how: str, tensors: list[Any]) -> tuple[Tensor, Tensor]:
    from . import router

    x, weight, weight_bias, *rest = tensors
    logits = router.product(x, weight, weight_bias, torch.float32 if product_of(plain(how))[1] else x.dtype)
    return _route(how, [logits, *rest], behind=router.fits(x, weight, weight_bias))


@_op
def route_bwd(
    grad: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, how: str, needs: Sequence[bool]
) -> Described:
    return _route_bwd, How(how, needs=tuple(needs)), (grad, ids, logits, bias, expert_scale)


def _route_bwd(how: How, tensors: list[Any]) -> list[Tensor]:
    r, logits = routing_of(how.text), tensors[2]
    run = kernels.backward if kernels.can_route(r, logits.shape[1]) is None else routing.backward
    return run(*tensors, r, list(how.needs))


# ---- experts -------------------------------------------------------------------------------------------------------


def _how(text: str, x: Tensor, lists: Sequence[Sequence[Tensor]], needs: Sequence[bool] = ()) -> How:
    precision = routed.precision(x.dtype) if x.dtype == torch.float32 else ""
    return How(text, tuple([len(ts) for ts in lists]), tuple(needs), precision)


def _flat(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [t for ts in lists for t in ts]


@_op
def experts(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Described:
    *lists, add, text = rest
    return _experts, _how(text, x, lists), (x, ids, weights, add, *_flat(lists))


def _experts(how: How, tensors: list[Any]) -> Tensor:
    x, ids, weights, add, *flat = tensors
    (p,) = _bundles(how, flat)
    return routed.forward(x, ids, weights, p, add, layout_of(how.text), save=False)[0]


@_op
def experts_fwd(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Described:
    *lists, add, text = rest
    return _experts_fwd, _how(text, x, lists), (x, ids, weights, add, *_flat(lists))


def _experts_fwd(how: How, tensors: list[Any]) -> tuple[Tensor, Tensor]:
    x, ids, weights, add, *flat = tensors
    (p,) = _bundles(how, flat)
    return routed.forward(x, ids, weights, p, add, layout_of(how.text), save=True)


@_op
def experts_bwd(grad: Tensor, pre: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Described:
    *lists, text, needs = rest
    return _experts_bwd, _how(text, x, lists, needs), (grad, pre, x, ids, weights, *_flat(lists))


def _experts_bwd(how: How, tensors: list[Any]) -> list[Tensor]:
    grad, pre, x, ids, weights, *flat = tensors
    (p,) = _bundles(how, flat)
    from . import backward as gradient

    return gradient.backward(grad, pre, x, ids, weights, p, layout_of(how.text), how.needs)


@_op
def experts_shared(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Described:
    """The op gives None where the operands are beyond the kernels."""
    *lists, text = rest[:4] + rest[5:9] + rest[10:]
    return _experts_shared, _how(text, x, lists), (x, ids, weights, rest[4], rest[9], *_flat(lists))


def _experts_shared(how: How, tensors: list[Any]) -> Tensor | None:
    from . import shared

    x, ids, weights, add, gate, *flat = tensors
    p, mlp = _bundles(how, flat)
    return shared.experts_shared((x, ids, weights, p, add), layout_of(how.text), (mlp, gate, *plain(how.text)[_LAYOUT:]))


@_op
def experts_stored_shared(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Described:
    """The op gives None where the operands are beyond the kernels."""
    own, at = len(CODED), len(CODED) + 1 + len(PLAIN)
    *lists, text = rest[:own] + rest[own + 1 : at] + rest[at + 1 :]
    return _experts_stored_shared, _how(text, x, lists), (x, ids, weights, rest[own], rest[at], *_flat(lists))


def _experts_stored_shared(how: How, tensors: list[Any]) -> Tensor | None:
    from . import shared

    x, ids, weights, add, gate, *flat = tensors
    it = iter(flat)
    lists = [[next(it) for _ in range(size)] for size in how.sizes]
    p, mlp = Operands.read(lists[: len(CODED)], CODED), Operands.read(lists[len(CODED) :])
    numbers = plain(how.text)
    layout, storage = storage_of(numbers[:_STORED])
    return shared.experts_shared((x, ids, weights, p, add), layout, (mlp, gate, *numbers[_STORED:]), storage)


@_op
def experts_stored(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Described:
    *lists, add, text = rest
    return _experts_stored, _how(text, x, lists), (x, ids, weights, add, *_flat(lists))


def _experts_stored(how: How, tensors: list[Any]) -> Tensor:
    x, ids, weights, add, *flat = tensors
    from . import coded, stored

    it = iter(flat)
    p = Operands.read([[next(it) for _ in range(size)] for size in how.sizes], CODED)
    layout, storage = storage_of(plain(how.text))
    found = coded.forward(x, ids, weights, p, add, layout, storage)
    return stored.forward(x, ids, weights, p, add, layout, storage) if found is None else found


OPS: dict[str, Callable[..., Any]] = {
    "route": route,
    "route_linear": route_linear,
    "route_bwd": route_bwd,
    "experts": experts,
    "experts_fwd": experts_fwd,
    "experts_bwd": experts_bwd,
    "experts_shared": experts_shared,
    "experts_stored_shared": experts_stored_shared,
    "experts_stored": experts_stored,
}
