"""Each scheme of weights in few bits, reached in each way: a grid. `make zoo` compiles it; docs/quantisation.md says what comes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Case, E, Fused, H, K
from .dispatch import GroupedSorted
from .indexed import Int4GroupsByIndex
from .packed import Int4FloatZero, Int4Offset, Int4OffsetHit, Int4PackedZeros, Int4ZeroAdded, Mxfp4Table, Nf4, Nvfp4
from .quantised import Int8Grouped
from .spelled import Int4ShiftsInABuffer
from .stored import Float8Channels, Float8Matrices, GroupsOfInputs, _Blocks


def _stack(case: Any, name: str) -> Tensor:
    """Floats of all experts, made expert by expert."""
    if hasattr(case, "matrix"):
        return torch.stack([case.matrix(name, e) for e in range(E)])
    return torch.stack([case.floats(getattr(case, name)[e], getattr(case, f"{name}_scale_inv")[e]) for e in range(E)])


def _dense(self: Any, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    g, u = torch.bmm(x.expand(E, -1, -1), _stack(self, "up").transpose(1, 2)).chunk(2, -1)
    y = torch.bmm(F.silu(g) * u, _stack(self, "down").transpose(1, 2))
    return (y * torch.zeros(x.shape[0], E, dtype=w.dtype).scatter_(1, ids, w).t()[..., None]).sum(0)


def _gathered(self: Any, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    g, u = torch.einsum("th,tkoh->tko", x, _stack(self, "up")[ids]).chunk(2, -1)
    return (torch.einsum("tki,tkhi->tkh", F.silu(g) * u, _stack(self, "down")[ids]) * w[..., None]).sum(1)


def _grouped(self: Any, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    _, order, ends = Int8Grouped.sorted_ids(self, ids)
    up, down = (_stack(self, name).to(x.dtype).transpose(-2, -1) for name in ("up", "down"))
    g, u = F.grouped_mm(x[order // K], up, offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(g) * u, down, offs=ends) * w.reshape(-1)[order].unsqueeze(-1)
    return y[order.argsort()].view(-1, K, H).sum(dim=1)


class Int8Groups(_Blocks):
    """Verdict: fused. A scale for every four inputs of a channel, beside int8."""

    how = replace(GroupsOfInputs.how, dtype=torch.int8)
    expect = Fused(GroupsOfInputs.expect.gating, replace(GroupsOfInputs.expect.experts, up_stored=how, down_stored=how))
    floats = GroupsOfInputs.floats


class _Float8Channels(Float8Channels):
    def floats(self, q: Tensor, s: Tensor) -> Tensor:
        return q.float() * s[:, None]


def _values(self: Any, q: Tensor) -> Tensor:
    """The table's numbers stand in the code: of a module's tuple Dynamo makes inputs where `dynamic=True`."""
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor([*half, *(-v for v in half)])
    return torch.stack([table[(q & 15).long()], table[(q >> 4).long()]], -1).flatten(-2)


class _Mxfp4(Mxfp4Table):
    values = _values


class _Nvfp4(Nvfp4):
    values = _values


WAYS = {"Hit": Int4OffsetHit.run_experts, "Dense": _dense, "Gathered": _gathered, "Grouped": _grouped}
SCHEMES: dict[str, type[Case]] = {
    "Float8Channels": _Float8Channels,
    "Float8Matrices": Float8Matrices,
    "Mxfp8": GroupsOfInputs,
    "Int8Groups": Int8Groups,
    "Int4Offset": Int4Offset,
    "Int4FloatZero": Int4FloatZero,
    "Int4ZeroAdded": Int4ZeroAdded,
    "Int4PackedZeros": Int4PackedZeros,
    "Int4GroupsByIndex": Int4GroupsByIndex,
    "Mxfp4": _Mxfp4,
    "Nvfp4": _Nvfp4,
    "Nf4": Nf4,
    "Int4Shifts": Int4ShiftsInABuffer,
}


def _grid() -> dict[str, type[Case]]:
    """Classes by name: `Mxfp8Gathered` and so on."""
    found = {}
    for scheme, cls in SCHEMES.items():
        for way, run in WAYS.items():
            told = f"Verdict: fused. {scheme}, {way.lower()}: floats of all experts at once, or of those that were hit."
            own: dict[str, Any] = {"run_experts": run, "zoo_only": True, "near": "", "differs": (), "group": "", "__doc__": told}
            if way == "Grouped":
                experts = replace(cls.expect.experts, dtype=torch.bfloat16)  # type: ignore[attr-defined]
                own |= {"expect": Fused(GroupedSorted.expect.gating, experts), "route": GroupedSorted.route}
                own |= {"dtype": torch.bfloat16, "faint_logits": False}
            name = f"{scheme}By{way}"
            found[name] = type(name, (cls,), own | {"__module__": __name__})
    return found


globals().update(_grid())
