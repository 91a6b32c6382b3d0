"""What libraries' loops do besides computing: helpers that are compiled on their own, and questions whether a tensor is a DTensor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from captured import Counter, H, Loop, compiled
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from moe_compile.loops import capture
from moe_compile.report import collecting


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    capture.pending()
    yield
    capture.pending()


@torch.compile(backend="eager")
def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@torch.compiler.disable
def apart(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


_calls: list[int] = []


@torch.compile(backend="eager")
def counted(gate: Tensor, up: Tensor) -> Tensor:
    _calls.append(len(gate))
    return F.silu(gate) * up


class CompiledHelper(Loop):
    """The activation is a function that its library compiles: what it computes is what it wraps. Fuses."""

    helper = staticmethod(gated)

    def expert(self, e: int, x: Tensor) -> Tensor:
        g, u = F.linear(x, self.up[e]).chunk(2, -1)
        return F.linear(self.helper(g, u), self.down[e])


class DisabledHelper(CompiledHelper):
    """Near miss: its library asks that this function is not compiled. As written."""

    helper = staticmethod(apart)


class CountingHelper(CompiledHelper):
    """Near miss: the compiled function writes to a list of its module. As written, and the list is as eager leaves it."""

    helper = staticmethod(counted)


class AsksForShards(Loop):
    """`to_local()` where the weights are spread over devices, as they are where not: here they are not. Fuses."""

    def weight(self, w: Tensor) -> Tensor:
        return w.to_local() if isinstance(w, DTensor) else w

    def expert(self, e: int, x: Tensor) -> Tensor:
        assert not isinstance(x, DTensor)
        g, u = F.linear(x, self.weight(self.up)[e]).chunk(2, -1)
        return F.linear(F.silu(g) * u, self.weight(self.down)[e])


class OtherWhereSharded(AsksForShards):
    """Near miss: with weights that are DTensors the code takes its other branch, which computes something else. As written."""

    def weight(self, w: Tensor) -> Tensor:
        return w.to_local() * 2 if isinstance(w, DTensor) else w


class MakesShards(Loop):
    """Near miss: more is done with DTensor than asking. As written."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        kind = DTensor.__name__ if x is None else DTensor.from_local
        return super().expert(e, x) if kind is not None else x


@pytest.fixture
def mesh() -> Iterator[object]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def run(m: nn.Module) -> tuple[int, list[str]]:
    counter, x = Counter(), torch.randn(9, H)
    with collecting() as report, torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x), rtol=1e-4, atol=1e-5)
    return counter.ops, [r.reason for r in report.rejected]


@pytest.mark.parametrize("cls", [CompiledHelper, AsksForShards, OtherWhereSharded])
def test_fuses(cls: type[Loop]) -> None:
    assert run(cls()) == (1, [])


def test_gradients_go_through_a_compiled_helper() -> None:
    m, twin, x = CompiledHelper(), CompiledHelper(), torch.randn(9, H)
    twin.load_state_dict(m.state_dict())
    for c in (compiled(m, Counter()), twin):
        c(x).square().sum().backward()
    for a, b in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (DisabledHelper, "it calls apart, which is kept from being compiled"),
        (CountingHelper, "it writes to"),
        (MakesShards, "it uses DTensor.from_local"),
    ],
)
def test_near_misses(cls: type[Loop], words: str) -> None:
    ops, reasons = run(cls())
    assert ops == 0 and any(words in r for r in reasons), reasons


def test_a_helper_runs_as_often_as_in_eager() -> None:
    m, x = CountingHelper(), torch.randn(9, H)
    _calls.clear()
    with torch.no_grad():
        m(x)
        want = list(_calls)
        _calls.clear()
        compiled(m, Counter())(x)
    assert _calls == want


def test_weights_that_are_sharded_take_the_other_branch(mesh: object) -> None:
    m = OtherWhereSharded()
    for name in ("up", "down"):
        setattr(m, name, nn.Parameter(distribute_tensor(getattr(m, name).detach(), mesh, [Replicate()])))  # type: ignore[arg-type]
    ops, reasons = run(m)
    assert ops == 0 and any("DTensor" in r for r in reasons), reasons


def test_what_one_module_holds_is_not_held_against_another() -> None:
    """Refused for a part that nothing asks about: another module of its class, without it, is read."""
    m = Loop()
    m.helper = torch.compile(nn.Linear(H, H), backend="eager")
    assert run(m) == (0, ["module helper is a OptimizedModule, which cannot be copied"])
    torch._dynamo.reset()
    assert run(Loop()) == (1, [])
