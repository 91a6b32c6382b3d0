"""The experts' gradient kernels against autograd through the IR's oracle: every layout, and what `needs` leaves out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import norm_error
from conftest import bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import CASES, Case, close, experts, leaves, tensors
from torch import Tensor

pytest.importorskip("triton")

from moe_compile import ir, ops
from moe_compile.ir import scalar as act
from moe_compile.lowering.reference import generic
from moe_compile.lowering.triton import backward as b
from moe_compile.lowering.triton import hopper_calls, library_backward
from moe_compile.lowering.triton.call import read
from moe_compile.lowering.triton.tune import Tile

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MORE = [
    Case("exact gelu list", experts(ir.Form.SEPARATE, act.gelu(act.G) * act.U, stacked=False, down_transposed=True)),
    Case("interleaved list", experts(ir.Form.INTERLEAVED, stacked=False, up_bias=True)),
    Case(
        "weight on input, all biases", experts(ir.Form.INTERLEAVED, weight_on_input=True, up_bias=True, down_bias=True, up_transposed=True)
    ),
    Case("weight on input, separate", experts(ir.Form.SEPARATE, weight_on_input=True), foreign=True),
    Case("single transposed", experts(ir.Form.SINGLE, act.silu(act.G), up_transposed=True, down_transposed=True), tokens=20),
    Case("half", experts(up_bias=True, down_bias=True), dtype=torch.float16),
    Case("identity, biases", experts(num_identity=1, down_bias=True), foreign=True, tokens=9, k=3),
    Case("many rows", ir.Experts(3, 20, 18, 20, ir.Form.CONCAT, act.SWIGLU), tokens=40),
    Case("six experts a token", ir.Experts(7, 8, 6, 8, ir.Form.CONCAT, act.SWIGLU), k=6),
]
BY_NAME = pytest.mark.parametrize("case", CASES + MORE, ids=lambda c: c.name)


def moved(t: dict[str, Any]) -> dict[str, Any]:
    """The case's tensors where the kernels run, `add` left out (its gradient is the incoming one)."""

    def move(v: Any) -> Any:
        return [move(i) for i in v] if isinstance(v, list) else v.detach().to(DEVICE).requires_grad_(v.requires_grad)

    return {name: move(v) for name, v in t.items() if name != "add"}


def expected(case: Case, t: dict[str, Any], grad: Tensor) -> list[Tensor]:
    """Gradients of the float64 oracle."""
    want = case.experts.evaluate(**t)
    found: Any = [None] * len(leaves({**t, "add": None}))
    if want.requires_grad:
        found = torch.autograd.grad(want, leaves({**t, "add": None}), grad.double(), allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves({**t, "add": None}), strict=True)]


def run(case: Case, t: dict[str, Any], grad: Tensor, needs: list[bool] | None = None, tiles: b.Tiles | None = None) -> list[Tensor]:
    layout = ops.layout_of(ops.experts_args(case.experts))
    plain = {name: [i.detach() for i in v] if isinstance(v, list) else v.detach() for name, v in t.items()}
    _, pre = generic.forward(*bundle(plain), None, layout)
    needs = [True] * len(leaves({**t, "add": None})) if needs is None else needs
    return b.backward(grad, pre, *bundle(plain), layout, needs, tiles)


def tolerance(case: Case) -> float:
    return 1e-2 if case.dtype in (torch.float16, torch.bfloat16) else 2e-5


PADDED = Tile(64, 32, 16, 4, 1) if not ON_GPU else Tile(128, 64, 64, 8, 3, tma=True)


def check(case: Case, t: dict[str, Any], tiles: b.Tiles | None = None, least: float = 1e-30) -> None:
    grad = torch.randn(t["x"].shape[0], case.experts.out_features, device=DEVICE).to(case.dtype)
    for got, want, leaf in zip(run(case, t, grad, tiles=tiles), expected(case, t, grad), leaves({**t, "add": None}), strict=True):
        assert got.dtype == leaf.dtype and got.is_contiguous()
        close(got, want, tolerance(case), least)


@BY_NAME
def test_gradients(case: Case) -> None:
    """All gradients of every layout."""
    check(case, moved(tensors(case)))


@pytest.mark.parametrize(
    "name", ["stacked", "interleaved", "separate", "list", "transposed", "biases", "weight on input", "identity experts"]
)
def test_padded(name: str) -> None:
    """Rows copied in order and filled up with zeros: all operands through descriptors (16-byte rows)."""
    case = next(c for c in CASES if c.name == name)
    meaning = replace(case.experts, num_experts=5, hidden=24, intermediate=16, out_features=24)
    case = replace(case, experts=meaning, tokens=90, k=2)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []
        grown = b.row_kernels.weight_grad_padded
        patch.setattr(b.row_kernels, "weight_grad_padded", _Seen(grown, seen))
        check(case, moved(tensors(case)), b.Tiles(PADDED, PADDED, PADDED, PADDED, padded=True))
        assert seen


class _Seen:
    """A kernel that tells when it was launched."""

    def __init__(self, kernel: Any, seen: list[str]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        self.seen.append("launched")
        return self.kernel[grid]


def by_hand(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped product, in any dtype on any device; rows of no expert are NaN."""
    bounds = [0, *ends.tolist()]
    if b.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in itertools.pairwise(bounds)])
    out = a.new_full((a.shape[0], b.shape[2]), float("nan"))
    for e, (i, j) in enumerate(itertools.pairwise(bounds)):
        out[i:j] = a[i:j] @ b[e]
    return out


@pytest.mark.parametrize("name", ["stacked", "transposed", "single transposed", "identity experts", "foreign ids"])
def test_by_a_librarys_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where widths are no whole tiles of the warp-specialised kernels; all gradients, and any of them alone."""
    monkeypatch.setattr(library_backward, "better", lambda *_: True)
    monkeypatch.setattr(library_backward, "grouped_product", by_hand)
    case = next(c for c in CASES + MORE if c.name == name) if name != "foreign ids" else Case(name, experts(), foreign=True)
    t = moved(tensors(case))
    check(case, t)
    grad = torch.randn(t["x"].shape[0], case.experts.out_features, device=DEVICE).to(case.dtype)
    every = run(case, t, grad)
    for i in range(len(every)):
        (one,) = run(case, t, grad, [j == i for j in range(len(every))])
        assert torch.equal(one, every[i])


def test_when_a_librarys_products_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 on Hopper, stacked and without biases, where a width is no multiple of 64 but one of 8, from a few rows an expert on."""
    monkeypatch.setattr(library_backward, "capability", lambda device: (9, 0))

    def taken(tokens: int, hidden: int, inter: int, dtype: torch.dtype = torch.bfloat16, **layout: Any) -> bool:
        meaning = ir.Experts(2, hidden, inter, hidden, ir.Form.CONCAT, act.SWIGLU, dtype=dtype, **layout)
        t = moved(tensors(Case("", meaning, tokens=tokens, dtype=dtype)))
        call = read(*bundle(t), None, ops.layout_of(ops.experts_args(meaning)))
        assert call is not None
        return library_backward.better(call, bundle(t)[-1])

    assert taken(40, 72, 64) and taken(40, 64, 40) and taken(40, 72, 40, up_transposed=True, down_transposed=True)
    assert not taken(40, 64, 64) and not taken(3, 72, 64) and not taken(40, 70, 64) and not taken(40, 72, 64, torch.float16)
    assert not taken(40, 72, 64, up_bias=True) and not taken(40, 72, 64, weight_on_input=True)


@pytest.mark.parametrize("name", ["stacked", "biases", "separate list biases", "weight on input", "identity experts"])
def test_only_what_is_asked(name: str) -> None:
    """Each gradient alone, and nothing, is what it is among all."""
    case = next(c for c in CASES if c.name == name)
    t = moved(tensors(case))
    grad = torch.randn(t["x"].shape[0], case.experts.out_features, device=DEVICE)
    everything = run(case, t, grad)
    for i, whole in enumerate(everything):
        needs = [i == j for j in range(len(everything))]
        (alone,) = run(case, t, grad, needs)
        close(alone, whole, 1e-6)
    assert run(case, t, grad, [False] * len(everything)) == []


ROUTINGS = {
    "all to one expert": lambda t, k, e: torch.full((t, k), e - 1),
    "only expert 0": lambda t, k, e: torch.zeros(t, k, dtype=torch.long),
    "no known expert": lambda t, k, e: torch.full((t, k), -1),
    "duplicates": lambda t, k, e: torch.arange(t)[:, None].expand(t, k) % e,
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_routings(name: str) -> None:
    """Experts without rows have zero gradients; a pair may come twice."""
    case = Case(name, experts(up_bias=True, down_bias=True), tokens=20)
    t = moved(tensors(case))
    t["ids"] = ROUTINGS[name](case.tokens, case.k, case.experts.num_experts).to(DEVICE)
    check(case, t)


def test_strides() -> None:
    """An expanded incoming gradient (of a sum), and weights that are windows of larger tensors."""
    case = Case("strides", experts())
    t = moved(tensors(case))
    grad = torch.ones((), device=DEVICE).expand(case.tokens, case.experts.out_features)
    t["up"] = [torch.randn(4, 12, 16, device=DEVICE)[..., 4:12].requires_grad_()]
    for got, want in zip(run(case, t, grad), expected(case, t, grad), strict=True):
        close(got, want, 2e-5)


def test_neighbours_stay_apart() -> None:
    """One expert's NaN is in no other expert's gradient."""
    case = Case("nan", experts(), tokens=24)
    t = moved(tensors(case))
    t["ids"] = (torch.arange(48) % 4).view(24, 2).to(DEVICE)
    t["up"][0] = t["up"][0].detach().clone()
    t["up"][0][1] = float("nan")
    grad = torch.randn(24, 8, device=DEVICE)
    _, _, up, down = run(case, t, grad)
    for g in (up, down):
        assert [bool(e.isnan().any()) for e in g] == [False, True, False, False]


def test_deterministic() -> None:
    case = next(c for c in MORE if c.name == "many rows")
    t = moved(tensors(case))
    grad = torch.randn(case.tokens, 20, device=DEVICE)
    for one, two in zip(run(case, t, grad), run(case, t, grad)):
        assert torch.equal(one, two)


@pytest.mark.parametrize("form", [ir.Form.CONCAT, ir.Form.INTERLEAVED, ir.Form.SEPARATE, ir.Form.SINGLE])
def test_tiles_in_two_parts(form: ir.Form) -> None:
    """Other tiles, among them an epilogue in two parts."""
    activation = act.silu(act.G) if form is ir.Form.SINGLE else act.SWIGLU
    case = Case("tiles", ir.Experts(3, 20, 40, 24, form, activation), tokens=30)
    size = 256 if ON_GPU else 32
    wide = Tile(128, size, 32, 8, 2) if ON_GPU else Tile(32, size, 16, 4, 1)
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setattr(b, "_PART", 4)
        check(case, moved(tensors(case)), b.Tiles(wide, wide, wide, wide))


@settings(max_examples=12 if not ON_GPU else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(list(ir.Form)),
    flags=st.tuples(*[st.booleans()] * 6),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    routing=st.tuples(st.integers(1, 6), st.integers(1, 3), st.booleans()),
)
def test_any_layout(form: ir.Form, flags: tuple[bool, ...], sizes: tuple[int, ...], routing: tuple[Any, ...]) -> None:
    """Random layouts and small sizes; a gradient of one element may be a small difference of large terms."""
    stacked, up_t, down_t, up_bias, down_bias, on_input = flags
    activation = act.relu(act.G) ** 2 if form is ir.Form.SINGLE else act.SWIGLU
    meaning = ir.Experts(
        sizes[0], sizes[1], sizes[2], sizes[1], form, activation, stacked=stacked, up_transposed=up_t, down_transposed=down_t,
        up_bias=up_bias, down_bias=down_bias, weight_on_input=on_input,
    )  # fmt: skip
    case = Case("any", meaning, tokens=routing[0], k=routing[1], foreign=routing[2])
    check(case, moved(tensors(case)), least=0.02)


@pytest.mark.skipif(not ON_GPU, reason="sizes for a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["stacked", "transposed", "separate list", "interleaved", "biases", "weight on input"])
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "padded"),
    [(5, 256, 192, False), (700, 512, 256, False), (700, 512, 256, True), (3000, 256, 384, True)],
)
def test_real_sizes(tokens: int, hidden: int, intermediate: int, padded: bool, name: str, dtype: torch.dtype) -> None:
    case = next(c for c in CASES if c.name == name)
    meaning = replace(case.experts, num_experts=8, hidden=hidden, intermediate=intermediate, out_features=hidden)
    t = moved(tensors(replace(case, experts=meaning, tokens=tokens, k=2)))
    for ts in (t["up"], t["down"]):
        for i, w in enumerate(ts):
            ts[i] = (w.detach() / hidden**0.5).requires_grad_()
    t = {n: [i.detach().to(dtype).requires_grad_() for i in v] if isinstance(v, list) else v for n, v in t.items()}
    t["x"] = t["x"].detach().to(dtype).requires_grad_()
    tiles = b.choose(2 * tokens, 8, dtype, True)
    tiles = replace(tiles, padded=padded and dtype != torch.float32)
    check(replace(case, experts=meaning, tokens=tokens, k=2, dtype=dtype), t, tiles)


SINGLE = [Case("single", experts(ir.Form.SINGLE, act.silu(act.G)))]
HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)


def warped_case(case: Case, dtype: torch.dtype, tokens: int, hidden: int = 512, intermediate: int = 256) -> tuple[Case, dict[str, Any]]:
    """The case at a size for 128-row tiles, in a dtype, with weights that keep values near one."""
    meaning = replace(case.experts, num_experts=8, hidden=hidden, intermediate=intermediate, out_features=hidden)
    case = replace(case, experts=meaning, tokens=tokens, k=2, dtype=dtype)
    t = moved(tensors(replace(case, dtype=torch.float32)))
    for ts in (t["up"], t["down"]):
        for i, w in enumerate(ts):
            ts[i] = w.detach() / hidden**0.5
    t = {n: [i.detach().to(dtype).requires_grad_() for i in v] if isinstance(v, list) else v for n, v in t.items()}
    t["x"] = t["x"].detach().to(dtype).requires_grad_()
    return case, t


def launches(patch: pytest.MonkeyPatch) -> set[str]:
    """Names of the warp-specialised products that run from now on."""
    seen: set[str] = set()
    for name in ("grad_hidden", "grad_input", "weight_grad"):
        real = getattr(hopper_calls, name)
        patch.setattr(hopper_calls, name, lambda *args, name=name, real=real: (seen.add(name), real(*args))[1])
    return seen


def warped_tiles() -> b.Tiles:
    tiles = b.choose(8 * 200, 8, torch.bfloat16, True)
    assert tiles.padded
    return replace(tiles, hopper=True)


@pytest.mark.skipif(not HOPPER, reason="needs an H100")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [9, 700, 3000])
@pytest.mark.parametrize("name", ["stacked", "transposed", "separate", "single", "interleaved", "biases", "identity experts"])
def test_warp_specialised(name: str, tokens: int, dtype: torch.dtype) -> None:
    """Every layout the warp-specialised products cover, few rows an expert to many."""
    case, t = warped_case(next(c for c in CASES + SINGLE if c.name == name), dtype, tokens)
    form = case.experts.form
    with pytest.MonkeyPatch.context() as patch:
        seen = launches(patch)
        check(case, t, warped_tiles())
        assert ("grad_hidden" in seen) == (form is not ir.Form.INTERLEAVED)
        assert ("grad_input" in seen) == (form is not ir.Form.SEPARATE)
        assert "weight_grad" in seen


@pytest.mark.skipif(not HOPPER, reason="needs an H100")
@pytest.mark.parametrize(("name", "still"), [("weight on input", {"weight_grad"}), ("list", set()), ("separate list", set())])
def test_not_warp_specialised(name: str, still: set[str]) -> None:
    """What they do not cover: the plain kernels run."""
    case, t = warped_case(next(c for c in CASES if c.name == name), torch.bfloat16, 700)
    with pytest.MonkeyPatch.context() as patch:
        seen = launches(patch)
        check(case, t, warped_tiles())
        assert seen == still


@pytest.mark.skipif(not HOPPER, reason="needs an H100")
@pytest.mark.parametrize("name", ROUTINGS)
def test_warp_specialised_routings(name: str) -> None:
    """Experts without rows, or all of them, have zero gradients; one expert has all rows."""
    case, t = warped_case(Case(name, experts()), torch.bfloat16, 1000)
    t["ids"] = ROUTINGS[name](case.tokens, case.k, case.experts.num_experts).to(DEVICE)
    check(case, t, warped_tiles())


@pytest.mark.skipif(not HOPPER, reason="needs an H100")
def test_warp_specialised_neighbours() -> None:
    """One expert's NaN, in weights or tokens, is in no other expert's gradient; rows that pad hold none of it."""
    case, t = warped_case(Case("nan", experts()), torch.bfloat16, 1000)
    t["ids"] = torch.randint(0, 4, (1000, 2), device=DEVICE) * 2 + torch.arange(2, device=DEVICE)  # experts 0, 2, 4, 6 and 1, 3, 5, 7
    t["up"][0] = t["up"][0].detach().clone()
    t["up"][0][3] = float("nan")
    grad = torch.randn(1000, 512, device=DEVICE, dtype=torch.bfloat16)
    _, _, up, down = run(case, t, grad, tiles=warped_tiles())
    for g in (up, down):
        assert [bool(e.isnan().any()) for e in g] == [e == 3 for e in range(8)]


@pytest.mark.skipif(not HOPPER, reason="needs an H100")
def test_warp_specialised_repeats() -> None:
    """Twenty runs on changing inputs, some experts without rows, bitwise equal to a second run of each."""
    for seed in range(20):
        torch.manual_seed(seed)
        case, t = warped_case(Case("again", experts()), torch.bfloat16, 500 + 37 * seed)
        t["ids"] = t["ids"].clamp(min=seed % 3, max=5)
        grad = torch.randn(case.tokens, 512, device=DEVICE, dtype=torch.bfloat16)
        for one, two in zip(run(case, t, grad, tiles=warped_tiles()), run(case, t, grad, tiles=warped_tiles()), strict=True):
            assert torch.equal(one, two)


@pytest.mark.skipif(not HOPPER, reason="needs an H100")
@pytest.mark.parametrize("name", ["stacked", "transposed", "separate", "single", "interleaved", "biases", "identity experts"])
def test_weights_beyond_the_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients whose last tiles reach beyond the matrix, in both directions."""
    case, t = warped_case(next(c for c in CASES + SINGLE if c.name == name), torch.bfloat16, 700, 192, 320)
    seen = launches(monkeypatch)
    check(case, t, warped_tiles())
    assert "weight_grad" in seen


@pytest.mark.skipif(not HOPPER, reason="needs an H100")
def test_weights_not_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor for each expert, or rows that are no whole groups of 64: the plain kernel."""
    for name, hidden, intermediate in (("list", 512, 256), ("stacked", 328, 40)):
        case, t = warped_case(next(c for c in CASES if c.name == name), torch.bfloat16, 700, hidden, intermediate)
        seen = launches(monkeypatch)
        check(case, t, warped_tiles())
        assert "weight_grad" not in seen


@pytest.mark.skipif(not ON_GPU or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper card")
@pytest.mark.parametrize("transposed", [False, True])
def test_widths_of_no_whole_tiles(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's grouped product, as the rule has it; by a plan, twice."""
    seen: list[int] = []
    products = library_backward.run
    monkeypatch.setattr(library_backward, "run", lambda *a: (seen.append(1), products(*a))[1])
    meaning = ir.Experts(
        6, 200, 168, 200, ir.Form.CONCAT, act.SWIGLU, dtype=torch.bfloat16, up_transposed=transposed, down_transposed=transposed
    )
    case = Case("", meaning, tokens=300, k=3, dtype=torch.bfloat16, foreign=True)
    t = moved(tensors(case))
    for _ in range(3):
        leaf = {
            n: [i.detach().requires_grad_() for i in v] if isinstance(v, list) else v.detach().requires_grad_(v.requires_grad)
            for n, v in t.items()
        }
        out = torch.ops.moe_compile.experts(*leaf.values(), None, *ops.experts_args(meaning))
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, leaves({**leaf, "add": None}), grad)
        for g, want in zip(got, expected(case, t, grad), strict=True):
            assert norm_error(g, want) < 1e-2  # rounded to bf16 between products, as torch's come
    assert len(seen) == 1, "recorded once"
