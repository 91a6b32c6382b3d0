"""The ops as CUDA runs them: the same operands, and all plain arguments as one text.

A call of an op costs microseconds for each of thirty arguments, twice where Python stands in between for autograd. So the ops of
`moe_compile.ops` hand CUDA tensors on, below autograd, to ops `cuda_...` of few arguments, and compiled graphs hold those. The text is
made from the arguments alone: equal layers share code, and a graph from a disk cache means what it meant.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.operands import CODED, PLAIN
from ...ops.schemas import IN_WEIGHTS, ROUTED, STORED, lists

_EXPERTS = f"Tensor x, Tensor ids, Tensor weights, {lists(PLAIN)}"
_ROUTE = "Tensor? bias, Tensor? expert_scale"
_SHARED = f"{lists(PLAIN, 'shared_')}, Tensor? shared_gate"
SCHEMAS = {
    "route": f"Tensor logits, {_ROUTE}, str how) -> (Tensor weights, Tensor ids)",
    "route_linear": f"Tensor x, Tensor router, Tensor? router_bias, {_ROUTE}, str how) -> (Tensor weights, Tensor ids)",
    "route_fwd": f"Tensor logits, {_ROUTE}, str how) -> "
    "(Tensor weights, Tensor ids, Tensor kept_logits, Tensor kept_ids, Tensor kept_bias, Tensor kept_scale)",
    "route_bwd": f"Tensor grad, Tensor ids, Tensor logits, {_ROUTE}, str how, bool[] needs) -> Tensor[]",
    "experts": f"{_EXPERTS}, Tensor? add, str how) -> Tensor",
    "experts_fwd": f"{_EXPERTS}, Tensor? add, str how) -> (Tensor out, Tensor pre, Tensor kept_ids, Tensor kept_weights)",
    "experts_bwd": f"Tensor grad, Tensor pre, {_EXPERTS}, str how, bool[] needs) -> Tensor[]",
    "experts_shared": f"{_EXPERTS}, Tensor? add, {_SHARED}, str how) -> Tensor",
    "experts_stored_shared": f"Tensor x, Tensor ids, Tensor weights, {lists(CODED)}, Tensor? add, {_SHARED}, str how) -> Tensor",
    "experts_stored": f"Tensor x, Tensor ids, Tensor weights, {lists(CODED)}, Tensor? add, str how) -> Tensor",
}
# How many arguments stand before the plain ones; for the shared expert also the second run of tensors, behind those of the routed ones
_TENSORS = {"route": 3, "route_linear": 5, "route_fwd": 3, "route_bwd": 5, "experts": 8, "experts_fwd": 8, "experts_bwd": 9}
_TENSORS["experts_stored"] = 4 + len(CODED)
_SHARED_AT = {
    "experts_shared": (8, ROUTED, ROUTED + len(PLAIN) + 1),
    "experts_stored_shared": (4 + len(CODED), STORED, STORED + len(PLAIN) + 1),
}


def text(plain: Sequence[Any]) -> str:
    """Plain arguments: numbers, lists of numbers, dtypes."""
    return _text(*[tuple(v) if isinstance(v, (list, tuple)) else v for v in plain])


@functools.lru_cache(maxsize=4096, typed=True)  # True is not 1 here
def _text(*plain: Any) -> str:
    return json.dumps(plain, separators=(",", ":"), default=lambda dtype: str(dtype).removeprefix("torch."))


@functools.lru_cache(maxsize=4096)
def plain(how: str) -> tuple[Any, ...]:
    """The plain arguments of a text."""
    return tuple(getattr(torch, v) if isinstance(v, str) else v for v in json.loads(how))


def shorten(name: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of an op of `moe_compile.ops` as its short form takes them."""
    if name in _SHARED_AT:
        first, second, third = _SHARED_AT[name]
        return (*args[:first], *args[second:third], text([*args[first:second], *args[third:]]))
    at = _TENSORS[name]
    if name.endswith("_bwd"):
        return (*args[:at], text(args[at:-1]), args[-1])
    return (*args[:at], text(args[at:]))


def lengthen(name: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The inverse of `shorten`."""
    if name in _SHARED_AT:
        first, second, _ = _SHARED_AT[name]
        *tensors, how = args
        numbers = plain(how)
        return (*tensors[:first], *numbers[: second - first], *tensors[first:], *numbers[second - first :])
    at = _TENSORS[name]
    return (*args[:at], *plain(args[at]), *args[at + 1 :])


def define(library: torch.library.Library, otherwise: Mapping[str, Callable[..., Any]], shapes: Mapping[str, Callable[..., Any]]) -> None:
    """Define the short ops. `otherwise`: an op's implementation for any device, by name; `shapes`: its fake one. Both take the long
    arguments."""
    for name, schema in SCHEMAS.items():
        _kernels[name] = _kernel(name, otherwise[name])
        library.define(f"cuda_{name}({schema}")
        library.impl(f"cuda_{name}", _kernels[name], "CUDA")
        library.impl(f"cuda_{name}", _long(name, otherwise[name]), "CompositeExplicitAutograd")
        # whoever asks for a gradient has met autograd before
        library.impl(f"cuda_{name}", torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"moe_compile::cuda_{name}", _fake(name, shapes[name]), lib=library)


def call(name: str, *args: Any) -> Any:
    """The short form of an op, for the arguments of the long one; straight to the kernels where nobody stands in between.

    An op that has none runs as it is.
    """
    if name not in SCHEMAS:
        return getattr(torch.ops.moe_compile, name).default(*args)
    short = shorten(name, args)
    if torch._C._len_torch_dispatch_stack() == 0 and _functorch() is None and all(map(_ordinary, args)):
        return _kernels[name](*short)
    return getattr(torch.ops.moe_compile, f"cuda_{name}").default(*short)


_kernels: dict[str, Callable[..., Any]] = {}
_KERNELS = {"route_fwd": "route"}  # ops whose kernels are another's
_functorch: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


def _ordinary(a: Any) -> bool:
    """No tensor that stands for another, or a list of such."""
    if isinstance(a, (list, tuple)):
        return all(map(_ordinary, a))
    return not isinstance(a, Tensor) or type(a) in (Tensor, torch.nn.Parameter)


def _long(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: f(*lengthen(name, args))


def _fake(name: str, shape: Callable[..., Any]) -> Callable[..., Any]:
    """The shapes of an op's results. Where a compiler asks for a card's, it is about to compile the rest: the op's kernels are begun."""

    def run(*args: Any) -> Any:
        if args[0].device.type == "cuda" and torch.cuda.is_available() and _found(name) is not None:
            importlib.import_module(f"{__package__}.calls").compile_ahead(_KERNELS.get(name, name), args)
        return shape(*lengthen(name, args))

    return run


def _copies(name: str, args: Sequence[Any], out: Sequence[Tensor]) -> list[Tensor]:
    """What the gradient is made from and a caller may write meanwhile; see `gradients`."""
    if name == "experts_fwd":
        return [args[1].clone(), args[2].clone()]
    logits, bias, expert_scale, how = args
    in_weights = plain(how)[IN_WEIGHTS]
    tables = (bias if in_weights else None, expert_scale)
    return [logits.clone(), out[1].clone(), *(logits.new_empty(0) if t is None else t.clone() for t in tables)]


@functools.cache
def _found(name: str) -> Callable[..., Any] | None:
    """The op in lowering/triton; None where triton is missing."""
    if importlib.util.find_spec("triton") is None:
        return None
    kernels: dict[str, Callable[..., Any]] = importlib.import_module(f"{__package__}.calls").OPS
    return kernels[_KERNELS.get(name, name)]


def _kernel(name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """The kernels of lowering/triton, looked up at the first call; `otherwise` where triton is missing or they are beyond it."""

    def run(*args: Any) -> Any:
        kernel = _found(name)
        out = None if kernel is None else kernel(*args)
        if out is None:
            return otherwise(*lengthen(name, args))
        return (*out, *_copies(name, args, out)) if name.endswith("_fwd") else out

    def on_its_device(*args: Any) -> Any:
        x: Tensor = args[0]
        if x.get_device() == torch._C._cuda_getDevice():
            return run(*args)
        with torch.cuda.device(x.device):
            return run(*args)

    return on_its_device
