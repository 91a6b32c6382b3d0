"""What an NPU would run, shown on a machine without one: the command line and the example."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from ascend_blocks import block, compiled, zoo

from moe_compile import __main__ as cli
from moe_compile.lowering.ascend import dry_run, schemas

ROOT = Path(__file__).parent.parent.parent
CALLS = ("npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "npu_moe_finalize_routing")


def test_explain_shows_the_lowered_graph(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--model", "afmoe", "--target", "ascend", "--graph", "calls", "--strict"]) == 0
    out = capsys.readouterr().out
    assert all(c in out for c in CALLS) and "2 MoE blocks fused" in out and "MiB more memory" in out
    assert "active_expert_range=[0, 64]" in out and "# router_logits" in out


def test_a_dry_run_holds_the_lowered_graph_as_python() -> None:
    """What `explain --graph fx` prints."""
    with torch.no_grad(), dry_run.collect() as run:
        compiled(block("afmoe"))(torch.randn(2, 5, zoo.HIDDEN))
    assert all(f"torch.ops.npu.{c}" in run.fx_text() and c in run.calls_text() for c in CALLS)


@pytest.mark.skipif(not schemas.wheel(), reason="torch_npu converts the graph")
def test_explain_shows_the_ge_graph(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--model", "afmoe", "--target", "ascend", "--graph", "ge"]) == 0
    out = capsys.readouterr().out
    assert "MoeFinalizeRoutingV2(" in out and "_user_stream_label=moe_shared" in out


def test_explain_says_what_the_ge_graph_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "wheel", lambda: False)
    assert cli.main(["explain", "--model", "afmoe", "--target", "ascend", "--graph", "ge"]) == 2
    assert "torch_npu" in capsys.readouterr().err


def test_graphs_need_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--model", "afmoe", "--graph", "fx"]) == 2
    assert "--target ascend" in capsys.readouterr().err


def example(*args: str) -> int:
    """The example's status, run here: a process of its own would import for 6 s what is there."""
    return runpy.run_path(str(ROOT / "examples/run_trinity.py"))["main"]([*args])


def test_the_example_runs_dry(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    status = example("--target", "ascend", "--dry-run", "--windows", "1", "--threads", "1", "--max-new-tokens", "2", "--prompt", "A")
    out, err = capsys.readouterr()
    assert status == 0, err
    assert all(c in out for c in CALLS)
    assert "prefill graph: 3 of 3" in out and "decode graph: 3 of 3" in out and "Emulated on the CPU" in out
    assert ("MoeGatingTopK(" if schemas.wheel() else "there are none to show") in out


@pytest.mark.parametrize("args", [("--dry-run",), ("--target", "ascend"), ("--graph-mode", "ge")])
def test_what_does_not_go_together_is_said(
    args: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    with pytest.raises(SystemExit) as stopped:
        example(*args)
    assert stopped.value.code == 2 and "goes with" in capsys.readouterr().err


MINI = (
    "num_experts=128", "num_experts_per_tok=8", "moe_intermediate_size=1024", "num_dense_layers=2", "num_attention_heads=32",
    "num_key_value_heads=4", "route_scale=2.826", "sliding_window=2048",
)  # fmt: skip


def test_trinity_mini_at_its_true_size_copies_no_weight_on_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Three of its 32 layers, one of them with experts: nothing is computed, so there is no limit to the size."""
    fields = [a for f in (*MINI, "num_hidden_layers=3") for a in ("--set", f)]
    assert cli.main(["explain", "--model", "afmoe", "--target", "ascend", "--strict", "--full", *fields]) == 0
    out = capsys.readouterr().out
    assert "128 × SwiGLU 2048→1024→2048" in out and "1 MoE block fused" in out
    assert "of inputs and 0 bytes of expert weights" in out and "1536.0 MiB more memory" in out


@pytest.mark.parametrize(("args", "message"), [
    (["--set", "num_experts=8"], "goes with --full"),
    (["--full", "--set", "num_expert=8"], "num_experts"),
    (["--full", "--set", "num_experts"], "NAME=VALUE"),
    (["--full", "--set", "hidden_size=wide"], "no 'afmoe' can be made"),
])  # fmt: skip
def test_what_cannot_be_set_is_told(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--model", "afmoe", "--target", "ascend", *args]) == 2
    assert message in capsys.readouterr().err
