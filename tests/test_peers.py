"""Sums through peers' memory (`moe_compile.peers`, `ops.summed`) as far as one process without a GPU can see them.

What crosses cards is checked on cards: benchmarks/two_cards.py, stage "sums".
"""

from __future__ import annotations

import contextlib
import unittest.mock
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_compile import agreement, divided, peers
from moe_compile.ir.operands import Operands
from moe_compile.ops import peer_rows, summed
from moe_compile.ops.summed import Sum


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def memory(group: Any, size: int, ranks: int = 2) -> summed.Peers:
    each = [torch.empty(size, dtype=torch.uint8)] * ranks
    return summed.Peers(lambda: group, group.group_name, 0, ranks, each, 1000, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "dtype", "ranks", "how"),
    [
        (1, torch.bfloat16, 2, Sum.ONE_SHOT),
        (2048, torch.bfloat16, 2, Sum.ONE_SHOT),  # two ranks get as much either way
        (4096, torch.bfloat16, 2, Sum.TWO_SHOT),  # no place for the parts of both
        (128, torch.bfloat16, 4, Sum.ONE_SHOT),  # 0.5 MiB of rows of 2048
        (128, torch.float32, 4, Sum.TWO_SHOT),
        (4097, torch.bfloat16, 2, Sum.COLLECTIVE),  # more than the memory holds
        (1, torch.int32, 2, Sum.COLLECTIVE),
        (0, torch.bfloat16, 2, Sum.COLLECTIVE),
    ],
)
def test_the_way_follows_from_size_and_dtype(tokens: int, dtype: torch.dtype, ranks: int, how: Sum, group: Any) -> None:
    found = memory(group, summed.memory_of(summed.SUMS), ranks)
    assert found.way((tokens, 2048), dtype) is how
    assert found.way((tokens, 2048 * tokens + 1), dtype) is Sum.COLLECTIVE  # no whole number of vectors


def test_a_lost_rank_is_named(group: Any) -> None:
    """What a kernel notes before it ends is read by the host: before the next call, and by a thread that says it."""
    found = memory(group, summed.memory_of(64))
    assert found.missing() == ""
    found.lost[1] = 1
    with pytest.raises(RuntimeError, match=r"rank 1 did not come .* within 1 s .* start all ranks again"):
        found.sum(torch.ones(8), Sum.ONE_SHOT)
    with unittest.mock.patch.object(peers.log, "error") as said:
        peers._watch(weakref.ref(found))
    assert "rank 1" in said.call_args.args[0]


def test_a_lost_rank_is_named_once_when_the_process_ends(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks first, the thread or the end of the process, which may be the next thing behind CUDA's error."""
    found = memory(group, summed.memory_of(64))
    monkeypatch.setattr(summed, "_peers", {found.name: found})
    with unittest.mock.patch.object(peers.log, "error") as said:
        peers._last_word()
        assert not said.called
        found.lost[1] = 1
        peers._last_word()
        peers._watch(weakref.ref(found))
    assert "rank 1" in said.call_args.args[0] and said.call_count == 1


class Counting:
    """Kernels that exchange nothing and note in which half they are called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def note(self, what: str) -> None:
        self.calls.append(f"{what} {len(self.calls) % 2}")

    def added(self, p: Any, part: torch.Tensor, scatter: bool) -> torch.Tensor:
        self.note("scatter" if scatter else "sum")
        return part.chunk(p.size)[0] if scatter else part

    def gathered(self, p: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, said: int) -> tuple[torch.Tensor, ...]:
        self.note("gather")
        return *(torch.cat([t] * p.size) for t in (x, ids, weights)), torch.zeros(p.size), torch.tensor(True)


def test_each_exchange_is_tried_in_either_half(group: Any) -> None:
    found = memory(group, summed.memory_of(1 << 10))
    found.kernels = Counting()
    assert "a sum" in peers._try(found, torch.device("cpu"))  # and goes on
    assert set(found.kernels.calls) == {f"{what} {half}" for what in ("sum", "gather", "scatter") for half in (0, 1)}


def test_what_the_host_reads_is_the_hosts(group: Any) -> None:
    """Models are placed under `torch.device("meta")`, or where the card is the default device."""
    with torch.device("meta"):
        found = summed.Peers(lambda: group, group.group_name, 0, 1, [torch.empty(1 << 20, dtype=torch.uint8, device="cpu")], 1, None)  # type: ignore[arg-type]
    assert found.missing() == ""


class Stream:
    cuda_stream = 1

    def __init__(self, captured: bool = False) -> None:
        self.captured, self.waits = captured, list[Any]()

    def wait_stream(self, other: Any) -> None:
        self.waits.append(other)


def test_calls_are_in_order_on_the_streams_of_one_capture_and_outside_of_any(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[Stream] = [Stream()]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now[-1].captured)
    found = memory(group, summed.memory_of(64))
    found.count = SimpleNamespace(is_cuda=True, device=None)  # type: ignore[assignment]
    streams = [Stream(), Stream(), Stream(True), Stream(True), Stream()]
    for stream in streams:
        with on(stream):
            found._before()
    # eager on two streams; a capture of two; eager again, while that goes on
    assert [s.waits for s in streams] == [[], [streams[0]], [], [streams[2]], []]


class Told:
    """A group of two whose other rank says what it is told to, on each topic."""

    size, timeout = 2, 1.0

    def __init__(self, **other: Any) -> None:
        self.other = {"peers": {"lacks": "", "host": "here"}, "peers hold": {"failed": ""}, "peers met": {"failed": ""}} | other

    def round(self, topic: str, word: Any, patience: float) -> list[Any]:
        return [word, self.other[topic]]


def joined(monkeypatch: pytest.MonkeyPatch, group: Any, talk: Told, meet: Any, own: str = "") -> bool:
    monkeypatch.setattr(agreement, "join", lambda g: talk)
    monkeypatch.setattr(peers, "_own", lambda group, size: torch.empty(0))
    monkeypatch.setattr(peers, "_meet", meet)
    monkeypatch.setattr(peers, "lacks", lambda group: own)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    monkeypatch.setattr(summed, "_peers", {})
    return peers.join(group, "cuda")


def made(group: Any, timeout: float, own: torch.Tensor) -> summed.Peers:
    return memory(group, summed.memory_of(64))


@pytest.mark.parametrize(
    ("other", "own"),
    [
        ({"peers": {"lacks": "MOE_COMPILE_PEERS=0", "host": "here"}}, ""),
        ({"peers": {"lacks": "", "host": "elsewhere"}}, ""),
        ({"peers": None}, ""),
        ({}, "no CUDA"),
        ({"peers met": {"failed": "RuntimeError: no peer access"}}, ""),
        ({"peers met": None}, ""),
    ],
)
def test_what_one_rank_lacks_no_rank_has(other: Any, own: str, monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    assert not joined(monkeypatch, group, Told(**other), made, own)
    assert summed.of_group(group.group_name) is None


def test_cards_wait_for_no_rank_that_has_no_memory(monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    """Where one rank is out of memory, or something unheard of fails on it, no rank comes to where cards wait for each other."""
    met: list[Any] = []
    assert not joined(monkeypatch, group, Told(**{"peers hold": {"failed": "OutOfMemoryError"}}), lambda *a: met.append(a))
    assert not met
    monkeypatch.undo()
    monkeypatch.setenv("MOE_COMPILE_PEERS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peers.importlib, "import_module", unittest.mock.Mock(side_effect=OSError))
    assert "OSError" in peers.lacks(group)


def test_ranks_meet_once(monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    def failing(group: Any, timeout: float, own: torch.Tensor) -> summed.Peers:
        raise RuntimeError("no peer access")

    assert not joined(monkeypatch, group, Told(), failing)
    assert joined(monkeypatch, group, Told(), made)
    monkeypatch.setattr(peers, "_meet", failing)
    assert peers.join(group, "cuda") and not peers.join(group, "cpu")
    monkeypatch.setattr(summed, "_peers", {group.group_name: SimpleNamespace(group=lambda: None)})  # of a group that is gone
    assert summed.of_group(group.group_name) is None and not summed._peers


def test_no_memory_is_shared_without_a_reason_against_it(monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    monkeypatch.setenv("MOE_COMPILE_PEERS", "0")
    assert peers.lacks(group) == "MOE_COMPILE_PEERS=0"
    monkeypatch.delenv("MOE_COMPILE_PEERS")
    for name, value in (("NCCL_P2P_DISABLE", "1"), ("NCCL_P2P_LEVEL", "LOC")):
        with monkeypatch.context() as told:
            told.setenv(name, value)
            assert f"{name}={value}" in peers.lacks(group)
            told.setenv("MOE_COMPILE_PEERS", "1")
            assert name not in peers.lacks(group)
            told.delenv("MOE_COMPILE_PEERS")
            told.setenv(name, {"1": "0", "LOC": "NVL"}[value])
            assert name not in peers.lacks(group)
    assert "more than 2 want MOE_COMPILE_PEERS=1" in peers.lacks(SimpleNamespace(size=lambda: 4))
    monkeypatch.setenv("MOE_COMPILE_PEERS", "1")
    assert "8 are the most" in peers.lacks(SimpleNamespace(size=lambda: 9))
    monkeypatch.setattr(peers, "_met", {group.group_name})
    assert "another one of its name" in peers.lacks(group)
    monkeypatch.setattr(peers, "_met", set())
    if not torch.cuda.is_available():
        assert peers.lacks(group) == "no CUDA"


@pytest.mark.parametrize(("rows", "fits"), [(0, False), (32, True), (48, False), (1 << 27, True), ((1 << 27) + 32, False), (-1, False)])
def test_rows_that_memory_holds(rows: int, fits: bool, group: Any) -> None:
    """Those of all ranks, each rank's in whole vectors; beside them ids and weights."""
    found = memory(group, peer_rows.MEMORY)
    assert found.holds(rows) == fits and not found.holds(rows, summed.MESSAGE + 1)
    assert not memory(group, summed.memory_of(summed.ALIGNED)).holds(32)


@pytest.mark.parametrize(("tokens", "fits"), [(139808, True), (139810, False)])
def test_weights_behind_ids_end_before_the_rows(tokens: int, fits: bool, group: Any) -> None:
    """Five ranks' ids of 4 bytes end 8 bytes before a vector's bound, where weights begin: 30 bytes a token are 4 less than there are."""
    found = memory(group, peer_rows.MEMORY, ranks=5)
    x, ids, w = (torch.empty(tokens, 8, dtype=torch.bfloat16), torch.empty(tokens, 1, dtype=torch.int32), torch.empty(tokens, 1).bfloat16())
    assert peer_rows._fits(found, x, ids, w) == fits


def test_the_sum_of_a_group_without_memory_is_an_all_reduce(group: Any) -> None:
    """A group whose collectives do nothing: value and gradient pass; shape and strides of the fake are those of the op."""
    x = torch.randn(4, 6, requires_grad=True)
    out = torch.ops.moe_compile.summed(x.T, group.group_name)
    out.sum().backward()
    assert torch.equal(out, x.T) and torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
    fake = torch.ops.moe_compile.summed(x.detach().T.to("meta"), group.group_name)
    assert fake.shape == out.shape and fake.stride() == out.stride()


def test_what_travels_back_has_one_order(group: Any) -> None:
    """Two ops that do not read each other's results are put in order by the schedule of each rank's graph: gradients are one op's."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradients(x: torch.Tensor, w: torch.Tensor) -> Any:
        ids = torch.zeros(4, 2, dtype=torch.long)
        rows, _, weights, _ = torch.ops.moe_compile.rows_gathered(x, ids, w, group.group_name)
        return torch.autograd.grad(rows.sum() + (weights**2).sum(), (x, w))

    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    traced = make_fx(gradients, tracing_mode="fake")(x, w)
    assert [n.target.__name__ for n in traced.graph.nodes if "summed" in str(n.target)] == ["summed_pair.default"]
    assert [g.shape for g in gradients(x, w)] == [x.shape, w.shape]
    again = [x.detach().repeat(2, 1).requires_grad_(), w.detach().repeat(2, 1).requires_grad_()]
    sums = torch.ops.moe_compile.summed_pair(*again, group.group_name)
    assert [g.shape for g in torch.autograd.grad(sums[0].sum() + sums[1].sum(), again)] == [t.shape for t in again]


@pytest.mark.parametrize("agreed", [False, True])
def test_divided_experts_sum_as_agreed(agreed: bool, monkeypatch: pytest.MonkeyPatch, group: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr(summed, "_peers", {group.group_name: made(group, 1.0, 64)} if agreed else {})
    monkeypatch.setattr(torch.ops.moe_compile, "experts", lambda x, *rest: x * 2)
    ids, w = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    plain = [2] * (divided._COUNT + 1)

    def run(x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return divided.divided_experts(x, ids, w, Operands.named().lists(), None, plain, group.group_name, True)

    code = make_fx(run, tracing_mode="fake")(torch.randn(3, 4), ids, w).code
    assert ("moe_compile.summed" in code, "_c10d_functional.all_reduce" in code) == (agreed, not agreed)
