"""The choice of tiles: rule, buckets, what is shipped, what the user measured. No kernel runs here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from moe_compile.lowering.triton import tune, tuner
from moe_compile.lowering.triton.tune import Choice, Problem, Tile, Vector

CUDA = torch.device("cuda", 0)
PROBLEM = Problem(128, 2048, 1024, 8, torch.bfloat16, True)
TILE = Tile(64, 128, 64, 8, 4, tma=True)
CHOICE = Choice(TILE, replace(TILE, hopper=True, group=8), (Vector(2, 1024, 4), Vector(1, 512, 2)))
PLAIN = Choice(TILE, TILE, None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A card of no shipped file, and a cache folder of the test's own."""
    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "card", lambda device: "some_card")
    tune._table.cache_clear()
    yield tmp_path
    tune._table.cache_clear()


def test_an_unknown_card_goes_by_the_rule() -> None:
    for tokens in (1, 4, 5, 64, 1024, 16384):
        assert tune.choose(PROBLEM, tokens, CUDA) == tune.rule(PROBLEM, tokens)


def test_measurements_are_remembered(cache: Path) -> None:
    path = tune.remember("some_card", PROBLEM, {1: CHOICE, 64: PLAIN})
    assert path == cache / "tuned" / "some_card.json" and list(path.parent.iterdir()) == [path]
    assert tune.read(path) == {PROBLEM.key: {1: CHOICE, 64: PLAIN}}
    assert tune.choose(PROBLEM, 1, CUDA) == CHOICE and tune.choose(PROBLEM, 5000, CUDA) == PLAIN


def test_a_file_without_split_is_read(cache: Path) -> None:
    """As older versions wrote it."""
    path = tune.remember("some_card", PROBLEM, {1: CHOICE, 64: replace(PLAIN, down=replace(TILE, split=2))})
    assert tune.read(path)[PROBLEM.key][64].down.split == 2
    path.write_text(re.sub(r',\s*"split": \d', "", path.read_text()))
    assert "split" not in path.read_text() and tune.read(path) == {PROBLEM.key: {1: CHOICE, 64: PLAIN}}


def test_measurements_add_up() -> None:
    """Of another token count, of another problem; the later one of the same count stays."""
    other = replace(PROBLEM, gated=False)
    tune.remember("some_card", PROBLEM, {1: PLAIN, 64: PLAIN})
    tune.choose(PROBLEM, 1, CUDA)
    tune.remember("some_card", other, {16: PLAIN})
    path = tune.remember("some_card", PROBLEM, {1: CHOICE})
    assert tune.read(path) == {PROBLEM.key: {1: CHOICE, 64: PLAIN}, other.key: {16: PLAIN}}
    assert tune.choose(PROBLEM, 1, CUDA) == CHOICE


def test_the_users_go_before_the_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path / "shipped_writer"))
    tune.remember("some_card", PROBLEM, {1: PLAIN, 64: PLAIN}).rename(tmp_path / "some_card.json")
    (tmp_path / "shipped").mkdir()
    (tmp_path / "some_card.json").rename(tmp_path / "shipped" / "some_card.json")
    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path / "user"))
    tune.remember("some_card", PROBLEM, {1: CHOICE})
    assert tune.choose(PROBLEM, 1, CUDA) == CHOICE and tune.choose(PROBLEM, 64, CUDA) == PLAIN


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', '{"a": {"x": {}}}', '{"a": {"1": {"up": {"bm": 16}, "decode": null}}}'])
def test_a_broken_file_holds_nothing(text: str, cache: Path) -> None:
    path = tune.user_file("some_card")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tune.read(path) == {} and tune.choose(PROBLEM, 8, CUDA) == tune.rule(PROBLEM, 8)
    tune.remember("some_card", PROBLEM, {8: CHOICE})
    assert tune.choose(PROBLEM, 8, CUDA) == CHOICE


@pytest.mark.parametrize(("tokens", "want"), [(0, 1), (1, 1), (2, 4), (3, 4), (8, 16), (16, 16), (31, 16), (33, 64), (10**6, 64)])
def test_buckets_are_the_nearest_by_ratio(tokens: int, want: int) -> None:
    assert tune.bucket(tokens, [1, 4, 16, 64]) == want


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(128, 2048, 1024, 8), (8, 4096, 14336, 2), (256, 7168, 2048, 8), (4, 64, 32, 1)])
def test_the_rule_gives_tiles_that_can_run(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    e, hidden, inter, k = shape
    for tokens in tuner.TOKENS:
        choice = tune.rule(Problem(e, hidden, inter, k, dtype, True), tokens)
        valid(choice)
        assert (choice.decode is not None) == (tokens <= 4)


def valid(choice: Choice) -> None:
    """Powers of two, and a pipeline that fits 227 KB of shared memory in bf16."""
    for tile, parts in ((choice.up, 2), (choice.down, 1)):
        assert tile.split == 1 or (tile.hopper and tile is choice.down)
        assert all(v & (v - 1) == 0 and v > 0 for v in (tile.split, tile.bm, tile.bn, tile.bk, tile.warps, tile.group))
        columns = tile.bn * (256 // tile.bm if tile.hopper else parts)
        staging = 2 * 64 * tile.bn if tile.hopper else 0
        assert tile.bm >= 16 and (tile.stages * tile.bk * (tile.bm + columns) + staging) * 2 <= 227 * 1024
        assert not tile.hopper or tile.bm in (64, 128)
    for v in choice.decode or ():
        assert all(x & (x - 1) == 0 for x in (v.bn, v.bk, v.warps))


def test_shipped_files_hold_what_they_should() -> None:
    files = sorted(tune.SHIPPED.glob("*.json"))
    assert any("h100" in f.name for f in files)
    for file in files:
        table = tune.read(file)
        assert set(table) == set(json.loads(file.read_text())), f"{file.name} cannot be read"
        for by_tokens in table.values():
            assert 1 in by_tokens and max(by_tokens) >= 4096
            for choice in by_tokens.values():
                valid(choice)


def test_the_interpreter_has_tiles_of_its_own() -> None:
    cpu = torch.device("cpu")
    assert tune.choose(PROBLEM, 1, cpu).decode is not None and tune.choose(PROBLEM, 8, cpu).decode is None


def test_keys_tell_problems_apart() -> None:
    changed = [replace(PROBLEM, **{f: v}) for f, v in {"experts": 64, "hidden": 64, "intermediate": 64, "k": 2, "gated": False}.items()]
    keys = [p.key for p in (PROBLEM, replace(PROBLEM, dtype=torch.float16), *changed)]
    assert keys[0] == "E128-H2048-I1024-k8-bfloat16" and len(set(keys)) == len(keys)


def test_candidates_are_valid_and_differ() -> None:
    for tokens in tuner.TOKENS:
        for down in (False, True):
            tiles = tuner.tiles(PROBLEM, tokens, down)
            assert tiles and len(set(tiles)) == len(tiles)
            for tile in tiles:
                valid(Choice(TILE, tile, None) if down else Choice(tile, TILE, None))


def test_the_depth_is_split_for_few_deep_experts() -> None:
    """Where tiles are few waves and parts stay long: in the down projection, warp-specialised, at most 4 parts."""
    few = Problem(8, 4096, 14336, 2, torch.bfloat16, True)
    for tokens in (256, 1024, 4096):
        found = tuner.tiles(few, tokens, down=True)
        split = [t for t in found if t.split > 1]
        assert {t.split for t in split} == {2, 4} and len(split) <= 8 and all(replace(t, split=1) in found for t in split)
        assert len(set(found)) == len(found)
        for tile in found:
            valid(Choice(TILE, tile, None))
        assert all(t.split == 1 for t in tuner.tiles(few, tokens, down=False))
    for other in (PROBLEM, Problem(256, 7168, 2048, 8, torch.bfloat16, True), replace(few, intermediate=1024)):
        assert all(t.split == 1 for tokens in (1024, 4096) for t in tuner.tiles(other, tokens, down=True))
    assert all(t.split == 1 for t in tuner.tiles(few, 16384, down=True))


def test_the_rule_splits_the_depth_where_the_last_wave_is_half_empty() -> None:
    """2.4 waves (Mixtral at 1,024 tokens); not 8.2 or 31.5 (a sixteenth and less), not 2.9 (Phi-3.5-MoE), not short depths, not up."""
    mixtral = Problem(8, 4096, 14336, 2, torch.bfloat16, True)
    assert [tune.rule(mixtral, t).down.split for t in (256, 1024, 4096, 16384)] == [1, 2, 1, 1]
    assert tune.rule(mixtral, 1024).up == replace(tune.rule(mixtral, 1024).down, split=1)
    for other, tokens in (
        (replace(mixtral, intermediate=4096), 1024),
        (Problem(16, 4096, 6400, 2, torch.bfloat16, True), 1024),
        (PROBLEM, 4096),
    ):
        assert tune.rule(other, tokens).down.split == 1
