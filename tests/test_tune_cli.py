"""`python -m moe_compile tune` without a GPU: its errors, the sizes it takes, what it prints and keeps of given measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_compile import tune_cli
from moe_compile.__main__ import main
from moe_compile.lowering.triton import tune
from moe_compile.lowering.triton.tune import Choice, Problem, Tile, Vector

SIZES = ["--experts", "16", "--hidden", "256", "--intermediate", "128", "--k", "4"]
TILE = Tile(128, 128, 64, 8, 4, tma=True, hopper=True, group=8)
FOUND = {1: (Choice(TILE, TILE, (Vector(2, 1024, 4), Vector(1, 512, 2))), 12.34), 4096: (Choice(TILE, Tile(64, 64, 64, 4, 3), None), 680.0)}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Problem]:
    """A card whose measurements are given; the problems asked for."""
    asked = []

    def measured(problem: Problem, tokens: list[int]) -> Any:
        asked.append(problem)
        return ((t, *FOUND[t]) for t in tokens if t in FOUND)

    monkeypatch.setenv("MOE_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune_cli, "measured", measured)
    monkeypatch.setattr(tune_cli, "_missing", lambda: None)
    monkeypatch.setattr(tune, "card", lambda device: "some_card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    return asked


def test_table_and_cache(card: list[Problem], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["tune", *SIZES, "--tokens", "4096", "1", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "E16-H256-I128-k4-bfloat16 on Some Card" and lines[1].split() == ["tokens", "µs", "up", "down"]
    assert lines[2].split()[:2] == ["1", "12.3"] and "few tokens 2x1024, 4 warps" in lines[2]
    assert lines[3].split()[:2] == ["4096", "680.0"] and "128x128x64, 8 warps, 4 stages, hopper, group 8" in lines[3]
    path = tmp_path / "tuned" / "some_card.json"
    assert lines[4] == f"kept in {path}"
    assert tune.read(path) == {card[0].key: {t: choice for t, (choice, _) in FOUND.items()}}


def test_json(card: list[Problem], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *SIZES, "--dtype", "float16", "--ungated", "--tokens", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["problem"] == "E16-H256-I128-k4-float16-plain" and told["tokens"]["1"]["microseconds"] == 12.3
    assert card == [Problem(16, 256, 128, 4, torch.float16, False)]


def test_sizes_of_a_model_type(card: list[Problem]) -> None:
    assert main(["tune", "--model", "mixtral", "--intermediate", "64", "--tokens", "1"]) == 0
    assert card == [Problem(8, 4096, 64, 2, torch.bfloat16, True)]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give --model TYPE, or --experts --hidden --intermediate --k"),
        (SIZES[:6], "--k"),
        ([*SIZES[:6], "--k", "17"], "17 of 16 experts"),
        (["--model", "qwen3_mo"], "qwen3_moe"),
        (["--model", "llama"], "does not say --experts"),
        ([*SIZES, "--tokens", "7"], "nothing was measured"),
    ],
)
def test_what_is_wrong_is_said(argv: list[str], said: str, card: list[Problem], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *argv]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *SIZES]) == 2
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--tokens", "0"], ["--tokens"], ["--k", "-1"], ["--dtype", "int8"], ["--hidden", "x"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["tune", *SIZES, *argv])
    assert e.value.code == 2


def test_each_token_count_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the tuner's own functions in the order it wants them; what does not fit is skipped."""
    tuner = pytest.importorskip("moe_compile.lowering.triton.tuner", exc_type=ImportError)
    steps = []

    def prepare(problem: Problem, tokens: int, weights: Any) -> int:
        if tokens > 100:
            raise torch.cuda.OutOfMemoryError
        steps.append((tokens, weights))
        return tokens

    monkeypatch.setattr(tuner, "random_weights", lambda problem: ("up", "down"))
    monkeypatch.setattr(tuner, "prepare", prepare)
    monkeypatch.setattr(tuner, "measure", lambda inputs, tokens: (FOUND[1][0], {}))
    monkeypatch.setattr(tuner, "whole_calls", lambda inputs, choice: [inputs])
    monkeypatch.setattr(tuner, "microseconds", lambda calls: float(calls[0]))
    rows = list(tune_cli.measured(Problem(16, 256, 128, 4, torch.bfloat16, True), [1, 64, 4096]))
    assert rows == [(1, FOUND[1][0], 1.0), (64, FOUND[1][0], 64.0)] and steps == [(1, ("up", "down")), (64, ("up", "down"))]
    assert "4096 tokens do not fit" in capsys.readouterr().err
