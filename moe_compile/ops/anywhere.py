"""The ops on any device, in plain torch: what runs where a target has no kernel of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..ir.operands import ADAPTED, CHAINED, CODED, STORED_ADAPTED
from ..ir.records import Storage
from ..lowering.reference import chained, generic, routing, stored
from .records import adapted_of, bundled, chained_of, layout_of, product_of, routing_of, storage_of, stored_adapted_of
from .schemas import IN_WEIGHTS, NAMES, ROUTED, STORED, library

_ops = torch.ops.moe_compile


def route(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any) -> tuple[Tensor, Tensor]:
    return routing.forward(logits, bias, expert_scale, routing_of(*gating))


def route_linear(x: Tensor, router: Tensor, router_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """route(x routerᵀ + router_bias, ...); `wide`: of the operands in float32."""
    gating, wide = product_of(rest[2:])
    operands = [t.float() if wide and t is not None else t for t in (x, router, router_bias)]
    return _ops.route(torch.nn.functional.linear(*operands), *rest[:2], *gating)  # type: ignore[no-any-return, arg-type]


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
    return experts_fwd(*args)[0]


def experts_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    x, ids, weights, p, (add, *plain) = bundled(args)
    return generic.forward(x, ids, weights, p, add, layout_of(plain))


def experts_adapted_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    x, ids, weights, p, (add, *plain) = bundled(args, ADAPTED)
    return generic.forward(x, ids, weights, p, add, adapted_of(plain))


def experts_adapted(*args: Any) -> Tensor:
    return experts_adapted_fwd(*args)[0]


def with_copies(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(out, pre) and copies of ids and weights."""

    def call(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *forward(*args), args[1].clone(), args[2].clone()

    return call


def experts_bwd(grad: Tensor, pre: Tensor, *args: Any) -> list[Tensor]:
    x, ids, weights, p, (*plain, needs) = bundled(args)
    return generic.backward(grad, pre, x, ids, weights, p, layout_of(plain), needs)


def experts_adapted_bwd(grad: Tensor, pre: Tensor, *args: Any) -> list[Tensor]:
    x, ids, weights, p, (*plain, needs) = bundled(args, ADAPTED)
    return generic.backward(grad, pre, x, ids, weights, p, adapted_of(plain), needs)


def experts_chained(*args: Any) -> Tensor:
    x, ids, weights, p, (add, *plain) = bundled(args, CHAINED)
    return chained.forward(x, ids, weights, p.parts, add, chained_of(plain))


def experts_chained_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return experts_chained(*args), args[0].new_empty(0)


def experts_chained_bwd(grad: Tensor, pre: Tensor, *args: Any) -> list[Tensor]:
    x, ids, weights, p, (*plain, needs) = bundled(args, CHAINED)
    return chained.backward(grad, x, ids, weights, p.parts, chained_of(plain), needs)


def experts_shared(*args: Any) -> Tensor:
    """routed + [gate ·] shared_down act(shared_up x) + add, as `experts` of one expert whose result is what the routed ones add."""
    x, ids, weights, p, (add, *routed) = bundled(args[:ROUTED])
    return _ops.experts(x, ids, weights, *p.lists(), _as_one(x, add, args[ROUTED:]), *routed)  # type: ignore[no-any-return]


def experts_stored_shared(*args: Any) -> Tensor:
    """As `experts_shared`, of routed experts in few bits."""
    x, ids, weights, p, (add, *routed) = bundled(args[:STORED], CODED)
    return _ops.experts_stored(x, ids, weights, *p.lists(CODED), _as_one(x, add, args[STORED:]), *routed)  # type: ignore[no-any-return]


def _as_one(x: Tensor, add: Tensor | None, args: Sequence[Any]) -> Tensor:
    """[gate ·] shared_down act(shared_up x) + add: the arguments of the shared expert as those of one that all tokens choose."""
    *mlp, gate, act_ops, act_consts, form, up_transposed, down_transposed, _ = args
    every = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    gate = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device) if gate is None else gate
    layout = (act_ops, act_consts, form, 1, False, up_transposed, down_transposed, False, 0)
    return _ops.experts(x, every, gate, *mlp, add, *layout)  # type: ignore[no-any-return]


def experts_stored(*args: Any) -> Tensor:
    x, ids, weights, p, (add, *plain) = bundled(args, CODED)
    return stored.forward(x, ids, weights, p, add, *storage_of(plain))


def experts_stored_adapted(*args: Any) -> Tensor:
    x, ids, weights, p, (add, *plain) = bundled(args, STORED_ADAPTED)
    return stored.forward(x, ids, weights, p, add, *stored_adapted_of(plain))


def adapted_as_floats(*args: Any) -> Tensor:
    """`experts_adapted` on the floats that codes and scales stand for, with gradients to scales too."""
    x, ids, weights, p, (add, *plain) = bundled(args, STORED_ADAPTED)
    layout, storage = stored_adapted_of(plain)
    _no_rounded_rows(storage, "experts_stored_adapted")
    floats = stored.as_floats(p, storage, x.dtype).lists(ADAPTED)
    return _ops.experts_adapted(x, ids, weights, *floats, add, *plain[: len(fields(layout))])  # type: ignore[no-any-return]


def _no_rounded_rows(storage: Storage, name: str) -> None:
    if any(storage.rows()):
        raise NotImplementedError(f"moe_compile::{name} has no gradient through rounded rows")


def experts_as_floats(*args: Any) -> Tensor:
    """`experts` on the floats that codes and scales stand for."""
    x, ids, weights, p, (add, *plain) = bundled(args, CODED)
    (layout, storage), wide = storage_of(plain), generic.accumulate_dtype(x.dtype)
    _no_rounded_rows(storage, "experts_stored")
    floats = stored.as_floats(p, storage, wide).lists()
    out: Tensor = _ops.experts(x.to(wide), ids, weights, *floats, add, *plain[: len(fields(layout))])
    return out.to(x.dtype)


# of each op the function of its name
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {name: globals()[name] for name in NAMES}
IMPLEMENTATIONS |= {name: with_copies(f) for name, f in IMPLEMENTATIONS.items() if name.startswith("experts") and name.endswith("_fwd")}
for _name, _implementation in IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
