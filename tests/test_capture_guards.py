"""What a captured loop reads beside its arguments and parameters: setting it anew is seen, at the next call."""

from __future__ import annotations

import collections
import enum
import functools
import operator
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captured import Counter, H, Loop, compiled
from torch import Tensor

from moe_compile.ir import Rejection
from moe_compile.loops.guards import Guards, Unguarded
from moe_compile.loops.libraries import is_plain_instance
from moe_compile.loops.places import MODULE, Place, mark
from moe_compile.loops.sealed import Sealed
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


class Size(enum.Enum):
    ONE = 1.0
    TWO = 2.0


def held() -> float:
    return held.value  # type: ignore[attr-defined, no-any-return]


def one() -> float:
    return 1.0


def factor(value: float) -> Callable[[], float]:
    return lambda: value


class Holder:
    def __init__(self, value: float) -> None:
        self.value = value

    def get(self) -> float:
        return self.value


class Asked(Holder):
    def __call__(self) -> float:
        return getattr(self, "later", self.value)  # type: ignore[no-any-return]


class Called(Holder):
    def __call__(self) -> float:
        return self.value


class Sizes(enum.Enum):
    BOTH = [1.0]  # noqa: RUF012
    FOUR = (4.0, "four")


class Kind(enum.Enum):
    ONE = 1.0

    @property
    def scale(self) -> float:
        return SCALE


class Looks:
    def __get__(self, of: Holder, _: type) -> float:
        return of.value


class Looked(Holder):
    scale = Looks()


class OfWhatever(Plain):
    """What the loop reads is one value, which is replaced or changed as a whole."""

    def __init__(self, value: Any, read: Callable[[Any], float]) -> None:
        super().__init__()
        self.value, self.read = value, read

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        scale = self.read(self.value)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * (2.0 if scale > 1.0 else 1.0) * w[t, j, None])
        return out


def call(f: Callable[[], float]) -> float:
    return f()


# (what is read, how, what takes its place or changes it, whether the loop is captured)
WHOLE: dict[str, tuple[Any, Callable[[Any], float], Any, bool]] = {
    "enum": (Size.ONE, lambda v: 1.0 if v is Size.ONE else v.value, Size.TWO, True),
    "bound method": (Holder(1.0).get, call, Holder(3.0).get, True),
    "function's attribute": (held, call, lambda v: setattr(v, "value", 3.0), True),
    "a name that nobody has": (Asked(1.0), call, lambda v: setattr(Asked, "later", 3.0), True),
    "what is called without its name": (Called(1.0), call, lambda v: setattr(Called, "__call__", lambda self: 3.0), True),
    "deque": (collections.deque([1.0]), lambda v: v[0], None, False),
}


@pytest.mark.parametrize("what", WHOLE)
def test_values_that_are_read_as_a_whole(what: str) -> None:
    """Verdict: as eager, before the change and after it; what nothing watches is left as written."""
    torch._dynamo.reset()
    value, read, other, captured = WHOLE[what]
    held.value = 1.0  # type: ignore[attr-defined]
    m, x, counter = OfWhatever(value, read), torch.randn(5, H), Counter()
    f = compiled(m, counter)
    with torch.no_grad():
        torch.testing.assert_close(f(x), m(x))
        assert counter.ops == captured
        if isinstance(other, types.LambdaType):
            other(value)
        elif other is not None:
            m.value = other
        else:
            value[0] = 3.0
        torch.testing.assert_close(f(x), m(x))


def test_a_key_that_cannot_be_watched_is_told() -> None:
    """Dynamo has a source for what a dictionary has under a number or text, and for nothing else."""
    m, x = OfWhatever(types.SimpleNamespace(of={int: factor(1.0)}), lambda v: max(f() for f in v.of.values())), torch.randn(5, H)
    with torch.no_grad(), collecting() as told:
        torch.testing.assert_close(torch.compile(m, backend="moe_fused", options={"inner": "eager"})(x), m(x))
    assert [r.code for r in told.rejected] == ["guards"] and "watched" in told.rejected[0].reason, told


def test_a_mark_tells_what_code_would_notice() -> None:
    """Equal marks: one reading serves both. New code under an old function, as a reload in a notebook leaves it, is another function."""
    assert mark(Size.ONE) == mark(Size.ONE) != mark(Size.TWO)
    assert mark(Holder(1.0)) == mark(Holder(2.0))  # what is read of them has places of its own
    assert mark(functools.partial(float, 1.0)) == mark(functools.partial(float, 1.0)) != mark(functools.partial(float, 2.0))
    assert mark(Holder(1.0).get) == mark(Holder(2.0).get)
    before, old = mark(one), one.__code__
    one.__code__ = held.__code__
    assert mark(one) != before
    one.__code__ = old
    assert mark(one) == before


def test_which_enums_are_values() -> None:
    """A list may change, and a property reads what it likes: nothing would watch either."""
    assert all(map(is_plain_instance, (Size.ONE, Sizes.FOUR, enum.IntEnum("N", "A").A)))
    assert not any(map(is_plain_instance, (Sizes.BOTH, Kind.ONE)))
    place = Place(MODULE).attr("kind")
    assert Sealed().copy(Size, place) is Size
    for v in (Kind.ONE, Kind, Sizes):
        with pytest.raises(Rejection, match="an Enum with methods or properties of its own"):
            Sealed().copy(v, place).ONE  # noqa: B018


def test_what_a_descriptor_looks_up_is_not_watched() -> None:
    """Asking its class for it, as a guard would, raised in the middle of compiling."""
    effects = types.SimpleNamespace(id_to_variable={})
    tx = types.SimpleNamespace(output=types.SimpleNamespace(side_effects=effects))
    with pytest.raises(Unguarded, match=r"self\.scale, which a descriptor looks up"):
        Guards(tx, {MODULE: Looked(1.0)}, {}).install([Place(MODULE).attr("scale")])


def test_what_of_numpy_is_a_value() -> None:
    """Arrays and generators are written by those who use them: a loop that is read has neither."""
    assert all(map(is_plain_instance, (np.float64(1.0), np.dtype("int8"), np.exp, operator.itemgetter(0))))
    assert not any(map(is_plain_instance, (np.ones(2), np.random.default_rng(0), np.random.RandomState(0))))
