"""The table of op names: one name for every way to call an op, kinds are apart, a row is all that an op of a plain kind needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import small
import torch
from small import H, T, assert_equal, both, told
from torch import Tensor

from moe_compile.passes.aten import names
from moe_compile.passes.aten.element import RULES

APART = [
    names.RESHAPE, names.PERMUTE, names.PART, names.REPEAT, names.SAME, names.CAST, names.JOIN, names.ZEROS, names.ONES, names.FULL,
    names.EMPTY, names.SIZE, names.READ, names.CONTRACTION - {"embedding"}, names.REDUCTION, names.ACCUMULATE, names.SELECTION,
    names.LOOKUP, names.CLAMP,
]  # fmt: skip


def test_kinds_are_apart() -> None:
    for a, b in itertools.combinations(APART, 2):
        assert not a & b, a & b


def test_kinds_whose_members_read_alike_have_their_definition() -> None:
    alike = names.RESHAPE | names.SAME | names.CAST | names.PERMUTE | names.REPEAT | names.CREATION
    assert not alike - set(RULES) - names.LIKE - {"ravel", "T", "H"}, alike - set(RULES)


CALLS: dict[str, list[Callable[[Tensor], Any]]] = {
    "reshape": [lambda x: torch.reshape(x, (-1,)), lambda x: x.reshape(-1)],
    "add": [lambda x: x + 1, lambda x: torch.add(x, 1), lambda x: x.clone().add_(1)],
    "div": [lambda x: x / 2, lambda x: x.div(2)],
    "linear": [lambda x: torch.nn.functional.linear(x, x)],
    "relu": [lambda x: torch.nn.functional.relu(x), lambda x: x.relu(), lambda x: torch.relu(x)],
    "topk": [lambda x: torch.topk(x, 1), lambda x: x.topk(1)],
}


def captured(f: Callable[[Tensor], Any], x: Tensor, **how: Any) -> Any:
    """The module of f's Dynamo graph."""
    graphs: list[Any] = []

    def keep(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=keep, **how)(x)
    return graphs[0]


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_call_an_op_is_one_name(name: str) -> None:
    """In Dynamo's graph and in the shadow."""
    from moe_compile.passes.aten.shadow import Shadow

    for f in CALLS[name]:
        gm = captured(f, torch.randn(3, 3))
        shadow = Shadow(gm)
        for graph in (gm.graph, shadow.graph):
            found = [names.op_name(n) for n in graph.nodes if n.op in ("call_function", "call_method")]
            assert name in found or graph is shadow.graph and name == "reshape" and "view" in found, found


def test_arithmetic_on_sizes_has_no_name() -> None:
    gm = captured(lambda x: x.new_zeros(x.shape[0] * 2 + 1), torch.randn(4), dynamic=True)
    found = {names.op_name(n) for n in gm.graph.nodes if n.op == "call_function"}
    assert not found & {"mul", "add"}, found


SEEN_THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "ravel": lambda x: x.ravel().view(-1, H),
    "view_copy": lambda x: torch.view_copy(x, (-1, H)),
    "unsqueeze_copy": lambda x: torch.unsqueeze_copy(x, 0)[0],
    "positive": lambda x: +x,
}


@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_ops_that_need_a_row_and_nothing_else(name: str) -> None:
    """Verdict: fused. The rows between the two products go through an op that stands in the table alone."""

    class Through(small.Block):
        def gathered(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            h = torch.nn.functional.silu(torch.einsum("th,tkih->tki", x, self.up[ids]))
            h = SEEN_THROUGH[name](h.reshape(-1, H)).view(h.shape)
            return (torch.einsum("tki,tkhi->tkh", h, self.down[ids]) * w[..., None]).sum(1)

    report, got, want = both(Through(), torch.randn(T, H))
    assert_equal(got, want)
    assert len(report.blocks) == 1, told(report)
