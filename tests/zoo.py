"""Every Mixture-of-Experts architecture of transformers, tiny, with random weights.

An entry says how to build the model, which router class and expert form it has (the classes of docs/coverage.md), how many MoE
blocks the backend has to fuse in it, and which of transformers' experts implementations to run. What is left out stands in `EXCLUDED`
with the reason. Sizes: 2 layers, 8 experts (16 where groups of experts take part in the selection), hidden size 32.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, VOCAB, TOKENS = 32, 64, 7
DECORATED = ("default", "eager", "batched_mm", "grouped_mm")
PLAIN = ("default",)

# Given to every config that has a field (or an alias) of that name; an entry's own keyword arguments win.
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=40,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=20,
    moe_shared_expert_intermediate_size=20,
    shared_intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=8,
    num_local_experts=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=0,
    num_dense_layers=0,
    norm_topk_prob=True,
    routed_scaling_factor=1.75,
    router_jitter_noise=0.0,
    max_position_embeddings=64,
    initializer_range=0.2,
    sliding_window=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_topk=16,
    index_head_dim=16,
    index_n_heads=2,
    num_nextn_predict_layers=0,
    num_mtp_layers=0,
)
GROUPED = dict(n_routed_experts=16, num_local_experts=16, num_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3)
SPARSE = dict(mlp_layer_types=["sparse", "sparse"])
FULL = dict(layer_types=["full_attention", "full_attention"])
SAME_KV = dict(num_key_value_heads=4)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One architecture.

    name: the transformers model type (with a suffix for a second variant). model, config: class names. router, experts: the
    classes of docs/coverage.md. blocks: MoE blocks that have to be fused. gating: whether the routing itself has to be recovered;
    False where it may stay as written while the experts are fused. scope: what is built, said where it is not the whole causal LM.
    inputs: which of `INPUTS` builds the forward's keyword arguments. prepare: run on the fresh model. note: for docs/coverage.md.
    """

    name: str
    router: str
    experts: str
    config: str
    model: str
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    blocks: int = 2
    implementations: tuple[str, ...] = DECORATED
    gating: bool = True
    scope: str = "causal LM"
    inputs: str = "tokens"
    prepare: Callable[[nn.Module], None] | None = None
    note: str = ""

    @property
    def package(self) -> str:
        return self.name.split("+")[0]

    def build(self, implementation: str = "default", seed: int = 0) -> nn.Module:
        """The model in eval mode, float32, with seeded random weights."""
        torch.manual_seed(seed)
        config = self.build_config()
        if implementation != "default":
            config._experts_implementation = implementation
        model = getattr(_module(self.package, "modeling"), self.model)(config)
        _randomise(model)
        if self.prepare is not None:
            self.prepare(model)
        return model.eval()

    def build_config(self) -> Any:
        return make_config(self.package, self.config, **self.kwargs)

    def make_inputs(self, batch: int = 1, tokens: int = TOKENS, seed: int = 1) -> dict[str, Any]:
        """Keyword arguments of the forward."""
        generator = torch.Generator().manual_seed(seed)
        return INPUTS[self.inputs](batch, tokens, generator)


def make_config(package: str, name: str, **kwargs: Any) -> Any:
    """A config object: `COMMON` where the class has such a field, overlaid with `kwargs`."""
    cls = getattr(_module(package, "configuration"), name)
    known = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
    base = {k: v for k, v in COMMON.items() if k in known}
    for alias, real in cls.attribute_map.items():  # one spelling only, and the entry's own wins
        if alias in base and (real in base or real in kwargs):
            base.pop(alias)
        if real in base and alias in kwargs:
            base.pop(real)
    return cls(**{**base, **kwargs})


def _module(package: str, kind: str) -> Any:
    return importlib.import_module(f"transformers.models.{package}.{kind}_{package}")


def _randomise(model: nn.Module) -> None:
    """Shake every constant parameter and buffer (norms, biases, selection biases): zeros and ones would hide mistakes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for _, t in tensors:
            if t.is_floating_point() and t.numel() > 1 and t.ndim < 3 and bool((t == t.flatten()[0]).all()):
                t.add_(torch.randn_like(t) * 0.3)


def _tokens(batch: int, tokens: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCAB, (batch, tokens), generator=generator), "use_cache": False}


def _tokens_only(batch: int, tokens: int, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCAB, (batch, tokens), generator=generator)}


def _patches(batch: int, tokens: int, generator: torch.Generator) -> dict[str, Any]:
    side = 2 * max(1, tokens // 4)
    pixels = torch.randn(batch * 2 * side, 3 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "grid_thw": torch.tensor([[1, 2, side]] * batch)}


def _embeds(batch: int, tokens: int, generator: torch.Generator) -> dict[str, Any]:
    return {"inputs_embeds": torch.randn(batch, tokens, HIDDEN, generator=generator), "use_cache": False}


INPUTS: dict[str, Callable[[int, int, torch.Generator], dict[str, Any]]] = {
    "tokens": _tokens,
    "tokens_only": _tokens_only,
    "embeds": _embeds,
    "patches": _patches,
}


def output_of(result: Any) -> Tensor:
    """The tensor to compare: the logits, else the last hidden state."""
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    return logits if logits is not None else result.last_hidden_state


def _fill_experts(model: nn.Module) -> None:
    """Weights that the model class leaves uninitialised."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".experts." in name:
                p.normal_(std=0.2)


def _fill_hash_table(model: nn.Module) -> None:
    """Distinct random experts per token id."""
    for name, b in model.named_buffers():
        if name.endswith("tid2eid"):
            b.copy_(torch.stack([torch.randperm(8)[: b.shape[1]] for _ in range(b.shape[0])]))


def _entry(name: str, router: str, experts: str, config: str, model: str, **kwargs: Any) -> Entry:
    own = {f.name for f in dataclasses.fields(Entry)}
    options = {k: kwargs.pop(k) for k in list(kwargs) if k in own}
    return Entry(name, router, experts, config, model, kwargs=kwargs, **options)


# fmt: off
ENTRIES: list[Entry] = [
    # R1: softmax, then top-k, with or without renormalisation
    _entry("qwen2_moe", "R1", "X1", "Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
    _entry("qwen3_moe", "R1", "X1", "Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
    _entry("qwen3_moe+plain", "R1", "X1", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", norm_topk_prob=False, note="no renormalisation"),
    _entry("qwen3_next", "R1", "X1", "Qwen3NextConfig", "Qwen3NextForCausalLM", **FULL),
    _entry("qwen3_5_moe", "R1", "X1", "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", **FULL),
    _entry("qwen3_vl_moe", "R1", "X1", "Qwen3VLMoeTextConfig", "Qwen3VLMoeTextModel", scope="text model"),
    _entry("qwen3_omni_moe", "R1", "X1", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel", scope="thinker's text model"),
    _entry("qwen3_omni_moe+talker", "R1", "X1", "Qwen3OmniMoeTalkerTextConfig", "Qwen3OmniMoeTalkerModel", scope="talker's text model",
           shared_expert_intermediate_size=20, inputs="embeds", prepare=_fill_experts),
    _entry("qwen4_exp", "R1", "X1", "Qwen4ExpTextConfig", "Qwen4ExpForCausalLM"),
    _entry("olmoe", "R1", "X1", "OlmoeConfig", "OlmoeForCausalLM"),
    _entry("flex_olmo", "R1", "X1", "FlexOlmoConfig", "FlexOlmoForCausalLM"),
    _entry("mellum", "R1", "X1", "MellumConfig", "MellumForCausalLM"),
    _entry("mixtral", "R1", "X1", "MixtralConfig", "MixtralForCausalLM"),
    _entry("minimax", "R1", "X1", "MiniMaxConfig", "MiniMaxForCausalLM", **FULL),
    _entry("jamba", "R1", "X1", "JambaConfig", "JambaForCausalLM", expert_layer_period=1, expert_layer_offset=0, attn_layer_period=1,
           attn_layer_offset=0, use_mamba_kernels=False),
    _entry("hunyuan_v1_moe", "R1", "X1", "HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM"),
    _entry("gemma4", "R1g", "X1", "Gemma4TextConfig", "Gemma4ForCausalLM", enable_moe_block=True, top_k_experts=2,
           hidden_size_per_layer_input=0, global_head_dim=8, **FULL),
    _entry("diffusion_gemma", "R1g", "X1", "DiffusionGemmaTextConfig", "DiffusionGemmaEncoderTextModel", top_k_experts=2, global_head_dim=8,
           scope="encoder's text model", **FULL),
    _entry("dbrx", "R1d", "X7", "DbrxConfig", "DbrxForCausalLM", d_model=HIDDEN, n_heads=4, n_layers=2, max_seq_len=64,
           attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
           ffn_config=dict(ffn_hidden_size=24, moe_num_experts=8, moe_top_k=2, moe_normalize_expert_weights=2.0), implementations=PLAIN),
    # R2: top-k, then softmax
    _entry("granitemoe", "R2", "X1", "GraniteMoeConfig", "GraniteMoeForCausalLM"),
    _entry("granitemoe_swa", "R2", "X1", "GraniteMoeSWAConfig", "GraniteMoeSWAForCausalLM"),
    _entry("granitemoeshared", "R2", "X1", "GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM"),
    _entry("granitemoehybrid", "R2", "X1", "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", mamba_n_heads=8, **FULL),
    _entry("aria", "R2", "X2", "AriaTextConfig", "AriaTextForCausalLM", moe_num_experts=8, moe_topk=2),
    _entry("gpt_oss", "R2", "X3", "GptOssConfig", "GptOssForCausalLM", swiglu_limit=1.5),
    _entry("openai_privacy_filter", "R2", "X2", "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterModel", swiglu_limit=1.5, scope="encoder",
           inputs="tokens_only"),
    _entry("cohere2_moe", "R2", "X1", "Cohere2MoeConfig", "Cohere2MoeForCausalLM", expert_selection_fn="softmax", num_shared_experts=1),
    _entry("jetmoe", "R2", "X7", "JetMoeConfig", "JetMoeForCausalLM", kv_channels=8, implementations=PLAIN, inputs="tokens"),
    # R3: score and selection bias
    _entry("afmoe", "R3", "X1", "AfmoeConfig", "AfmoeForCausalLM", route_scale=2.826, num_shared_experts=1),
    _entry("hy_v3", "R3", "X1", "HYV3Config", "HYV3ForCausalLM", router_scaling_factor=2.826, **SPARSE),
    _entry("dots3_note+vision", "R3", "X1", "Dots3NoteVisionConfig", "Dots3NoteVisionModel", pyramid_num_routed=[8, 8], patch_size=4,
           router_scaling_factor=1.75, adapter_in_dim=HIDDEN, adapter_out_dim=HIDDEN, scope="vision encoder", inputs="patches"),
    _entry("minimax_m2", "R3", "X1", "MiniMaxM2Config", "MiniMaxM2ForCausalLM"),
    _entry("minimax_m3_vl", "R3", "X4", "MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM", swiglu_limit=1.5, dense_intermediate_size=40,
           rotary_dim=8, **SPARSE, **FULL),
    _entry("step3p7", "R3", "X7", "Step3p7TextConfig", "Step3p7TextModel", share_expert_dim=20, moe_router_scaling_factor=1.75,
           swiglu_limits=[0.0, 1.5], implementations=PLAIN, scope="text model", **SPARSE),
    _entry("lfm2_moe", "R3", "X1", "Lfm2MoeConfig", "Lfm2MoeForCausalLM", **FULL),
    _entry("laguna", "R3", "X1", "LagunaConfig", "LagunaForCausalLM", moe_routed_scaling_factor=1.75, moe_router_logit_softcapping=3.0,
           **SPARSE, **FULL),
    _entry("muse_spark", "R3", "X5", "MuseSparkTextConfig", "MuseSparkTextModel", moe_hidden_size=24, scope="text model",
           note="an RMSNorm after each expert"),
    _entry("deepseek_v4", "R3", "X4", "DeepseekV4Config", "DeepseekV4ForCausalLM", swiglu_limit=1.5, mlp_layer_types=["moe", "moe"]),
    _entry("inkling2", "R3", "X5", "Inkling2TextConfig", "Inkling2ForCausalLM"),
    _entry("flint", "R3'", "X1", "FlintConfig", "FlintForCausalLM", mlp_only_layers=[], **FULL),
    _entry("kolibri1", "R3'", "X1", "Kolibri1Config", "Kolibri1ForCausalLM"),
    _entry("cohere2_moe+sigmoid", "R3'", "X1", "Cohere2MoeConfig", "Cohere2MoeForCausalLM", expert_selection_fn="sigmoid"),
    # R4: R3 with groups
    _entry("deepseek_v3", "R4", "X1", "DeepseekV3Config", "DeepseekV3ForCausalLM", **GROUPED, **SAME_KV),
    _entry("deepseek_v32", "R4", "X1", "DeepseekV32Config", "DeepseekV32ForCausalLM", **GROUPED, **SAME_KV, **SPARSE),
    _entry("dots1", "R4", "X1", "Dots1Config", "Dots1ForCausalLM", n_shared_experts=1, norm_topk_prob=False, note="no renormalisation",
           **GROUPED, **SAME_KV),
    _entry("glm4_moe", "R4", "X1", "Glm4MoeConfig", "Glm4MoeForCausalLM", **GROUPED),
    _entry("glm4_moe_lite", "R4", "X1", "Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", **GROUPED, **SAME_KV, **SPARSE),
    _entry("glm4v_moe", "R4", "X1", "Glm4vMoeTextConfig", "Glm4vMoeTextModel", scope="text model",
           rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=1.0, mrope_section=[2, 1, 1]), **GROUPED),
    _entry("glm5_next", "R4", "X4", "Glm5NextTextConfig", "Glm5NextTextModel", scope="text model", swiglu_limit=1.5, qk_rope_head_dim=0,
           head_dim=0, linear_head_dim=8, linear_num_heads=4, **GROUPED, **SAME_KV, **SPARSE),
    _entry("glm_moe_dsa", "R4", "X1", "GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", **GROUPED, **SAME_KV, **SPARSE),
    _entry("solar_open", "R4", "X1", "SolarOpenConfig", "SolarOpenForCausalLM", **GROUPED),
    _entry("exaone_moe", "R4", "X1", "ExaoneMoeConfig", "ExaoneMoeForCausalLM", **GROUPED, **SPARSE),
    _entry("mimo_v2_flash", "R4", "X1", "MiMoV2FlashConfig", "MiMoV2FlashForCausalLM", **GROUPED, **SPARSE),
    _entry("kimi_linear", "R4", "X1", "KimiLinearConfig", "KimiLinearForCausalLM", **GROUPED, **SAME_KV, **SPARSE, **FULL),
    _entry("bailing_hybrid", "R4", "X1", "BailingHybridConfig", "BailingHybridForCausalLM", **GROUPED, **SAME_KV, **SPARSE, **FULL),
    _entry("nemotron_h", "R4", "X5", "NemotronHConfig", "NemotronHForCausalLM",
           layers_block_type=["full_attention", "moe", "full_attention", "moe"], moe_latent_size=16, **GROUPED),
    _entry("hy_v4", "R4", "X4", "HYV4Config", "HYV4ForCausalLM", swiglu_limit=1.5, **GROUPED, **SPARSE),
    _entry("axk1", "R4", "X1", "AXK1Config", "AXK1ForCausalLM", **GROUPED, **SAME_KV, **SPARSE),
    _entry("axk2", "R4", "X1", "AXK2Config", "AXK2ForCausalLM", note="losing groups are masked with 0, not -inf", **GROUPED, **SAME_KV,
           **SPARSE),
    _entry("dots3_note", "R4", "X1", "Dots3NoteTextConfig", "Dots3NoteForCausalLM", shared_experts_intermediate_size=20, **GROUPED,
           **SAME_KV, **SPARSE, **FULL),
    _entry("beam", "R4", "X5", "BeamConfig", "BeamForCausalLM", **GROUPED, **SPARSE),
    # R5: softmax with groups
    _entry("deepseek_v2", "R5", "X1", "DeepseekV2Config", "DeepseekV2ForCausalLM", topk_method="group_limited_greedy", **GROUPED,
           **SAME_KV),
    _entry("deepseek_v2+greedy", "R5", "X1", "DeepseekV2Config", "DeepseekV2ForCausalLM", topk_method="greedy", note="no groups",
           **SAME_KV),
    _entry("deepseek_ocr2", "R5", "X1", "DeepseekOcr2TextConfig", "DeepseekOcr2TextModel", topk_method="group_limited_greedy",
           scope="text model", **GROUPED, **SPARSE),
    _entry("unlimited_ocr", "R5", "X1", "UnlimitedOcrTextConfig", "UnlimitedOcrTextModel", topk_method="group_limited_greedy",
           scope="text model", **GROUPED, **SPARSE),
    _entry("mistral4", "R5", "X1", "Mistral4Config", "Mistral4ForCausalLM", **GROUPED, **SAME_KV),
    _entry("mistral_large4", "R5", "X1", "MistralLarge4TextConfig", "MistralLarge4TextModel", scope="text model", **GROUPED, **SAME_KV,
           **SPARSE),
    # R6: softmax with selection bias
    _entry("ernie4_5_moe", "R6", "X1", "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", moe_layer_start_index=0, moe_norm_min=0.35,
           moe_num_shared_experts=1),
    _entry("ernie4_5_vl_moe", "R6", "X1", "Ernie4_5_VLMoeTextConfig", "Ernie4_5_VLMoeTextModel", scope="text model",
           moe_intermediate_size=[24, 16], moe_norm_min=0.35, moe_num_shared_experts=1,
           rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]), **SPARSE),
    _entry("longcat_flash", "R6", "X7", "LongcatFlashConfig", "LongcatFlashForCausalLM", num_layers=2, moe_topk=3, zero_expert_num=4,
           expert_ffn_hidden_size=24, ffn_hidden_size=40, implementations=PLAIN, **SAME_KV),
    # others
    _entry("llama4", "R7", "X6", "Llama4TextConfig", "Llama4ForCausalLM", intermediate_size_mlp=40, num_experts_per_tok=2,
           implementations=PLAIN, **FULL),
    _entry("phimoe", "R8", "X1", "PhimoeConfig", "PhimoeForCausalLM", gating=False, router_jitter_noise=0.1,
           note="sparsemixer: two masked argmaxes, no top-k"),
    _entry("inkling", "R9", "X1", "InklingTextConfig", "InklingForCausalLM", gating=False,
           note="weights normalised jointly with those of the shared experts"),
    _entry("deepseek_v4+hash", "R10", "X4", "DeepseekV4Config", "DeepseekV4ForCausalLM", swiglu_limit=1.5,
           mlp_layer_types=["hash_moe", "moe"], gating=False, prepare=_fill_hash_table,
           note="first layer: experts from a table of token ids"),
    _entry("zaya", "R12", "X1", "ZayaConfig", "ZayaForCausalLM", gating=False, num_experts_per_tok=1, router_hidden_size=16,
           note="an MLP router with state across layers and a skip expert"),
]
# fmt: on

# Left out, with the reason. Each is a kind of routing that is not "k experts of E for every token".
EXCLUDED: dict[str, str] = {
    "switch_transformers": "R11, capacity: tokens beyond an expert's capacity are dropped; experts in a ModuleDict",
    "nllb_moe": "R11, capacity with random second expert and batch priority; tokens are dropped",
    "doge": "R12, product-key retrieval: the experts are single rows of an embedding, not MLPs",
    "vitpose_backbone": "R12, one extra MLP per dataset index given by the caller; no router",
    "vitpose": "uses the vitpose_backbone",
    "bamba": "no MoE: the words occur in inherited code only",
    "gemma3n": "no MoE: the words occur in inherited code only",
    "gemma4_unified": "no MoE: the words occur in inherited code only",
    "granite_docling": "no MoE: the words occur in inherited code only",
}
