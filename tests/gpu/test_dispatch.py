"""Dispatch metadata against a stable argsort: few pairs in one launch, many in two."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from moe_compile.lowering.triton import dispatch as d

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture
def two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of many pairs, at sizes that the interpreter can take."""
    small_chunks(monkeypatch)


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d, "_ONE_LAUNCH", 0)
    if not ON_GPU:
        monkeypatch.setattr(d, "_CHUNK", 64)
        monkeypatch.setattr(d, "_segments", lambda pairs, bins: (4, True, True, 4))
        monkeypatch.setattr(d, "_WRITERS", 2)
        monkeypatch.setattr(d, "_SLOTS", 8)


def check(ids: Tensor, experts: int, blocks: tuple[int, ...] = (16, 32)) -> None:
    """Every field of the dispatch of ids [T, k]."""
    got = d.dispatch(ids.to(DEVICE), experts, blocks)
    flat = ids.reshape(-1).long()
    known = torch.where((flat >= 0) & (flat < experts), flat, experts)
    counts = torch.bincount(known, minlength=experts + 1)[:experts]
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    assert got.offsets.tolist() == offsets.tolist()
    rows = int(offsets[-1])
    assert torch.equal(got.order[:rows].cpu().long(), known.argsort(stable=True)[:rows])
    assert torch.equal(got.rank[got.order[:rows].long()].cpu(), torch.arange(rows, dtype=torch.int32)) and got.rank.shape == (ids.numel(),)
    assert {got.order.dtype, got.rank.dtype, got.offsets.dtype} == {torch.int32}
    assert list(got.tiles) == list(blocks)
    for block in blocks:
        wanted = [(e, int(offsets[e]) + j) for e in range(experts) for j in range(0, int(counts[e]), block)]
        tiles = got.tiles[block]
        assert tiles.shape == (2, experts + ids.numel() // block)
        assert got.num_tiles[block].tolist() == [len(wanted)]
        assert [(e, row) for e, row in tiles.t().tolist()[: len(wanted)]] == wanted
        assert (tiles[0, len(wanted) :] == -1).all()
        assert got.tile_starts[block].tolist() == [sum(e < expert for e, _ in wanted) for expert in range(experts + 1)]


def random_ids(tokens: int, k: int, experts: int, low: int = 0, high: int | None = None) -> Tensor:
    return torch.randint(low, experts if high is None else high, (tokens, k))


NAMED = {
    "random": lambda: (random_ids(20, 3, 7), 7),
    "all to one expert": lambda: (torch.full((33, 2), 3), 5),
    "only expert 0": lambda: (torch.zeros(40, 1, dtype=torch.long), 4),
    "only the last expert": lambda: (torch.full((9, 2), 5), 6),
    "empty experts": lambda: (random_ids(30, 2, 60) // 20 * 20, 60),
    "one token": lambda: (torch.tensor([[5, 0, 3]]), 8),
    "one token, one expert": lambda: (torch.tensor([[0]]), 1),
    "duplicates": lambda: (torch.tensor([[2, 2], [1, 2], [2, 1]]), 3),
    "foreign ids": lambda: (random_ids(30, 2, 6, -2, 9), 6),
    "no known id": lambda: (torch.full((5, 2), -1), 6),
    "beyond 32 bits": lambda: (torch.tensor([[2**32, 1], [-(2**40), 0]]), 2),
    "160 experts": lambda: (random_ids(12, 4, 160), 160),
}


@pytest.mark.parametrize("name", NAMED)
def test_one_launch(name: str) -> None:
    check(*NAMED[name]())


@pytest.mark.parametrize("name", NAMED)
def test_two_launches(name: str, two_launches: None) -> None:
    check(*NAMED[name]())


def test_no_tokens() -> None:
    check(torch.zeros(0, 2, dtype=torch.long), 5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_id_dtypes(dtype: torch.dtype) -> None:
    check(random_ids(9, 2, 5).to(dtype), 5)


@pytest.mark.parametrize("blocks", [(), (16,), (64, 16)])
def test_tile_lists(blocks: tuple[int, ...]) -> None:
    """No list, one, and two in any order."""
    check(random_ids(40, 2, 3), 3, blocks)


def test_strided_ids() -> None:
    """A column range of a wider tensor."""
    check(random_ids(9, 5, 6)[:, 1:3], 6)


@settings(max_examples=25 if not ON_GPU else 200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), experts=st.integers(1, 40), k=st.integers(1, 4), tokens=st.integers(0, 24), many=st.booleans())
def test_any_ids(data: st.DataObject, experts: int, k: int, tokens: int, many: bool) -> None:
    """Ids in and around the range of experts, both paths."""
    ids = data.draw(st.lists(st.integers(-2, experts + 1), min_size=tokens * k, max_size=tokens * k))
    with pytest.MonkeyPatch.context() as patch:
        if many and tokens:
            small_chunks(patch)
        check(torch.tensor(ids, dtype=torch.long).view(tokens, k), experts)


@pytest.mark.parametrize(("tokens", "launches"), [(4, 1), (3000, 2)])
def test_launches(tokens: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for few pairs, two for many, counted at the kernels."""
    seen: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: object) -> object:
            return lambda *args, **kwargs: seen.append(self.name)

    for name in ("_sort_few", "_count", "_place"):
        monkeypatch.setattr(d, name, Kernel(name))
    d.dispatch(torch.zeros(tokens, 8, dtype=torch.long, device=DEVICE), 8, (16,))
    assert len(seen) == launches


@pytest.mark.skipif(not ON_GPU, reason="sizes for a GPU")
@pytest.mark.parametrize(
    ("tokens", "k", "experts"), [(1, 8, 128), (64, 8, 128), (1024, 8, 256), (4096, 8, 384), (16384, 8, 128), (40000, 10, 1024)]
)
@pytest.mark.parametrize("kind", ["random", "one expert", "foreign"])
def test_real_sizes(tokens: int, k: int, experts: int, kind: str) -> None:
    ids = random_ids(tokens, k, experts, -3, experts + 3) if kind == "foreign" else random_ids(tokens, k, experts)
    if kind == "one expert":
        ids.fill_(experts - 1)
    check(ids, experts, (16, 128))


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA graphs")
def test_captured() -> None:
    """No host synchronisation: both paths can be captured, and a replay follows new ids."""
    for tokens in (8, 4096):
        ids = random_ids(tokens, 8, 64).cuda()
        d.dispatch(ids, 64, (16,))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = d.dispatch(ids, 64, (16,))
        ids.copy_(random_ids(tokens, 8, 64))
        graph.replay()
        assert torch.equal(got.order.long(), ids.reshape(-1).argsort(stable=True))
