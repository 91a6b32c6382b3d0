"""Redundant experts: a table of replicas makes physical ids of logical ones, and npu_moe_update_expert stands for just that."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import documents
import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from ascend_blocks import Seen, compiled, relative
from functorch.compile import make_boxed_func
from hazards import hazards
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import moe_compile
from moe_compile.ir import placement
from moe_compile.lowering.ascend import device, emulate, places, register, schemas, streams

register.ensure()
T, K, H, I, E, P = 9, 2, 16, 12, 6, 10
WORLD, RANK = 8, 5
Read = Callable[[Tensor, Tensor], Tensor]
A3 = places.Case("A3", 64, 8, 256, 4)


def table_of(experts: int, width: int, seed: int = 0) -> Tensor:
    """Counts 1 .. width - 1, then places; what stands behind an expert's places is never read."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, width, (experts, 1), generator=g)
    return torch.cat([counts, torch.randint(0, P, (experts, width - 1), generator=g)], 1)


# ---- the law -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("world", "rank"), [(0, 0), *((w, r) for w in (2, 7) for r in range(w))])
def test_the_op_reads_what_is_meant(world: int, rank: int, seed: int) -> None:
    """Mode 1 is tokens in turn, mode 0 neighbouring ranks by ceil(world / n), a count of 1 both: in both emulations, for any table."""
    table, ids = table_of(E, min(world or 5, 5) + 1, seed).int(), torch.randint(0, E, (T, K), dtype=torch.int32)
    meant = placement.physical(ids, table, world, rank)
    assert torch.equal(places.physical(ids, table, world, rank), meant)
    how = dict(local_rank_id=rank, world_size=world, balance_mode=0) if world else dict(balance_mode=1)
    for op in (emulate.KERNELS["npu_moe_update_expert"], documents.OPS["npu_moe_update_expert"]):
        assert torch.equal(op(ids, table, **how)[0], meant)


@pytest.mark.parametrize(("changes", "objection"), [
    ({}, None), ({"device": ""}, None), ({"world": 8, "rank": 7}, None), ({"tokens": 512, "k": 16, "width": 769, "experts": 1023}, None),
    ({"device": "A2"}, "for an A3"), ({"device": "950"}, "for an A3"), ({"tokens": None}, "not fixed"), ({"tokens": 0}, "takes 512"),
    ({"tokens": 513}, "takes 512"), ({"k": 17}, "takes 16"), ({"k": 4, "experts": 3}, "takes 3"), ({"experts": 1024}, "fewer than 1024"),
    ({"width": 1}, "2 to 769"), ({"width": 770}, "2 to 769"), ({"world": 2, "width": 4}, "2 to 3"), ({"world": 1, "width": 2}, "2 to 768"),
    ({"world": 769}, "2 to 768"), ({"world": 8, "rank": 8}, "rank 8 of 8"),
])  # fmt: skip
def test_limits(changes: dict[str, Any], objection: str | None) -> None:
    why = places.refuses(dataclasses.replace(A3, **changes))
    assert why is None if objection is None else objection in str(why), why


# ---- spellings ---------------------------------------------------------------------------------------------------------------


def turn_of(n: Tensor) -> Tensor:
    return torch.arange(len(n))[:, None] % n


def flat(t: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(t[ids], -1, (1 + turn_of(t[ids, 0]))[..., None])[..., 0]


def by_rank(rank: int, each: Callable[[Tensor], Tensor]) -> Read:
    return lambda t, ids: t[ids, rank // each(t[:, 0][ids]) + 1]


# Verdict: the op, in the mode that the name says.
READS: dict[str, Read] = {
    "token: t % n + 1": lambda t, ids: t[ids, turn_of(t[:, 0][ids]) + 1],
    "token: count at [ids, 0]": lambda t, ids: t[ids, 1 + turn_of(t[ids, 0])],
    "token: select, remainder": lambda t, ids: t[ids, torch.remainder(torch.arange(T).view(-1, 1), t.select(1, 0)[ids]) + 1],
    "token: expanded": lambda t, ids: t[ids, torch.arange(T)[:, None].expand(T, K) % t[ids, 0] + 1],
    "token: a slice of the places": lambda t, ids: t[:, 1:][ids, turn_of(t[ids, 0])],
    "token: fmod": lambda t, ids: t[ids, torch.arange(T)[:, None].fmod(t[ids, 0]) + 1],
    "rank: (w + n - 1) // n": by_rank(RANK, lambda n: (WORLD + n - 1) // n),
    "rank: -(-w // n)": by_rank(RANK, lambda n: -(-WORLD // n)),
    "rank: the last": by_rank(WORLD - 1, lambda n: (WORLD - 1 + n) // n),
    "rank: of one more": by_rank(RANK, lambda n: (WORLD + n) // n),
    "rank: div": by_rank(0, lambda n: torch.div(WORLD + n - 1, n, rounding_mode="floor")),
}
# Near misses, verdict: the gather stays, the numbers are the user's.
OTHERS: dict[str, Read] = {
    "off by one": lambda t, ids: t[ids, turn_of(t[ids, 0])],
    "two behind": lambda t, ids: t[ids, (turn_of(t[ids, 0]) + 2).clamp(max=4)],
    "the next token": lambda t, ids: t[ids, (torch.arange(1, T + 1)[:, None] % t[ids, 0]) + 1],
    "slots in turn": lambda t, ids: t[ids, torch.arange(T * K).view(T, K) % t[ids, 0] + 1],
    "choices in turn": lambda t, ids: t[ids, torch.arange(K) % t[ids, 0] + 1],
    "half of the tokens": lambda t, ids: t[ids, (torch.arange(T)[:, None] // 2) % t[ids, 0] + 1],
    "count in the last column": lambda t, ids: t[ids, turn_of(t[ids, -1].clamp(1, 2))],
    "one count for all": lambda t, ids: t[ids, torch.arange(T)[:, None] % 2 + 1],
    "counts of the neighbour": lambda t, ids: t[ids, turn_of(t[(ids + 1) % E, 0]) + 1],
    "backwards": lambda t, ids: t[ids, t[ids, 0] - turn_of(t[ids, 0])],
    "rank: floor": by_rank(1, lambda n: WORLD // n),
    "rank: rank % n": lambda t, ids: t[ids, RANK % t[ids, 0] + 1],
    "the first place": lambda t, ids: t[ids, 1],
}


class Placed(nn.Module):
    """Softmax top-k of E logical experts; P physical ones lie in the stacks."""

    def __init__(self, read: Read, dtype: torch.dtype = torch.int64, width: int = 5) -> None:
        super().__init__()
        self.read = read
        self.gate = nn.Parameter(torch.randn(E, H))
        self.up, self.down = nn.Parameter(torch.randn(P, 2 * I, H) * 0.3), nn.Parameter(torch.randn(P, H, I) * 0.3)
        self.register_buffer("table", table_of(E, width).to(dtype))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = F.linear(x, self.gate).softmax(-1).topk(K)
        return w / w.sum(-1, keepdim=True), ids

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        ids = self.read(self.table, ids)
        g, u = torch.einsum("th,tkih->tki", x, self.up[ids]).chunk(2, -1)
        return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, self.down[ids]) * w[..., None]).sum(1)


class Looped(Placed):
    """An expert loop over physical experts."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        ids, out = self.read(self.table, ids), torch.zeros_like(x)
        for e in range(P):
            t, j = torch.where(ids == e)
            g, u = F.linear(x[t], self.up[e]).chunk(2, -1)
            out.index_add_(0, t, F.linear(F.silu(g) * u, self.down[e]) * w[t, j, None])
        return out


def ran(module: nn.Module, x: Tensor, **options: Any) -> list[str]:
    """The calls, where the numbers are those of float64."""
    want = module.double()(x.double())
    module.float()
    with Seen() as seen:
        out = compiled(module, mode="eager", **options)(x)
    assert relative(out.double(), want) <= 1e-5
    return seen.calls()


@pytest.mark.parametrize("name", READS)
@torch.no_grad()
def test_spellings(name: str) -> None:
    calls = ran(Placed(READS[name]), torch.randn(T, H))
    assert calls[:2] == ["npu_moe_gating_top_k_softmax_v2", "npu_moe_update_expert"]


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_near_misses(name: str) -> None:
    calls = ran(Placed(OTHERS[name]), torch.randn(T, H))
    assert "npu_moe_update_expert" not in calls and "npu_grouped_matmul" in calls


@torch.no_grad()
def test_what_is_told_of_a_gather_that_stays() -> None:
    report = moe_compile.explain(Placed(OTHERS["off by one"]), torch.randn(T, H), options={"target": "ascend"})
    assert "physical experts stay a gather: the column that is read is not 1 + (turn" in " ".join(str(report).split())


@torch.no_grad()
def test_a_loop_and_a_narrow_table() -> None:
    assert "npu_moe_update_expert" in ran(Looped(READS["token: t % n + 1"], torch.int32), torch.randn(T, H))


class Batched(Placed):
    """Tokens [B, S, H], which take the places of an expert in turn over the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.choose(x)
        ids = self.read(self.table, ids)
        g, u = torch.einsum("bth,btkih->btki", x, self.up[ids]).chunk(2, -1)
        return (torch.einsum("btki,btkhi->btkh", F.silu(g) * u, self.down[ids]) * w[..., None]).sum(2)


@pytest.mark.parametrize(("steps", "op"), [(10, True), (5, False)])
@torch.no_grad()
def test_batches(steps: int, op: bool) -> None:
    """Near miss: in turn over each sequence."""

    def read(t: Tensor, ids: Tensor) -> Tensor:
        return t[ids, 1 + torch.arange(steps).view(-1, 5, 1) % t[ids, 0]]

    assert ("npu_moe_update_expert" in ran(Batched(read), torch.randn(2, 5, H))) == op


@torch.no_grad()
def test_a_table_that_is_written_to() -> None:
    """Rebalancing: the table is an input of the graph, its values are those of the call."""
    module, x = Placed(READS["token: t % n + 1"]), torch.randn(T, H)
    fast = compiled(module, mode="eager")
    for seed in range(3):
        module.table.copy_(table_of(E, 5, seed))
        assert relative(fast(x), module(x)) <= 1e-5


@torch.no_grad()
def test_a_table_that_is_written_to_in_the_graph_stays_a_gather() -> None:
    """Near miss: behind the read, before the experts, the table gets other values."""

    def read(t: Tensor, ids: Tensor) -> Tensor:
        out = t[ids, turn_of(t[ids, 0]) + 1]
        t.fill_(1)
        return out

    module, x = Placed(read), torch.randn(T, H)
    table, want = module.table.clone(), module(x)
    module.table.copy_(table)
    with Seen() as seen:
        assert relative(compiled(module, mode="eager")(x), want) <= 1e-5
    assert not seen.lowered or "npu_moe_update_expert" not in seen.calls()
    assert bool((module.table == 1).all())


@pytest.mark.parametrize(("family", "tokens", "reason"), [("A2", T, "for an A3"), ("A3", 600, "takes 512")])
@torch.no_grad()
def test_where_the_op_does_not_go(family: str, tokens: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "family", lambda: family)
    module, x = Placed(READS["token: t % n + 1"]), torch.randn(tokens, H)
    with Seen() as seen:
        assert relative(compiled(module, mode="eager")(x), module(x)) <= 1e-5
    assert "npu_moe_update_expert" not in seen.calls()
    assert any("physical experts stay a gather" in n and reason in n for n in seen.lowered[0].notes)


@torch.no_grad()
def test_tokens_of_any_number() -> None:
    """The op's batch is fixed: with a symbolic one the gather stays."""
    module = Placed(READS["token: t % n + 1"])
    fast = compiled(module, dynamic=True, mode="eager")
    with Seen() as seen:
        for tokens in (5, 8):
            x = torch.randn(tokens, H)
            assert relative(fast(x), module(x)) <= 1e-5
    assert "npu_moe_update_expert" not in seen.calls()


@torch.no_grad()
def test_other_targets_gather() -> None:
    module, x = Placed(READS["token: t % n + 1"]), torch.randn(T, H)
    assert relative(compiled(module, target="cpu", inner="eager")(x), module(x)) <= 1e-5


class Beside(Placed):
    """With a shared expert."""

    def __init__(self, read: Read) -> None:
        super().__init__(read)
        self.one, self.two = nn.Linear(H, I, bias=False), nn.Linear(I, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.two(F.silu(self.one(x)))


@pytest.mark.parametrize("name", ["token: t % n + 1", "rank: -(-w // n)"])
@torch.no_grad()
def test_the_stream_program_is_sound(name: str) -> None:
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> object:
        found.append(copy.deepcopy(gm))
        return make_boxed_func(gm.forward)

    inner = aot_autograd(fw_compiler=keep, inference_compiler=keep)
    compiled(Beside(READS[name]), inner=inner, overlap_shared=False)(torch.randn(T, H))
    assert streams.overlap(found[0].graph, streams.NpugraphEx) == 1
    assert hazards(found[0].graph) == []
    assert "npu_moe_update_expert" in map(streams.name_of, found[0].graph.nodes)


def test_gradients() -> None:
    """Of tokens, router and experts; ids and tables have none."""
    if schemas.wheel():
        pytest.skip("torch_npu has gradients on its own device only")
    module, x, found = Placed(READS["token: t % n + 1"]), torch.randn(T, H), []
    for fn in (module, compiled(module)):
        leaf = x.clone().requires_grad_()
        fn(leaf).sin().sum().backward()
        found.append([leaf.grad, *(p.grad for p in module.parameters())])
        module.zero_grad(set_to_none=True)
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_ge_has_no_unpermute_wherever_it_is_asked_for() -> None:
    with pytest.raises(moe_compile.OptionError, match=r"'combine' is 'unpermute'.*'finalize'"):
        compiled(nn.Linear(2, 2), mode="ge", combine="unpermute")(torch.randn(2, 2))


def test_the_option_says_what_it_takes() -> None:
    with pytest.raises(moe_compile.OptionError, match="'distinct_places' is 1; allowed: False, True"):
        compiled(nn.Linear(2, 2), distinct_places=1)(torch.randn(2, 2))
