"""Sharded models in two gloo processes: what is fused, in how many graphs, and results and gradients as in one process.

One pair of processes runs all cells of a file (`cells`, `models`): what costs is the start.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import cells  # noqa: E402
import narrow  # noqa: E402
import parallelized  # noqa: E402
import ranks  # noqa: E402

BOTH = ("grouped_mm", "loop")
# set-up -> (experts ops, graphs) in training for grouped products and for the loop. FSDP2's second layer is a graph of its own there: its
# input wants a gradient. Layers that are alike share a graph.
OWN: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "ddp": ((2, 1), (2, 1)),
    "ddp, several buckets": ((0, 8), (2, 3)),
    "ddp, optimize_ddp=False": ((2, 1), (2, 1)),
    "fsdp, by layer": ((2, 2), (2, 2)),
    "fsdp, whole": ((2, 2), (2, 2)),
    "fsdp, experts apart": ((1, 5), (1, 5)),
    "fsdp, mixed precision": ((2, 2), (2, 2)),
    "fsdp, accumulation": ((2, 2), (2, 2)),
    "fsdp, kept": ((2, 2), (2, 2)),
}
INFERENCE: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "ddp": ((2, 1), (2, 1)),
    "fsdp, by layer": ((1, 1), (1, 1)),
    "fsdp, experts apart": ((1, 3), (1, 3)),
    "ddp, several buckets": ((0, 8), (2, 3)),
    "ddp, optimize_ddp=False": ((2, 1), (2, 1)),
    "fsdp, whole": ((1, 1), (1, 1)),
    "fsdp, mixed precision": ((1, 1), (1, 1)),
    "fsdp, kept": ((1, 1), (1, 1)),
}
# of transformers, one layer
THEIRS: dict[str, tuple[tuple[int, int], ...]] = {
    "tp": ((1, 1), (1, 1)),
    "ep, all_reduce": ((1, 1), (1, 1)),
    # The splits are read back to the host in a context that Dynamo cannot break in; in CI the block alone is compiled
    "ep, all_to_all": ((1, 13 if cells.EVERY else 6),),
    "ep, moe_compile": ((1, 1), (1, 1)),
    "fsdp and ep, moe_compile": ((1, 5), (1, 5)),  # transformers shards the experts apart from their layer
    "fsdp and ep, moe_compile_rows": ((1, 5), (1, 5)),
}


def _found(name: str, tmp: pytest.TempPathFactory, timeout: float, world: int = 2) -> list[dict[str, Any]]:
    return ranks.start(HERE / f"{name}.py", "table", tmp.mktemp(name), timeout=timeout, world=world)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _found("cells", tmp_path_factory, 400)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers.distributed.expert_parallel")
    return _found("models", tmp_path_factory, 400)


def _check(found: list[dict[str, Any]], cell: str, fused: int, graphs: int, off: float = 2e-6) -> None:
    for of_rank in found:
        assert cell in of_rank, of_rank["said"]
        told = of_rank[cell]
        assert (told["fused"], told["graphs"]) == (fused, graphs), told
        assert told["out"] <= off and told["grad"] <= off, told


TRAINED = [(s, x) for s in OWN if s not in cells.LEFT for x in (BOTH[:1] if s in cells.GROUPED else BOTH)]


@pytest.mark.parametrize(("setup", "spelling"), TRAINED)
def test_training(setup: str, spelling: str, own: list[dict[str, Any]]) -> None:
    off = 0.03 if "mixed" in setup else 2e-6  # gathered in bf16, beside fp32
    _check(own, f"{setup} / {spelling} / training", *OWN[setup][BOTH.index(spelling)], off)


@pytest.mark.parametrize("setup", [s for s in INFERENCE if s in cells.INFERENCE])
@pytest.mark.parametrize("spelling", BOTH)
def test_inference(setup: str, spelling: str, own: list[dict[str, Any]]) -> None:
    off = 0.03 if "mixed" in setup else 2e-6
    _check(own, f"{setup} / {spelling} / inference", *INFERENCE[setup][BOTH.index(spelling)], off)


def test_a_bucket_that_cuts_a_block_is_told_with_what_to_do(own: list[dict[str, Any]]) -> None:
    left = own[0]["ddp, several buckets / grouped_mm / training"]["left"]
    assert left and all("optimize_ddp = False" in reason and "FSDP2" in reason for reason in left)
    assert not own[0]["ddp / grouped_mm / training"]["left"]


CELLS = [(s, x) for s, each in THEIRS.items() for x in ("grouped_mm", "eager")[: len(each)]]
GROUPED = () if cells.EVERY else tuple(s for s in THEIRS if s != "ep, all_to_all")  # without the loop in training, as in models.py


@pytest.mark.parametrize(("setup", "spelling"), [(s, x) for s, x in CELLS if x != "eager" or s not in GROUPED])
def test_training_of_transformers(setup: str, spelling: str, theirs: list[dict[str, Any]]) -> None:
    _check(theirs, f"{setup} / {spelling} / training", *THEIRS[setup][spelling == "eager"])


@pytest.mark.parametrize("spelling", ["grouped_mm", "eager"] if cells.EVERY else ["eager"])
def test_inference_of_transformers(spelling: str, theirs: list[dict[str, Any]]) -> None:
    """Ranks that share a batch: nothing is gathered, one all-reduce."""
    _check(theirs, f"ep, moe_compile / {spelling} / inference", 1, 1)
    assert theirs[1][f"ep, moe_compile / {spelling} / inference"]["exchange"] == ["rank 1 of 2: shared rows, all-reduce"]


@pytest.mark.skipif("ZOO_ALL" not in os.environ, reason="the graphs of training without gradients: make zoo")
@pytest.mark.parametrize(("setup", "spelling"), [(s, x) for s, x in CELLS if s in ("tp", "ep, all_reduce", "ep, all_to_all")])
def test_inference_of_what_is_transformers_own(setup: str, spelling: str, theirs: list[dict[str, Any]]) -> None:
    _check(theirs, f"{setup} / {spelling} / inference", *THEIRS[setup][spelling == "eager"])


# ---- moe_compile.parallelize ---------------------------------------------------------------------------------------------------


WAYS = {"own": "all-gather, reduce-scatter", "shared": "shared rows, all-reduce", "rows": "rows by all-to-all"}


@pytest.mark.parametrize("cell", [" / ".join(names) for names in parallelized.CELLS])
def test_parallelize_is_the_undivided_model(cell: str, own: list[dict[str, Any]]) -> None:
    """Outputs and gradients; rows travel where compiled, weights are gathered where not; state_dict stays DTensor, half on each rank;
    equal inputs give equal bits."""
    for rank, of_rank in enumerate(own):
        told = of_rank[f"parallelize / {cell}"]
        assert told["out"] < 2e-6 and told["grad"] < 2e-6 and told["kept"] == ["DTensor", [2, 32, 16]], told
        way = WAYS[cell.split(" / ")[1]]
        assert told["exchange"] == ([] if "eager" in cell else [f"rank {rank} of 2: {way}"] * 2)
        assert told["gathers weights"] is False and told["same"] and told["fewer tokens"] < 2e-6, told


def test_the_op_of_shared_batches_sums_alike_on_every_rank(own: list[dict[str, Any]]) -> None:
    for of_rank in own:
        assert of_rank["summed"]["off"] < 1e-6 and of_rank["summed"]["grad"] == [2.0]
        assert of_rank["summed"]["bits"] == own[0]["summed"]["bits"]


def test_the_example_is_the_undivided_model(own: list[dict[str, Any]]) -> None:
    """Every MoE layer fused, results as of the undivided model, half of the experts' weights in each process."""
    found = own[0]["example"]
    assert found["complete"] and found["fused"] == found["moe_layers"] == 3 and found["exchange"] == "rank 0 of 2: shared rows, all-reduce"
    assert found["difference"] < 1e-3 and found["parameter_bytes"][0] == found["parameter_bytes"][1] < 0.7 * found["undivided_bytes"]


def test_one_rank_compiles_again(own: list[dict[str, Any]]) -> None:
    """For a number of its own: rows travel as agreed, and nothing is asked of the other. In another mode: agreed anew."""
    for rank, of_rank in enumerate(own):
        assert of_rank["recompiled / one rank"] == {"graphs": 1 + rank, "off": pytest.approx(0, abs=1e-5)}
        assert of_rank["recompiled / another mode"] == {"graphs": 2 + rank, "off": pytest.approx(0, abs=1e-5)}
        assert all(not part for part in of_rank["recompiled / gathers weights"])


def test_ranks_out_of_step_raise_alike(own: list[dict[str, Any]]) -> None:
    """One rank has fewer tokens; one is behind Dynamo's limit and runs the model as written."""
    for of_rank in own:
        for cell in ("other tokens", "as written"):
            told = of_rank[f"recompiled / {cell}"]
            assert "different numbers of tokens" in told["raised"] and "recompile_limit" in told["raised"] and told["after"] < 50, told


@pytest.mark.skipif("ZOO_ALL" not in os.environ, reason="four processes for one step: make zoo")
def test_a_step_of_experts_divided_under_fsdp(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two ranks divide experts, two such pairs average by FSDP2: output, every gradient, and the output after a step of SGD."""
    for rank, of_rank in enumerate(_found("both_ways", tmp_path_factory, 240, world=4)):
        for batch, way in WAYS.items():
            assert batch in of_rank, of_rank["said"]
            told = of_rank[batch]
            assert max(told["out"], told["grad"], told["after"]) < 2e-6, told
            assert told["exchange"] == [f"rank {rank % 2} of 2: {way}"]


@pytest.mark.skipif("ZOO_ALL" not in os.environ, reason="eight processes: make zoo")
def test_rows_among_eight_ranks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A node's eight: each way of rows beside the undivided model, output and every gradient; two experts on each rank."""
    for rank, of_rank in enumerate(_found("eight", tmp_path_factory, 400, world=8)):
        for batch, way in (("own", WAYS["own"]), ("rows", WAYS["rows"])):
            assert batch in of_rank, of_rank["said"]
            told = of_rank[batch]
            assert told["out"] < 2e-6 and told["grad"] < 2e-6 and told["same"], told
            assert told["exchange"] == [f"rank {rank} of 8: {way}"] and not told["gathers weights"]


@pytest.mark.skipif("ZOO_ALL" not in os.environ, reason="four stages in processes of their own: make zoo")
def test_the_benchmark_of_several_cards_runs(tmp_path: Path) -> None:
    """Each stage in gloo processes of tiny sizes; what is there already is left out, a stage that is out of time is told so."""
    out, script = tmp_path / "found.json", HERE.parents[1] / "benchmarks" / "two_cards.py"

    def run(*args: str) -> str:
        return subprocess.run([sys.executable, script, "--out", out, "--tiny", *args], capture_output=True, text=True, timeout=600).stdout

    assert run("--stages", "correct", "training", "big").count(": done") == 3
    assert run("--stages", "correct") == ""
    assert "travel: no time left" in run("--stages", "travel", "--seconds", "1")
    assert "same" in out.read_text() and "gather, moe_fused" in run("--table")


def test_parallelize_refuses_with_a_reason(own: list[dict[str, Any]]) -> None:
    told = own[0]["parallelize / refused"]
    assert "3 experts, which 2 ranks cannot share equally" in told["three experts"]
    assert "mesh must be a DeviceMesh of one dimension" in told["mesh"]
    assert "no experts were found" in told["dense"]
    assert "each expert has tensors of its own" in told["modules"]
    assert "give an example" in told["no example"]
    assert "first.up is shared with another module" in told["tied"]
    assert "with shared_batch=True no row travels" in told["rows of a shared batch"]


def test_rows_through_peers_memory_are_the_undivided_model(own: list[dict[str, Any]]) -> None:
    """Memory that is files: outputs, gradients, the same bits; nothing is done with ranks that are out of step."""
    for rank, of_rank in enumerate(own):
        for cell in ("grouped / own", "as written"):
            told = of_rank[f"peers / {cell}"]
            assert told["out"] < 2e-6 and told["grad"] < 2e-6 and told["same"] and told["through memory"], told
        assert of_rank["peers / grouped / own"]["exchange"] == [f"rank {rank} of 2: {WAYS['own']}"]
        assert all("different numbers of tokens" in told for told in of_rank["peers / uneven"].values()), of_rank["peers / uneven"]
        told = of_rank["peers / too small"]
        assert told["off"] < 1e-6 and told["met"] > 0 and "different numbers of tokens" in told["uneven"], told


def test_exchanges_through_peers_memory_by_hand(own: list[dict[str, Any]]) -> None:
    """The kernels in Triton's interpreter: rows, choices, numbers and sums of any size are the ranks', in both halves of the memory."""
    for of_rank in own:
        told = of_rank["peers / by hand"]
        assert told["tried"] == "" and told["same"] and told["told"] == [5, 5] and told["said"] == [-1, -2] and all(told["sums"]), told
        assert told["crossed"] == [[[8, -7], False], [[-7, 8], False]], told["crossed"]


def test_ranks_choose_an_exchange_alike(own: list[dict[str, Any]]) -> None:
    """By the slowest link that any of them finds; whoever wants no peers' memory has none of them use it, nor does one that alone asks."""
    for of_rank in own:
        used = [name for name, peers in of_rank["peers / chosen"].items() if peers]
        assert used == ["fast", "slow, asked for"], of_rank["peers / chosen"]


def test_what_one_rank_cannot_prove_gathers_weights_on_all(own: list[dict[str, Any]]) -> None:
    """Results are the undivided model's; every rank is told whose block it was; `strict` on another rank raises on both."""
    for of_rank in own:
        told = of_rank["parallelize / left on rank 1"]
        assert told["fused"] == 0 and told["off"] < 2e-6 and "ranks leave a graph as written alike" in told["told"][-1], told
        assert of_rank["parallelize / strict on rank 0"] == {"raised": "NotFused"}
    assert "rank 1 fused 0 of this graph's blocks and this rank 1 (made up)" in own[0]["parallelize / left on rank 1"]["told"][-1]


def test_other_batches_where_one_was_to_be_shared_raise_on_every_rank(own: list[dict[str, Any]]) -> None:
    for of_rank in own:
        assert "rank 1 of 2 called the model with another batch than rank 0" in of_rank["parallelize / other batches"]


# ---- the exchange of moe_compile.integrations.transformers, four ranks with tokens of their own --------------------------------


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("transformers.distributed.expert_parallel")
    return _found("exchange", tmp_path_factory, 400, world=4)


def test_exchange_is_the_oracle(exchanged: list[dict[str, Any]]) -> None:
    """Result and every gradient as `ir.evaluate_world` in float64; one graph, the same bits for the same inputs."""
    for of_rank in exchanged:
        assert "gathered" in of_rank, of_rank["said"]
        told = of_rank["gathered"]
        assert told["exchange"] == [f"rank {exchanged.index(of_rank)} of 4: all-gather, reduce-scatter"]
        assert told["fused"] == [1] and told["same"] and told["out"] < 1e-6 and told["grad"] < 1e-6, told


def test_rows_by_all_to_all_are_the_oracle(exchanged: list[dict[str, Any]]) -> None:
    """Batches of 6, 0, 1 and 12 tokens: result and every gradient as `ir.evaluate_world` in float64, the same bits twice."""
    for of_rank in exchanged:
        told = of_rank["rows"]
        assert told["same"] and told["out"] < 1e-6 and told["grad"] < 1e-6, told


@pytest.mark.parametrize("routing", ["rows, static", "rows, static, all to a few"])
def test_rows_in_one_graph_are_the_oracle(routing: str, exchanged: list[dict[str, Any]]) -> None:
    """None is dropped where every rank's tokens choose the same few experts; batches of unequal length are refused on every rank."""
    for rank, of_rank in enumerate(exchanged):
        told = of_rank[routing]
        assert told["same"] and told["out"] < 1e-6 and told["grad"] < 1e-6 and "different numbers of tokens" in told["uneven"], told
        assert not cells.EVERY or told["fused"] == [1] and told["exchange"] == [f"rank {rank} of 4: rows by all-to-all"], told


@pytest.mark.parametrize("way", narrow.WAYS)
def test_bf16_is_held_to_the_contract(way: str, own: list[dict[str, Any]], exchanged: list[dict[str, Any]]) -> None:
    """Over two and four ranks: errors against float64 of the result and every gradient are within 1.25 x the undivided experts' own."""
    for of_rank in (*own, *exchanged):
        found = [told for name, told in of_rank.items() if name in (f"narrow, {way}", f"narrow, {way}, compiled")]
        assert found and all(ratio <= 1.25 for told in found for ratio in told.values()), (found, of_rank["said"])


def test_different_numbers_of_tokens_raise_on_every_rank(exchanged: list[dict[str, Any]]) -> None:
    assert all("different numbers of tokens" in of_rank["uneven"]["raised"] for of_rank in exchanged)


def test_what_one_rank_cannot_prove_is_left_on_all(exchanged: list[dict[str, Any]]) -> None:
    for of_rank in exchanged:
        told = of_rank["declined"]
        assert told["fused"] == 0 and told["same"] and "ranks leave a graph as written alike [ranks]" in told["told"][-1], told
    assert "rank 1 fused 0" in exchanged[0]["declined"]["told"][-1]


def test_strict_on_one_rank_raises_on_all(exchanged: list[dict[str, Any]]) -> None:
    assert all(of_rank["strict"]["raised"].startswith("NotFused") for of_rank in exchanged)


def test_several_models_in_one_group_and_a_group_made_anew(exchanged: list[dict[str, Any]]) -> None:
    for of_rank in exchanged:
        assert of_rank["several"]["fused"] == [1, 1, 1, 1] and of_rank["several"]["off"] < 1e-5
        assert of_rank["anew"]["fused"] == 1 and of_rank["anew"]["off"] < 1e-5


def test_a_rank_that_compiles_later_is_not_waited_for_without_end(exchanged: list[dict[str, Any]]) -> None:
    """It runs the exchange as written meanwhile; the others wait for half of the group's timeout, and say so."""
    for rank, of_rank in enumerate(exchanged):
        told = of_rank["late"]
        assert told["off"] < 1e-5 and told["fused"] == 1, told
        named = re.search(r"ranks? ([0-9, ]+) compiled nothing", str(told["notes"]))  # a slow machine may add one
        assert rank == 1 or told["after"] < 30 and named and "1" in named[1], told


def test_other_versions_are_refused_on_every_rank(exchanged: list[dict[str, Any]]) -> None:
    told = "rank 0: moe_compile 0.0; rank 1: moe_compile 0.1"
    assert all(told in of_rank["versions"]["raised"] for of_rank in exchanged)


def test_a_rank_that_dies_is_an_error_of_the_others_and_no_hang(exchanged: list[dict[str, Any]]) -> None:
    assert "dead" not in exchanged[-1]
    for of_rank in exchanged[:-1]:
        told = of_rank["dead"]
        named = re.search(r"ranks? ([0-9, ]+) did not answer", told["raised"])
        assert named and "3" in named[1] and told["after"] < ranks.COLLECTIVE + 20, told
