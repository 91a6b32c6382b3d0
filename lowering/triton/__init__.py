"""The CUDA target: routing, grouped GEMMs and combine as Triton kernels. Triton is looked up when a block is lowered."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor

from ... import ops
from ..target import Target
from . import capability, coded_tiles, pairs, short

short.define(ops.library, ops.anywhere.IMPLEMENTATIONS, ops.shapes.SHAPES)


def _stored_adapted(*args: Any) -> Tensor:
    """Looked up when it is called: what it launches is made by triton."""
    found: Tensor = importlib.import_module(f"{__package__}.stored").experts_stored_adapted(*args)
    return found


TARGET = Target(
    name="cuda",
    devices=("cuda",),
    refuses=capability.refuses,
    says=capability.says,
    dispatch_key="CUDA",
    kernels={name: functools.partial(short.call, name) for name in short.SCHEMAS}
    | pairs.KERNELS
    | {"experts_stored_adapted": _stored_adapted},
    straight=short.call,
    router_tokens=capability.ROUTER_TOKENS,
    decodes=capability.decodes,
    alone_tokens=coded_tiles.FEW_OF_ONE,  # with more, floats of the one matrix and a library's product are faster
    coded=True,
    missing=capability.missing,
)
