"""What a captured loop reads beside its arguments and parameters: setting it anew is seen, at the next call."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import Counter, H, Loop, compiled
from torch import Tensor

from moe_compile.report import collecting

SCALE = 1.0
SCALES = {"all": [1.0, 2.0]}
CONFIG = types.SimpleNamespace(moe=types.SimpleNamespace(scale=1.0))
TABLE = torch.ones(1)


def scaled(y: Tensor) -> Tensor:
    return y * SCALE


class Plain(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = types.SimpleNamespace(moe=types.SimpleNamespace(scale=1.0))
        self.scales, self.named = [1.0, 2.0], {"scale": 1.0}


class OfGlobal(Plain):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * SCALE * w[t, j, None])
        return out


class OfGlobalOfAFunction(Plain):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, scaled(self.expert(e, x[t])) * w[t, j, None])
        return out


class OfGlobalOfAMethod(Plain):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x) * SCALE


class OfGlobalList(Plain):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * SCALES["all"][0] * w[t, j, None])
        return out


class OfGlobalObject(Plain):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * CONFIG.moe.scale * w[t, j, None])
        return out


class OfNestedConfig(Plain):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * self.cfg.moe.scale * w[t, j, None])
        return out


class OfList(Plain):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * self.scales[0] * w[t, j, None])
        return out


class OfDict(Plain):
    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * self.named["scale"] * w[t, j, None])
        return out


class OfGlobalTensor(Plain):
    """Tensors are compared by nobody: the loop stays as written."""

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * TABLE * w[t, j, None])
        return out


def set_globals(patch: pytest.MonkeyPatch, m: Any) -> None:
    patch.setitem(globals(), "SCALE", 1.5)
    patch.setitem(SCALES, "all", [1.5, 2.0])
    patch.setattr(CONFIG.moe, "scale", 1.5)


def set_attributes(patch: pytest.MonkeyPatch, m: Any) -> None:
    m.cfg.moe.scale = m.scales[0] = m.named["scale"] = 1.5


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("cls", "change"),
    [(c, set_globals) for c in (OfGlobal, OfGlobalOfAFunction, OfGlobalOfAMethod, OfGlobalList, OfGlobalObject)]
    + [(c, set_attributes) for c in (OfNestedConfig, OfList, OfDict)],
)
def test_a_change_is_seen(cls: type[Plain], change: Callable[..., None], dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    m, counter, x = cls(), Counter(), torch.randn(9, H)
    c = compiled(m, counter, dynamic=dynamic)
    before = c(x)
    torch.testing.assert_close(before, m(x))
    c(x)
    assert counter.ops == 1, "captured, and once"
    change(monkeypatch, m)
    after = c(x)
    torch.testing.assert_close(after, m(x))
    assert not torch.allclose(before, after)


def test_what_nothing_watches_stays_as_written() -> None:
    m, counter, x = OfGlobalTensor(), Counter(), torch.randn(9, H)
    with collecting() as report:
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 0 and report.rejected, str(report)
