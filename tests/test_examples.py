"""The examples: the shipped model is trained, the cache is exact, errors are clear, training goes through the backend."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import decoding  # noqa: E402
import quantised  # noqa: E402
import run_trinity  # noqa: E402
import train_tiny  # noqa: E402
import trinity  # noqa: E402

needs_passes = pytest.mark.skipif(find_spec("moe_compile.passes.pipeline") is None, reason="needs the passes")
SMALL = train_tiny.Recipe(steps=3, batch=2, context=32, warmup=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    return trinity.load_tiny()


# -- text and weights -------------------------------------------------------------------------------------------------------


def test_held_out_text_is_not_trained_on() -> None:
    trained, held_out = (bytes(t.tolist()).decode() for t in trinity.corpus())
    assert len(trained) > 900_000 and len(held_out) > 15_000
    assert "Jonah" in held_out and "Jonah rose up to flee unto Tarshish" not in trained


def test_shipped_files_are_small() -> None:
    assert (EXAMPLES / "tiny" / "model.safetensors").stat().st_size <= 4 * 1024 * 1024
    assert (EXAMPLES / "text" / "kjv.txt").stat().st_size <= 1024 * 1024


def test_shipped_config_is_the_one_that_is_trained(model) -> None:
    ours, theirs = model.config.to_dict(), trinity.tiny_config().to_dict()
    for key in ("architectures", "dtype"):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs


def test_shipped_model_predicts_held_out_text(model) -> None:
    """A byte model that knows only letter frequencies is at about 17; one of uniform bytes at 256."""
    trained, held_out = trinity.corpus()
    frequency = torch.bincount(trained, minlength=256).float() + 1
    unigram = math.exp(-(frequency / frequency.sum()).log()[held_out].mean().item())
    perplexity = trinity.perplexity(lambda ids: model(ids, use_cache=False).logits, held_out, context=128)
    assert unigram > 15
    assert perplexity < 3.4


def test_every_expert_is_used(model) -> None:
    _, held_out = trinity.corpus()
    seen: list[torch.Tensor] = []
    hooks = [
        r.register_forward_hook(lambda m, a, out: seen.append(out[2].flatten().bincount(minlength=16))) for r in train_tiny.routers(model)
    ]
    model(held_out[:1024].view(4, 256), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    assert all(int(counts.min()) > 0 for counts in seen)


# -- decoding ---------------------------------------------------------------------------------------------------------------


def test_cached_steps_equal_one_forward(model) -> None:
    ids = trinity.corpus()[1][:150]
    session = decoding.Session(model, "eager", prefill=128, length=192)
    whole = model(ids[None], use_cache=False).logits[0]
    torch.testing.assert_close(session.prefill(ids[:100]), whole[:100], atol=5e-5, rtol=0)
    torch.testing.assert_close(session.teacher_forced(ids, start=100, tokens=50), whole[100:], atol=5e-5, rtol=0)


def test_a_session_forgets_the_prompt_before(model) -> None:
    session = decoding.Session(model, "eager", prefill=64, length=128)
    first, _, _ = session.generate(list(b"And God said"), 20)
    session.generate(list(b"a much longer prompt, about something else entirely"), 20)
    assert session.generate(list(b"And God said"), 20)[0] == first


def test_sampling_depends_on_the_seed_alone(model) -> None:
    session = decoding.Session(model, "eager", prefill=64, length=128)
    one, again, other = (session.generate(list(b"And "), 30, decoding.Sampling(1.0, seed))[0] for seed in (1, 1, 2))
    assert one == again != other


def test_what_does_not_fit_the_cache_is_refused(model) -> None:
    session = decoding.Session(model, "eager", prefill=64, length=128)
    with pytest.raises(ValueError, match="do not fit the cache of 128"):
        session.generate([1] * 60, 69)
    with pytest.raises(ValueError, match="1 to 64 tokens"):
        session.prefill(torch.zeros(65, dtype=torch.long))


def test_measuring_finds_no_difference_between_equals(model) -> None:
    subject = run_trinity.Subject("tiny", model, trinity.ByteTokenizer(), torch.device("cpu"), True)
    sessions = {name: decoding.Session(model, "eager", 64, 128) for name in ("eager", "other")}
    windows = run_trinity.held_out(subject, 64, 2)
    results = {name: run_trinity.Result(name) for name in sessions}
    run_trinity.compare(sessions, windows, results)
    run_trinity.time_all(sessions, windows[0, :-1].tolist(), results)
    other = results["other"]
    assert (other.prefill_difference, other.decode_difference, other.same_greedy_tokens) == (0.0, 0.0, True)
    assert other.perplexity == results["eager"].perplexity < 6
    assert other.decode_tokens_per_second > 0


# -- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "huge"], "invalid choice"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--temperature", "-1"], "--temperature must not be negative"),
        (["--prompt", ""], "--prompt must not be empty"),
        (["--layers", "4"], "--layers goes with --size mini"),
        (["--size", "mini", "--layers", "2"], "--layers must be 3 to 32"),
        (["--size", "mini", "--checkpoint", "x"], "not allowed with"),
        (["--windows", "0"], "--windows must be at least 1"),
        (["--quantize", "int3"], "invalid choice: 'int3' (choose from"),
        (["--quantize", "fp8", "--target", "ascend", "--dry-run"], "--quantize goes with --device cpu or cuda"),
        (["--ep", "0"], "--ep must be at least 1"),
        (["--ep", "2", "--quantize", "fp8"], "--ep goes with --size"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run_trinity.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def error_of(argv, capsys) -> str:
    assert run_trinity.main(argv) == 2
    return capsys.readouterr().err


def test_experts_over_processes_that_were_not_started_is_said(capsys) -> None:
    assert "--ep 2 wants as many processes: torchrun --nproc-per-node 2" in error_of(["--ep", "2"], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_said(capsys) -> None:
    assert "no CUDA device" in error_of(["--device", "cuda"], capsys)


@pytest.mark.skipif(find_spec("torch_npu") is not None, reason="needs a machine without torch_npu")
def test_a_missing_npu_is_said(capsys) -> None:
    assert "torch_npu cannot be imported" in error_of(["--device", "npu"], capsys)


def test_a_prompt_beyond_the_model_is_said(capsys) -> None:
    assert "positions, the model has 1024" in error_of(["--prompt", "a" * 1000], capsys)


def test_too_little_memory_is_said_before_allocating(capsys, monkeypatch) -> None:
    monkeypatch.setattr(trinity, "free_bytes", lambda device: 10_000_000_000)
    error = error_of(["--size", "mini"], capsys)
    assert "needs 57.5 GB in bfloat16, but cpu has 10.0 GB free" in error


def test_checkpoints_that_are_none_are_said(tmp_path, capsys) -> None:
    assert "config.json is missing" in error_of(["--checkpoint", str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert "is not an AFMoE checkpoint" in error_of(["--checkpoint", str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text((trinity.TINY / "config.json").read_text())
    assert "could not be loaded" in error_of(["--checkpoint", str(tmp_path)], capsys)


# -- other models -----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_with_its_tokenizer_loads(model, tmp_path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded, speaker = trinity.load_checkpoint(tmp_path, torch.device("cpu"), torch.float32)
    subject = run_trinity.Subject("saved", loaded, speaker, torch.device("cpu"), True)
    assert subject.decode(subject.encode("And God said")) == "And God said"
    ids = torch.tensor([subject.encode("And God said")])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_random_weights_are_seeded_and_finite(monkeypatch) -> None:
    monkeypatch.setattr(trinity, "mini_config", lambda layers: trinity.tiny_config())
    one, again, other = (trinity.build_mini(torch.device("cpu"), torch.bfloat16, seed=seed) for seed in (3, 3, 4))
    ids = torch.arange(40)[None]
    assert torch.equal(one(ids).logits, again(ids).logits)
    assert not torch.equal(one(ids).logits, other(ids).logits)
    assert one(ids).logits.isfinite().all()
    assert one.lm_head.weight.dtype is torch.bfloat16 and one.model.norm.weight.dtype is torch.float32


def test_mini_is_trinity_minis_shape() -> None:
    with torch.device("meta"):
        mini = trinity.AfmoeForCausalLM(trinity.mini_config())
    assert 26.0e9 < sum(p.numel() for p in mini.parameters()) < 26.3e9


# -- the backend ------------------------------------------------------------------------------------------------------------


@needs_passes
def test_explain_shows_every_moe_layer_validated(capsys) -> None:
    assert run_trinity.main(["--explain"]) == 0
    table = capsys.readouterr().out
    assert "16 × SwiGLU" in table and "2.826 · σ(l)" in table
    assert "3 MoE blocks fused · 0 left as written" in table


@needs_passes
@pytest.mark.skipif("ZOO_ALL" not in os.environ, reason="started by torchrun: make zoo; in processes that are there: tests/sharded")
def test_experts_over_two_processes() -> None:
    """`--ep 2` under torchrun: every MoE layer fused, results as of the undivided model, half of the experts' weights in each process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "run_trinity.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run([*command, "--ep", "2", "--explain", "--json"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:6000]  # what a process said itself stands before what its launcher says of it
    found = json.loads(done.stdout)
    assert found["fused"] == found["moe_layers"] == 3 and found["exchange"] == "rank 0 of 2: shared rows, all-reduce"
    assert found["difference"] < 1e-3 and found["parameter_bytes"][0] == found["parameter_bytes"][1] < 0.7 * found["undivided_bytes"]


def test_explain_as_json(capsys) -> None:
    assert run_trinity.main(["--explain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fused"] == {"prefill": 3, "decode": 3} and found["moe_layers"] == 3
    assert all(block["validated"] for block in found["report"]["blocks"])


# -- experts in few bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "most"), [("fp8", 1 / 28), ("mxfp4", 1 / 4), ("int4", 1 / 14)])
def test_weights_are_rounded_by_half_a_step(model, scheme, most) -> None:
    """most: half of the widest step, or what is cut off above the largest code, as a part of the largest weight that shares a scale."""
    experts = model.model.layers[1].mlp.experts
    few = quantised.SCHEMES[scheme](experts)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)[3].detach()
        error = (few.floats(getattr(few, name)[3], getattr(few, f"{name}_scale")[3]) - weight).abs()
        blocks = (32, 32) if scheme == "fp8" else (1, 32)
        largest = torch.nn.functional.max_pool2d(weight.abs()[None], blocks)[0]
        worst = torch.nn.functional.max_pool2d(error[None], blocks)[0]
        assert worst.max() > 0 and (worst <= largest * most * 1.001).all()


def test_zeros_and_experts_without_groups(model) -> None:
    zeros = torch.zeros(64, 64)
    for kind in quantised.SCHEMES.values():
        few = kind(model.model.layers[1].mlp.experts)
        assert torch.equal(few.floats(*few.encode(zeros)), zeros)
    odd = copy.copy(model.model.layers[1].mlp.experts)
    odd.intermediate_dim = 36
    with pytest.raises(trinity.ExampleError, match="128 and 36 inputs have no groups of a multiple of 32"):
        quantised.Mxfp4Experts(odd)


@needs_passes
def test_experts_in_few_bits_are_fused_as_they_lie(model) -> None:
    import moe_compile

    few = copy.deepcopy(model)
    quantised.quantise(few, "mxfp4")
    block, x = few.model.layers[1].mlp, torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = torch.compile(block, backend="moe_fused", dynamic=False, options={"inner": "eager"})(x)
        torch.testing.assert_close(got, block(x), atol=2e-5, rtol=1e-5)
    report = moe_compile.last_report()
    assert report is not None and [b.validated for b in report.blocks] == [True] and not report.rejected
    assert "4 bits in uint8 × scale of 1 × 32" in report.blocks[0].experts


# -- training ---------------------------------------------------------------------------------------------------------------


def test_batches_are_the_same_for_the_same_seed() -> None:
    data, _ = trinity.corpus()
    one, again = (next(train_tiny.batches(data, SMALL)) for _ in range(2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[0][:, 1:], one[1][:, :-1])


def test_training_writes_what_it_promises(tmp_path, capsys) -> None:
    argv = ["--backend", "eager", "--steps", "3", "--batch", "2", "--context", "32", "--threads", "1", "--out", str(tmp_path)]
    assert train_tiny.main(argv) == 0
    numbers = json.loads((tmp_path / "training.json").read_text())
    losses = numbers["runs"][0]["losses"]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out perplexity" in capsys.readouterr().out
    assert trinity.load_tiny(directory=tmp_path).config.num_experts == 16


def test_the_balancer_favours_idle_experts() -> None:
    model = train_tiny.new_model(0)
    balancer = train_tiny.Balancer(model, 0.01)
    for block in balancer.blocks:
        block.router.load.copy_(torch.arange(16.0))
    assert balancer.step() == pytest.approx(2.0)
    bias = balancer.blocks[0].expert_bias
    assert (bias[:8] > 0).all() and (bias[8:] < 0).all()
    assert not balancer.blocks[0].router.load.any()


@pytest.mark.parametrize(("argv", "message"), [(["--steps", "0"], "--steps must be"), (["--lr", "0"], "--lr must be positive")])
def test_wrong_training_arguments_are_named(argv, message, capsys) -> None:
    with pytest.raises(SystemExit):
        train_tiny.main(argv)
    assert message in capsys.readouterr().err


@needs_passes
def test_three_steps_through_the_backend_equal_eager() -> None:
    import moe_compile

    eager = train_tiny.train(SMALL, "eager", lambda *_: None)
    fused = train_tiny.train(SMALL, "moe_fused", lambda *_: None, options={"inner": "aot_eager"})
    report = moe_compile.last_report()
    assert report is not None and len(report.blocks) == 3 and not report.rejected
    assert fused.losses == pytest.approx(eager.losses, abs=2e-5)
    assert fused.busiest_expert == eager.busiest_expert
