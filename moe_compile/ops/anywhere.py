"""The ops on any device, in plain torch: what runs where a target has no kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..lowering.reference import generic, routing, scaled
from .records import layout_of, routing_of
from .schemas import IN_WEIGHTS, library

_ops = torch.ops.moe_compile


def route(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any) -> tuple[Tensor, Tensor]:
    return routing.forward(logits, bias, expert_scale, routing_of(*gating))


def route_linear(x: Tensor, router: Tensor, router_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """route(x routerᵀ + router_bias, ...)."""
    return _ops.route(torch.nn.functional.linear(x, router, router_bias), *rest)  # type: ignore[no-any-return]


def route_fwd(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`route`, and copies of what its gradient is made from; a bias that only selects is not."""
    weights, ids = _ops.route(logits, bias, expert_scale, *gating)
    return weights, ids, logits.clone(), ids.clone(), *(_kept(t, logits) for t in (bias if gating[IN_WEIGHTS] else None, expert_scale))


def route_bwd(grad: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *rest: Any) -> list[Tensor]:
    *gating, needs = rest
    return routing.backward(grad, ids, logits, bias, expert_scale, routing_of(*gating), needs)


def _kept(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t.clone()


_meanwhile: dict[str, Callable[..., Tensor]] = {}


def until_loaded(device: str, run: Callable[..., Tensor]) -> None:
    """Let `run` be `experts` on a type of device until a library of C++ takes the op over: the dispatcher warns of a second kernel."""
    _meanwhile[device] = run


def experts(*args: Any) -> Tensor:
    run = _meanwhile.get(args[0].device.type)
    if run is not None:
        return run(*args)
    return generic.forward(*args[:8], layout_of(args[8:]))[0]


def experts_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return generic.forward(*args[:8], layout_of(args[8:]))


def with_copies(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(out, pre) and copies of ids and weights."""

    def call(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *forward(*args), args[1].clone(), args[2].clone()

    return call


def experts_bwd(*args: Any) -> list[Tensor]:
    return generic.backward(*args[:9], layout_of(args[9:-1]), args[-1])


def experts_shared(*args: Any) -> Tensor:
    """routed + [gate ·] shared_down act(shared_up x) + add, as `experts` of one expert whose result is what the routed ones add."""
    x, add, routed = args[0], args[7], args[8:17]
    *lists, gate, act_ops, act_consts, form, up_transposed, down_transposed, _ = args[17:]
    ids = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    gate = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device) if gate is None else gate
    layout = (act_ops, act_consts, form, 1, False, up_transposed, down_transposed, False, 0)
    shared = _ops.experts(x, ids, gate, *lists, add, *layout)
    return _ops.experts(*args[:7], shared, *routed)  # type: ignore[no-any-return]


def experts_scaled(*args: Any) -> Tensor:
    return scaled.forward(*args[:10], layout_of(args[10:-2]), *args[-2:])


def experts_as_floats(x: Tensor, ids: Tensor, weights: Tensor, up: Any, down: Any, *rest: Any) -> Tensor:
    """`experts` on the weights times their scales."""
    up_bias, down_bias, up_scale, down_scale, add, *plain, row_bits, _ = rest
    if row_bits:
        raise NotImplementedError("moe_compile::experts_scaled has no gradient through rounded rows")
    layout, wide = layout_of(plain), generic.accumulate_dtype(x.dtype)
    ups = scaled.as_floats(up, up_scale, layout.up_transposed, wide)
    downs = scaled.as_floats(down, down_scale, layout.down_transposed, wide)
    biases = [[b.to(wide) for b in group] for group in (up_bias, down_bias)]
    out: Tensor = _ops.experts(x.to(wide), ids, weights, ups, downs, *biases, add, *plain)
    return out.to(x.dtype)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "route": route,
    "route_linear": route_linear,
    "route_fwd": route_fwd,
    "route_bwd": route_bwd,
    "experts": experts,
    "experts_fwd": with_copies(experts_fwd),
    "experts_bwd": experts_bwd,
    "experts_shared": experts_shared,
    "experts_scaled": experts_scaled,
}
for _name, _implementation in IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
