"""Prepared calls: the same values as step by step, a plan for each layout and for nothing else, pointers that follow the operands.

Kernels run in Triton's interpreter, from the addresses that a plan has written: what a plan gets wrong, they read or write wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import bundle
from test_ops import Case
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")

from calls import ON_GPU, TOLERANCE, covered, norm_error, operands
from interpreted import Driver, interpreted

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.lowering.triton import backward, calls, combine, experts, hopper_calls, library, shared, short, tune
from moe_compile.lowering.triton.launch import driver, memory, packing, plan, plans, tape
from moe_compile.lowering.triton.launch.later import Later, packed

pytestmark = pytest.mark.skipif(ON_GPU, reason="the interpreter's: on a GPU every test of an op is one of its plans")
MEANING = ir.Experts(5, 24, 16, 24, ir.Form.CONCAT, act.SWIGLU)
TEXT = short.text(ops.experts_args(MEANING))
GATING = ir.Gating(8, 2, ir.Score.SIGMOID, bias=ir.BiasOn.SCORE, norm=ir.Normaliser(ir.Norm.SUM, eps=1e-20), weight_dtype=torch.float32)
ROUTE = short.text(ops.route_args(GATING))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    with interpreted(monkeypatch) as made:
        yield made


def call(t: dict[str, Any], text: str = TEXT) -> Tensor:
    *rest, add = t.values()
    return calls.experts(*rest, add, text)


def tensors(tokens: int = 7, add: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    return operands(Case("plain", MEANING, tokens, 2, add, dtype=dtype), seed)


def right(t: dict[str, Any], meaning: ir.Experts = MEANING) -> None:
    """The call's result is the formula's."""
    got = call(t, short.text(ops.experts_args(meaning)))
    assert norm_error(got, meaning.evaluate(*t.values())) <= TOLERANCE[got.dtype]


def made() -> int:
    """How many plans there are; none is missing."""
    assert None not in plans._plans.values()
    return len(plans._plans)


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("case", [c for c in covered(2, (4, 20, 18)) if c.experts.stacked], ids=lambda c: c.name)
def test_experts(case: Case, tokens: int, card: Driver) -> None:
    """Every layout of stacked weights, few tokens and many; twice, with other operands."""
    case = Case(case.name, case.experts, tokens, case.k, case.add, dtype=case.dtype, foreign=True)
    for seed in range(2):
        t = operands(case, seed)
        right(t, case.experts)
    assert made() == 1 and card.seen


@pytest.mark.parametrize("case", [c for c in covered(2, (4, 20, 18)) if c.experts.stacked][::2], ids=lambda c: c.name)
def test_gradients(case: Case, card: Driver) -> None:
    text, layout = short.text(ops.experts_args(case.experts)), ops.layout_of(ops.experts_args(case.experts))
    for seed in range(2):
        t = operands(case, seed)
        *rest, add = t.values()
        out, pre = calls.experts_fwd(*rest, add, text)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        needs = [True] * (2 + sum(len(ts) for ts in rest[3:]))
        got = calls.experts_bwd(grad, pre, *rest, text, needs)
        with plans.step_by_step():
            want = backward.backward(grad, pre, *bundle({n: v for n, v in t.items() if n != "add"}), layout, needs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert made() == 2


@pytest.mark.parametrize("needs", [[True, False, False, False], [False, False, True, False], [False, True, False, True]], ids=str)
def test_gradients_of_some(needs: list[bool], card: Driver) -> None:
    *rest, _ = tensors().values()
    _, pre = calls.experts_fwd(*rest, None, TEXT)
    grad = torch.randn(7, 24)
    got = calls.experts_bwd(grad, pre, *rest, TEXT, needs)
    with plans.step_by_step():
        want = calls.experts_bwd(grad, pre, *rest, TEXT, needs)
    assert len(got) == sum(needs) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_routing(tokens: int, card: Driver) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        x, w, bias, scale = torch.randn(tokens, 16), torch.randn(8, 16), torch.randn(8), torch.rand(8)
        logits = x @ w.t()
        weights, ids = calls.route(logits, bias, scale, ROUTE)
        linear = calls.route_linear(x, w, None, bias, scale, ROUTE) if tokens <= 4 else (weights, ids)
        grads = calls.route_bwd(torch.ones_like(weights), ids, logits, bias, None, ROUTE, [True, False, False])
        with plans.step_by_step():
            want = calls.route(logits, bias, scale, ROUTE)
            want_grads = calls.route_bwd(torch.ones_like(weights), ids, logits, bias, None, ROUTE, [True, False, False])
        assert torch.equal(weights, want[0]) and torch.equal(ids, want[1]) and torch.equal(grads[0], want_grads[0])
        torch.testing.assert_close(linear[0], want[0])
    assert made() == 2 + (tokens <= 4)


# ---- a plan for each layout ----------------------------------------------------------------------------------------


def strided(t: Tensor) -> Tensor:
    """The same values, rows further apart."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 8), float("nan"), dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def shifted(t: Tensor) -> Tensor:
    """The same values and strides at an address of another alignment."""
    memory = torch.zeros(t.numel() + 5, dtype=t.dtype)
    view = memory[5 - (memory.data_ptr() % 16) // t.element_size() :][: t.numel()].view(t.shape)
    return view.copy_(t)


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "other values at other addresses": lambda t: tensors(seed=1),
    "rows of tokens further apart": lambda t: {**t, "x": strided(t["x"])},
    "an expert's rows further apart": lambda t: {**t, "down": [strided(t["down"][0])]},
    "matrices stored the other way round": lambda t: {**t, "up": [t["up"][0].transpose(1, 2).contiguous().transpose(1, 2)]},
    "another alignment of tokens": lambda t: {**t, "x": shifted(t["x"])},
    "another alignment of weights": lambda t: {**t, "up": [shifted(t["up"][0])]},
    "more tokens": lambda t: tensors(tokens=8),
    "fewer tokens": lambda t: tensors(tokens=1),
    "something to add": lambda t: tensors(add=True),
    "32-bit ids": lambda t: {**t, "ids": t["ids"].int()},
    "weights in another dtype": lambda t: {**t, "weights": t["weights"].half()},
    "half precision": lambda t: {n: [i.half() for i in v] if isinstance(v, list) else v.half() if n == "x" else v for n, v in t.items()},
    "more experts stored than used": lambda t: {**t, "up": [torch.cat([t["up"][0], t["up"][0][:1]])]},
}


@pytest.mark.parametrize("name", CHANGES)
def test_near_misses(name: str, card: Driver) -> None:
    """After one call, the same with one thing changed: right, by a plan of its own unless only values and addresses changed."""
    t = tensors()
    right(t)
    right(CHANGES[name](t))
    assert made() == (1 if name.startswith("other values") else 2)
    right(t)
    assert made() <= 2


def test_other_plain_numbers(card: Driver) -> None:
    """The same operands under another activation, or as another form."""
    t = tensors()
    right(t)
    right(t, ir.Experts(5, 24, 16, 24, ir.Form.CONCAT, act.gelu(act.G) * act.U))
    right(t, ir.Experts(5, 24, 16, 24, ir.Form.INTERLEAVED, act.SWIGLU))
    right(t, ir.Experts(5, 24, 16, 24, ir.Form.CONCAT, act.SWIGLU, weight_on_input=True))
    assert made() == 4


def test_operands_that_were_one_and_are_two(card: Driver) -> None:
    """A plan made while what is added was the tokens themselves serves one that is another tensor, and the other way round."""
    t = tensors(add=True)
    right({**t, "add": t["x"]})
    right(t)
    right({**t, "add": t["x"]})
    assert made() == 1


def test_weights_that_move(card: Driver) -> None:
    """Storage swapped, under the same tensor objects."""
    t = tensors()
    right(t)
    t["up"][0].data = t["up"][0].data.clone() * 2
    right(t)
    t["down"][0].set_(torch.randn_like(t["down"][0]))
    right(t)
    assert made() == 1


def test_a_shape_swapped_under_the_same_address(card: Driver) -> None:
    """A square matrix turned in place: same object, same address, same shape, other strides."""
    meaning = ir.Experts(3, 16, 16, 16, ir.Form.SINGLE, act.silu(act.G))
    t = operands(Case("square", meaning, 5, 2))
    right(t, meaning)
    t["down"][0].data = t["down"][0].data.transpose(1, 2)
    right(t, meaning)
    assert made() == 2


def test_results_are_not_overwritten(card: Driver) -> None:
    """By the next call of the same plan."""
    first, second = tensors(), tensors(seed=1)
    a = call(first)
    kept = a.clone()
    b = call(second)
    assert torch.equal(a, kept) and not torch.equal(a, b)


def test_no_operand_is_kept(card: Driver) -> None:
    import weakref

    t = tensors()
    alive = [weakref.ref(t["x"]), weakref.ref(t["up"][0]), weakref.ref(call(t))]
    del t
    assert all(r() is None for r in alive)


def test_streams(card: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go to the stream that is current at the call."""
    t = tensors()
    for stream in (3, 9, 0, 3):
        monkeypatch.setattr(plans, "current_stream", lambda index, stream=stream: stream)
        card.seen.clear()
        call(t)
        assert set(card.seen) == {stream}
    assert made() == 1


def test_a_refused_launch(card: Driver) -> None:
    """Is an error, and the next call is right."""
    t = tensors()
    right(t)
    card.fail_at = len(card.seen) + 2
    with pytest.raises(RuntimeError, match="refused"):
        call(t)
    right(t)


def test_threads(card: Driver) -> None:
    """Several at once, by one plan, each with its own operands."""
    sets = [tensors(seed=s) for s in range(4)]
    want = [MEANING.evaluate(*t.values()) for t in sets]
    wrong: list[int] = []

    def run(i: int) -> None:
        wrong.extend(i for _ in range(3) if norm_error(call(sets[i]), want[i]) > 1e-5)

    call(sets[0])
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and made() == 1


# ---- what has no plan ----------------------------------------------------------------------------------------------


def test_lists_of_matrices_run_step_by_step(card: Driver) -> None:
    meaning = ir.Experts(5, 24, 16, 24, ir.Form.CONCAT, act.SWIGLU, stacked=False)
    t = operands(Case("list", meaning, 7, 2))
    for _ in range(2):
        right(t, meaning)
    assert list(plans._plans.values()) == [None] and not card.seen


@pytest.mark.parametrize("name", ["x", "ids", "weights", "add"])
def test_operands_that_are_copied_run_step_by_step(name: str, card: Driver) -> None:
    t = tensors(add=True)
    turned = t[name].t().contiguous().t()
    right({**t, name: turned})
    right({**t, name: turned})
    assert list(plans._plans.values()) == [None]


def test_beyond_the_kernels(card: Driver) -> None:
    t = {n: [i.double() for i in v] if isinstance(v, list) else v.double() if n == "x" else v for n, v in tensors().items()}
    right(t)
    assert list(plans._plans.values()) == [None]


def test_an_error_of_the_call_is_the_users(card: Driver) -> None:
    t = tensors()
    with pytest.raises(ValueError, match="fewer experts"):
        call({**t, "down": [t["down"][0][:-1]]})


def test_whoever_listens_to_launches_hears_them(card: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "hooked", lambda: True)
    right(tensors())
    assert not plans._plans and not card.seen


def test_old_plans_make_room(card: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST", 4)
    for tokens in range(1, 9):
        right(tensors(tokens=tokens))
    assert made() <= 4


# ---- memory --------------------------------------------------------------------------------------------------------


def test_large_buffers_come_and_go(card: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values where every buffer counts as large; each is given back behind the last step that touches it."""
    monkeypatch.setattr(memory, "LARGE", 1)
    freed: list[int] = []
    free = plan.Plan._free
    monkeypatch.setattr(plan.Plan, "_free", lambda self, root: (freed.append(root), free(self, root))[1])
    case = Case("plain", MEANING, 9, 2)
    for seed in range(2):
        right(operands(case, seed))
    assert freed
    *rest, _ = operands(case).values()
    _, pre = calls.experts_fwd(*rest, None, TEXT)
    grad = torch.randn(9, 24)
    got = calls.experts_bwd(grad, pre, *rest, TEXT, [True] * 4)
    with plans.step_by_step():
        want = calls.experts_bwd(grad, pre, *rest, TEXT, [True] * 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_happens_beside_happens_at_once() -> None:
    """Between a fork and the join no buffer's memory is given to another."""
    recorded = tape.Tape(0, torch.device("cpu"))
    a, b, c = (recorded.empty((1 << 23,), torch.float32) for _ in range(3))

    def step(*given: Later, side: bool = False) -> tape.Launch:
        return tape.Launch(None, (1,), given, {}, side)

    recorded.steps = [step(a), tape.Fork(), step(a, b), tape.Begin(), step(c, side=True), step(b), tape.Join(), step(c)]
    spans = memory.plan(recorded, []).alone
    assert [(spans[r].first, spans[r].last) for r in (a.root, b.root, c.root)] == [(0, 6), (1, 6), (1, 7)]


def test_small_buffers_do_not_overlap() -> None:
    recorded = tape.Tape(2, torch.device("cpu"))
    made_ = [recorded.empty((n,), torch.int16) for n in (1, 127, 128, 129, 0)]
    recorded.steps = [tape.Launch(None, (1,), tuple(made_), {}, False)]
    found = memory.plan(recorded, [made_[1].root])
    places = sorted((found.offsets[b.root], found.offsets[b.root] + memory.bytes_of(b)) for b in made_ if b is not made_[1])
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(places)) and places[-1][1] <= found.size and set(found.alone) == {made_[1].root}


# ---- beside the routed experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_shared_expert_on_a_side_stream(dtype: torch.dtype, card: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked before the dispatch, joined before the combine; the right values, which both streams write into memory of their own.

    In float32 its products are torch's, in halves they are grouped GEMMs on the side stream whose kernels come first."""
    from test_side_stream import shared_call

    stream = type("Stream", (), {"cuda_stream": 5, "stream_id": 5, "device_index": 0, "device_type": 1})()
    firsts: set[bool] = set()
    for module in (plan, tape):
        monkeypatch.setattr(module, "side_stream", lambda device, first: (firsts.add(first), stream)[1])
    for name in ("set_stream", "current_stream"):
        monkeypatch.setattr(plan, name, lambda *_: (3, 0, 1))
    monkeypatch.setattr(plans, "device_of", lambda tensors: torch.device("cuda", 0))
    monkeypatch.setattr(plan, "_empty", lambda shape, strides, dtype, device: torch.empty_strided(shape, strides, dtype=dtype))
    for module in (combine, experts, hopper_calls):
        monkeypatch.setattr(module, "capability", lambda device: (0, 0))
    monkeypatch.setattr(experts, "processors", lambda device: 2)
    monkeypatch.setattr(tune, "choose", lambda p, t, d: tune.Choice(tune.Tile(16, 16, 16, 4, 1), tune.Tile(16, 16, 16, 4, 1), None))
    for gated in (0, 1):
        args, want = shared_call(9, dtype, ir.Form.CONCAT, gated=gated)
        card.seen.clear()
        got = calls.experts_shared(*short.shorten("experts_shared", [*args, ir.Overlap.SIDE]))
        assert got is not None and norm_error(got, want) <= TOLERANCE[dtype]
        marks = [s for s in card.seen if isinstance(s, tuple)]
        assert marks == [("record", 3), ("wait", 5), ("record", 5), ("wait", 3)]
        assert card.seen[0] == ("record", 3) and card.seen[-1] == 3 and 5 in card.seen
    assert made() == 2 and isinstance(shared.Side, type) and firsts == {dtype is not torch.float32}


# ---- tensors that are not there yet --------------------------------------------------------------------------------


VIEWS: dict[str, Callable[[Any], Any]] = {
    "whole": lambda t: t,
    "transposed": lambda t: t.transpose(-1, -2),
    "half of the rows": lambda t: t[..., :3, :],
    "the other half": lambda t: t[..., 3:, :],
    "every other row": lambda t: t[..., 1::2, :],
    "one": lambda t: t[2],
    "one more dimension": lambda t: t[None],
    "the last ones": lambda t: t[3:],
    "columns": lambda t: t[:, :, 1:5],
    "as rows": lambda t: t.view(-1, 8),
    "two parts": lambda t: t.view(2, -1)[1],
    "split": lambda t: t.split(4, -1)[1],
    "chunks": lambda t: t.chunk(2, 1)[1],
    "unbound": lambda t: t.unbind(0)[3],
    "turned and cut": lambda t: t.transpose(1, 2)[..., 2:4],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    """Sizes, strides and places are those of torch's views."""
    real = torch.zeros(5, 6, 8)
    later = Later(0, real.shape, real.stride(), real.dtype, real.device)
    got, want = VIEWS[name](later), VIEWS[name](real)
    assert tuple(got.shape) == tuple(want.shape) and tuple(got.stride()) == tuple(want.stride()) and got.start == want.storage_offset()
    assert got.is_contiguous() == want.is_contiguous() and got.numel() == want.numel() and got.ndim == want.ndim
    assert got.data_ptr() == want.storage_offset() * 4 % 16
    first, end = got.reach()
    assert first == got.start * 4 and end <= real.numel() * 4


def test_what_is_not_known_of_them() -> None:
    """Whatever needs the memory says so, by name."""
    later = Later(0, (2, 2), packed((2, 2)), torch.float32, torch.device("cpu"))
    asked: Sequence[Callable[[], Any]] = (
        lambda: later.sum(),
        lambda: torch.relu(later),  # type: ignore[arg-type]
        lambda: later.to(torch.float16),
        lambda: later.transpose(0, 1).contiguous(),
    )
    for ask in asked:
        with pytest.raises(tape.NotRecorded):
            ask()
    with pytest.raises(tape.NotRecorded):
        tape.empty(later, 3)  # type: ignore[arg-type]


# ---- kernels compiled ahead ----------------------------------------------------------------------------------------


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of kernels that are compiled, on a card that is said to be there; every second one fails."""
    names: list[str] = []

    def compiled(step: Any) -> None:
        names.append(step.kernel.fn.__name__)
        if len(names) % 2:
            raise RuntimeError("does not build here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(driver, "found", lambda: object())
    monkeypatch.setattr(packing, "compiled", compiled)
    for module in (combine, experts, hopper_calls, library):
        monkeypatch.setattr(module, "capability", lambda device: (0, 0))
    monkeypatch.setattr(tune, "card", lambda device: "none")
    plans.forget()
    yield names
    plans.forget()


def traced(tokens: Any = 7, device: str = "cuda") -> None:
    """What a compiler does with the op: its fake implementation on fake operands."""
    with contextlib.nullcontext() if detect_fake_mode() else FakeTensorMode():
        x, up, down = (torch.empty(s, device=device) for s in ((tokens, 24), (5, 32, 24), (5, 24, 16)))
        ids, w = torch.empty(tokens, 2, dtype=torch.int64, device=device), torch.empty(tokens, 2, device=device)
        out = torch.ops.moe_compile.cuda_experts(x, ids, w, [up], [down], [], [], None, TEXT)
        assert out.shape[1] == 24


def finish() -> None:
    for futures in plans._compiling.values():
        wait(futures)


def test_kernels_are_compiled_while_the_rest_is(begun: list[str]) -> None:
    """Once for each layout, from its fake operands alone; one that does not build is left to the call."""
    for _ in range(3):
        traced()
    finish()
    assert sorted(begun) == ["_combine", "_sort_few", "grouped_gemm", "grouped_gemm"]
    traced(tokens=8)
    finish()
    assert len(begun) == 8


def test_nothing_is_compiled_for_another_device(begun: list[str]) -> None:
    traced(device="cpu")
    assert not plans._compiling and not begun


def test_nothing_is_compiled_for_sizes_that_vary(begun: list[str]) -> None:
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        traced(env.create_unbacked_symint())
    assert not begun and not plans._compiling


def test_whoever_makes_the_plan_waits(card: Driver) -> None:
    t = tensors()
    *rest, add = t.values()
    done: list[str] = []
    pending: Future[None] = Future()
    pending.add_done_callback(lambda _: done.append("compiled"))
    plans.expect(plans.key_of(*calls.experts.describe(*rest, add, TEXT)), [pending])
    threading.Timer(0.2, pending.set_result, (None,)).start()
    right(t)
    assert done and card.seen


class _Kernel:
    """A compiled kernel of which Triton would have to build a launcher."""

    name, kernel, function = "grouped", b"cubin", None
    metadata = SimpleNamespace(shared=1024, num_warps=4)

    @property
    def run(self) -> None:
        self.function = 2


@pytest.mark.parametrize("most, threads, handle", [(2048, 1024, 7), (512, 1024, 2), (2048, 64, 2)])
def test_a_kernel_is_loaded_without_a_launcher_unless_it_does_not_fit(monkeypatch: Any, most: int, threads: int, handle: int) -> None:
    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": most}, load_binary=lambda *a: (1, 7, 0, 0, threads))
    active = SimpleNamespace(get_current_device=lambda: 0, utils=utils)
    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "driver", SimpleNamespace(active=active))
    kernel = _Kernel()
    assert packing._loaded(kernel) == packing._loaded(kernel) == handle
    assert (kernel.function is None) == (handle == 7)
