"""Who else sees a tensor's memory, and when it is written: the one place that answers it, for both graphs.

In the shadow (ATen, `Memory`) schemas say which ops return a view and which write; an in-place result is a new name there. In Dynamo's
graph the fake values tell which names lie in one storage. Graph inputs that lie in one storage are one memory in both.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from ...calls import is_write
from . import names
from .node import example_value, named_args, schema_of
from .sharded import leaf

# ---- the shadow --------------------------------------------------------------------------------------------------------


def mutated_args(n: fx.Node) -> list[fx.Node]:
    """The nodes that an ATen call writes to."""
    if schema_of(n) is None:
        return []
    written = [v for s, v in named_args(n) if s.alias_info is not None and s.alias_info.is_write]
    return [x for v in written for x in (v if isinstance(v, (list, tuple)) else (v,)) if isinstance(x, fx.Node)]


def aliased_arg(n: fx.Node) -> fx.Node | None:
    """The node whose storage a view op returns, or None."""
    if n.target is operator.getitem:
        src = n.args[0]
        return aliased_arg(src) if isinstance(src, fx.Node) else None
    if schema_of(n) is None or not any(r.alias_info for r in schema_of(n).returns):
        return None
    return next((v for s, v in named_args(n) if s.alias_info is not None and isinstance(v, fx.Node)), None)


class Memory:
    """`root[n]`: one node for all names of a memory. `writers[root]`: the nodes that write it, in order.

    `stale`: nodes that are read after their memory was written under another name: their name no longer tells their value.
    `frozen`: floating copies (clone, a cast, ...) of what is written later: they hold what was there before.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.root: dict[fx.Node, fx.Node] = {}
        self.writers: dict[fx.Node, list[fx.Node]] = {}
        inputs: dict[int, fx.Node] = {}
        for n in graph.nodes:
            storage = storage_of(n) if n.op in ("placeholder", "get_attr") or n.target is leaf else None
            base = aliased_arg(n)
            base = None if base is None or _converts(n, base) else base
            first = n if storage is None else inputs.setdefault(storage, n)
            self.root[n] = first if base is None else self.root.get(base, base)
            for m in mutated_args(n):
                self.writers.setdefault(self.root.get(m, m), []).append(n)
        self.stale = {n for n in self.order if self._is_stale(n)} if self.writers else set()
        self.frozen = {n for n in self.order if self._is_frozen(n)} if self.writers else set()

    def written(self, n: fx.Node, after: int, before: int) -> fx.Node | None:
        """The first node that writes the memory of n between two places in the graph."""
        return next((w for w in self.writers.get(self.root[n], ()) if after < self.order[w] < before), None)

    def shared(self, n: fx.Node) -> list[fx.Node]:
        """All names of the memory of n."""
        return [x for x, r in self.root.items() if r is self.root[n]]

    def _is_stale(self, n: fx.Node) -> bool:
        writers = self.writers.get(self.root[n], ())
        last = max((self.order[u] for u in n.users), default=-1) if writers else -1
        # a node's own chain of in-place results is renamed by the tracer; any other alias is not
        return any(self.order[n] < self.order[w] < last and n not in mutated_args(w) for w in writers)

    def _is_frozen(self, n: fx.Node) -> bool:
        if names.op_name(n) not in names.VIEW | names.CAST or aliased_arg(n) is not None and self._shows(n):
            return False
        source, value = n.args[0] if n.args else None, n.meta.get("val")
        if not isinstance(source, fx.Node) or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            return False
        before = source.meta.get("val")
        if isinstance(before, torch.Tensor) and not before.dtype.is_floating_point and self.root[source].op == "call_function":
            return False  # ids that the graph made itself, as floats for a histogram: as with copies that stay integers
        return self.written(source, self.order[n], len(self.order)) is not None

    def _shows(self, n: fx.Node) -> bool:
        """Whether a node that may be a view (reshape, to, contiguous) is one."""
        source = n.args[0]
        return not isinstance(source, fx.Node) or storage_of(n) is None or storage_of(n) == storage_of(source)


def _converts(n: fx.Node, source: fx.Node) -> bool:
    """Whether a cast gives another type or device: a copy then, whatever its schema says of views."""
    a, b = n.meta.get("val"), source.meta.get("val")
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and names.op_name(n) in names.CAST
    return both and (a.dtype, a.device) != (b.dtype, b.device)  # type: ignore[union-attr]


def storage_of(n: Any) -> int | None:
    """An identity of the storage that a node's value lies in, where it has one."""
    v = example_value(n) if isinstance(n, fx.Node) else None
    if not isinstance(v, torch.Tensor):
        return None
    try:
        return v.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


# ---- Dynamo's graph ----------------------------------------------------------------------------------------------------

_ASSERTIONS = ("_assert", "sym_constrain", "_check")
_EFFECTS = "set_grad_enabled autocast _log_api manual_seed print lock nesting batch_dim record_function profiler".split()


def is_assertion(n: fx.Node) -> bool:
    called = str(n.target) if n.op == "call_function" else ""
    return any(s in called for s in _ASSERTIONS)


def is_transform(n: fx.Node) -> bool:
    """Whether a node of Dynamo's graph enters or leaves a transform of torch.func, or changes what is batched."""
    called = str(n.target) if n.op == "call_function" else ""
    return "nesting" in called or "batch_dim" in called


def change_of_level(n: fx.Node) -> int:
    """1 where a node of Dynamo's graph enters a transform of torch.func, -1 where it leaves one."""
    name = str(getattr(n.target, "__name__", ""))
    return name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")


def has_effect(n: fx.Node) -> bool:
    if n.op in ("placeholder", "output", "call_module"):
        return True
    if n.op != "call_function" or is_write(n) or is_assertion(n):
        return False
    called = str(n.target)
    return any(s in called for s in _EFFECTS) or isinstance(n.target, torch._ops.HigherOrderOperator)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the outputs, effects and outside memory depend on; linear in the size of the graph."""
    writes: dict[int | None, list[fx.Node]] = {}
    outside: set[int | None] = set()
    for n in graph.nodes:
        if is_write(n):
            for target in targets_of(n):
                writes.setdefault(storage_of(target), []).append(n)
        if n.op in ("placeholder", "get_attr"):
            outside.add(storage_of(n))
    live: set[fx.Node] = set()
    work = [n for n in graph.nodes if has_effect(n)]
    for storage, ws in writes.items():
        if storage is None or storage in outside:
            work.extend(ws)
    while work:
        n = work.pop()
        if n in live:
            continue
        live.add(n)
        work.extend(n.all_input_nodes)
        work.extend(writes.get(storage_of(n), ()) if storage_of(n) is not None else ())
    live |= {n for n in graph.nodes if is_assertion(n) and all(x in live for x in _needs(n))}
    for n in [n for n in live if is_assertion(n)]:
        live |= _needs(n)
    return live


def targets_of(n: fx.Node) -> list[Any]:
    """What a writing node of Dynamo's graph writes to."""
    out = n.kwargs.get("out")
    if out is not None:
        return list(out) if isinstance(out, (list, tuple)) else [out]
    if schema_of(n) is not None:
        return mutated_args(n)
    return [n.args[0]] if n.args else []


def writers(n: fx.Node) -> list[fx.Node]:
    """The nodes of Dynamo's graph that write the memory of n, under whatever name (a view, another input), in order.

    A node that the rewrite put in has no value of its own: it is taken for a view of its first argument where its op may be one.
    """
    storage = storage_of(_valued(n))
    if storage is None:
        return [w for w in n.graph.nodes if is_write(w) and n in targets_of(w)]
    return [w for w in n.graph.nodes if is_write(w) and any(storage_of(_valued(t)) == storage for t in targets_of(w))]


def written(n: fx.Node, until: fx.Node | None = None) -> fx.Node | None:
    """The first write that reaches n, a tensor of Dynamo's graph, after what it shows was made (and before `until`); seen through views,
    casts and copies. Where there is one, n is not what its source was made to be: ids are not the selection's own any more.
    """
    while True:
        hit = next((w for w in writers(n) if n < w and (until is None or w < until)), None)
        if hit is not None or not n.args or not isinstance(n.args[0], fx.Node) or names.op_name(n) not in names.VIEW | names.CAST:
            return hit
        until = until if _viewed(n) is not None else n
        n = n.args[0]


def written_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether anything at all is written between two nodes of Dynamo's graph, or may be."""
    n = first.next
    while n is not last:
        if is_write(n) or isinstance(n.target, torch._ops.HigherOrderOperator):
            return True
        n = n.next
    return False


def _viewed(n: Any) -> fx.Node | None:
    """What a node that may be a view, and whose value nobody noted down or lies in the same storage, is a view of."""
    if not isinstance(n, fx.Node) or not n.args or not isinstance(n.args[0], fx.Node) or names.op_name(n) not in names.VIEW | names.CAST:
        return None
    return n.args[0] if storage_of(n) is None or storage_of(n) == storage_of(n.args[0]) else None


def _valued(n: Any) -> Any:
    while isinstance(n, fx.Node) and storage_of(n) is None and (source := _viewed(n)) is not None:
        n = source
    return n


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
