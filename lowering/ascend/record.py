"""Run a function on a graph's example values and put what it does into the graph."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.overrides import TorchFunctionMode

_OPERATORS: dict[str, Callable[..., Any]] = {
    "__add__": operator.add, "__mul__": operator.mul, "__truediv__": operator.truediv, "__sub__": operator.sub, "__pow__": operator.pow,
    "__and__": operator.and_, "__invert__": operator.invert, "__ge__": operator.ge, "__lt__": operator.lt, "__getitem__": operator.getitem,
    "add": torch.add, "mul": torch.mul,
}  # fmt: skip


class Recorder(TorchFunctionMode):
    """Turns torch calls on known values into nodes before `where`; values are those of `node.meta["example_value"]`."""

    def __init__(self, where: fx.Node, like: fx.Node) -> None:
        super().__init__()
        self.graph, self.where, self.like = where.graph, where, like
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []  # ids of values stay unique while they live
        self.made: list[fx.Node] = []

    def value(self, n: fx.Node | None) -> Any:
        """The example value of a node; from now on that value stands for the node."""
        if n is None:
            return None
        v = n.meta["example_value"]
        self._know(v, n)
        return v

    def _know(self, v: Any, n: fx.Node) -> None:
        self.nodes[id(v)] = n
        self.kept.append(v)

    def node(self, v: Tensor) -> fx.Node:
        return self.nodes[id(v)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not any(isinstance(t, Tensor) for t in (out if isinstance(out, (list, tuple)) else [out])):
            return out
        if isinstance(out, Tensor) and id(out) in self.nodes:
            return out
        n = self._call(func, args, kwargs)
        if isinstance(out, Tensor):
            self._finish(n, out)
        else:
            n.meta["example_value"] = out
            with self.graph.inserting_before(self.where):
                for i, v in enumerate(out):
                    if isinstance(v, Tensor):
                        self._finish(self._dress(self.graph.call_function(operator.getitem, (n, i))), v)
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        plain = fx.node.map_aggregate((tuple(args), dict(kwargs)), self._operand)
        with self.graph.inserting_before(self.where):
            name = getattr(func, "__name__", "")
            # `x ** 2` arrives as a wrapper of torch._tensor that goes by the method's name
            wrapped = getattr(func, "__module__", "") == "torch._tensor" and hasattr(torch.Tensor, name)
            method = wrapped or getattr(torch.Tensor, name, None) is func
            if method and name in _OPERATORS:
                n = self.graph.call_function(_OPERATORS[name], *plain)  # type: ignore[misc]
            elif method:
                n = self.graph.call_method(name, *plain)  # type: ignore[misc]
            else:
                n = self.graph.call_function(func, *plain)  # type: ignore[misc]
        return self._dress(n)

    def _operand(self, v: Any) -> Any:
        return self.nodes[id(v)] if isinstance(v, Tensor) else v

    def _dress(self, n: fx.Node) -> fx.Node:
        self.made.append(n)
        n.meta.update({k: self.like.meta[k] for k in ("stack_trace", "nn_module_stack", "source_fn_stack") if k in self.like.meta})
        return n

    def _finish(self, n: fx.Node, v: Tensor) -> None:
        n.meta["example_value"] = v
        self._know(v, n)

    def drop_unused(self) -> None:
        """Results of multi-output ops that nobody reads."""
        for n in reversed(self.made):
            if not n.users and n.target is operator.getitem:
                self.graph.erase_node(n)


@contextlib.contextmanager
def recording(where: fx.Node, like: fx.Node, values: Sequence[fx.Node]) -> Iterator[Recorder]:
    """Record before `where`, under the fake mode of the values."""
    mode = next((v.fake_mode for n in values if hasattr(v := n.meta.get("example_value"), "fake_mode")), contextlib.nullcontext())
    r = Recorder(where, like)
    # the mode for functions is entered first: what it records are torch's calls, not what a fake tensor makes of them
    with mode, torch.no_grad(), r:
        yield r
