"""The shadow: a throw-away pre-dispatch ATen copy of a Dynamo graph, only for reading.

The shadow has a smaller vocabulary than the Dynamo graph and is in SSA form: an in-place op is a new node that later
readers use. It is never handed on (custom autograd.Functions would lose their gradients); `origin` and `image` map its
nodes back to the Dynamo graph, where the rewrite happens.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_slot, make_fx, track_tensor_tree
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_leaves

from .. import terms as T
from ..terms.text import SAID
from . import contracts, sharded, sorted_rows
from .effects import Memory, change_of_level
from .filled import fill
from .merge import merge_made
from .node import example_value, fakes
from .sources import input_name
from .wrapped import HELD


class Shadow:
    """`graph`: ATen nodes with `meta["val"]`.

    `read`: the Dynamo nodes that it holds, None for all; what they take from others is `given`.
    `origin[s]`: the Dynamo nodes whose value is shadow node s, earliest first. `image[d]`: the shadow node of Dynamo node d.
    `statement[s]`: the Dynamo node `tensor[...] = y` after which the tensor has the value s.
    `transformed`: shadow nodes made under a transform of torch.func (vmap, grad, jvp, ...): walls too, for the ops have no rule for it.
    `walls`: shadow nodes made inside a higher-order op (custom autograd.Function and the like), or whose gradient a hook changes:
    never looked through; copies of what is written later are among them. `inside[s]`: the Dynamo node of that op.
    `memory`: who shares which. `no_grad`: see `without_gradient`.
    """

    def __init__(self, gm: fx.GraphModule, read: set[fx.Node] | None = None) -> None:
        self.dynamo, self.read = gm, read
        self.origin: dict[fx.Node, list[fx.Node]] = {}
        self.image: dict[fx.Node, fx.Node] = {}
        self.statement: dict[fx.Node, fx.Node] = {}
        self.walls: set[fx.Node] = set()
        self.inside: dict[fx.Node, fx.Node] = {}
        self.transformed: set[fx.Node] = set()
        self.module = self._trace(gm)
        self.graph = self.module.graph
        fill(self.graph)
        sorted_rows.mark(self.graph)
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        self.memory = Memory(self.graph)
        self.no_grad = without_gradient(self.graph) - self.walls
        merge_made(self.graph, self.memory, self.walls | self.no_grad)
        self.walls |= self.memory.frozen | self.transformed

    def _trace(self, gm: fx.GraphModule) -> fx.GraphModule:
        values = [example_value(n) for n in gm.graph.nodes if n.op == "placeholder"]
        records: list[tuple[fx.Node, fx.Node]] = []
        tracer = _Tracer(gm, records, self.read)

        def run(*args: Any) -> Any:
            with preserve_node_meta():
                return tracer.run(*args)

        with fakes(values), torch.autograd.set_grad_enabled(torch.is_grad_enabled()):
            traced = make_fx(run, tracing_mode="real", pre_dispatch=True)(*values)
        # make_fx copies its graph once more when it builds the module: names survive, node objects do not
        with fakes(values):
            stands = {n.name: new for n, new in contracts.expand(traced).items()}
        by_name = {n.name: n for n in traced.graph.nodes} | stands
        for dynamo_node, recorded in records:
            s = by_name.get(recorded.name)
            if s is not None and dynamo_node.target is operator.setitem:
                self.statement[s] = dynamo_node
            elif s is not None:
                self.origin.setdefault(s, []).append(dynamo_node)
                self.image[dynamo_node] = s
        held = {by_name[x] for x in tracer.held if x in by_name}
        shadows = (n for n in traced.graph.nodes if n.op == "placeholder" and n not in held)
        for d, s in zip((n for n in gm.graph.nodes if n.op == "placeholder"), shadows, strict=True):
            self.image[d] = s
            self.origin[s] = [d]
            s.meta["trained"] = getattr(example_value(d), "requires_grad", False)
            if text := input_name(d):
                s.meta[SAID] = text
        self._mark_cuts(gm, traced.graph)
        self.inside = {by_name[x]: call for x, call in tracer.opaque.items() if x in by_name}
        self.walls.update(self.inside)
        self.transformed.update(by_name[x] for x in tracer.transformed if x in by_name)
        return traced

    def _mark_cuts(self, gm: fx.GraphModule, graph: fx.Graph) -> None:
        """Results of the shadow that do not leave Dynamo's graph: only their readers are not read."""
        end, last = (next(n for n in reversed(g.nodes) if n.op == "output") for g in (gm.graph, graph))
        for s in last.all_input_nodes:
            if self.read is not None and s in self.origin and not any(d in end.all_input_nodes for d in self.origin[s]):
                s.meta[CUT] = True


CUT = "cut"  # in the meta of a shadow node: see `Shadow._mark_cuts`


def given() -> Tensor:
    """Stands in the shadow for a value whose making is not read."""
    raise AssertionError("the shadow is never run")


_DATA = getattr(torch._C._autograd, "_get_data_attr", None)  # what Dynamo writes for `x.data`


class _Tracer(fx.Interpreter):
    """Runs the Dynamo graph under make_fx and notes which proxy each Dynamo node's value has.

    `read`: the nodes that are run, None for all; what they take from others is a call of `given`, with the value Dynamo noted for it.
    Names of what was made: `opaque` in a higher-order op (with its node), `transformed` under a transform of torch.func; `held`: of inner
    tensors.
    """

    def __init__(self, gm: fx.GraphModule, records: list[tuple[fx.Node, fx.Node]], read: set[fx.Node] | None = None) -> None:
        super().__init__(gm)
        self.records, self.read = records, read
        self.opaque: dict[str, fx.Node] = {}
        self.held: set[str] = set()
        self.transformed: set[str] = set()
        self.level = 0
        self.garbage_collect_values = False

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        if self.read is None:
            return super().run(*args)
        self.args_iter = iter(args)
        for n in self.graph.nodes:
            if n in self.read:
                for x in n.all_input_nodes:
                    if x not in self.env:
                        self.env[x] = self._given(x)
                self.env[n] = self.run_node(n)
        ends = (n for n in self.graph.nodes if n in self.read and any(u not in self.read for u in n.users))
        return [v for n in ends if isinstance(v := self.env[n], Tensor)]

    def _given(self, n: fx.Node, op: str = "call_function") -> Any:
        """The value that Dynamo noted for a node which is not read; `op`: "placeholder" for what a parameter holds."""
        tracer, value = _current_tracer(), example_value(n)
        proxy = tracer.create_proxy(op, given if op == "call_function" else n.name, (), {})
        proxy.node.meta.update({k: n.meta[k] for k in ("stack_trace",) if k in n.meta})
        if op == "placeholder":
            self.held.add(proxy.node.name)
        track_tensor_tree(value, proxy, constant=None, tracer=tracer)
        self.records.append((n, proxy.node))
        return value

    def run_node(self, n: fx.Node) -> Any:
        T.look()
        tracer = _current_tracer()
        is_hop = n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator)
        if HELD in n.meta:
            return self._given(n, "placeholder")
        self.level += change_of_level(n)
        watched = tracer is not None and (is_hop or self.level > 0)
        before = {x.name for x in tracer.graph.nodes} if watched else set()
        target = self.env[n.args[0]] if n.target is operator.setitem and isinstance(n.args[0], fx.Node) else None
        old = None if tracer is None or target is None else get_proxy_slot(target, tracer, None, lambda p: p.proxy)
        out = self._region(n, tracer) if sharded.is_region(n) else super().run_node(n)
        if tracer is None:
            return out
        if watched:
            made = {x.name for x in tracer.graph.nodes} - before
            if is_hop:
                self.opaque.update(dict.fromkeys(made, n))
            else:
                self.transformed.update(made)
        value = out if target is None else target
        if isinstance(value, Tensor) and n.op not in ("placeholder", "output"):
            proxy = get_proxy_slot(value, tracer, None, lambda p: p.proxy)
            if proxy is not None and proxy is not old:  # a write through a view gives the tensor no new name
                self.records.append((n, proxy.node))
                if is_hop and "register_hook" in str(n.target):  # the very tensor that the hook is on
                    self.opaque[proxy.node.name] = n
        return out

    def _region(self, n: fx.Node, tracer: Any) -> Any:
        """The value of a node that computes on tensors spread over devices: every plain tensor in it is a leaf."""
        value = example_value(n)
        out = sharded.opened(value)
        for new, old in zip(tree_leaves(out), tree_leaves(value), strict=True):
            if new is not old and isinstance(new, Tensor):
                made = get_proxy_slot(new, tracer, None, lambda p: p.proxy).node
                sharded.as_leaf(made, old)
                self.opaque[made.name] = n
        return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A checkpointed body runs as it is: what is recomputed in the backward pass has no meaning here.

        `x.data` is a view of x; the tracer takes it for a constant, and what is written through it for no write.
        """
        if target is _DATA:
            return args[0].detach()
        if isinstance(target, torch._ops.HigherOrderOperator) and target.name() == "tag_activation_checkpoint":
            return args[0](*args[1:])
        return super().call_function(target, args, kwargs)


def _current_tracer() -> Any:
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


def without_gradient(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that run where the graph itself has turned gradients off."""
    enabled, found = True, set()
    for n in graph.nodes:
        if n.target is torch._C._set_grad_enabled:
            enabled = bool(n.args[0])
        elif not enabled and n.op == "call_function":
            found.add(n)
    return found
