"""Experts over ranks: the table of laws, and a block with ranks in threads against the block on one."""

from __future__ import annotations

import dataclasses
import sys
import threading
import types
from typing import Any

import pytest
import torch
from ascend_blocks import block, compiled, zoo
from torch import Tensor

from moe_compile.ir import Form
from moe_compile.ir import scalar as act
from moe_compile.lowering.ascend import calls, exchange, register
from moe_compile.lowering.ascend.emulate_exchange import Fabric

register.ensure()
A3 = exchange.Spread("A3", 8, 64, 4, 2048, 128, torch.bfloat16)
A2 = dataclasses.replace(A3, device="A2", world=16)


@pytest.mark.parametrize(("changes", "row", "objection"), [
    ({}, exchange.A3, ""),
    ({"identity": 4}, exchange.A3, ""),
    ({"tokens": None}, exchange.COLLECTIVES, "not fixed"),
    ({"tokens": 513}, exchange.COLLECTIVES, "takes 512"),
    ({"tokens": 0}, exchange.COLLECTIVES, "takes 512"),
    ({"known": False}, exchange.COLLECTIVES, "distinct experts"),
    ({"training": True}, exchange.COLLECTIVES, "no gradients"),
    ({"dtype": torch.float32}, exchange.COLLECTIVES, "fp16 and bf16"),
    ({"shared": True}, exchange.COLLECTIVES, "the same tokens"),
    ({"widens": True}, exchange.COLLECTIVES, "outputs than inputs"),
    ({"weight_on_input": True}, exchange.COLLECTIVES, "applied to the input"),
    ({"experts": 60}, exchange.COLLECTIVES, "evenly"),
    ({"experts": 2048}, exchange.COLLECTIVES, "1024"),
    ({"k": 17}, exchange.COLLECTIVES, "17 experts a token"),
    ({"hidden": 512}, exchange.COLLECTIVES, "1024 to 8192"),
    ({"world": 1}, exchange.COLLECTIVES, "2 to 768"),
    ({"device": "950"}, exchange.COLLECTIVES, "not an A3"),
    ({"device": ""}, exchange.COLLECTIVES, "not an A3"),
])  # fmt: skip
def test_an_a3_takes_what_its_page_says(changes: dict[str, Any], row: exchange.Row, objection: str) -> None:
    found, refused = exchange.choose(dataclasses.replace(A3, **changes))
    assert found is row and any(objection in why for _, why in refused) or not objection


@pytest.mark.parametrize(("changes", "row", "objection"), [
    ({}, exchange.A2, ""),
    ({"hidden": 512}, exchange.A2, ""),
    ({"hidden": 520}, exchange.COLLECTIVES, "multiples of 32"),
    ({"tokens": 257}, exchange.COLLECTIVES, "takes 256"),
    ({"world": 8}, exchange.COLLECTIVES, "16, 32 .. 256"),
    ({"experts": 400}, exchange.COLLECTIVES, "up to 24 experts"),
    ({"identity": 1}, exchange.COLLECTIVES, "identity experts"),
])  # fmt: skip
def test_an_a2_takes_what_its_page_says(changes: dict[str, Any], row: exchange.Row, objection: str) -> None:
    found, refused = exchange.choose(dataclasses.replace(A2, **changes))
    assert found is row and (not objection or any(objection in why for _, why in refused))


MEGA = dataclasses.replace(A3, inner=1024, swiglu=True, one_kernel=True)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The package of the one kernel, as its callers know it, with ranks in threads; the buffer is the rank."""
    package, ranks = types.ModuleType("mega_moe"), threading.local()

    def run(x: Tensor, ids: Tensor, w: Tensor, up: list[Tensor], down: list[Tensor], rank: int, **given: Any) -> tuple[Tensor, None]:
        assert given == dict(x_active_mask=given["x_active_mask"], activation="swiglu", activation_clamp=None)
        everyone = Fabric.groups["test"].meet(rank, [calls.Weight(torch.stack(up)), calls.Weight(torch.stack(down))])
        ups, downs = (torch.cat([own[0][i].matrix for own in everyone]) for i in (0, 1))
        whole = calls.Packed([calls.Weight(ups)], calls.Weight(downs))
        return calls.experts(x, ids, w, whole, [], layout(0), all_known=True), None

    package.mega_moe = run  # type: ignore[attr-defined]
    package.ranks = ranks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, exchange.mega.MODULE, package)
    monkeypatch.setattr(exchange.mega, "_buffer", lambda *sizes: ranks.rank)
    return package


@pytest.mark.parametrize(("changes", "objection"), [
    ({}, ""),
    ({"one_kernel": False}, "not asked for"),
    ({"hidden": 1280}, "multiples of 512"),
    ({"inner": 512}, "intermediate size of 512"),
    ({"tokens": 4097}, "takes 4096"),
    ({"swiglu": False}, "SwiGLU"),
    ({"identity": 1}, "no identities"),
    ({"known": False}, "distinct experts"),
    ({"training": True}, "no gradients"),
])  # fmt: skip
def test_one_kernel_by_option_within_its_limits(changes: dict[str, Any], objection: str, kernel: types.ModuleType) -> None:
    found, refused = exchange.choose(dataclasses.replace(MEGA, **changes))
    assert (found is exchange.MEGA) == (not objection) and (not objection or objection in refused[0][1])


def test_one_kernel_only_where_it_can_be_imported() -> None:
    found, refused = exchange.choose(MEGA)
    assert found is exchange.A3 and "cannot be imported" in refused[0][1]
    with pytest.raises(Exception, match=r"'mega_moe' is True.*cannot be imported"):
        compiled(block("afmoe"), mega_moe=True)(torch.randn(1, 2, zoo.HIDDEN))


def test_one_kernel_gives_what_one_rank_gives(kernel: types.ModuleType) -> None:
    up, down = torch.randn(E, H, 2 * I).bfloat16(), torch.randn(E, I, H).bfloat16() / 4
    x, w = torch.randn(2, T, H).bfloat16(), torch.rand(2, T, K)
    ids = torch.stack([torch.stack([torch.randperm(E)[:K] for _ in range(T)]) for _ in range(2)])

    def run(rank: int) -> Tensor:
        kernel.ranks.rank = rank
        p = calls.Packed([calls.Weight(up[rank * 4 : rank * 4 + 4])], calls.Weight(down[rank * 4 : rank * 4 + 4]))
        said = exchange.Spread.of("A3", 2, x[rank], ids[rank], layout(0), I, False, one_kernel=True)
        assert (said.experts, said.k, said.hidden, said.inner, said.tokens, said.swiglu) == (E, K, H, I, T, True)
        return exchange.experts(x[rank], ids[rank], w[rank], p, layout(0), exchange.MEGA, exchange.Place("test", 2, rank))

    whole = calls.Packed([calls.Weight(up)], calls.Weight(down))
    for rank, out in enumerate(on_ranks(2, run)):
        want = calls.experts(x[rank], ids[rank], w[rank], whole, [], layout(0), all_known=True)
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


# ---- a block -----------------------------------------------------------------------------------------------------------------

E, K, H, I, T = 8, 3, 16, 12, 5


def layout(identity: int) -> calls.generic.Layout:
    ops, consts = act.encode(act.SWIGLU)
    return calls.generic.Layout(tuple(ops), tuple(consts), int(Form.CONCAT), E, True, True, True, False, identity)


def on_ranks(world: int, run: Any) -> list[Tensor]:
    """What `run(rank)` gives on every rank; the first error of any is raised."""
    out: list[Any] = [None] * world

    def one(rank: int) -> None:
        try:
            with torch.no_grad():
                out[rank] = run(rank)
        except Exception as e:
            out[rank] = e
            fabric.barrier.abort()

    fabric = Fabric("test", world)
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for error in out:
        if isinstance(error, Exception) and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return out


@pytest.mark.parametrize(("world", "row", "identity", "masked"), [
    (2, exchange.A3, 0, False), (4, exchange.A3, 2, False), (2, exchange.A3, 0, True), (4, exchange.A2, 0, False),
])  # fmt: skip
def test_ranks_give_what_one_gives(world: int, row: exchange.Row, identity: int, masked: bool) -> None:
    """Distinct ids; identity experts are copy experts; tokens that take no part are zero, whatever the kernel leaves there."""
    up, down = torch.randn(E, H, 2 * I).bfloat16(), torch.randn(E, I, H).bfloat16() / 4
    x, w = torch.randn(world, T, H).bfloat16(), torch.rand(world, T, K)
    ids = torch.stack([torch.stack([torch.randperm(E + identity)[:K] for _ in range(T)]) for _ in range(world)])
    active = torch.arange(T) < 3 if masked else None
    local = E // world

    def run(rank: int) -> Tensor:
        mine = slice(rank * local, (rank + 1) * local)
        p = calls.Packed([calls.Weight(up[mine])], calls.Weight(down[mine]))
        return exchange.experts(x[rank], ids[rank], w[rank], p, layout(identity), row, exchange.Place("test", world, rank), active)

    whole = calls.Packed([calls.Weight(up)], calls.Weight(down))
    for rank, out in enumerate(on_ranks(world, run)):
        with torch.no_grad():
            want = calls.experts(x[rank], ids[rank], w[rank], whole, [], layout(identity), all_known=identity == 0)
        if active is not None:
            want = want * active[:, None]
        torch.testing.assert_close(out, want, rtol=0.02, atol=0.02)


def test_what_the_kernels_reject_is_rejected() -> None:
    """An expert twice in a row: near to the block above, where ids are distinct."""
    p = calls.Packed([calls.Weight(torch.randn(4, H, 2 * I).bfloat16())], calls.Weight(torch.randn(4, I, H).bfloat16()))
    x, ids, w = torch.randn(T, H).bfloat16(), torch.zeros(T, K, dtype=torch.int64), torch.rand(T, K)
    with pytest.raises(AssertionError, match="twice"):
        on_ranks(2, lambda rank: exchange.experts(x, ids, w, p, layout(0), exchange.A3, exchange.Place("test", 2, rank)))
