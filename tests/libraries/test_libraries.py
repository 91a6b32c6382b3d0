"""Layers of real libraries, as their wheels have them: fused, exact, with eager's gradients. docs/libraries.md is written from this run.

`make test-libraries` installs the wheels beside the main environment; where a library is missing its rows are skipped.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moe_compile.report import Report, collecting

DOC = Path(__file__).parents[2] / "docs" / "libraries.md"
WRITE = os.environ.get("DOCS_WRITE") == "1"
H = 16


class Layer(NamedTuple):
    """A module of a library: how it is made, the shape of its tokens, what is to come of it ("" or words of the reason), how exactly."""

    library: str
    module: str
    what: str
    make: Callable[[Any], nn.Module]
    shape: tuple[int, ...] = (2, 7, H)
    left: str = ""
    near: float = 1e-5  # of eager; a layer that multiplies in bf16 is near to that
    graphs: int = 1


def _litgpt(**more: Any) -> Callable[[Any], nn.Module]:
    def make(m: Any) -> nn.Module:
        sizes = dict(n_embd=H, moe_intermediate_size=8, n_expert=8, n_expert_per_token=2, mlp_class_name="LLaMAMoE")
        return m.LLaMAMoE(m.Config(n_layer=1, n_head=2, block_size=16, padded_vocab_size=32, bias=False, **(sizes | more)))

    return make


def _mistral(m: Any) -> nn.Module:
    class Expert(nn.Module):
        """The package's FeedForward, whose own file needs xformers."""

        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(H, 8, bias=False), nn.Linear(H, 8, bias=False), nn.Linear(8, H, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    gate, args = nn.Linear(H, 4, bias=False), m.MoeArgs(num_experts=4, num_experts_per_tok=2)
    return m.MoeLayer([Expert() for _ in range(4)], gate, args)


def _torchtitan(m: Any, **router: Any) -> nn.Module:
    config, dispatch = importlib.import_module("torchtitan.models.common.config_utils"), m.LocalTokenDispatcher
    experts = m.GroupedExperts.Config(dim=H, hidden_dim=8, num_experts=8)
    routed = m.RoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatch.Config(num_experts=8, top_k=2))
    gate = config.make_router_config(dim=H, num_experts=8, gate_param_init={}, top_k=2, **router)
    layer: nn.Module = m.MoE.Config(num_experts=8, router=gate, routed_experts=routed).build()
    return layer


def _automodel(m: Any, **more: Any) -> nn.Module:
    sizes = dict(n_routed_experts=8, n_shared_experts=1, n_activated_experts=2, dim=H, inter_dim=8, moe_inter_dim=8)
    groups = dict(n_expert_groups=1, n_limited_groups=1, score_func="softmax", route_scale=1.0, norm_topk_prob=True)
    training = dict(train_gate=True, gate_bias_update_factor=0.0, aux_loss_coeff=0.0, dtype=torch.float32)
    backend = importlib.import_module("nemo_automodel.components.models.common").BackendConfig
    layer: nn.Module = m.MoE(
        m.MoEConfig(**(sizes | groups | training | more)),
        backend(attn="sdpa", linear="torch", rms_norm="torch", experts="torch", dispatcher="torch", fake_balanced_gate=False),
    )
    return layer


def _alone() -> None:
    """A group of one process, for libraries that always divide."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _llama4(m: Any, k: int) -> nn.Module:
    _alone()
    importlib.import_module("fairscale.nn.model_parallel.initialize").initialize_model_parallel(1)
    args = importlib.import_module("models.llama4.args").MoEArgs(num_experts=4, top_k=k)
    layer: nn.Module = m.MoE(dim=H, hidden_dim=12, ffn_dim_multiplier=1.0, multiple_of=8, moe_args=args)
    return layer


def _megatron(m: Any, **more: Any) -> nn.Module:
    """One process; on the CPU, where the library asks CUDA for the current device all the same."""
    _alone()
    importlib.import_module("megatron.core.parallel_state").initialize_model_parallel(1, 1)
    importlib.import_module("megatron.core.transformer.moe.moe_utils").te_general_gemm = None
    config = importlib.import_module("megatron.core.transformer.transformer_config").TransformerConfig
    sizes = dict(num_layers=1, hidden_size=H, num_attention_heads=2, num_moe_experts=8, moe_ffn_hidden_size=8, moe_router_topk=2)
    dispatch = dict(moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="none", moe_grouped_gemm=False)
    expert = dict(gated_linear_unit=True, activation_func=nn.functional.silu, add_bias_linear=False, bias_activation_fusion=False)
    plain = dict(use_cpu_initialization=True, gradient_accumulation_fusion=False, params_dtype=torch.float32)
    specs = importlib.import_module("megatron.core.models.gpt.moe_module_specs")
    spec = specs.get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    layer: nn.Module = m.MoELayer(config(**(sizes | dispatch | expert | plain | more)), spec.submodules)
    return layer


@pytest.fixture
def as_megatron_runs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its own linear layer warns of its own call in every forward: Dynamo is told to leave warnings out of its graphs."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    if importlib.util.find_spec("megatron"):
        router, utils = (importlib.import_module(f"megatron.core.transformer.moe.{x}") for x in ("router", "moe_utils"))

        def gating(self: Any, x: Tensor) -> Tensor:
            """Theirs without the lines that move the weight to a GPU."""
            return utils.router_gating_linear(x, self.weight, self.bias, x.dtype)  # type: ignore[no-any-return]

        monkeypatch.setattr(router.Router, "gating", gating)
    with torch._dynamo.config.patch(ignore_logging_functions={*torch._dynamo.config.ignore_logging_functions, warnings.warn}):
        yield
    if divided := sys.modules.get("megatron.core.parallel_state"):
        divided.destroy_model_parallel()


@pytest.fixture(autouse=True)
def no_group_left() -> Any:
    yield
    if torch.distributed.is_initialized():
        if divided := sys.modules.get("fairscale.nn.model_parallel.initialize"):
            divided.destroy_model_parallel()
        torch.distributed.destroy_process_group()


_GROUPS = dict(score_func="sigmoid", n_expert_groups=4, n_limited_groups=2, route_scale=2.5)
LAYERS = (
    Layer(
        "torchtitan",
        "torchtitan.models.common.moe",
        "MoE, sigmoid, groups, normalised",
        lambda m: _torchtitan(m, route_norm=True, route_scale=2.5, num_expert_groups=4, num_limited_groups=2),
        near=2e-2,
    ),
    Layer(
        "torchtitan",
        "torchtitan.models.common.moe",
        "MoE, softmax",
        lambda m: _torchtitan(m, score_func="softmax"),
        near=2e-2,
    ),
    Layer("nemo-automodel", "nemo_automodel.components.moe.layers", "MoE, a loop, shared expert", _automodel),
    Layer("nemo-automodel", "nemo_automodel.components.moe.layers", "MoE, sigmoid, groups", lambda m: _automodel(m, **_GROUPS)),
    Layer("megatron-core", "megatron.core.transformer.moe.moe_layer", "MoELayer, all-gather, softmax over the selected", _megatron),
    Layer(
        "megatron-core",
        "megatron.core.transformer.moe.moe_layer",
        "MoELayer, all-gather, sigmoid, scale 2.5",
        lambda m: _megatron(m, moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5),
    ),
    # fairscale's reduction behind the block ends the graph
    Layer("llama-models", "models.llama4.moe", "Llama 4's MoE, top 1", lambda m: _llama4(m, 1), graphs=2),
    Layer("llama-models", "models.llama4.moe", "Llama 4's MoE, top 2", lambda m: _llama4(m, 2), graphs=2),
    Layer("litgpt", "litgpt.model", "LLaMAMoE, softmax over the selected", _litgpt()),
    Layer("litgpt", "litgpt.model", "LLaMAMoE, shared expert, scale 2.5", _litgpt(n_shared_expert=1, routed_scaling_factor=2.5)),
    Layer("mistral_inference", "mistral_inference.moe", "MoeLayer", _mistral, (9, H)),
    Layer(
        "mixture-of-experts",
        "mixture_of_experts",
        "MoE (capacity)",
        lambda m: m.MoE(dim=H, num_experts=4, hidden_dim=8),
        left="",
    ),
    Layer(
        "soft-moe-pytorch",
        "soft_moe_pytorch",
        "SoftMoE",
        lambda m: m.SoftMoE(dim=H, seq_len=8, num_experts=4, is_distributed=False),
        (2, 8, H),
        left="soft MoE",
    ),
)
# By design: nothing is to be fused here, whatever the reason that is told
BY_DESIGN = {"MoE (capacity)", "SoftMoE"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch._dynamo.reset()


def _tensor(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def _run(layer: Layer, m: nn.Module) -> SimpleNamespace:
    x = torch.randn(layer.shape)
    with torch.no_grad(), collecting() as report:
        compiled = torch.compile(m, backend="moe_fused", options={"inner": "aot_eager"})
        torch.manual_seed(1)
        mine = _tensor(compiled(x))
        torch.manual_seed(1)
        exact = _error(mine, _tensor(m(x)))
    torch._dynamo.reset()
    grads = []
    for f in (m, torch.compile(m, backend="moe_fused", options={"inner": "aot_eager"})):
        m.zero_grad()
        torch.manual_seed(1)
        _tensor(f(x)).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    return SimpleNamespace(report=report, exact=exact, gradients=_error(grads[1], grads[0]))


def _row(layer: Layer, report: Report, exact: float, gradients: float) -> str:
    verdict = (
        "yes" if report.blocks and not report.rejected else f"no: {'; '.join(dict.fromkeys(r.reason for r in report.rejected)) or '–'}"
    )
    version = importlib.metadata.version(layer.library)
    near = ["yes" if e < 1e-5 else "as bf16 is" if e < layer.near else f"{e:.0e}" for e in (exact, gradients)]
    return f"| {layer.library} {version} | {layer.what} | {verdict} | {near[0]} | {near[1]} | {report.graph_count} |"


@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: f"{x.library}: {x.what}")
def test_a_layer_of_a_library(layer: Layer, request: pytest.FixtureRequest) -> None:
    if layer.library == "megatron-core":
        request.getfixturevalue("as_megatron_runs")
    try:
        module = importlib.import_module(layer.module)
    except ImportError as e:
        pytest.skip(f"{layer.library} is not installed: {e}")
    torch.manual_seed(0)
    m = layer.make(module).eval()
    for p in m.parameters():
        nn.init.normal_(p, std=0.3)
    run = _run(layer, m)
    assert run.exact < layer.near and run.gradients < 10 * layer.near
    if layer.what in BY_DESIGN:
        assert not run.report.blocks
        assert any(layer.left in r.reason for r in run.report.rejected) if layer.left else True, str(run.report)
    else:
        assert run.report.blocks and not run.report.rejected and run.report.graph_count == layer.graphs, str(run.report)
    row = _row(layer, run.report, run.exact, run.gradients)
    text = DOC.read_text(encoding="utf-8")
    if WRITE:
        start = re.escape(row.split("|")[1].split()[0])
        pattern = re.compile(rf"^\| {start} \S+ \| {re.escape(layer.what)} \|.*$", re.M)
        text = pattern.sub(lambda _: row, text) if pattern.search(text) else text.replace("<!-- end -->", f"{row}\n<!-- end -->")
        DOC.write_text(text, encoding="utf-8")
    assert row in text, row


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """torchtitan's layer in two processes."""
    pytest.importorskip("torchtitan")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    ranks = importlib.import_module("ranks")
    return ranks.start(Path(__file__).with_name("exchanged.py"), "cells", tmp_path_factory.mktemp("exchanged"))  # type: ignore[no-any-return]


def test_the_all_to_all_of_torchtitan(exchanged: list[dict[str, Any]]) -> None:
    """Batches of unequal length: experts fuse where rows arrive; the undivided result and gradients, eager's gradients."""
    for found in exchanged:
        cell = found.get("all-to-all")
        assert cell is not None, found["said"]
        assert cell["fused"] == 1 and cell["left"] == ["elsewhere"]
        assert max(cell["out"], cell["whole"], cell["grad"], cell["whole grad"]) < 2e-2, cell


def test_our_gather_in_torchtitan(exchanged: list[dict[str, Any]]) -> None:
    """One graph, experts fused; result and gradients of the undivided layer and of eager; batches of unequal length are refused on all."""
    for rank, found in enumerate(exchanged):
        cell = found.get("gather")
        assert cell is not None, found["said"]
        assert (cell["fused"], cell["graphs"], cell["left"]) == (1, 1, ["no block"]), cell
        assert cell["exchange"] == [f"rank {rank} of 2: all-gather, reduce-scatter"]
        assert max(cell["out"], cell["whole"], cell["grad"], cell["whole grad"]) < 2e-2, cell
        assert "different numbers of tokens" in found["uneven"]
