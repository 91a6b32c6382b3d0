"""Unrolled loops over many experts: Dynamo could take them, at a high price for each expert, so they are read by example."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_compile
from moe_compile import backend
from moe_compile.loops import capture
from moe_compile.loops.bench import Unrolls
from moe_compile.loops.fewer import MANY
from moe_compile.loops.readers import UNROLLED

H, I, K, T = 16, 6, 2, 9


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((H, I), (H, I), (I, H)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Added(nn.Module):
    """Verdict: fused. The rows of each expert are picked, whether there are any or not."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(H, experts, bias=False), nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * w[t, j, None])
        return out


class AddedInPlace(Added):
    """Verdict: fused, with work that is linear in the experts: each sum is a part of the next one, no result of its own."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, j = (ids == e).nonzero(as_tuple=True)
            out[t] += expert(x[t]) * w[t, j, None]
        return out


class NeighbourAdded(Added):
    """Verdict: as written. An expert gets the rows of its own, and adds to those of the next tokens."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, j = torch.where(ids == e)
            out.index_add_(0, (t + 1) % x.shape[0], expert(x[t]) * w[t, j, None])
        return out


class FromOnes(Added):
    """Verdict: as written. The sum starts from ones."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        out = torch.ones_like(x)
        for e, expert in enumerate(self.experts):
            t, j = torch.where(ids == e)
            out.index_add_(0, t, expert(x[t]) * w[t, j, None])
        return out


def compiled(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Compiles and compares; what the readings came to."""
    outcomes: list[type] = []
    read = capture.read

    def noted(*args: object) -> capture.Trial:
        trial = read(*args)
        outcomes.append(type(trial.outcome))
        return trial

    monkeypatch.setattr(capture, "read", noted)
    torch._dynamo.reset()
    x = torch.randn(T, H)
    with torch.no_grad():
        got = torch.compile(model, backend="moe_fused", options={"inner": "eager"})(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
    return outcomes


@pytest.mark.parametrize("cls", [Added, AddedInPlace])
@pytest.mark.parametrize("experts", [UNROLLED + 1, MANY + 2])
def test_many_are_read_by_example(cls: type[nn.Module], experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: where there are more than MANY, few of them tell, whether gate and up projections are one matrix or two."""
    model = cls(experts)
    recordings: list[int] = []
    kept = capture._recover
    monkeypatch.setattr(capture, "_recover", lambda gm: recordings.append(len(gm.graph.nodes)) or kept(gm))
    assert compiled(model, monkeypatch) == [capture.Reading]
    assert len(recordings) == 1 and len(moe_compile.last_report().blocks) == 1
    assert moe_compile.last_report().blocks[0].ir.experts.num_experts == experts


def test_few_are_left_to_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capture.Reading not in compiled(Added(4), monkeypatch)
    assert len(moe_compile.last_report().blocks) == 1


def test_what_is_not_read_is_told_by_the_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo unrolls it, and what is said of it is said once."""
    assert capture.Reading not in compiled(NeighbourAdded(UNROLLED + 1), monkeypatch)
    report = moe_compile.last_report()
    assert not report.blocks and len(report.rejected) == 1, report.rejected


def test_what_was_tried_is_not_traced_again_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph with a block missed is traced again if whole blocks may be read in its place, but for those that this has been tried with."""
    graphs: list[int] = []
    kept = backend.flags.check
    monkeypatch.setattr(backend.flags, "check", lambda gm, missed: graphs.append(len(missed)) or kept(gm, missed))
    assert compiled(FromOnes(3), monkeypatch) == [Unrolls] and graphs == [1]
    assert moe_compile.last_report().rejected[0].stage == "experts"


# ---- what is written beside the result ---------------------------------------------------------------------------------


def _in_no_grad(count: Tensor, n: int) -> None:
    with torch.no_grad():
        count.add_(n)


WRITES: dict[str, Callable[[Tensor, int], Any]] = {
    "add": lambda count, n: count.add_(n),
    "copy": lambda count, n: count.copy_(count + n),
    "view": lambda count, n: count.view(1).add_(n),
    "no_grad": _in_no_grad,
    "running_mean": lambda count, n: count.mul_(0.9).add_(n, alpha=0.1),
}


class Counting(Added):
    """Verdict: fused from the graph, never read by example. The rows of each expert are counted in buffers."""

    def __init__(self, experts: int, *writes: str) -> None:
        super().__init__(experts)
        self.writes = writes
        for e in self.experts:
            for write in writes:
                e.register_buffer(write, torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.router(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, j = torch.where(ids == e)
            for write in self.writes:
                WRITES[write](getattr(expert, write), t.shape[0])
            out.index_add_(0, t, expert(x[t]) * w[t, j, None])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_that_are_written_are_as_in_eager(dtype: torch.dtype) -> None:
    """In float64 Dynamo itself took a write to a scalar out of the graph, under AOT autograd, where nothing read its result."""
    eager = Counting(2, *WRITES).to(dtype)
    ours, x = copy.deepcopy(eager), torch.randn(T, H, dtype=dtype)
    torch._dynamo.reset()
    f = torch.compile(ours, backend="moe_fused", options={"inner": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(f(x), eager(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(eager.experts[0].buffers())


class Read(BaseException):
    """Ends a compilation once a loop has been read."""


@pytest.mark.parametrize("write", WRITES)
def test_loops_that_write_are_not_read_by_example(write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They write on probes, which a recording refuses; in the graph that Dynamo makes the writes stay."""
    outcomes: list[object] = []
    read = capture.read

    def noted(*args: object) -> capture.Trial:
        outcomes.append(read(*args).outcome)
        raise Read

    monkeypatch.setattr(capture, "read", noted)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Read):
        torch.compile(Counting(UNROLLED + 1, write), backend="moe_fused", options={"inner": "eager"})(torch.randn(T, H))
    assert len(outcomes) == 1 and "writes to" in str(outcomes[0]), outcomes
