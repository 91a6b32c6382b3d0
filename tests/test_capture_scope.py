"""moe_compile/capture.py: only graphs for this backend are touched."""

from __future__ import annotations

import copy
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Counter, E, H, K, Loop, compiled
from torch import Tensor, nn
from torch._dynamo.types import ConvertFrameReturn

from moe_compile import backend
from moe_compile.loops import capture, hooks, outermost


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    capture.pending()
    yield
    capture.pending()


# ---- scope -------------------------------------------------------------------------------------------------------------


def _plain(m: nn.Module, x: Tensor, **kw: Any) -> int:
    """How many graphs another backend gets; they must hold nothing of ours."""
    torch._dynamo.reset()
    counter = Counter()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(m, backend=counter, **kw)(x), m(x))
    assert counter.ops == 0
    return len(counter.graphs)


def test_a_method_that_is_compiled_by_itself() -> None:
    """It is the first frame, which Dynamo never inlines: it gets a frame around it, as a module's forward does."""
    m, x = Loop(), torch.randn(9, H)
    torch._dynamo.reset()
    ours = Counter()
    with torch.no_grad():
        torch.testing.assert_close(compiled(m.forward, ours)(x), m(x))
    assert len(ours.graphs) == 1 and ours.ops > 0


def test_other_backends_see_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = Loop(), torch.randn(9, H)
    with_hooks = _plain(m, x)
    with torch.no_grad():
        compiled(m, ours := Counter())(x)
    assert _plain(m, x) == with_hooks > 1 and len(ours.graphs) == 1
    monkeypatch.setenv("MOE_COMPILE_CAPTURE", "0")
    assert _plain(m, x) == with_hooks


def test_two_backends_on_one_model() -> None:
    m, x, ours, other = Loop(), torch.randn(9, H), Counter(), Counter()
    a, b = compiled(m, ours), torch.compile(m, backend=other)
    with torch.no_grad():
        for f in (b, a, b, a):
            torch.testing.assert_close(f(x), m(x))
    assert ours.ops == 1 and other.ops == 0 and len(ours.graphs) == 1 and len(other.graphs) > 1


def test_environment_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x, counter = Loop(), torch.randn(9, H), Counter()
    plain = _plain(m, x)
    torch._dynamo.reset()
    monkeypatch.setenv("MOE_COMPILE_CAPTURE", "0")
    with torch.no_grad():
        torch.testing.assert_close(compiled(m, counter)(x), m(x))
    assert len(counter.graphs) == plain and counter.ops == 0


def test_reset_changes_nothing() -> None:
    m, x = Loop(), torch.randn(9, H)
    for _ in range(2):
        counter = Counter()
        with torch.no_grad():
            torch.testing.assert_close(compiled(m, counter)(x), m(x))
        assert counter.ops == 1
        torch._dynamo.reset()


def test_export_is_left_alone() -> None:
    class Static(Loop):
        def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            dense = torch.zeros(x.shape[0], E).scatter(1, ids, w)
            return sum(self.expert(e, x) * dense[:, e, None] for e in range(E))  # type: ignore[return-value]

    m, x = Static(), torch.randn(9, H)
    compiled(m, Counter())(x)
    exported = torch.export.export(m, (x,))
    assert not any("moe_compile" in str(n.target) for n in exported.graph.nodes)


def test_threads() -> None:
    errors: list[BaseException] = []

    def work(m: nn.Module) -> None:
        try:
            x = torch.randn(9, H)
            with torch.no_grad():
                torch.testing.assert_close(compiled(m, counter := Counter())(x), m(x))
            assert counter.ops == 1
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(m,)) for m in (Loop(), Loop(F.gelu), Loop())]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors


def test_scope_follows_wrapped_compilers() -> None:
    wrapper = types.SimpleNamespace(_torchdynamo_orig_backend=types.SimpleNamespace(compiler_fn=backend.moe_fused))
    assert hooks.for_us(wrapper) and hooks.for_us(backend.moe_fused)
    assert not hooks.for_us(None) and not hooks.for_us(Counter()) and not hooks.for_us(types.SimpleNamespace(compiler_fn=None))


def test_user_state_is_untouched() -> None:
    """Reading draws no random numbers of the user's and leaves the module as it was."""
    m, x = Loop(), torch.randn(9, H)
    before = {k: (v.data_ptr(), v._version) for k, v in m.state_dict(keep_vars=True).items()}
    attributes = dict(vars(m))
    state = torch.get_rng_state()
    with torch.no_grad():
        compiled(m, Counter())(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert {k: (v.data_ptr(), v._version) for k, v in m.state_dict(keep_vars=True).items()} == before
    assert {k: v for k, v in vars(m).items() if k in attributes and k != "_compiled_call_impl"} == attributes


def test_not_inside_transforms() -> None:
    """What is read outside of `torch.func.grad` is not put inside it, and a try inside is not remembered outside."""

    class Everywhere(Loop):
        def dispatch(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e in ids.unique().tolist():
                t, j = torch.where(ids == e)
                out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
            return out

    m, x = Everywhere(), torch.randn(9, H)

    def gradient(x: Tensor) -> Any:
        return torch.func.grad(lambda x: m(x).square().sum())(x)

    for f, ops in ((gradient, 0), (m, 1), (gradient, 0)):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(f, counter := Counter())(x), f(x), rtol=1e-4, atol=1e-5)
        assert counter.ops == ops


class Alone(Loop):
    """Router and loop in one function, which is the first that Dynamo meets."""

    def forward(self, x: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            t, j = torch.where(ids == e)
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return out


def _in_place(m: nn.Module, ours: Counter) -> nn.Module:
    m.compile(backend="moe_fused", options={"inner": ours})
    return m


@pytest.mark.parametrize(
    "way",
    [
        _in_place,
        lambda m, ours: compiled(_in_place(m, ours), ours),
        lambda m, ours: copy.deepcopy(compiled(m, ours), {id(ours): ours}),
        lambda m, ours: compiled(compiled(m, ours), ours),
    ],
    ids=["module.compile", "compiled after it", "copied", "compiled twice"],
)
def test_every_way_to_compile_a_block_gives_one_graph(way: Callable[[nn.Module, Counter], nn.Module]) -> None:
    """`module.compile()` compiles the module's call, as does the copy of a compiled module; the second of two counts."""
    m, x = Alone(), torch.randn(9, H)
    torch._dynamo.reset()
    want, ours = m(x), Counter()
    with torch.no_grad():
        torch.testing.assert_close(way(m, ours)(x), want)
    assert len(ours.graphs) == 1 and ours.ops == 1


def test_hooks_of_a_module_that_is_compiled_in_place_still_run() -> None:
    """A near miss: what is put into one frame is the module's call, not its forward alone."""
    m, x = Alone(), torch.randn(9, H)
    m.register_forward_hook(lambda module, args, out: out * 3)
    torch._dynamo.reset()
    want, ours = m(x), Counter()
    with torch.no_grad():
        torch.testing.assert_close(_in_place(m, ours)(x), want)
    assert ours.ops == 1


# ---- a loop that is a frame of its own ---------------------------------------------------------------------------------------


class InPython(nn.Module):
    """Its own loop breaks, so that Dynamo leaves it to Python, which calls the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = x + self.block(x, scale=0.5)
        return x


class CalledByPython(Loop):
    """Router and loop in one function, with arguments of every kind."""

    breaks = False

    def forward(self, x: Tensor, shift: float = 0.25, *more: Tensor, scale: float = 1.0, **named: Tensor) -> Tensor:
        w, ids = self.gate(x).softmax(-1).topk(K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(E):
            t, j = torch.where(ids == e)
            if t.numel() == 0:
                continue
            if self.breaks:
                torch._dynamo.graph_break()
            out.index_add_(0, t, self.expert(e, x[t]) * w[t, j, None])
        return sum(more, sum(named.values(), out * scale + shift))


class CalledWithABreak(CalledByPython):
    """Near miss: compiled whole it would call itself."""

    breaks = True


@pytest.mark.parametrize("cls", [CalledByPython, CalledWithABreak])
def test_a_loop_that_python_calls(cls: type[CalledByPython]) -> None:
    m, x, counter = InPython(cls()), torch.randn(9, H), Counter()
    torch._dynamo.reset()
    c = compiled(m, counter)
    with torch.no_grad():
        for t in (x, torch.randn(5, H)):
            torch.testing.assert_close(c(t), m(t))
    assert (counter.ops > 0) is not cls.breaks


def test_a_frame_that_is_skipped_as_a_whole_is_compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in its place may hold nothing to compile, or be left by Dynamo: that says nothing of the frame itself."""
    monkeypatch.setattr(outermost, "in_place_of", lambda given: given)
    for found in (None, ConvertFrameReturn()):
        assert outermost.whole(lambda code, found=found: found, inspect.signature(lambda code: None), {"code": 0}) is None
    compiled = ConvertFrameReturn(guarded_code=object())  # type: ignore[arg-type]
    assert outermost.whole(lambda code: compiled, inspect.signature(lambda code: None), {"code": 0}) is compiled
