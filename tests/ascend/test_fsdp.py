"""FSDP2 over two gloo ranks: gradients and three optimiser steps as without it, the gather in the fractal format, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_compile.lowering.ascend import schemas
from moe_compile.lowering.ascend.sharding import Sharding, advice

if schemas.wheel():
    pytest.skip("torch_npu has gradients on its own device only", allow_module_level=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two ranks found, by scenario: one start for all of them."""
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    command = [sys.executable, str(Path(__file__).parent / "two_ranks.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("scenario", ["plain", "kept", "uneven", "inputs", "outputs"])
def test_sharded_training_is_eagers(scenario: str, found: dict[str, Any]) -> None:
    told = found[scenario]
    assert told["moved"] == ["down", "up"] and told["blocks"] == 1
    assert max(told["gradients"]) <= 1e-5 and told["weights"] <= 1e-4
    assert any("sharded along" in n for n in told["notes"]) == (scenario in ("inputs", "outputs")), told["notes"]
    assert not any("not lowered" in n for n in told["notes"])


@pytest.mark.parametrize("scenario", ["nz", "nz kept", "nz uneven", "nz inputs"])
def test_training_gathered_in_the_fractal_format(scenario: str, found: dict[str, Any]) -> None:
    """In bf16: no further from fp32 than the same training gathered as it is, over three optimiser steps."""
    nd, nz = found[scenario]["nd"], found[scenario]["nz"]
    assert nz["moved"] == ["down", "up"] and nz["types"] == ["Tensor"]
    assert nz["gradients"] == nd["gradients"] and nz["weights"] == nd["weights"]
    assert ("not in the fractal format" in found[scenario]["log"]) == (scenario == "nz inputs")


def test_gathered_bytes_are_those_of_a_cast_behind_the_gather(found: dict[str, Any]) -> None:
    assert found["bytes"]["8"] == [True] * 3 and found["bytes"]["7"] == [True] * 3


def test_preparing_and_sharding_in_the_wrong_order_is_told(found: dict[str, Any]) -> None:
    told = found["refusals"]
    assert "non-contiguous" in told["fully_shard"], "torch's own words"
    assert "training=True" in told["log"], "ours, before that"
    assert "before fully_shard" in told["prepare"]


@pytest.mark.parametrize(("dim", "ranks", "said"), [
    (0, 8, None), (0, 7, None), (0, 1024, None),
    (1, 4, None), (1, 1, None), (2, 2, None),  # 2048 / 4 and 1024 / 2 are 512
    (1, 8, "256 each"), (2, 4, "256 each"), (2, 512, "no whole blocks of 16"), (1, 3, "no whole blocks of 16"),
])  # fmt: skip
def test_what_counts_is_the_shard(dim: int, ranks: int, said: str | None) -> None:
    told = advice((128, 2048, 1024), Sharding(dim, ranks))
    assert told is None if said is None else said in str(told)
