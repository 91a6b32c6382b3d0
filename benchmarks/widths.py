"""Widths of a well-known checkpoint, for models of tests/zoo.py whose configuration class has others as its defaults."""

from __future__ import annotations

from typing import Any

WIDTHS: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": dict(hidden_size=4096, moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8),  # 235B-A22B
    "hunyuan_v1_moe": dict(hidden_size=4096, intermediate_size=3072, num_experts=64, moe_topk=8),  # A13B
    "gemma4": dict(hidden_size=2816, moe_intermediate_size=704, num_experts=128, top_k_experts=8),  # 26B-A4B
    "diffusion_gemma": dict(hidden_size=2816, moe_intermediate_size=704, num_experts=128, top_k_experts=8),
    "dbrx": dict(
        d_model=6144,
        n_heads=48,
        attn_config=dict(kv_n_heads=8, clip_qkv=8.0, rope_theta=500000.0),
        ffn_config=dict(ffn_hidden_size=10752, moe_num_experts=16, moe_top_k=4),
    ),
    "granitemoe": dict(hidden_size=1536, intermediate_size=512, num_local_experts=40, num_experts_per_tok=8),  # 3.0 3b-a800m
    "granitemoe_swa": dict(hidden_size=1536, intermediate_size=512, num_local_experts=40, num_experts_per_tok=8),
    "granitemoeshared": dict(hidden_size=1536, intermediate_size=512, num_local_experts=40, num_experts_per_tok=8),
    "granitemoehybrid": dict(hidden_size=4096, intermediate_size=768, num_local_experts=72, num_experts_per_tok=10),  # 4.0-h-small
    "aria": dict(hidden_size=2560, intermediate_size=1664, moe_num_experts=64, moe_topk=6),
    "afmoe": dict(hidden_size=2048, moe_intermediate_size=1024, num_experts=128, num_experts_per_tok=8, route_scale=2.826),  # Trinity Mini
    "dots1": dict(hidden_size=4096, moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=6, n_shared_experts=2),
    "glm4_moe": dict(hidden_size=4096, moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=8),  # GLM-4.5-Air
    "exaone_moe": dict(hidden_size=6144, moe_intermediate_size=2048, num_experts=128, num_experts_per_tok=8),  # K-EXAONE
    "nemotron_h": dict(hidden_size=2688, moe_intermediate_size=1856, n_routed_experts=128, num_experts_per_tok=6),  # Nemotron 3 Nano
    "step3p7": dict(hidden_size=4096, moe_intermediate_size=1280, n_routed_experts=288, num_experts_per_tok=8, sliding_window=512),
    "deepseek_v2": dict(  # V2
        hidden_size=5120,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        num_attention_heads=128,
        num_key_value_heads=128,
    ),
    "deepseek_v2+greedy": dict(  # V2-Lite
        hidden_size=2048,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        num_attention_heads=16,
        num_key_value_heads=16,
    ),
    "longcat_flash": dict(num_key_value_heads=64),
    "glm4v_moe": dict(
        head_dim=128, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[8, 12, 12])
    ),
    "qwen3_omni_moe": dict(  # 30B-A3B, its thinker
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    ),
    "deepseek_ocr2": dict(hidden_size=1280, moe_intermediate_size=896, n_routed_experts=64, num_experts_per_tok=6, n_group=1, topk_group=1),
}
