"""The inner compiler: whoever compiles the graph once the fused ops are in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx as fx

from . import report as reports
from ._version import __version__
from .inductor import inductor
from .lowering.target import Rest, Target
from .ops import shapes
from .options import Options
from .passes.aten.node import fakes


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
    _fill(gm.graph)
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


# ---- example values, which torch's cache of compiled graphs asks for ---------------------------------------------------------

_COMPUTED = ("call_function", "call_method")


def _fill(graph: fx.Graph) -> None:
    """Give a fake value to every new node that a method is called on: AOTAutograd keeps no graph with a method of what is not known to be
    a tensor, and a second process would trace and lower it all again. Nodes whose value cannot be told are left without one."""
    wanted = set(_without_value(graph))
    if not wanted:
        return
    with fakes(n.meta.get("example_value") for n in graph.nodes), torch.no_grad():
        for n in graph.nodes:
            if n in wanted and all("example_value" in x.meta for x in n.all_input_nodes):
                try:
                    n.meta["example_value"] = _value(n)
                except Exception:  # the compiler behind meets the same node, and says what is wrong with it
                    return


def _value(n: fx.Node) -> Any:
    args, kwargs = (fx.map_arg(a, lambda x: x.meta["example_value"]) for a in (n.args, n.kwargs))
    if n.op == "call_method":
        return getattr(args[0], n.target)(*args[1:], **kwargs)
    _, _, name = str(n.target).removesuffix(".default").rpartition("moe_compile.")
    # our ops by the shapes they give: where one is called, its kernels are begun, and threads that look those up hold up this one
    return shapes.SHAPES.get(name, n.target)(*args, **kwargs)


def _without_value(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes without a value that methods are called on, and those that these are made of."""
    found: set[fx.Node] = set()
    for n in reversed(graph.nodes):
        of_method = any(u.op == "call_method" and u.args[0] is n for u in n.users)
        if n.op in _COMPUTED and "example_value" not in n.meta and (of_method or not found.isdisjoint(n.users)):
            found.add(n)
            yield n
