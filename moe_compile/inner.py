"""The inner compiler: whoever compiles the graph once the fused ops are in it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .options import Options

Compiler = Callable[..., Callable[..., Any]]


def inductor(options: Mapping[str, Any], mode: str | None) -> Compiler:
    """Inductor with exactly what `torch.compile(mode=..., options=...)` gives it.

    Raises RuntimeError (Inductor's own) on an unknown option, value type or mode.
    """
    # torch.compile routes backend="inductor" through this wrapper, which turns mode and options into config patches;
    # going through the same door keeps every mode meaning what users expect of it.
    return torch._TorchCompileInductorWrapper(mode, dict(options), None)


def compile_with(
    options: Options, mode: str | None, target: str, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Hand `gm` to the inner compiler that `options` names and return what it makes of it."""
    if target == "ascend":
        from .lowering.ascend import modes

        return modes.compile_with(options, mode, gm, example_inputs)
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
    with _cache_tag() if _holds_our_ops(gm) else nullcontext():
        return compiler(gm, example_inputs, **kwargs)


def _holds_our_ops(gm: torch.fx.GraphModule) -> bool:
    ops = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    return any(isinstance(n.target, ops) and str(n.target).startswith("moe_compile.") for n in gm.graph.nodes)


def _cache_tag() -> AbstractContextManager[Any]:
    """Mark on-disk cache entries with the state of this package's ops.

    A cached graph keeps the shapes, strides and gradient formulas that our ops had when it was compiled, but torch's cache keys
    only hold an op's name: without the mark a new version of this package would run graphs compiled against the old ops.
    """
    config = torch.compiler.config
    return config.patch(cache_key_tag=f"{config.cache_key_tag}moe_compile-{__version__}-{_ops_digest()}")


@functools.cache
def _ops_digest() -> str:
    """A digest of the source of the ops and their lowerings."""
    from . import lowering

    here = Path(__file__).parent
    digest = hashlib.sha256()
    for folder in (here, *map(Path, lowering.__path__)):
        for file in sorted([folder / "ops.py"] if folder == here else folder.rglob("*.py")):
            digest.update(file.read_bytes() if file.exists() else b"")
    return digest.hexdigest()[:16]
