"""The CUDA target: routing, grouped GEMMs and combine as Triton kernels. Triton is looked up when a block is lowered."""

from __future__ import annotations

import functools

from ... import ops
from ..target import Target
from . import capability, pairs, short

short.define(ops.library, ops.anywhere.IMPLEMENTATIONS, ops.shapes.SHAPES)
TARGET = Target(
    name="cuda",
    devices=("cuda",),
    refuses=capability.refuses,
    says=capability.says,
    dispatch_key="CUDA",
    kernels={name: functools.partial(short.call, name) for name in short.SCHEMAS} | pairs.KERNELS,
    straight=short.call,
    router_tokens=capability.ROUTER_TOKENS,
    coded=True,
    missing=capability.missing,
)
