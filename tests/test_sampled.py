"""What `sampled` names is there: a test that was renamed would run in full again, and nobody would know. None of its kinds is left out."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import sampled
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("key", sampled.GRIDS | sampled.LISTS, ids="::".join)
def test_a_sampled_test_is_there(key: tuple[str, str]) -> None:
    assert re.search(rf"^def {key[1]}\(", (sampled.HERE / key[0]).read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("key", sampled.GRIDS, ids="::".join)
def test_every_value_of_every_parameter_is_met(key: tuple[str, str], request: pytest.FixtureRequest) -> None:
    module = pytest.Module.from_parent(request.session, path=sampled.HERE / key[0])
    items = [i for i in request.session.genitems(module) if sampled.key_of(i) == key]
    grid = [i.callspec.params for i in items if isinstance(i, pytest.Function)]
    kept = [grid[i] for i in sampled.chosen(key, items)]
    assert all(len(entry) > 1 for entry in grid), "a list is no grid"
    assert len(kept) < len(grid), "nothing is left out"
    for name in grid[0]:
        assert {repr(e[name]) for e in kept} == {repr(e[name]) for e in grid}, name


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(1, 6))
def test_a_cover_meets_all_values_and_what_pairs_its_share_allows(sizes: list[int], one_in: int) -> None:
    names = [f"p{i}" for i in range(len(sizes))]
    grid = [dict(zip(names, entry, strict=True)) for entry in itertools.product(*map(range, sizes))]
    share = -(-len(grid) // one_in)
    kept = [grid[i] for i in sampled.cover(grid, share)]
    assert len(kept) == len({tuple(e.values()) for e in kept}) <= max(1.5 * share, sum(sizes))
    for name, size in zip(names, sizes, strict=True):
        assert {e[name] for e in kept} == set(range(size))
    pairs = [len({(e[a], e[b]) for e in kept}) == sizes[i] * sizes[j] for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)]
    assert all(pairs) or len(kept) >= share, "part of the share is spent on nothing"


def test_dtypes_meet_paths_before_names_do() -> None:
    """Eight names cannot meet two dtypes and three paths in eight entries; dtypes can meet paths."""
    grid = [{"name": n, "dtype": d, "path": p} for n in range(8) for d in "ab" for p in "xyz"]
    kept = [grid[i] for i in sampled.cover(grid, 8)]
    assert len(kept) == 8 and {(e["dtype"], e["path"]) for e in kept} == set(itertools.product("ab", "xyz"))


def test_fields_of_a_record_meet_what_stands_beside_it() -> None:
    rows: list[dict[str, Any]] = [{"form": f, "bias": b} for f in "uvw" for b in (0, 1)]
    grid = [{"row": r, "path": p} for r in rows for p in "xy"]
    kept = [(grid[i]["row"]["form"], grid[i]["path"]) for i in sampled.cover(grid, 6)]
    assert len(kept) == 6 and set(kept) == set(itertools.product("uvw", "xy"))
