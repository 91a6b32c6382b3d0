"""Which nodes of a Dynamo graph matter, with in-place writes: a write matters when its storage is read or comes from outside."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from .shadow import example_value

_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul,
}  # fmt: skip
_ASSERTIONS = ("_assert", "sym_constrain", "_check")
_EFFECTS = (
    "set_grad_enabled",
    "autocast",
    "_log_api",
    "manual_seed",
    "print",
    "lock",
    "nesting",
    "batch_dim",
    "record_function",
    "profiler",
)


def is_write(n: fx.Node) -> bool:
    """Whether a Dynamo node changes its first argument (or its `out=`)."""
    if n.op == "call_method":
        name = str(n.target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
    if n.op != "call_function":
        return False
    if n.target in _IN_PLACE or n.kwargs.get("out") is not None or n.kwargs.get("inplace"):
        return True
    schema = getattr(n.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = getattr(n.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def is_assertion(n: fx.Node) -> bool:
    return n.op == "call_function" and any(s in str(n.target) for s in _ASSERTIONS)


def _has_effect(n: fx.Node) -> bool:
    if n.op in ("placeholder", "output", "call_module"):
        return True
    if n.op != "call_function" or is_write(n) or is_assertion(n):
        return False
    return any(s in str(n.target) for s in _EFFECTS) or isinstance(n.target, torch._ops.HigherOrderOperator)


def _storage(n: Any) -> int | None:
    v = example_value(n) if isinstance(n, fx.Node) else None
    if not isinstance(v, torch.Tensor):
        return None
    try:
        return v.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the outputs, effects and outside memory depend on; linear in the size of the graph."""
    writes: dict[int | None, list[fx.Node]] = {}
    outside: set[int | None] = set()
    for n in graph.nodes:
        if is_write(n):
            for target in _targets(n):
                writes.setdefault(_storage(target), []).append(n)
        if n.op in ("placeholder", "get_attr"):
            outside.add(_storage(n))
    live: set[fx.Node] = set()
    work = [n for n in graph.nodes if _has_effect(n)]
    for storage, ws in writes.items():
        if storage is None or storage in outside:
            work.extend(ws)
    while work:
        n = work.pop()
        if n in live:
            continue
        live.add(n)
        work.extend(n.all_input_nodes)
        work.extend(writes.get(_storage(n), ()) if _storage(n) is not None else ())
    live |= {n for n in graph.nodes if is_assertion(n) and all(x in live for x in _needs(n))}
    for n in [n for n in live if is_assertion(n)]:
        live |= _needs(n)
    return live


def _targets(n: fx.Node) -> list[Any]:
    out = n.kwargs.get("out")
    if out is not None:
        return list(out) if isinstance(out, (list, tuple)) else [out]
    return [n.args[0]] if n.args else []


def _needs(n: fx.Node) -> set[fx.Node]:
    """What an assertion looks at, seen through arithmetic that exists only for it."""
    out: set[fx.Node] = set()
    work = list(n.all_input_nodes)
    while work:
        x = work.pop()
        if x in out:
            continue
        only_checks = all(is_assertion(u) or isinstance(example_value(u), (bool, torch.SymBool)) for u in x.users)
        if only_checks and isinstance(example_value(x), (int, bool, torch.SymInt, torch.SymBool)) and x.op == "call_function":
            work.extend(x.all_input_nodes)
        else:
            out.add(x)
    return out


def remove_dead(graph: fx.Graph, alive_before: set[fx.Node]) -> None:
    """Erase nodes that were alive in `alive_before` and are not any more, and checks of values that are gone."""
    live = live_nodes(graph)
    dead = [n for n in graph.nodes if n in alive_before and n not in live]
    for n in reversed(dead):
        _erase(graph, n, live)


def _erase(graph: fx.Graph, n: fx.Node, live: set[fx.Node]) -> None:
    if not n._erased and all(u not in live for u in n.users):
        for u in list(n.users):
            _erase(graph, u, live)
        if not n.users:
            graph.erase_node(n)
