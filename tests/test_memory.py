"""Memory written under one name and read under another: nothing is moved across such a write, and what nothing writes still fuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import small
import torch
from small import Block, E, H, K, T, assert_equal, both, told
from torch import Tensor, nn

from moe_compile.passes.aten import effects
from moe_compile.report import collecting

torch.set_num_threads(1)


class Biased(Block):
    """The bias is a part of one flat buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flat", torch.randn(3 * E) * 3)
        self.register_buffer("bias", self.flat[E : 2 * E])

    def choose(self, x: Tensor, scores: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ids = (scores + bias).topk(K).indices
        return self.gathered(x, ids, scores.gather(1, ids)), ids


class WrittenBetween(Biased):
    """Verdict: experts fused, routing as written. The flat buffer is written between logits and selection."""

    def forward(self, x: Tensor) -> Any:
        scores = self.router(x).sigmoid()
        self.flat.neg_()
        return self.choose(x, scores, self.bias)


class WrittenAfter(Biased):
    """Verdict: fused. The write comes when all is read."""

    def forward(self, x: Tensor) -> Any:
        out = self.choose(x, self.router(x).sigmoid(), self.bias)
        self.flat.neg_()
        return out


class CopiedBefore(Biased):
    """Verdict: fused, with the copy as the bias. The buffer is written before the op could read it."""

    def forward(self, x: Tensor) -> Any:
        bias = self.bias.clone()
        self.flat.neg_()
        return self.choose(x, self.router(x).sigmoid(), bias)


class CopiedBeforeItself(Biased):
    """Verdict: fused, with the copy as the bias. The same, written by its own name."""

    def forward(self, x: Tensor) -> Any:
        bias = self.bias.float().clone()
        self.bias.neg_()
        return self.choose(x, self.router(x).sigmoid(), bias)


class AddedIntoView(Block):
    """Verdict: fused, onto that result. The experts' rows are added into a view of another result, which nobody else reads."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.loop(x, ids, w, (x * 2).view(-1, H))


class AddedIntoCopy(Block):
    """Verdict: fused. A copy of the tokens is what they are added to."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.route(x)
        return self.loop(x, ids, w, x.clone())


class IdsWritten(Block):
    """Verdict: rejected. Ids are written through a view after the selection."""

    def forward(self, x: Tensor) -> Any:
        w, ids = self.route(x)
        ids[:, 0].fill_(1)
        return self.gathered(x, ids, w), ids


CASES = [
    (WrittenBetween, 1, False),
    (WrittenAfter, 1, True),
    (CopiedBefore, 1, True),
    (CopiedBeforeItself, 1, True),
    (AddedIntoView, 1, True),
    (AddedIntoCopy, 1, True),
    (IdsWritten, 0, False),
]


@pytest.mark.parametrize(("cls", "blocks", "routed"), CASES, ids=lambda c: getattr(c, "__name__", ""))
def test_writes_under_another_name(cls: type[Block], blocks: int, routed: bool) -> None:
    report, got, want = both(cls(), torch.randn(T, H))
    assert_equal(got, want)
    assert len(report.blocks) == blocks and all((b.ir.gating is not None) == routed for b in report.blocks), told(report)


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_a_copy_of_an_input_that_another_input_overwrites(inner: str) -> None:
    """Verdict: fused, with the copy as the tokens. The two inputs are one memory."""

    class Copied(Block):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            h = x.clone()
            other.zero_()
            w, ids = self.route(h)
            return self.gathered(h, ids, w)

    module, found = Copied(), []
    for f in (module, small.compiled(copy.deepcopy(module), inner=inner)):
        torch.manual_seed(1)
        x = torch.randn(T, H)
        with torch.no_grad(), collecting() as report:
            found.append(f(x, x.view(-1)))
    assert_equal([found[1]], [found[0]])
    assert len(report.blocks) == 1, told(report)


def captured(f: Any, *inputs: Tensor) -> dict[str, torch.fx.Node]:
    """The nodes of f's Dynamo graph."""
    graphs: list[Any] = []
    torch._dynamo.reset()
    torch.compile(f, backend=lambda gm, _: graphs.append(gm) or gm.forward)(*inputs)
    return {n.name: n for n in graphs[0].graph.nodes}


def test_a_write_that_reaches_ids_is_a_fact_of_the_graph() -> None:
    def written(x: Tensor) -> Any:
        ids = x.topk(K).indices
        shown = ids.view(-1)
        narrow = ids.to(torch.int32)
        shown[::3] = 0
        return ids, narrow, ids.to(torch.int32)

    nodes = captured(written, torch.randn(T, E))
    casts = [n for n in nodes.values() if n.target == "to"]
    ids = next(n for n in nodes.values() if n.name.startswith("ids"))
    write = next(n for n in nodes.values() if effects.is_write(n))
    assert effects.written(ids) is write and effects.written(ids, until=casts[0]) is None
    assert [effects.written(c) is write for c in casts] == [False, True]


IN_PLACE = [
    lambda v: nn.functional.relu(v, True),
    lambda v: nn.functional.relu(v, inplace=True),
    lambda v: v.relu_(),
    lambda v: v.__isub__(1),
    lambda v: v.__itruediv__(3.0),
]


@pytest.mark.parametrize("how", IN_PLACE)
def test_functions_in_place_are_writes(how: Any) -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        how(y)
        return y

    nodes = captured(f, torch.randn(3))
    assert [effects.is_write(n) for n in nodes.values() if n.op in ("call_function", "call_method")] == [False, True]
