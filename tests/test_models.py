"""What --model takes: types, configurations on disk, classes in files; and `bench` on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_compile.__main__ import main
from moe_compile.models import running
from moe_compile.trace_text import check_stage

BLOCK = """
import torch, torch.nn.functional as F
from torch import nn
class Block(nn.Module):
    def __init__(self, hidden=8, experts=3):
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 8, hidden) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, hidden, 4) * 0.3)
    def forward(self, x):
        w, ids = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e in range(self.up.shape[0]):
            t, j = torch.where(ids == e)
            g, u = F.linear(x[t], self.up[e]).chunk(2, -1)
            out.index_add_(0, t, F.linear(F.silu(g) * u, self.down[e]) * w[t, j, None])
        return out
"""
SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, vocab_size=64)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    torch._dynamo.reset()
    (tmp_path / "mine.py").write_text(BLOCK)
    return f"{tmp_path}/mine.py"


def test_a_class_in_a_file(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", f"{mine}:Block", "--shape", "9,16", "--set", "hidden=16"]) == 0
    out = capsys.readouterr().out
    assert "1 MoE block fused" in out and "3 × SwiGLU 16→4→16" in out and "mine.py:16" in out


def test_a_class_on_meta_for_a_gpu(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", f"{mine}:Block", "--shape", "9,4096", "--set", "hidden=4096", "--full", "--target", "cuda"]) == 0
    assert "3 × SwiGLU 4096→4→4096" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, words",
    [
        (["Blok", "--shape", "9,8"], "close ones: Block"),
        (["Block"], "give a --shape"),
        (["Block", "--shape", "9,x"], "no list of numbers"),
        (["Block", "--shape", "9,8", "--set", "width=3"], "cannot be made"),
    ],
)
def test_wrong_use_is_told(mine: str, more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", f"{mine}:{more[0]}", *more[1:]]) == 2
    assert words in capsys.readouterr().err


def test_a_configuration_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    config = SMALL | dict(model_type="mixtral", num_local_experts=4, architectures=["MixtralForCausalLM"], torch_dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["explain", "--model", str(tmp_path), "--target", "cuda"]) == 0
    assert "4 × SwiGLU 32→16→32" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(config | dict(num_local_expert=4)))
    assert main(["explain", "--model", f"{tmp_path}/config.json"]) == 2
    assert "num_local_experts" in capsys.readouterr().err


def test_a_hub_name_and_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", "Qwen/Qwen3-30B-A3B"]) == 2
    assert "nothing is downloaded" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        main(["explian"])
    assert e.value.code == 2
    assert "close ones: explain" in capsys.readouterr().err


def test_bench(mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--model", f"{mine}:Block", "--shape", "9,8", "--inner", "eager", "--sides", "eager,moe_fused", "--rounds", "1"]
    pytest.importorskip("matplotlib")
    assert main([*command, "--plot", str(tmp_path / "b.svg")]) == 0
    out = capsys.readouterr().out
    assert "median ms" in out and "moe_fused" in out and "1 MoE block fused" in out and (tmp_path / "b.svg").stat().st_size
    assert main([*command, "--sides", "eager,fast"]) == 2
    assert "allowed: eager, inductor, moe_fused" in capsys.readouterr().err


def test_what_fails_in_the_compiler_is_no_fault_of_the_models() -> None:
    with (
        pytest.raises(RuntimeError, match=r"mine\.py:Block could not be compiled, by a fault of the compiler's") as seen,
        running("mine.py:Block"),
    ):
        check_stage("no such pass", "--stage")
    assert isinstance(seen.value.__cause__, ValueError)

    def broken(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise KeyError("internal")

    with pytest.raises(RuntimeError, match="fault of the compiler's"), running("mine.py:Block"):
        torch.compile(torch.sin, backend=broken)(torch.ones(2))
    with pytest.raises(ValueError, match=r"mine raises ValueError at .*test_models.py:\d+: of the model"), running("mine"):
        raise ValueError("of the model")
