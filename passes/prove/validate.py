"""Validate: run the recovered meaning against the very subgraph it describes, in float64, on a few probing tokens.

Agreement to 1e-7 in float64 means the same function and not a tolerance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Rejection
from ..aten.element import fixed_number, shape_of, size_of
from ..recover.fused import is_fused
from ..recover.region import Block, inside
from .probe import TROUBLE, Sizes, constant, difference, evaluate, one_thread, probe_values, size_choices

Probe = Callable[[Block, dict[fx.Node, Tensor], list[fx.Node]], str | None]

_proved: dict[Any, str | None] = {}
_unlike = itertools.count()  # a constant too large to compare is like no other


def validate(block: Block) -> Rejection | None:
    """None when the block's IR and its subgraph agree on every probe; else which part does not, and by how much."""
    for part in parts(block):
        probe, outs, boundary, what = part.probe, part.outs, part.boundary, part.what
        nodes = inside(outs, boundary)
        if isinstance(nodes, Rejection):
            return nodes
        key = (probe.__name__, replace(block.ir, boundary={}), block.fold.factor, block.wraps, signature(nodes, boundary, outs))
        if key not in _proved:
            if len(_proved) > 4096:
                _proved.clear()
            with one_thread():
                _proved[key] = _try_sizes(block, probe, nodes, outs, boundary)
        if _proved[key] is not None:
            return Rejection(f"{what} and the recovered formula disagree: {_proved[key]}", block.match.out, "validate")
    return None


@dataclass(frozen=True)
class Part:
    """A piece of a block that is compared by itself: what is computed (`outs`) from what (`boundary`).

    `values(computed, outs)`: what the graph says and what the IR says, to be equal; `probe` compares the two, and the choice of experts.
    """

    what: str
    outs: list[fx.Node]
    boundary: list[fx.Node]
    probe: Probe
    values: Callable[[dict[fx.Node, Tensor], list[fx.Node]], tuple[Tensor, Tensor]]

    @property
    def routing(self) -> bool:
        return self.probe is _routing_probe


def parts(block: Block) -> list[Part]:
    """Experts and routing where tensors lie between the two, else the whole; experts that are fused already were compared then."""
    outs = [n for n in (block.raw_ids, block.weights, block.ids if block.masked else None) if n is not None]
    routed = block.gating is not None and block.raw_ids is not None
    routing = Part("the routing", outs, block.routing_inputs(), _routing_probe, partial(_routing_pair, block))
    if is_fused(block.match.out):
        return [routing] if routed and block.weights is not None else []
    if block.ids is not None and block.weights is not None:
        experts = Part("the experts", [block.match.out], block.expert_inputs(), _experts_probe, partial(_experts_pair, block))
        return [experts, routing] if routed else [experts]
    given = [block.match.tokens, block.match.base, *block.params(), *block.routing_inputs()]
    edge = [n for n in dict.fromkeys(given) if n is not None]
    return [Part("the block", [block.match.out], edge, _joint_probe, partial(_joint_pair, block))]


def signature(nodes: list[fx.Node], boundary: list[fx.Node], outs: list[fx.Node]) -> Any:
    """Equal for regions that compute the same thing from inputs of the same shapes (as equal layers do)."""
    number = {n: i for i, n in enumerate([*boundary, *nodes])}

    def arg(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return ("n", number.get(a, str(a)))
        if isinstance(a, (list, tuple)):
            return tuple(arg(x) for x in a)
        return (type(a).__name__, str(a))

    head = tuple((str(shape_of(n)), str(n.meta["val"].dtype)) for n in boundary)

    def key(n: fx.Node) -> Any:
        if n.op == "get_attr":
            return _constant_key(n)
        return size_of(n) if fixed_number(n) else (str(n.target), arg(n.args), arg(tuple(sorted(n.kwargs.items()))))

    body = tuple(key(n) for n in nodes)
    return hash((head, body, tuple(number.get(o, -1) for o in outs)))


def _constant_key(n: fx.Node) -> Any:
    v = constant(n)
    small = isinstance(v, Tensor) and v.numel() < 4096
    return ("const", tuple(v.shape), tuple(v.flatten().tolist())) if small else ("const", next(_unlike))


def _try_sizes(block: Block, probe: Any, nodes: list[fx.Node], outs: list[fx.Node], boundary: list[fx.Node]) -> str | None:
    errors = None
    for sizes in size_choices(block):
        try:
            for seed in range(3):
                bad = _compare(block, probe, nodes, outs, boundary, sizes, seed)
                if bad is not None:
                    return bad
            return None
        except TROUBLE as e:
            errors = f"the subgraph could not be run on probing inputs ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
    return errors


def _compare(
    block: Block, probe: Any, nodes: list[fx.Node], outs: list[fx.Node], boundary: list[fx.Node], sizes: Sizes, seed: int
) -> str | None:
    computed = evaluate(block, nodes, probe_values(block, boundary, sizes, seed), sizes, outs)
    with torch.no_grad():
        bad: str | None = probe(block, computed, outs)
    return None if bad is None else f"{bad} on probe {seed}"


def _experts_probe(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> str | None:
    return difference(*_experts_pair(block, env, outs))


def _experts_pair(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> tuple[Tensor, Tensor]:
    assert block.ids is not None and block.weights is not None
    k = block.match.k
    ids = env[block.ids].remainder(block.match.experts.num_experts) if block.wraps else env[block.ids]
    return env[outs[0]], _experts_value(block, env, ids.reshape(-1, k), env[block.weights].reshape(-1, k))


def _routing_probe(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> str | None:
    """The graph's choice must be a top-k of the recovered criterion (any one at ties), its weights the recovered ones of that choice."""
    g = block.gating
    assert g is not None
    gating = g.gating
    ids = env[outs[0]].reshape(-1, gating.k)
    choice, _ = gating.selection(*_routing_values(block, env)[:2], torch.float64)
    best = choice.topk(gating.k, dim=-1).values
    chosen = choice.gather(-1, ids).sort(-1, descending=True).values
    if bool((ids.sort(-1).values.diff(dim=-1) == 0).any()) or not torch.allclose(chosen, best, rtol=1e-9, atol=1e-12):
        return "other experts are selected"
    return difference(*_routing_pair(block, env, outs))


def _routing_pair(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> tuple[Tensor, Tensor]:
    """The weights of the experts that the graph chose."""
    assert block.gating is not None
    gating = block.gating.gating
    ids, weights, *mapped = (env[o].reshape(-1, gating.k) for o in outs)
    logits, bias, table = _routing_values(block, env)
    _, raw = gating.selection(logits, bias, torch.float64)
    wanted = gating.weights_of(raw, ids, bias, table)
    if mapped:
        valid = valid_slots(block, mapped[0])
        weights, wanted = weights * valid, wanted * valid
    return weights * block.fold.factor, wanted


def valid_slots(block: Block, ids: Tensor) -> Tensor:
    """Where ids are experts at all."""
    e = block.match.experts
    return (ids >= 0) & (ids < e.num_experts + e.num_identity)


def _joint_probe(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> str | None:
    return difference(*_joint_pair(block, env, outs))


def _joint_pair(block: Block, env: dict[fx.Node, Tensor], outs: list[fx.Node]) -> tuple[Tensor, Tensor]:
    assert block.gating is not None
    w, ids = block.gating.gating.evaluate(*_routing_values(block, env))
    return env[outs[0]] * block.fold.factor, _experts_value(block, env, ids, w)


def _routing_values(block: Block, env: dict[fx.Node, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    g = block.gating
    assert g is not None
    logits = env[g.logits].reshape(-1, g.gating.num_experts)
    return logits, *(None if n is None else env[n].reshape(-1) for n in (g.bias, g.expert_scale))  # type: ignore[return-value]


def _experts_value(block: Block, env: dict[fx.Node, Tensor], ids: Tensor, w: Tensor) -> Tensor:
    m = block.match
    x = env[m.tokens].reshape(-1, m.experts.hidden)

    def get(params: list[Any]) -> list[Tensor]:
        return [env[q.node] if q.view is None else env[q.node].reshape(q.view) for q in params]

    add = None if m.base is None else env[m.base].reshape(-1, m.experts.out_features)
    up, down, up_bias, down_bias, up_scale, down_scale = map(get, m.groups())
    return m.experts.evaluate(x, ids, w, up, down, up_bias, down_bias, add, up_scale=up_scale, down_scale=down_scale)
