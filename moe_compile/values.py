"""Example values of the nodes that a rewrite has put into a graph, which torch's cache of compiled graphs asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.fx as fx

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
                args, kwargs = (fx.map_arg(a, lambda x: x.meta["example_value"]) for a in (n.args, n.kwargs))
                try:
                    value = getattr(args[0], n.target)(*args[1:], **kwargs) if n.op == "call_method" else n.target(*args, **kwargs)
                except Exception:  # the compiler behind meets the same node, and says what is wrong with it
                    return
                n.meta["example_value"] = value


def _without(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes without a value that methods are called on, and those that these are made of."""
    found: set[fx.Node] = set()
    for n in reversed(graph.nodes):
        of_method = any(u.op == "call_method" and u.args[0] is n for u in n.users)
        if n.op in _COMPUTED and "example_value" not in n.meta and (of_method or not found.isdisjoint(n.users)):
            found.add(n)
            yield n
