"""The fused ops ``torch.ops.moe_compile.route``, ``.experts`` and their kin: schema, shapes, gradients, autocast, dispatch.

Only tensors and plain numbers go in (the activation as a postfix program), so equal layers share compiled code.
Under autograd `experts` runs as `experts_fwd`, which also returns the pre-activations, and its gradient is the op
`experts_bwd`; `route` runs as `route_fwd`, its gradient is `route_bwd`. Compilers therefore see ops in both directions. What backward
needs of small tensors that a training step may write meanwhile (a selection bias, logits or weights that the caller was given) are copies
that the forward ops return. Gradients of gradients are those of plain torch (`lowering/twice.py`).
`experts_shared` adds the shared expert's MLP, so that a device can run it beside the routed experts; it is for inference, and
where a gradient is asked for it runs as `experts` twice. `route_linear` is `route` of logits that are a linear map of the tokens, for
inference with few of them.
`experts_scaled` is `experts` with a scale for each output channel, for weights that are stored as integers; where a gradient is asked
for it runs as `experts` on the weights as floats. With `row_bits` = 8 rows are rounded before both products, and there is no gradient.
A device without kernels of its own runs `moe_compile.lowering.generic`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .lowering import cpu, cpu_native, cpu_route, generic, gradients, on_cuda, routing, scaled
from .lowering.gradients import layout_of as _layout
from .lowering.gradients import routing_of as _routing

_GATING = (
    "int k, int score, bool score_over_selected, int bias_on, bool bias_in_weights, int n_groups, int kept_groups, int group_top, "
    "float group_fill, int norm, float norm_eps, float norm_clamp, float norm_p, float scale, "
    "ScalarType score_dtype, ScalarType weight_dtype"
)
_LAYOUT = (
    "int[] act_ops, float[] act_consts, int form, int num_experts, bool stacked, bool up_transposed, bool down_transposed, "
    "bool weight_on_input, int num_identity"
)
_EXPERTS = "Tensor x, Tensor ids, Tensor weights, Tensor[] up, Tensor[] down, Tensor[] up_bias, Tensor[] down_bias, "
_SCALES = "Tensor[] up_scale, Tensor[] down_scale, "
_SHARED = (
    "Tensor[] shared_up, Tensor[] shared_down, Tensor[] shared_up_bias, Tensor[] shared_down_bias, Tensor? shared_gate, "
    "int[] shared_act_ops, float[] shared_act_consts, int shared_form, bool shared_up_transposed, bool shared_down_transposed, int overlap"
)

SCHEMAS = (
    f"route(Tensor logits, Tensor? bias, Tensor? expert_scale, {_GATING}) -> (Tensor weights, Tensor ids)",
    f"route_linear(Tensor x, Tensor router, Tensor? router_bias, Tensor? bias, Tensor? expert_scale, {_GATING}) "
    "-> (Tensor weights, Tensor ids)",
    f"route_fwd(Tensor logits, Tensor? bias, Tensor? expert_scale, {_GATING}) "
    "-> (Tensor weights, Tensor ids, Tensor kept_logits, Tensor kept_ids, Tensor kept_bias, Tensor kept_scale)",
    f"route_bwd(Tensor grad, Tensor ids, Tensor logits, Tensor? bias, Tensor? expert_scale, {_GATING}, bool[] needs) -> Tensor[]",
    f"experts({_EXPERTS}Tensor? add, {_LAYOUT}) -> Tensor",
    f"experts_fwd({_EXPERTS}Tensor? add, {_LAYOUT}) -> (Tensor out, Tensor pre, Tensor kept_ids, Tensor kept_weights)",
    f"experts_bwd(Tensor grad, Tensor pre, {_EXPERTS}{_LAYOUT}, bool[] needs) -> Tensor[]",
    f"experts_shared({_EXPERTS}Tensor? add, {_LAYOUT}, {_SHARED}) -> Tensor",
    f"experts_scaled({_EXPERTS}{_SCALES}Tensor? add, {_LAYOUT}, int row_bits, float row_floor) -> Tensor",
)
_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "privateuseone": "AutocastPrivateUse1"}

_lib = torch.library.Library("moe_compile", "DEF")
for _schema in SCHEMAS:
    _lib.define(_schema)
_ops = torch.ops.moe_compile
Lists = Sequence[Sequence[Tensor]]


# ---- kernels: the device picks them ------------------------------------------------------------------------------


def _route(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any) -> tuple[Tensor, Tensor]:
    return routing.forward(logits, bias, expert_scale, _routing(*gating))


def _route_cpu(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any) -> tuple[Tensor, Tensor]:
    return cpu_route.forward(logits, bias, expert_scale, _routing(*gating))


def _route_linear(x: Tensor, router: Tensor, router_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """route(x routerᵀ + router_bias, ...)."""
    return _ops.route(torch.nn.functional.linear(x, router, router_bias), *rest)  # type: ignore[no-any-return]


def _route_fwd(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`route`, and copies of what its gradient is made from; a bias that only selects is not."""
    weights, ids = _ops.route(logits, bias, expert_scale, *gating)
    return weights, ids, logits.clone(), ids.clone(), *(_kept(t, logits) for t in (bias if gating[4] else None, expert_scale))


def _route_bwd(grad: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *rest: Any) -> list[Tensor]:
    *gating, needs = rest
    return routing.backward(grad, ids, logits, bias, expert_scale, _routing(*gating), needs)


def _kept(t: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if t is None else t.clone()


def _experts(*args: Any) -> Tensor:
    if args[0].is_cpu:
        return cpu_native.experts(*args)
    return generic.forward(*args[:8], _layout(args[8:]))[0]


def _experts_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    return generic.forward(*args[:8], _layout(args[8:]))


def _with_copies(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(out, pre) and copies of ids and weights."""

    def call(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *forward(*args), args[1].clone(), args[2].clone()

    return call


def _experts_bwd(*args: Any) -> list[Tensor]:
    return generic.backward(*args[:9], _layout(args[9:-1]), args[-1])


def _experts_shared(*args: Any) -> Tensor:
    """routed + [gate ·] shared_down act(shared_up x) + add, as `experts` of one expert whose result is what the routed ones add."""
    x, add, routed = args[0], args[7], args[8:17]
    *lists, gate, act_ops, act_consts, form, up_transposed, down_transposed, _ = args[17:]
    ids = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    gate = torch.ones(x.shape[0], 1, dtype=torch.float32, device=x.device) if gate is None else gate
    layout = (act_ops, act_consts, form, 1, False, up_transposed, down_transposed, False, 0)
    shared = _ops.experts(x, ids, gate, *lists, add, *layout)
    return _ops.experts(*args[:7], shared, *routed)  # type: ignore[no-any-return]


def _experts_scaled(*args: Any) -> Tensor:
    return scaled.forward(*args[:10], _layout(args[10:-2]), *args[-2:])


def _experts_as_floats(x: Tensor, ids: Tensor, weights: Tensor, up: Any, down: Any, *rest: Any) -> Tensor:
    """`experts` on the weights times their scales."""
    up_bias, down_bias, up_scale, down_scale, add, *plain, row_bits, _ = rest
    if row_bits:
        raise NotImplementedError("moe_compile::experts_scaled has no gradient through rounded rows")
    layout, wide = _layout(plain), generic.accumulate_dtype(x.dtype)
    ups = scaled.as_floats(up, up_scale, layout.up_transposed, wide)
    downs = scaled.as_floats(down, down_scale, layout.down_transposed, wide)
    biases = [[b.to(wide) for b in group] for group in (up_bias, down_bias)]
    out: Tensor = _ops.experts(x.to(wide), ids, weights, ups, downs, *biases, add, *plain)
    return out.to(x.dtype)


def _experts_fwd_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    return cpu.forward(*args[:8], _layout(args[8:]), save=True)


def _experts_bwd_cpu(*args: Any) -> list[Tensor]:
    return cpu.backward(*args[:9], _layout(args[9:-1]), args[-1])


for _name, _any_device, _on_cpu in (
    ("route", _route, _route_cpu),
    ("route_linear", _route_linear, None),
    ("route_bwd", _route_bwd, None),
    ("experts", _experts, None),
    ("experts_bwd", _experts_bwd, _experts_bwd_cpu),
    ("experts_shared", _experts_shared, None),
):
    _lib.impl(_name, _any_device, "CompositeExplicitAutograd")
    _lib.impl(_name, functools.partial(on_cuda.call, _name), "CUDA")
    if _on_cpu is not None:
        _lib.impl(_name, _on_cpu, "CPU")
_lib.impl("experts_scaled", _experts_scaled, "CompositeExplicitAutograd")
_lib.impl("route_fwd", _route_fwd, "CompositeExplicitAutograd")
_lib.impl("experts_fwd", _with_copies(_experts_fwd), "CompositeExplicitAutograd")
_lib.impl("experts_fwd", _with_copies(_experts_fwd_cpu), "CPU")
for _name in ("route_fwd", "experts_fwd"):
    _lib.impl(_name, functools.partial(on_cuda.call, _name), "CUDA")


# ---- shapes ------------------------------------------------------------------------------------------------------


@torch.library.register_fake("moe_compile::route", lib=_lib)
def _route_fake(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, k: int, *gating: Any) -> tuple[Tensor, Tensor]:
    tokens = logits.shape[0]
    return logits.new_empty(tokens, k, dtype=gating[-1]), logits.new_empty(tokens, k, dtype=torch.int64)


@torch.library.register_fake("moe_compile::route_linear", lib=_lib)
def _route_linear_fake(x: Tensor, router: Tensor, router_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return _route_fake(x, *rest)  # type: ignore[no-any-return]


@torch.library.register_fake("moe_compile::route_fwd", lib=_lib)
def _route_fwd_fake(
    logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, ids = _route_fake(logits, bias, expert_scale, *gating)
    kept = (logits.new_empty(0) if t is None else torch.empty_like(t) for t in (bias if gating[4] else None, expert_scale))
    return weights, ids, torch.empty_like(logits), torch.empty_like(ids), *kept


@torch.library.register_fake("moe_compile::route_bwd", lib=_lib)
def _route_bwd_fake(
    grad: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *rest: Any
) -> list[Tensor]:
    wanted = zip((logits, bias, expert_scale), rest[-1], strict=True)
    return [_empty_contiguous(t) for t, needed in wanted if needed and t is not None]


@torch.library.register_fake("moe_compile::experts", lib=_lib)
def _experts_fake(*args: Any) -> Tensor:
    return args[0].new_empty(args[0].shape[0], _layout(args[8:]).out_features(args[4]))


@torch.library.register_fake("moe_compile::experts_scaled", lib=_lib)
def _experts_scaled_fake(*args: Any) -> Tensor:
    return args[0].new_empty(args[0].shape[0], _layout(args[10:-2]).out_features(args[4]))


@torch.library.register_fake("moe_compile::experts_shared", lib=_lib)
def _experts_shared_fake(*args: Any) -> Tensor:
    return _experts_fake(*args[:17])


@torch.library.register_fake("moe_compile::experts_fwd", lib=_lib)
def _experts_fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, ids, weights, layout = *args[:3], _layout(args[8:])
    out = x.new_empty(x.shape[0], layout.out_features(args[4]))
    pre = x.new_empty(ids.shape[0] * ids.shape[1], layout.pre_width(args[4]))
    return out, pre, torch.empty_like(ids), torch.empty_like(weights)


@torch.library.register_fake("moe_compile::experts_bwd", lib=_lib)
def _experts_bwd_fake(grad: Tensor, pre: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> list[Tensor]:
    tensors = [x, weights, *(t for ts in rest[:4] for t in ts)]
    return [_empty_contiguous(t) for t, needed in zip(tensors, rest[-1], strict=True) if needed]


def _empty_contiguous(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


on_cuda.define(
    _lib,
    {
        "route": _route,
        "route_linear": _route_linear,
        "route_fwd": _route_fwd,
        "route_bwd": _route_bwd,
        "experts": _experts,
        "experts_fwd": _with_copies(_experts_fwd),
        "experts_bwd": _experts_bwd,
        "experts_shared": _experts_shared,
    },
    {
        "route": _route_fake,
        "route_linear": _route_linear_fake,
        "route_fwd": _route_fwd_fake,
        "route_bwd": _route_bwd_fake,
        "experts": _experts_fake,
        "experts_fwd": _experts_fwd_fake,
        "experts_bwd": _experts_bwd_fake,
        "experts_shared": _experts_shared_fake,
    },
)


# ---- gradients ---------------------------------------------------------------------------------------------------


def _needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _experts_autograd(*args: Any) -> Tensor:
    x, ids, weights, *lists, add = args[:8]
    if torch.is_grad_enabled():
        flat = [t for ts in lists for t in ts]
        if _needs_grad([x, weights, add, *flat]):
            return gradients.Experts.apply([len(ts) for ts in lists], list(args[8:]), x, ids, weights, add, *flat)  # type: ignore[no-any-return, no-untyped-call]
    return on_cuda.below("experts", *args)  # type: ignore[no-any-return]


def _route_autograd(logits: Tensor, bias: Tensor | None, expert_scale: Tensor | None, *gating: Any) -> tuple[Tensor, Tensor]:
    if _needs_grad([logits, bias, expert_scale]):
        return gradients.Route.apply(list(gating), logits, bias, expert_scale)  # type: ignore[no-any-return, no-untyped-call]
    return on_cuda.below("route", logits, bias, expert_scale, *gating)  # type: ignore[no-any-return]


def _or_differentiable(name: str, differentiable: Callable[..., Any]) -> Callable[..., Any]:
    """The op, or differentiable ops in its place where a gradient is asked for."""

    def call(*args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        if _needs_grad(tensors):
            return differentiable(*args)
        return on_cuda.below(name, *args)

    return call


_lib.impl("experts", _experts_autograd, "Autograd")
cpu_native.define(_lib, f"({_EXPERTS}Tensor? add, {_LAYOUT}) -> Tensor", _experts_autograd)
_lib.impl("experts_shared", _or_differentiable("experts_shared", _experts_shared), "Autograd")
_lib.impl("experts_scaled", _or_differentiable("experts_scaled", _experts_as_floats), "Autograd")
_lib.impl("route", _route_autograd, "Autograd")
_lib.impl("route_linear", _or_differentiable("route_linear", _route_linear), "Autograd")


# ---- autocast ----------------------------------------------------------------------------------------------------


def _autocast(device_type: str, key: str, name: str = "experts") -> Callable[..., Tensor]:
    def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible and t is not None else t

    def experts(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        """Matrix products take the autocast dtype, as `F.linear` does; routing weights and scales keep theirs."""
        dtype = torch.get_autocast_dtype(device_type)
        lists = [[cast(t, dtype) for t in ts] for ts in rest[:4]]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            rest = rest[4:]
            if name == "experts_shared":
                rest = tuple([cast(t, dtype) for t in a] if _tensor_list(a) else a for a in rest)
            return getattr(_ops, name)(cast(x, dtype), ids, weights, *lists, *rest)  # type: ignore[no-any-return]

    return experts


def _tensor_list(a: Any) -> bool:
    return isinstance(a, (list, tuple)) and bool(a) and isinstance(a[0], Tensor)


for _device, _key in _AUTOCAST.items():
    if hasattr(torch._C.DispatchKey, _key):
        _lib.impl("experts_shared", _autocast(_device, _key, "experts_shared"), _key)
        _lib.impl("experts_scaled", _autocast(_device, _key, "experts_scaled"), _key)
        _lib.impl("experts", _autocast(_device, _key), _key)


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
    from .ir.scalar import encode

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
    from .ir.scalar import encode

    return [*encode(shared.activation), int(shared.form), shared.up_transposed, shared.down_transposed, overlap]
