"""Whether all ranks hold the batch that they were said to share: compared at the first call of code that the ranks have agreed upon.

x, ids and weights of experts whose results are summed by an all-reduce come from the same values on all ranks, or the sums are of
different tokens' results. Words go through the group's store (`agreement`): nothing is added to the collectives of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from . import agreement, divided
from .agreement import Talk, Word
from .passes.aten.node import example_value, reached
from .passes.aten.sharded import is_sharded, takes_part

ELEMENTS = 256  # of a tensor that are compared
TOLERANCE = 0.05  # of their norm: other batches are about 1.4 apart, the same one through kernels that round otherwise about 0.01


def shared(gm: fx.GraphModule) -> list[tuple[int, str]]:
    """Place and name of the graph's inputs, parameters aside, from which experts take rows that all ranks are to hold alike.

    What reaches experts by way of a collective or a DTensor alone may be a rank's own: its heads' keys and slopes under tensor parallelism.
    """
    wanted = [n for n in gm.graph.nodes if n.target is divided.divided_experts and n.args[7]]
    rows = (x for n in wanted for x in n.args[:3] if isinstance(x, fx.Node))
    seen = set(reached(rows, lambda n: () if _made_of_all(n) else n.all_input_nodes))
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [(i, n.name) for i, n in enumerate(inputs) if n in seen and not isinstance(n.meta.get("example_value"), nn.Parameter)]


def _made_of_all(n: fx.Node) -> bool:
    """Whether a value is made, or overwritten, by what all ranks hold: a collective, in a custom function as well, or a DTensor's."""
    bodies = [getattr(n.graph.owning_module, str(x.target), None) for x in n.all_input_nodes if x.op == "get_attr"]
    inside = [x for body in bodies if isinstance(body, fx.GraphModule) for x in body.graph.nodes]
    spread = any(is_sharded(example_value(x)) for x in (n, *n.all_input_nodes))
    written = any(str(u.target).startswith("copy_") and u.args[0] is n for u in n.users)  # as `all_reduce(x)` is, which gives back x
    return spread or written or any(map(takes_part, (n, *inside)))


def compared(compiled: Callable[..., Any], inputs: Sequence[tuple[int, str]], talks: Sequence[Talk], topic: str) -> Callable[..., Any]:
    """`compiled`, whose first call raises RuntimeError, on every rank, where ranks of a group hold other `inputs` than its first one.

    topic: of the graph (`agreement.topic_of`), so that no rank hears of another graph's. What has raised is compared once more.
    """
    if not inputs:
        return compiled
    left = [True]

    def run(*args: Any) -> Any:
        if left:
            for talk in talks:
                _same(talk, f"batch, {topic}", {name: _sample(args[i]) for i, name in inputs})
            left.clear()
        return compiled(*args)

    return run


def _sample(value: Any) -> Any:
    """What is told of an input: a number, or a tensor's shape and some of its elements."""
    if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.layout is not torch.strided:
        return value if isinstance(value, (int, float)) else None
    flat = value.detach().reshape(-1)
    found = flat[:: max(1, len(flat) // ELEMENTS)][:ELEMENTS].to(torch.float64).tolist() if not flat.is_complex() else []
    return [list(value.shape), value.dtype.is_floating_point, found]


def _same(talk: Talk, topic: str, own: Word) -> None:
    told = talk.round(topic, own, talk.timeout / 2)
    first = told[0]
    if first is None:
        return
    others = {r: [name for name, v in word.items() if _differ(v, first.get(name))] for r, word in enumerate(told) if word is not None}
    if found := {r: names for r, names in others.items() if names}:
        names = ", ".join(dict.fromkeys(n for each in found.values() for n in each))
        raise RuntimeError(
            f"parallelize(shared_batch=True): {agreement.ranks(list(found))} of {talk.size} called the model with another batch than "
            f"rank 0 (inputs of the graph: {names}); give all ranks the same one, or leave shared_batch out"
        )


def _differ(a: Any, b: Any) -> bool:
    if not isinstance(a, list) or not isinstance(b, list):
        return bool(a != b)
    if a[:2] != b[:2]:
        return True
    if not a[1]:
        return bool(a[2] != b[2])
    x, y = (torch.tensor(v[2], dtype=torch.float64) for v in (a, b))
    return bool((x - y).norm() > TOLERANCE * torch.maximum(x.norm(), y.norm()))
