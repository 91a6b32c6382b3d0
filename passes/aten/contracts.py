"""Contracts of ops: what an op that nothing is known of computes, said in plain torch.

    op(a, b, ...) = reference(a, b, ...)

Before a graph is read, the operations of the reference stand in the op's place; the op itself stays in the graph that runs. What is
proved is proved of the reference. A contract goes by the name of the op, in one namespace or in any, and by the names of its arguments.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from .node import fakes, schema_of, traced

_NAME = re.compile(r"(\w+::)?\w+(\.\w+)?")


@dataclass(frozen=True)
class Contract:
    """`name`: "namespace::op", or "op" for that of any namespace; with ".overload" for one that is not the default.

    `own`: whether this package brings it.
    """

    name: str
    reference: Callable[..., Any]
    own: bool = False

    def arguments(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.reference).parameters)


_contracts: dict[str, Contract] = {}


def register_contract(name: str, reference: Callable[..., Any]) -> None:
    """Say what an op of yours (or of a library's) computes, so that blocks which use it can be read.

    name: ``"namespace::op"``, or ``"op"`` for an op of that name in any namespace (some are named after a build); ``".overload"`` behind
    it for an overload that is not the default. reference: a function of plain torch operations with the op's arguments, by the same
    names and in the same order, that returns what the op returns, of the same shape and dtype; where the op writes to an argument, it
    writes the same. It is traced on tensors without values, so it must not read any. A later contract of the same name replaces the former.

    Raises TypeError for a name that is no text and a reference that is no function with named arguments, ValueError for a name of another
    form, and for arguments that are not those of the op, where that is known already.

    Example::

        @torch.library.custom_op("mine::grouped", mutates_args=())
        def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor: ...

        moe_compile.register_contract(
            "mine::grouped", lambda rows, weight, ends: torch.nn.functional.grouped_mm(rows, weight, offs=ends)
        )
    """
    if not isinstance(name, str):
        raise TypeError(f"register_contract: name is {name!r}; allowed: the name of an op, such as 'namespace::op'")
    if not _NAME.fullmatch(name):
        raise ValueError(f"register_contract: name is {name!r}; allowed: 'namespace::op' or 'op', each with '.overload' where it has one")
    contract = Contract(name, reference)
    _check_reference(contract)
    op = _op(name)
    if op is not None and (why := _unlike(contract, op._schema)):
        raise ValueError(f"register_contract: {why}")
    _contracts[name] = contract


def _check_reference(c: Contract) -> None:
    if not callable(c.reference):
        raise TypeError(f"register_contract: reference of {c.name!r} is {c.reference!r}; allowed: a function of plain torch operations")
    try:
        kinds = [p.kind for p in inspect.signature(c.reference).parameters.values()]
    except (TypeError, ValueError):
        kinds = [inspect.Parameter.VAR_POSITIONAL]
    if any(kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for kind in kinds):
        raise TypeError(f"register_contract: reference of {c.name!r} must name its arguments, as the op does (no *args, no **kwargs)")


def _op(name: str) -> Any:
    """The op of a full name, None where it is not there (yet)."""
    space, _, rest = name.rpartition("::")
    op, _, overload = rest.partition(".")
    if not space:
        return None
    return getattr(getattr(getattr(torch.ops, space), op, None), overload or "default", None)


def _unlike(c: Contract, schema: Any) -> str:
    """Why a contract is for another op of this name, "" where it is for this one."""
    of_op, of_reference = tuple(a.name for a in schema.arguments), c.arguments()
    if of_op == of_reference:
        return ""
    return f"the contract of {c.name!r} has the arguments ({', '.join(of_reference)}), the op has ({', '.join(of_op)})"


def own(*contracts: Contract) -> None:
    """Contracts that this package brings; those of a user go before."""
    for c in contracts:
        _contracts.setdefault(c.name, c)


def contract_of(target: Any) -> Contract | None:
    """The contract of what a node calls: an op's overload."""
    schema = getattr(target, "_schema", None)
    if schema is None or not _contracts:
        return None
    space, _, op = str(schema.name).rpartition("::")
    tail = f".{schema.overload_name}" if schema.overload_name else ""
    for name in (f"{space}::{op}{tail}", f"{op}{tail}"):
        c = _contracts.get(name)
        if c is not None and not _unlike(c, schema):
            return c
    return None


def foreign(graph: fx.Graph) -> bool:
    """Whether a graph has ops whose contract is not this package's: what is read of it is not told by the graph."""
    return any(c is not None and not c.own for n in graph.nodes if n.op == "call_function" for c in map(contract_of, _overloads(n.target)))


def _overloads(target: Any) -> list[Any]:
    """A graph of Dynamo's calls an op by its name alone."""
    return [getattr(target, name) for name in target.overloads()] if isinstance(target, torch._ops.OpOverloadPacket) else [target]


# ---- in a graph --------------------------------------------------------------------------------------------------------


def expand(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """The operations of references in the place of ops that have a contract. What nodes were, and what holds their values now.

    Nodes have fake tensors as `meta["val"]`. A reference that fails leaves its op.
    """
    stands: dict[fx.Node, fx.Node] = {}
    known: dict[Any, fx.GraphModule | None] = {}
    for n in list(gm.graph.nodes):
        c = contract_of(n.target) if n.op == "call_function" else None
        if c is not None:
            stands |= _expanded(gm, n, c, known)
    return stands


def _expanded(gm: fx.GraphModule, n: fx.Node, c: Contract, known: dict[Any, fx.GraphModule | None]) -> dict[fx.Node, fx.Node]:
    """`known`: references that were traced on arguments of these kinds."""
    given = {a.name: v for a, v in zip(schema_of(n).arguments, n.args, strict=False)} | dict(n.kwargs)
    leaves, spec = pytree.tree_flatten(given)
    nodes = [v for v in leaves if isinstance(v, fx.Node)]
    written = [a.name for a in schema_of(n).arguments if _is_written(a) and isinstance(given.get(a.name), fx.Node)]

    def run(*values: Any) -> Any:
        rest = iter(values)
        filled = pytree.tree_unflatten([next(rest) if isinstance(v, fx.Node) else v for v in leaves], spec)
        return c.reference(**filled), [filled[name] for name in written]

    values = [x.meta.get("val") for x in nodes]
    key = (c.name, str(spec), repr([_kind(values[nodes.index(v)]) if isinstance(v, fx.Node) else v for v in leaves]))
    first = key not in known
    if first:
        known[key] = traced(run, values, pre_dispatch=True)
    made = known[key]
    if made is None:
        return {}
    env: dict[fx.Node, Any] = dict(zip((x for x in made.graph.nodes if x.op == "placeholder"), nodes, strict=True))
    held: dict[fx.Node, torch.Tensor] = {}
    with gm.graph.inserting_before(n), fakes(values):
        for x in made.graph.nodes:
            if x.op == "get_attr":
                env[x] = gm.graph.get_attr(_kept(gm, getattr(made, str(x.target))))
                env[x].meta = dict(x.meta)
                held[env[x]] = getattr(made, str(x.target))
            elif x.op == "call_function":
                env[x] = gm.graph.node_copy(x, env.__getitem__)
                env[x].meta |= {k: v for k, v in n.meta.items() if k not in ("val", "tensor_meta")}
                if not first:  # memory of its own
                    args, kwargs = fx.map_arg((env[x].args, env[x].kwargs), lambda y: held.get(y, y.meta["val"]))
                    env[x].meta["val"] = x.target(*args, **kwargs)
    ((out, after),) = (x.args[0] for x in made.graph.nodes if x.op == "output")
    _rename(n, {given[name]: env[a] for name, a in zip(written, after, strict=True)})
    return _replaced(n, fx.map_arg(out, env.__getitem__))


def _kind(v: Any) -> Any:
    """What a reference's operations may hang on, of an argument."""
    same = (v.shape, v.stride(), v.dtype, v.device, v.requires_grad) if isinstance(v, torch.Tensor) else v
    return str(same)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _kept(gm: fx.GraphModule, value: Any) -> str:
    """The name of an attribute of `gm` that holds a constant of a reference."""
    name = next(name for i in range(1 << 30) if not hasattr(gm, name := f"_contract_constant{i}"))
    if isinstance(value, torch.Tensor):
        gm.register_buffer(name, value, persistent=False)  # of a plain attribute torch warns
    else:
        setattr(gm, name, value)
    return name


def _rename(n: fx.Node, written: dict[fx.Node, fx.Node]) -> None:
    """Behind n, what it wrote goes by another node."""
    for old, new in written.items():
        behind, node = set(), n
        while node.op != "root":
            behind.add(node)
            node = node.next
        for user in [u for u in old.users if u in behind and u is not n]:
            user.replace_input_with(old, new)


def _replaced(n: fx.Node, out: Any) -> dict[fx.Node, fx.Node]:
    stands: dict[fx.Node, fx.Node] = {}
    if isinstance(out, fx.Node):
        n.replace_all_uses_with(out)
        stands[n] = out
    else:
        for user in [u for u in n.users if u.target is operator.getitem]:
            stands[user] = part = out[user.args[1]]
            user.replace_all_uses_with(part)
            n.graph.erase_node(user)
    if not n.users:
        n.graph.erase_node(n)
    return stands
