"""How rows travel, read off the collectives around fused experts: each form with its verdict, near misses beside them.

One process, in a group whose collectives do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_compile
from moe_compile import exchange
from moe_compile.ir import Exchange, Way

E, K, H, I, T = 4, 2, 16, 16, 6
Fn = Callable[..., Tensor]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def experts(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = torch.relu(torch.einsum("th,tkih->tki", x, up[ids.clamp(max=E - 1)]))
    return torch.einsum("tki,tkhi,tk->th", h, down[ids.clamp(max=E - 1)], w)


def world() -> dist.ProcessGroup:
    return dist.group.WORLD  # type: ignore[return-value]


def shared(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SHARED: an all-reduce of the results."""
    return exchange.shared(x, ids, w, lambda *rows: experts(*rows, up, down), E, E, world())


def by_peers(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SHARED: the op that sums through peers' memory, or by an all-reduce where there is none."""
    return exchange.shared(x, ids, w, lambda *rows: experts(*rows, up, down), E, E, world(), peers=True)


def gathered_by_peers(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """GATHER: the ops that read peers' memory, or gather and scatter where there is none."""
    return exchange.gathered(x, ids, w, lambda *rows: experts(*rows, up, down), E, E, world(), peers=True)


def gathered(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """GATHER: rows gathered, sums scattered."""
    return exchange.gathered(x, ids, w, lambda *rows: experts(*rows, up, down), E, E, world())


def largest(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """None: the largest result of the ranks is no sum."""
    return fc.wait_tensor(fc.all_reduce(experts(x, ids, w, up, down), "max", world()))


def squared(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """None: what is summed is not the result, but its squares."""
    return fc.wait_tensor(fc.all_reduce(experts(x, ids, w, up, down) ** 2, "sum", world()))


def scattered(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """None: sums are scattered of rows that were not gathered."""
    return fc.wait_tensor(torch.ops._c10d_functional.reduce_scatter_tensor(experts(x, ids, w, up, down), "sum", 2, world().group_name))


def alone(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """None: no collective."""
    return experts(x, ids, w, up, down) + 1


FORMS = {
    shared: Way.SHARED,
    by_peers: Way.SHARED,
    gathered: Way.GATHER,
    gathered_by_peers: Way.GATHER,
    largest: None,
    squared: None,
    scattered: None,
    alone: None,
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("form", "way"), FORMS.items())
def test_exchange(form: Fn, way: Way | None, training: bool) -> None:
    torch._dynamo.reset()
    x, w, up, down = torch.randn(T, H), torch.rand(T, K), torch.randn(E, I, H), torch.randn(E, H, I)
    ids = torch.stack([torch.randperm(2 * E)[:K] for _ in range(T)])
    report = moe_compile.Report()
    with torch.set_grad_enabled(training):
        tensors = [t.requires_grad_(training) for t in (x, w, up, down)]
        torch.compile(form, backend="moe_fused", options={"inner": "eager"}, fullgraph=True)(tensors[0], ids, *tensors[1:])
        report = moe_compile.last_report()  # type: ignore[assignment]
    want = None if way is None else Exchange(way, world().group_name, 2, 1)
    assert [b.ir.exchange for b in report.blocks] == [want]


class Collectives(TorchDispatchMode):
    """The names of the collectives that are called, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "_c10d_functional" and "wait" not in func._opname and not func._opname.startswith("_"):
            self.called.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_choices_are_one_message(dtype: torch.dtype) -> None:
    """Counts of tokens, ids beside weights, rows; sums back. Gradients: of the sums, the weights, the rows."""
    x, w = torch.randn(T, H, dtype=dtype, requires_grad=True), torch.rand(T, K, dtype=dtype, requires_grad=True)
    ids = torch.stack([torch.randperm(2 * E)[:K] for _ in range(T)])
    with Collectives() as seen:
        out = gathered(x, ids, w, torch.randn(E, I, H, dtype=dtype), torch.randn(E, H, I, dtype=dtype))
    assert seen.called == ["all_gather_into_tensor"] * 3 + ["reduce_scatter_tensor"] and out.dtype == dtype
    with Collectives() as seen:
        out.sum().backward()
    assert sorted(seen.called) == ["all_gather_into_tensor"] + ["reduce_scatter_tensor"] * 2


@pytest.mark.parametrize(
    ("ranks", "tokens", "way"),
    [(2, 65536, Way.GATHER), (4, 65536, Way.GATHER), (8, 64, Way.GATHER), (8, 4096, Way.GATHER), (8, 65536, Way.ROWS)],
)
def test_cheapest(ranks: int, tokens: int, way: Way) -> None:
    """E 128, k 8: at most a tenth is gathered in vain up to four ranks; counts that are read back cost more than few rows; one expert a
    token is rows wherever there are enough of them."""
    assert exchange.cheapest(ranks, 128, 8, tokens, 4096) is way
    assert exchange.cheapest(ranks, 128, 1, 1, 4096) is Way.GATHER
    assert exchange.cheapest(ranks, 128, 1, 1 << 20, 4096) is Way.ROWS
    with pytest.raises(ValueError, match="one node of 8"):
        exchange.cheapest(16, 128, 8, tokens, 4096)
