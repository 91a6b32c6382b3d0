"""The ops of experts with low-rank pairs on CUDA: kernels looked up when they are called, plain torch where triton is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.operands import ADAPTED
from ...ops import shapes
from ...ops.anywhere import IMPLEMENTATIONS, with_copies
from ...ops.records import adapted_of, bundled


def _on_its_device(f: Callable[..., Any], of: str) -> Callable[..., Any]:
    """Kernels are launched on the operands' device; `of`: the op that runs without triton."""

    def call(*args: Any) -> Any:
        if importlib.util.find_spec("triton") is None:
            return IMPLEMENTATIONS[of](*args)
        with torch.cuda.device(args[0].device):
            return f(importlib.import_module(f"{__package__}.adapted_calls"), *args)

    return functools.wraps(f)(call)


def _forward(kernels: Any, *args: Any) -> tuple[Tensor, Tensor]:
    x, ids, weights, p, (add, *plain) = bundled(args, ADAPTED)
    found: tuple[Tensor, Tensor] = kernels.forward(x, ids, weights, p, add, adapted_of(plain))
    return found


def _experts(kernels: Any, *args: Any) -> Tensor:
    return _forward(kernels, *args)[0]


def _with_copies(kernels: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return with_copies(functools.partial(_forward, kernels))(*args)


def _backward(kernels: Any, grad: Tensor, pre: Tensor, *args: Any) -> list[Tensor]:
    x, ids, weights, p, (*plain, needs) = bundled(args, ADAPTED)
    found: list[Tensor] = kernels.backward(grad, pre, x, ids, weights, p, adapted_of(plain), needs)
    return found


KERNELS = {
    name: _on_its_device(f, name)
    for name, f in (("experts_adapted", _experts), ("experts_adapted_fwd", _with_copies), ("experts_adapted_bwd", _backward))
}


def _ahead(name: str, args: Sequence[Any]) -> None:
    """Kernels are begun while the compiler that traces an op compiles the rest."""
    on_card = args[0].device.type == "cuda" and torch.cuda.is_available()
    if on_card and importlib.util.find_spec("triton") is not None:
        importlib.import_module(f"{__package__}.adapted_calls").compile_ahead(name, args)


for _name in KERNELS:
    shapes.watch(_name, functools.partial(_ahead, _name))
