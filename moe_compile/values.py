"""Example values of the nodes that a rewrite has put into a graph, which torch's cache of compiled graphs asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

from .ops import shapes

_COMPUTED = ("call_function", "call_method")


def fill(graph: fx.Graph) -> None:
    """Give a fake value to every new node that a method is called on: AOTAutograd keeps no graph with a method of what is not known to be
    a tensor, and a second process would trace and lower it all again. Nodes whose value cannot be told are left without one."""
    wanted = set(_without(graph))
    if not wanted:
        return
    values = (n.meta.get("example_value") for n in graph.nodes)
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None) or contextlib.nullcontext()
    with mode, torch.no_grad():
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


def _without(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes without a value that methods are called on, and those that these are made of."""
    found: set[fx.Node] = set()
    for n in reversed(graph.nodes):
        of_method = any(u.op == "call_method" and u.args[0] is n for u in n.users)
        if n.op in _COMPUTED and "example_value" not in n.meta and (of_method or not found.isdisjoint(n.users)):
            found.add(n)
            yield n
