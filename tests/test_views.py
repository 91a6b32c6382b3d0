"""What an element of each view-like op is, held against torch: at every index the definition names the element that torch has there.

A new op is a row of `definitions_views.MOVES` (or of the table of names) and a line of `CALLS` here.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import moe_compile.passes.terms as T
from moe_compile.passes.aten import names
from moe_compile.passes.aten.definitions_views import MOVES
from moe_compile.passes.aten.element import Puller
from moe_compile.passes.recover.glance import places

sys.path.insert(0, str(Path(__file__).parent / "laws"))
from evaluate import World, evaluate

CALLS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "transpose": [lambda x: x.transpose(0, 2), lambda x: x.transpose(-1, 1)],
    "permute": [lambda x: x.permute(2, 0, 1), lambda x: x.permute(-1, 1, 0)],
    "mT": [lambda x: x.mT],
    "t": [lambda x: x[0].t(), lambda x: x[0, 1].t()],
    "movedim": [lambda x: x.movedim(0, 2), lambda x: x.movedim((0, -1), (1, 0))],
    "unsqueeze": [lambda x: x.unsqueeze(1), lambda x: x.unsqueeze(-1)],
    "squeeze": [lambda x: x[:, :1].squeeze(1), lambda x: x[:1].squeeze()],
    "flip": [lambda x: x.flip(1), lambda x: x.flip((0, -1))],
    "fliplr": [lambda x: x.fliplr()],
    "flipud": [lambda x: x.flipud()],
    "roll": [lambda x: x.roll(1, 1), lambda x: x.roll((5, -1), (2, 0)), lambda x: x.roll(7), lambda x: x.roll(-1)],
    "tril": [lambda x: x.tril(), lambda x: x.tril(1), lambda x: x.tril(-1)],
    "triu": [lambda x: x.triu(), lambda x: x.triu(2), lambda x: x.triu(-1)],
    "narrow": [lambda x: x.narrow(2, 1, 3)],
    "slice": [lambda x: x[:, 1:, ::2], lambda x: x[..., -2:]],
    "expand": [lambda x: x[:, :1].expand(2, 5, 4)],
    "repeat": [lambda x: x.repeat(2, 1, 3), lambda x: x.repeat(2, 1, 1, 1)],
    "repeat_interleave": [lambda x: x.repeat_interleave(2, 1), lambda x: x.repeat_interleave(3)],
    "reshape": [lambda x: x.reshape(4, 6), lambda x: x.flatten(1), lambda x: x.unflatten(2, (2, 2))],
    "stack": [lambda x: torch.stack([x[0], x[1]], 1)],
    "cat": [lambda x: torch.cat([x[:, 1:], x], 1)],
    "vstack": [lambda x: torch.vstack([x[1:], x]), lambda x: torch.row_stack([x[0], x[1]])],
    "hstack": [lambda x: torch.hstack([x[:, 1:], x]), lambda x: torch.column_stack([x[0], x[1]])],
    "dstack": [lambda x: torch.dstack([x[..., 1:], x])],
}


@pytest.fixture(autouse=True)
def own_terms():
    T.reset()
    yield
    T.reset()


def test_every_row_is_held_against_torch() -> None:
    same_op = {"swapaxes", "swapdims", "numpy_T", "T", "H", "mH", "matrix_H", "adjoint", "moveaxis"}
    assert set(MOVES) - same_op <= set(CALLS) and set(MOVES) >= names.MOVE


@pytest.mark.parametrize("name", CALLS)
def test_the_definition_names_torchs_element(name: str) -> None:
    x = torch.arange(1.0, 25).view(2, 3, 4)
    for f in CALLS[name]:
        graph = make_fx(f, pre_dispatch=True)(x).graph
        (out,) = next(n for n in graph.nodes if n.op == "output").all_input_nodes
        puller, want = Puller(lambda n: False), f(x)
        at = tuple(map(T.var, want.shape))
        term, world = puller.at(out, at), World(lambda node, where: float(x[where]))
        assert not puller.unknown
        for where in itertools.product(*map(range, want.shape)):
            assert evaluate(term, world, dict(zip(at, where))) == float(want[where]), (where, term)


def graph_of(f: Callable[..., object], *args: Tensor) -> torch.fx.Graph:
    graphs: list[torch.fx.Graph] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=keep)(*args)
    return graphs[0]


IDS = torch.arange(6).view(2, 3)
LOOKED_AT: dict[str, tuple[bool, Callable[[Tensor], object]]] = {
    "softmax": (False, lambda x: x.softmax(-1)),
    "amax": (False, lambda x: x.amax(-1)),
    "maximum": (False, lambda x: torch.maximum(x, x + 1)),
    "the largest of all": (False, lambda x: x.max()),
    "the larger of two": (False, lambda x: torch.max(x, x + 1)),
    "positions": (False, lambda x: x[..., :2] + torch.arange(6).view(3, 2)[None]),
    "the largest of each row": (False, lambda x: x - x.max(-1, keepdim=True)[0]),
    "the largest and where": (True, lambda x: x.max(-1)[1]),
    "argmax": (True, lambda x: x.argmax(-1)),
    "top-k": (True, lambda x: torch.topk(x, 2).indices),
    "sorted": (True, lambda x: x.sort(-1, descending=True)[1][:, :2]),
    "argsort": (True, lambda x: torch.argsort(x, -1)),
    "hard gumbel": (True, lambda x: torch.nn.functional.gumbel_softmax(x, hard=True)),
    "a table of ids": (True, lambda x: IDS[(x[0, 0] > 0).long()]),
    "a table of ids, embedded": (True, lambda x: torch.nn.functional.embedding((x[0, 0] > 0).long(), IDS)),
}


@pytest.mark.parametrize("what", LOOKED_AT)
def test_graphs_without_a_selection_are_not_looked_at(what: str) -> None:
    """The cheap look that every graph gets: `max` is no part of `softmax`."""
    expected, f = LOOKED_AT[what]
    assert bool(places(graph_of(f, torch.randn(2, 3, 4)))) is expected
