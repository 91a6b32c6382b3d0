"""Custom functions whose gradients are those of what they compute: an autograd.Function that saves memory, not maths.

    backward(g, saved) = g · ∂forward/∂x   for every x that may want a gradient

bitsandbytes' product with codes is one: its backward pass makes the floats of its codes once more. Both of its graphs are run on random
numbers; where they agree, the operations of its forward pass can stand in its place. Nothing is run but operations of ATen that draw no
numbers and write nothing, and ops with a contract by their references.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses import FakeTensorMode

from . import contracts
from .node import example_value, traced

_ROWS = 5  # of a tensor, where their number hangs on data
_MOST = 1 << 27  # elements of an argument that are drawn
_CLOSE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}  # by how much of its norm a gradient may differ


def is_custom(n: fx.Node) -> bool:
    """Whether a node of Dynamo's graph applies an autograd.Function."""
    return n.op == "call_function" and getattr(n.target, "__name__", "") == "autograd_function_apply"


@contextlib.contextmanager
def opened(gm: fx.GraphModule) -> Iterator[None]:
    """Inside, the operations of their forward passes stand in the place of such functions; afterwards they themselves do again, where
    anyone still reads what they return."""
    stands = [_opened(n, body) for n, body in _formulas(gm).items()]
    try:
        yield
    finally:
        for s in stands:
            s.close()
        if stands:
            gm.graph.lint()
            gm.recompile()


@dataclass(frozen=True)
class _Opened:
    """A function, the operations of its forward pass, and by what takes a result from it the operation that readers have now."""

    call: fx.Node
    own: list[fx.Node]
    parts: dict[fx.Node, fx.Node]

    def close(self) -> None:
        for part, out in self.parts.items():
            out.replace_all_uses_with(part, delete_user_cb=lambda u: u not in self.own)
        unread = [*reversed(self.own), *self.parts, self.call, *self.call.args[:2]]
        for n in unread:
            if isinstance(n, fx.Node) and not n.users and not n._erased:
                n.graph.erase_node(n)


def _opened(n: fx.Node, body: fx.GraphModule) -> _Opened:
    inner = (x for x in body.graph.nodes if x.op == "placeholder")
    env: dict[fx.Node, Any] = dict(zip(inner, n.args[2:], strict=True))
    own = [x for x in body.graph.nodes if x.op.startswith("call_")]
    with n.graph.inserting_before(n):
        for x in own:
            env[x] = n.graph.node_copy(x, env.__getitem__)
    outs = _results(body)
    parts = {u: env[outs[u.args[1]]] for u in n.users}  # type: ignore[index]
    for part, out in parts.items():
        part.replace_all_uses_with(out)
    return _Opened(n, [env[x] for x in own], parts)


def _results(body: fx.GraphModule) -> tuple[fx.Node, ...]:
    """What a forward pass returns beside what it saves."""
    return body.graph.output_node().args[0][0]  # type: ignore[return-value, index]


def _formulas(gm: fx.GraphModule) -> dict[fx.Node, fx.GraphModule]:
    """The forward pass of each custom function of a Dynamo graph whose gradients are its own: what it returns, and what it saves."""
    known: dict[Any, bool] = {}
    found = {}
    for n in gm.graph.nodes:
        bodies = _bodies(gm, n) if is_custom(n) else None
        if bodies is None or not all(u.target is operator.getitem for u in n.users):
            continue
        values = [example_value(x) if isinstance(x, fx.Node) else x for x in n.args[2:]]
        key = (*map(_spelling, bodies), *map(_kind, values))
        if key not in known:
            known[key] = _agree(*bodies, values)
        if known[key]:
            found[n] = bodies[0]
    return found


def _bodies(gm: fx.GraphModule, n: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """Both passes of a custom function, nothing turning gradients off; None where its graphs are of another form."""
    found = [getattr(gm, str(x.target), None) for x in n.args[:2] if isinstance(x, fx.Node) and x.op == "get_attr"]
    if len(found) != 2 or not all(isinstance(x, fx.GraphModule) for x in found):
        return None
    forward, backward = map(_with_gradients, found)
    computed = [x for x in forward.graph.nodes if x.op.startswith("call_")]
    whole = all(x.op != "get_attr" for x in forward.graph.nodes) and all(x in computed for x in _results(forward))
    return (forward, backward) if whole else None


def _with_gradients(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for n in list(graph.nodes):
        if n.target is torch._C._set_grad_enabled:
            graph.erase_node(n)
    return fx.GraphModule(gm, graph)


def _spelling(gm: fx.GraphModule) -> Any:
    """A graph without the names of its nodes."""
    number = {n: i for i, n in enumerate(gm.graph.nodes)}
    args = (repr(fx.map_arg((n.args, dict(n.kwargs)), lambda x: ("node", number[x]))) for n in gm.graph.nodes)
    return tuple((n.op, "" if n.op == "placeholder" else str(n.target), a) for n, a in zip(gm.graph.nodes, args, strict=True))


def _kind(v: Any) -> Any:
    return (_sizes(v), v.dtype, v.requires_grad) if isinstance(v, Tensor) else str(_number(v))


def _sizes(v: Tensor) -> tuple[int, ...]:
    return tuple(map(_number, v.shape))


def _number(s: Any) -> Any:
    """A size as it is now; one that hangs on data has no value yet."""
    if not isinstance(s, torch.SymInt):
        return s
    known = s.node.shape_env.backed_var_to_val
    return int(s.node.expr.subs({x: known.get(x, _ROWS) for x in s.node.expr.free_symbols}))


def _agree(forward: fx.GraphModule, backward: fx.GraphModule, values: Sequence[Any]) -> bool:
    """Whether the function's gradients are those of its formula, on random numbers."""
    try:
        draw = torch.Generator().manual_seed(5)
        given = [_drawn(v, draw) for v in values]
        run = _runnable(forward, given)
        outs, saved = run(*given)
        grads = [torch.randn(o.shape, generator=draw).to(o.dtype) for o in outs]
        theirs = _runnable(backward, [*grads, *_detached(saved)])(*grads, *_detached(saved))
        return _same(given, values, outs, grads, theirs)
    except Exception as e:  # it stays an operation of its own
        if type(e).__module__.startswith("torch._dynamo"):
            raise
        return False


def _drawn(v: Any, draw: torch.Generator) -> Any:
    """Random numbers in the place of an argument; whole ones are all that their type holds, of one byte, and else small."""
    if not isinstance(v, Tensor):
        return _number(v)
    shape = _sizes(v)
    if torch.Size(shape).numel() > _MOST:
        raise ValueError("too many numbers")
    if v.dtype.is_floating_point:
        return torch.randn(shape, generator=draw).to(v.dtype).requires_grad_(v.dtype.itemsize > 1)
    info = torch.iinfo(v.dtype)
    return torch.randint(max(info.min, 0), min(info.max, 255) + 1, shape, generator=draw).to(v.dtype)


def _detached(saved: Sequence[Any]) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in saved]


def _runnable(gm: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
    """A graph as operations of ATen, references in the place of ops with a contract. Raises ValueError where it has others."""
    mode = FakeTensorMode()
    made = traced(gm, [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given], pre_dispatch=True)
    if made is None:
        raise ValueError("it cannot be traced")
    with mode:
        contracts.expand(made)
    for n in made.graph.nodes:
        aten = isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "aten"
        if n.op == "call_function" and (not aten or _acts(n.target)):
            raise ValueError(f"it calls {n.target}")
    made.recompile()
    return made


def _acts(op: Any) -> bool:
    """Whether an operation draws numbers or writes."""
    return torch.Tag.nondeterministic_seeded in op.tags or op._schema.is_mutable and op is not torch.ops.aten.detach_.default


def _same(given: Sequence[Any], values: Sequence[Any], outs: Sequence[Tensor], grads: Sequence[Tensor], theirs: Sequence[Any]) -> bool:
    """Whether the formula has the same gradients, and none where the function has none for what wants one."""
    leaves = [x if isinstance(x, Tensor) and x.requires_grad else None for x in given]
    own = iter(torch.autograd.grad(outs, [x for x in leaves if x is not None], grads, allow_unused=True))
    for leaf, value, their in zip(leaves, values, theirs, strict=True):
        one = None if leaf is None else next(own)
        if not isinstance(value, Tensor) or not value.requires_grad and their is None:
            continue
        if one is None or their is None:
            if (one is None) != (their is None):
                return False
        elif one.shape != their.shape or one.dtype != their.dtype or not _close(one, their):
            return False
    return True


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one.double() - other.double()).norm() <= _CLOSE[one.dtype] * one.double().norm())
