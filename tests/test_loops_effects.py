"""Reading a loop by example touches nothing of the user's: what has an effect is left as written, and has it as often as in eager."""

from __future__ import annotations

import collections
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from captured import Counter, E, H, Loop, agree, compiled
from torch import Tensor, nn

from moe_compile.loops import capture
from moe_compile.report import collecting


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    capture.pending()
    yield
    capture.pending()


class Stats:
    def __init__(self) -> None:
        self.rows, self.deep, self.last = [0] * E, {"a": {"b": [0]}}, torch.zeros(E)

    def note(self, e: int, n: int) -> None:
        self.rows[e] += n

    def __call__(self, e: int, n: int) -> None:
        self.deep["a"]["b"][0] += n

    def __iadd__(self, n: int) -> Stats:
        self.rows[0] += n
        return self


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


@dataclass
class Data:
    seen: list[int] = field(default_factory=list)
    total: int = 0


class Property:
    def __init__(self) -> None:
        self.n = 0

    @property
    def asked(self) -> int:
        self.n += 1
        return 1


LOG: list[int] = []
TABLE: dict[str, Any] = {"n": 0, "inner": collections.Counter()}
CALLS = 0


class Kept:
    calls = 0
    log: ClassVar[list[int]] = []


def noted(n: int, log: list[int] = LOG) -> int:
    log.append(n)
    return n


def counted(n: int) -> None:
    global CALLS
    CALLS += n


class Effect(Loop):
    """`note` is called once for each expert that was hit, with how many rows it got."""

    def __init__(self) -> None:
        super().__init__()
        self.stats, self.slotted, self.data, self.asked = Stats(), Slotted(), Data(), Property()
        self.queue, self.counter, self.nested = collections.deque(maxlen=9), collections.Counter(), {"a": [{"n": 0}]}
        self.lock, self.bound = threading.Lock(), self.data.seen.append

    def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            self.note(e, t.shape[0])
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out

    def note(self, e: int, n: int) -> None:
        raise NotImplementedError


def effect(note: Callable[[Any, int, int], Any]) -> type[Effect]:
    return type("Effect", (Effect,), {"note": note})


def _append(self: Any, e: int, n: int) -> None:
    self.queue.append(n)


def _slot(self: Any, e: int, n: int) -> None:
    self.slotted.n += n


def _class_attribute(self: Any, e: int, n: int) -> None:
    Kept.calls += n


def _own_class(self: Any, e: int, n: int) -> None:
    type(self).total = getattr(type(self), "total", 0) + n


def _class_list(self: Any, e: int, n: int) -> None:
    Kept.log.append(n)


def _stats(self: Any, e: int, n: int) -> None:
    self.stats.note(e, n)


def _in_place(self: Any, e: int, n: int) -> None:
    self.stats += n


def _tensor(self: Any, e: int, n: int) -> None:
    self.stats.last[e] += n


def _through_data(self: Any, e: int, n: int) -> None:
    self.load.data[e] += n


def _state(self: Any) -> Any:
    """Everything that an effect here may change."""
    lists = self.stats.rows, self.stats.deep, self.stats.last.tolist(), self.slotted.n, self.data, self.asked.n, list(self.queue)
    return copy.deepcopy((*lists, self.counter, self.nested, LOG, TABLE, CALLS, Kept.calls, Kept.log, getattr(type(self), "total", 0)))


def _forget() -> None:
    global CALLS
    LOG.clear(), Kept.log.clear()
    TABLE.update(n=0, inner=collections.Counter())
    CALLS = Kept.calls = 0


EFFECTS: dict[str, Callable[[Any, int, int], Any]] = {
    "method of an object": _stats,
    "object that is called": lambda self, e, n: self.stats(e, n),
    "object with an operator in place": _in_place,
    "tensor of an object": _tensor,
    "slot": _slot,
    "list of a dataclass": lambda self, e, n: self.data.seen.append(n),
    "attribute of a dataclass": lambda self, e, n: setattr(self.data, "total", self.data.total + n),
    "property that counts": lambda self, e, n: self.asked.asked,
    "deque": _append,
    "Counter": lambda self, e, n: self.counter.update({e: n}),
    "nested dictionary": lambda self, e, n: self.nested["a"][0].update(n=n),
    "bound method of a list": lambda self, e, n: self.bound(n),
    "global list": lambda self, e, n: LOG.append(n),
    "global dictionary": lambda self, e, n: TABLE["inner"].update([e]),
    "default argument": lambda self, e, n: noted(n),
    "global number": lambda self, e, n: counted(n),
    "attribute of a class": _class_attribute,
    "attribute of its own class": _own_class,
    "list of a class": _class_list,
    "lock": lambda self, e, n: self.lock.acquire(blocking=False) and self.lock.release(),
}


@pytest.mark.parametrize("what", EFFECTS)
@torch.no_grad()
def test_an_effect_is_neither_run_nor_lost(what: str) -> None:
    cls, x = effect(EFFECTS[what]), torch.randn(3, H)  # each expert that is hit is graphs of its own
    found = []
    for run in ("eager", "compiled"):
        torch.manual_seed(0)
        m = cls()
        _forget()
        f = m if run == "eager" else compiled(m, counter := Counter())
        out = [f(x) for _ in range(2)]
        found.append((out, _state(m)))
        if hasattr(cls, "total"):
            del cls.total
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b)
    assert found[0][1] == found[1][1] and counter.ops == 0


class ThroughData(Effect):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(E))

    note = _through_data


@torch.no_grad()
def test_a_buffer_written_behind_its_version() -> None:
    m, counter = ThroughData(), Counter()
    twin = ThroughData()
    twin.load_state_dict(m.state_dict())
    agree(m, twin, counter, torch.randn(9, H))
    assert counter.ops == 0


class OnlyReads(Effect):
    """Near miss: the same things are there, and only read."""

    def note(self, e: int, n: int) -> None:
        local: list[int] = []
        local.append(len(self.stats.rows) + self.data.total + TABLE["n"] + Kept.calls + len(self.nested["a"]) + self.slotted.n)
        table = {"n": local[0]}
        table["n"] += self.counter[e] if e in self.counter else 0  # noqa: SIM401 - this spelling is what is tested


@torch.no_grad()
def test_reading_the_same_things_is_no_effect() -> None:
    m, counter = OnlyReads(), Counter()
    agree(m, copy.deepcopy(_without_lock(m)), counter, torch.randn(9, H))
    assert counter.ops == 1


def _without_lock(m: Effect) -> Effect:
    m.lock = m.bound = None  # type: ignore[assignment]
    return m


@torch.no_grad()
def test_the_reason_names_what_is_written() -> None:
    m = effect(_stats)()
    with collecting() as report:
        compiled(m, Counter())(torch.randn(9, H))
    assert any("writes to self.stats.rows" in r.reason for r in report.rejected), str(report)


def test_what_is_held_and_not_asked_for_is_no_reason() -> None:
    """The near miss: locks, queues and counters stand in the module, and the loop uses none of them."""
    m, counter, x = effect(lambda self, e, n: None)(), Counter(), torch.randn(9, H)
    torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert counter.ops == 1


# ---- what torch keeps --------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.randn_like(like) * 0.3)

    def forward(self, w: Tensor) -> Tensor:
        return w + self.d


def test_the_cache_of_parametrised_weights_gets_no_probes() -> None:
    m, x = Loop(), torch.randn(9, H)
    nn.utils.parametrize.register_parametrization(m, "up", Shift(m.up))
    expected = m(x)
    with nn.utils.parametrize.cached():
        got = compiled(m, Counter())(x)
        kept = [v for v in nn.utils.parametrize._cache.values()]
    torch.testing.assert_close(got, expected)
    assert all(torch.equal(v, m.up) for v in kept)


def test_hooks_of_all_modules_see_no_probes() -> None:
    class Modules(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))

        def expert(self, e: int, x: Tensor) -> Tensor:
            return self.experts[e](x)  # type: ignore[no-any-return]

    m, x, calls = Modules(), torch.randn(9, H), []
    handle = nn.modules.module.register_module_forward_hook(lambda *a: calls.append(1))
    try:
        with torch.no_grad():
            torch.compile(m, backend="eager")(x)
            plain = len(calls)
            torch._dynamo.reset()
            calls.clear()
            compiled(m, Counter())(x)
        assert len(calls) == plain
    finally:
        handle.remove()


# ---- a refused trial ---------------------------------------------------------------------------------------------------


class Hooked(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(E))
        self.outs = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(E))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.outs[e](F.silu(self.experts[e](x)))  # type: ignore[no-any-return]


def _with_a_hook(m: Hooked) -> Hooked:
    m.experts[1].register_forward_hook(lambda *a: None)
    return m


def _with_one_expert_twice(m: Hooked) -> Hooked:
    m.experts[1] = m.experts[0]
    return m


@pytest.mark.parametrize(("spoil", "ops"), [(_with_a_hook, 0), (_with_one_expert_twice, None)])
@torch.no_grad()
def test_a_refused_module_does_not_blind_the_next_of_its_class(spoil: Callable[[Hooked], Hooked], ops: int | None) -> None:
    """Nor does one that was read speak for one with hooks. What two experts share is one tensor in both places of the op's list."""
    x = torch.randn(9, H)
    for m, wanted in ((spoil(Hooked()), ops), (Hooked(), 1), (spoil(Hooked()), ops)):
        torch._dynamo.reset()
        counter = Counter()
        torch.testing.assert_close(compiled(m, counter)(x), m(x), rtol=1e-4, atol=1e-5)
        assert wanted is None or counter.ops == wanted
