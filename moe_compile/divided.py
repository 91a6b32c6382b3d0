"""Experts whose weights a graph puts together from the ranks (`moe_compile.whole`): the weights stay and the rows travel.

experts(x, ids, w, whole(up), whole(down)) = Σ over the ranks of their own experts, each on its part of `up` and `down`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from .ir import Exchange, Way
from .ir.codec import place
from .ir.operands import Operands
from .ir.records import Layout
from .ops import bundled, summed

_EXPERTS = ("moe_compile.experts.default", "moe_compile.experts")
_COUNT, _STACKED, _IDENTITY = (place(Layout, name) for name in ("num_experts", "stacked", "num_identity"))
# what keeps the experts of a stack in its first dim: casts, transposed matrices
_CASTS = ("to", "contiguous", "mT", "transpose", "permute")


def is_whole(n: fx.Node) -> bool:
    """Whether a node puts weights together."""
    return str(n.target).startswith("moe_compile.whole")


def puts_together(gm: fx.GraphModule) -> bool:
    return any(map(is_whole, gm.graph.nodes))


def is_experts(n: fx.Node) -> bool:
    return n.op == "call_function" and str(n.target) in _EXPERTS


def why_not(n: fx.Node) -> str:
    """What keeps the experts of a fused op from being divided; "" for nothing."""
    if not is_experts(n):
        name = str(n.target).split(".")[1]
        return f"{name}: only plain experts are divided (no codes, no low-rank pairs, no chains, no shared expert inside)"
    _, _, _, operands, (_, *plain) = bundled(n.args)
    if not plain[_STACKED]:
        return "each expert has tensors of its own: only stacks [E, ...] are divided"
    if plain[_IDENTITY]:
        return "some experts are identities"
    if any(source(w) is None for w in operands):
        return "a stack of weights is not read as it is stored"
    return ""


def source(n: fx.Node) -> fx.Node | None:
    """What a stack of weights is a cast or transposition of, by expert; None where its experts are moved."""
    while _view(n) in _CASTS:
        order = [a for a in n.args[1:] if isinstance(a, int)]
        if n.target == "permute" and order[0] != 0 or n.target == "transpose" and 0 in order:
            return None
        n = n.args[0]  # type: ignore[assignment]
    return None if n.op == "call_method" else n


def _view(n: fx.Node) -> str:
    """The name of a method, or of an attribute that is read."""
    return str(n.target) if n.op == "call_method" else str(n.args[1]) if n.target is getattr else ""


def divided(gm: fx.GraphModule) -> list[fx.Node]:
    """The fused ops all of whose weights are put together from the ranks of one group."""
    return [n for n in gm.graph.nodes if is_experts(n) and not why_not(n) and _of_one_group(n)]


def _of_one_group(n: fx.Node) -> bool:
    stacks = _sources(n)
    return all(map(is_whole, stacks)) and len({w.args[1:] for w in stacks}) == 1


def _sources(n: fx.Node) -> list[Any]:
    return [source(w) for w in bundled(n.args)[3]]


def name_of(whole: fx.Node) -> str:
    """The parameter that weights are put together from: the same in every graph of the same code."""
    n = whole
    while n.op != "placeholder" and n.all_input_nodes:
        n = n.all_input_nodes[0]
    return n.name


def stacks(n: fx.Node) -> str:
    """The parameters of an op that is divided."""
    return " ".join(map(name_of, _sources(n)))


def how(n: fx.Node) -> Exchange:
    """How the rows of an op travel."""
    _, group, shared, rows = _how(n)
    own = summed.resolved(group)
    return Exchange(Way.SHARED if shared else Way.ROWS if rows else Way.GATHER, group, own.size(), own.rank())


def _how(n: fx.Node) -> tuple[Any, ...]:
    """The arguments of `whole`."""
    args = _sources(n)[0].args
    return args if len(args) == 4 else (*args, False)


def exchange(gm: fx.GraphModule, experts: Sequence[fx.Node]) -> None:
    """Let the rows travel to the experts of these ops; weights that nothing else reads are not put together any more."""
    for n in experts:
        x, ids, weights, operands, (add, *rest) = bundled(n.args)
        _, group, shared, by_rows = _how(n)
        plain = list(rest)
        plain[_COUNT] //= summed.resolved(group).size()
        with gm.graph.inserting_before(n):
            local = operands.map(lambda w: _local(gm.graph, w))
            args = (x, ids, weights, local.lists(), add, plain, group, shared)
            new = gm.graph.call_function(divided_experts, args, {"rows": True} if by_rows else {})
        new.meta.update(n.meta)
        n.replace_all_uses_with(new)
        gm.graph.erase_node(n)
    for n in reversed(list(gm.graph.nodes)):
        if not n.users and (is_whole(n) or _view(n) in _CASTS):
            gm.graph.erase_node(n)
    gm.graph.lint()
    gm.recompile()


def _local(g: fx.Graph, w: fx.Node) -> fx.Node:
    """The rank's own part, cast and transposed as the whole was."""
    if is_whole(w):
        return w.args[0]  # type: ignore[return-value]
    new = g.node_copy(w, lambda x: _local(g, x) if x is w.args[0] else x)
    new.meta.pop("example_value", None)
    return new


def divided_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    lists: Any,
    add: Any,
    plain: Sequence[Any],
    group: str,
    shared: bool,
    rows: bool = False,
) -> torch.Tensor:
    """experts(x, ids, weights, the stacks of all ranks) + add, with this rank's stacks; plain: of its own experts; rows: by all-to-all."""
    from . import exchange

    own = summed.resolved(group)
    operands: Operands[torch.Tensor] = Operands.read(lists)
    count = plain[_COUNT]

    def local(tokens: torch.Tensor, chosen: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.moe_compile.experts(tokens, chosen, w, *operands.lists(), None, *plain)  # type: ignore[no-any-return]

    if rows:
        out = exchange.sent(x, ids, weights, local, count, own)
    else:
        way = exchange.shared if shared else exchange.gathered
        out = way(x, ids, weights, local, own.rank() * count, count, own, peers=summed.of_group(group) is not None)
    return out if add is None else out + add
