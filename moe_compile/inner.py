"""The inner compiler: whoever compiles the graph once the fused ops are in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from . import report as reports
from . import values
from ._version import __version__
from .inductor import inductor
from .lowering.target import Rest, Target
from .options import Options


def compile_with(
    options: Options, mode: str | None, target: Target, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Hand `gm` to the target where that compiles graphs itself, else to the inner compiler; return what it makes of it."""
    if target.finish is None:
        return _compile(options, mode, target, gm, example_inputs)

    def rest(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
        return _compile(options, mode, target, gm, example_inputs)

    return target.finish(Rest(options, mode, rest, reports.remark, reports.explaining()), gm, example_inputs)


def _compile(
    options: Options, mode: str | None, target: Target, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Hand `gm` to the compiler that `options` names."""
    compiler = options.inner
    kwargs: dict[str, Any] = {}
    if compiler == "auto":
        compiler = "inductor"
    if compiler == "inductor":
        compiler = inductor(options.inner_options, mode)
    else:
        if isinstance(compiler, str):
            from torch._dynamo.backends.registry import lookup_backend

            compiler = lookup_backend(compiler)
        if mode and mode != "default":
            kwargs["mode"] = mode
        if options.inner_options:
            kwargs["options"] = dict(options.inner_options)
    assert callable(compiler)
    if not _holds_our_ops(gm):
        return compiler(gm, example_inputs, **kwargs)
    values.fill(gm.graph)
    with _cache_tag(target):
        return compiler(gm, example_inputs, **kwargs)


def _holds_our_ops(gm: torch.fx.GraphModule) -> bool:
    ops = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    return any(isinstance(n.target, ops) and str(n.target).startswith("moe_compile.") for n in gm.graph.nodes)


def _cache_tag(target: Target) -> AbstractContextManager[Any]:
    """Mark on-disk cache entries with the state of this package's ops.

    A cached graph keeps the shapes, strides and gradient formulas that our ops had when it was compiled, but torch's cache keys
    only hold an op's name: without the mark a new version of this package would run graphs compiled against the old ops.
    """
    config = torch.compiler.config
    return config.patch(cache_key_tag=f"{config.cache_key_tag}moe_compile-{__version__}-{target.digest[:16]}")
