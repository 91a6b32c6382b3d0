"""Custom functions whose gradients are those of what they compute: an autograd.Function that saves memory, not maths.

    backward(g, saved) = g · ∂forward/∂x   for every x that may want a gradient

bitsandbytes' product with codes is one: its backward pass makes the floats of its codes once more. Both of its graphs are run on random
numbers, in float64; where they agree, the operations of its forward pass can stand in its place. Nothing is run but operations of ATen
that draw no numbers and write nothing, and ops with a contract by their references. Of floats both are analytic: such functions that agree
where numbers are drawn at random agree everywhere, which those with a case for large ones (a gradient that is clipped) do not.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses import FakeTensorMode

from . import contracts, names
from .names import op_name
from .node import example_value, traced

_ROWS = 5  # of a tensor, where their number hangs on data
_MOST = 1 << 26  # elements of an argument that are drawn
_CLOSE = 1e-9  # by how much of its norm a gradient may differ
_FORMULAS = frozenset(
    "sub rsub mul div neg reciprocal square pow sqrt rsqrt exp log sigmoid silu silu_backward tanh erf gelu gelu_backward softmax _softmax "
    "index index_select gather".split()
)
_ANALYTIC = _FORMULAS | names.VIEW | names.CAST | names.JOIN | names.REDUCTION | names.CONTRACTION | {"add"}


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
        draw, mode = torch.Generator().manual_seed(5), FakeTensorMode()
        with mode:
            fakes = [_empty(v) for v in values]
        run = _traced(forward, fakes)
        like, kept = fx.map_arg(run.graph.output_node().args[0], lambda n: n.meta["val"])
        back = _traced(backward, _detached([*map(torch.empty_like, like), *kept]))
        given = [_drawn(v, draw) for v in values]
        outs, saved = _in_double(run)(*given)
        grads = [torch.randn(o.shape, generator=draw, dtype=o.dtype) for o in outs]
        return _same(given, values, outs, grads, _in_double(back)(*grads, *_detached(saved)))
    except Exception as e:  # it stays an operation of its own
        if type(e).__module__.startswith("torch._dynamo"):
            raise
        return False


def _empty(v: Any) -> Any:
    if not isinstance(v, Tensor):
        return _number(v)
    return torch.empty(_sizes(v), dtype=v.dtype).requires_grad_(_is_wide(v.dtype))


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _drawn(v: Any, draw: torch.Generator) -> Any:
    """Random numbers in the place of an argument; whole ones are all that their type holds, of one byte, and else small."""
    if not isinstance(v, Tensor):
        return _number(v)
    shape = _sizes(v)
    if torch.Size(shape).numel() > _MOST:
        raise ValueError("too many numbers")
    if v.dtype.is_floating_point:
        wide = _is_wide(v.dtype)
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(torch.float64 if wide else v.dtype).requires_grad_(wide)
    info = torch.iinfo(v.dtype)
    return torch.randint(max(info.min, 0), min(info.max, 255) + 1, shape, generator=draw).to(v.dtype)


def _detached(saved: Sequence[Any]) -> list[Any]:
    return [x.detach() if isinstance(x, Tensor) else x for x in saved]


def _traced(gm: fx.GraphModule, fakes: Sequence[Any]) -> fx.GraphModule:
    """A graph as operations of ATen, references in the place of ops with a contract. Raises ValueError where it has others, or some that
    are not analytic in its floats."""
    made = traced(gm, fakes, pre_dispatch=True)
    if made is None:
        raise ValueError("it cannot be traced")
    contracts.expand(made)
    floats: set[fx.Node] = set()  # what hangs on the values of floats that are given
    for n in made.graph.nodes:
        v = n.meta.get("val")
        if n.op == "placeholder" and isinstance(v, Tensor) and v.dtype.is_floating_point:
            floats.add(n)
        if n.op != "call_function":
            continue
        aten = isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "aten"
        if not aten or _acts(n.target):
            raise ValueError(f"it calls {n.target}")
        if op_name(n) in names.CREATION or floats.isdisjoint(n.all_input_nodes):
            continue
        if not _is_analytic(n):
            raise ValueError(f"{n.target} of floats")
        floats.add(n)
    return made


def _is_analytic(n: fx.Node) -> bool:
    v = n.meta["val"]
    values = [v] if isinstance(v, Tensor) else v
    return op_name(n) in _ANALYTIC and n.kwargs.get("rounding_mode") is None and all(_is_wide(x.dtype) for x in values)


def _in_double(made: fx.GraphModule) -> fx.GraphModule:
    """The same in float64, whatever floats it is written for: what two graphs differ by is not rounding then."""

    def wide(a: Any) -> Any:
        return torch.float64 if isinstance(a, torch.dtype) and _is_wide(a) else a

    for n in made.graph.nodes:
        if n.op == "get_attr" and _is_wide(getattr(made, str(n.target)).dtype):
            setattr(made, str(n.target), getattr(made, str(n.target)).double())
        elif n.op == "call_function" and n.target is not torch.ops.aten.view.dtype:
            n.args, n.kwargs = fx.node.map_aggregate((n.args, dict(n.kwargs)), wide)
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
        elif one.shape != their.shape or not bool((one - their).norm() <= _CLOSE * one.norm()):
            return False
    return True
