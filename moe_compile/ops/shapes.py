"""The ops' results without their values: shapes, dtypes, strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.operands import ADAPTED, CHAINED, CODED, PLAIN, STORED_ADAPTED, Operands
from ..ir.records import Layout, Storage
from .records import adapted_of, bundled, chained_of, layout_of, product_of, storage_of, stored_adapted_of
from .schemas import IN_WEIGHTS, NAMES, ROUTED, STORED, library


def route(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, k: int, *gating: Any) -> tuple[Tensor, Tensor]:
    tokens = logits.shape[0]
    return logits.new_empty(tokens, k, dtype=gating[-1]), logits.new_empty(tokens, k, dtype=torch.int64)


def route_linear(x: Tensor, router: Tensor, router_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return route(x, *rest[:2], *product_of(rest[2:])[0])  # type: ignore[no-any-return]


def route_fwd(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, ids = route(logits, bias, expert_scale, *gating)
    kept = (logits.new_empty(0) if t is None else torch.empty_like(t) for t in (bias if gating[IN_WEIGHTS] else None, expert_scale))
    return weights, ids, torch.empty_like(logits), torch.empty_like(ids), *kept


def route_bwd(grad: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *rest: Any) -> list[Tensor]:
    wanted = zip((logits, bias, expert_scale), rest[-1], strict=True)
    return [_empty_contiguous(t) for t, needed in wanted if needed and t is not None]


def _of(names: Sequence[str], record: Callable[[Sequence[Any]], Layout]) -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    """The shapes of an op of experts with these parameters, and of its `_fwd`."""

    def experts(*args: Any) -> Tensor:
        x, _, _, p, (_, *plain) = bundled(args, names)
        return x.new_empty(x.shape[0], record(plain).out_features(p.down))  # type: ignore[no-any-return]

    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, ids, weights, p, (_, *plain) = bundled(args, names)
        pre = x.new_empty(ids.shape[0] * ids.shape[1], record(plain).pre_width(p.down))
        return experts(*args), pre, torch.empty_like(ids), torch.empty_like(weights)

    return experts, forward


def _backward_of(names: Sequence[str]) -> Callable[..., list[Tensor]]:
    """The shapes of a `_bwd`: of the tensors whose gradients are asked for."""

    def backward(grad: Tensor, pre: Tensor, *args: Any) -> list[Tensor]:
        x, _, weights, p, (*_, needs) = bundled(args, names)
        return [_empty_contiguous(t) for t, needed in zip((x, weights, *p), needs, strict=True) if needed]

    return backward


experts, experts_fwd = _of(PLAIN, layout_of)
experts_adapted, experts_adapted_fwd = _of(ADAPTED, adapted_of)


def experts_stored(*args: Any) -> Tensor:
    x, _, _, p, (_, *plain) = bundled(args, CODED)
    return _stored(x, p, *storage_of(plain))


def experts_stored_adapted(*args: Any) -> Tensor:
    x, _, _, p, (_, *plain) = bundled(args, STORED_ADAPTED)
    return _stored(x, p, *stored_adapted_of(plain))


def _stored(x: Tensor, p: Operands[Tensor], layout: Layout, storage: Storage) -> Tensor:
    down, matrix = storage.stored()[1], p.down[0].shape[-2:]
    out, inner = matrix if down is None else down.shape(matrix)
    return x.new_empty(x.shape[0], inner if layout.down_transposed else out)


def experts_chained(*args: Any) -> Tensor:
    x, _, _, _, (_, *plain) = bundled(args, CHAINED)
    return x.new_empty(x.shape[0], chained_of(plain).chain.stages[-1].width)  # type: ignore[no-any-return]


def experts_shared(*args: Any) -> Tensor:
    return experts(*args[:ROUTED])


def experts_stored_shared(*args: Any) -> Tensor:
    return experts_stored(*args[:STORED])


def experts_chained_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, ids, weights = args[:3]
    return experts_chained(*args), x.new_empty(0), torch.empty_like(ids), torch.empty_like(weights)


experts_bwd, experts_adapted_bwd, experts_chained_bwd = map(_backward_of, (PLAIN, ADAPTED, CHAINED))


def _empty_contiguous(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


SHAPES: dict[str, Callable[..., Any]] = {name: globals()[name] for name in NAMES}  # of each op by a function of its name
_watching: dict[str, Callable[[Sequence[Any]], None]] = {}


def watch(name: str, look: Callable[[Sequence[Any]], None]) -> None:
    """Let `look` see the arguments of an op, tensors without values, where a compiler traces it: a target may begin to compile kernels."""
    _watching[name] = look


def _traced(name: str, shape: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if name in _watching:
            _watching[name](args)
        return shape(*args)

    return run


for _name, _shape in SHAPES.items():
    torch.library.register_fake(f"moe_compile::{_name}", _traced(_name, _shape), lib=library)
