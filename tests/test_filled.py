"""The law of `aten.filled`: what a tensor that is filled part by part holds; and the fills that are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from moe_compile.passes.aten.filled import fill
from moe_compile.passes.aten.node import traced


def strided(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(4, 6)
    out[:, 0::2], out[:, 1::2] = a, b
    return out + 1


def strided_rows(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(8, 3, dtype=torch.int32)
    out[1::2] = b * 9
    out[0::2] = a * 9
    return out.float() * 2


def in_turn(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(8, 3)
    out[:4] = a
    out[4:] = b
    return out.view(4, 6)


def scaled_in_place(a: Tensor, b: Tensor) -> Tensor:
    return torch.mul(strided(a, b), 2, out=torch.empty(4, 6))


def read_between(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(4, 6)
    out[:, 0::2] = a
    early = out * 3
    out[:, 1::2] = b
    return out + early


def not_whole(a: Tensor, b: Tensor) -> Tensor:
    out = torch.ones(4, 9)
    out[:, 0::3], out[:, 1::3] = a, b
    return out * 2


def overlapping(a: Tensor, b: Tensor) -> Tensor:
    out = torch.ones(7, 3)
    out[:4] = a
    out[3:] = b
    return out * 2


def written_later(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(4, 6)
    out[:, 0::2], out[:, 1::2] = a, b
    first = out[0]
    first.mul_(5)
    return out + 1


def broadcast(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(4, 6)
    out[:, 0::2], out[:, 1::2] = a, b[:1]
    return out + 1


FILLED = (strided, strided_rows, in_turn, scaled_in_place, broadcast)
LEFT = (read_between, not_whole, overlapping, written_later)


@pytest.mark.parametrize("of", [*FILLED, *LEFT])
def test_what_is_read_is_what_the_tensor_holds(of: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    mode = FakeTensorMode()
    gm = traced(of, [mode.from_tensor(a), mode.from_tensor(b)], pre_dispatch=True)
    assert gm is not None
    fill(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert any(str(n.target).startswith(("aten.cat", "aten.stack")) for n in gm.graph.nodes) == (of in FILLED)
    torch.testing.assert_close(gm(a, b), of(a, b))
