"""The models of tests/zoo.py at the widths of their well-known checkpoints, a few layers of each, on weights without memory.

A configuration class of transformers has the widths of its flagship as defaults; `WIDTHS` holds those of a well-known checkpoint where
the defaults are not of one.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo

# Of the tiny models' arguments those that say how the model is built; all others are sizes
STRUCTURE = frozenset(
    (
        "norm_topk_prob router_jitter_noise num_hidden_layers first_k_dense_replace num_dense_layers num_nextn_predict_layers "
        "num_mtp_layers mlp_layer_types layer_types layers_block_type topk_method enable_moe_block expert_selection_fn expert_layer_period "
        "expert_layer_offset attn_layer_period attn_layer_offset use_mamba_kernels mlp_only_layers moe_layer_start_index "
        "hidden_size_per_layer_input num_layers routed_scaling_factor pyramid_num_routed patch_size adapter_in_dim adapter_out_dim"
    ).split()
)

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
    "deepseek_v2": dict(  # V2
        hidden_size=5120, moe_intermediate_size=1536, n_routed_experts=160, num_experts_per_tok=6, n_group=8, topk_group=3
    ),
    "deepseek_v2+greedy": dict(hidden_size=2048, moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6),  # V2-Lite
    "deepseek_ocr2": dict(hidden_size=1280, moe_intermediate_size=896, n_routed_experts=64, num_experts_per_tok=6, n_group=1, topk_group=1),
}


@dataclasses.dataclass(frozen=True)
class Real:
    """A model of the zoo at its real widths with `layers` layers."""

    entry: zoo.Entry
    layers: int

    def config(self) -> Any:
        cls = getattr(zoo._module(self.entry.package, "configuration"), self.entry.config)
        known = {f.name for f in dataclasses.fields(cls)} | set(cls.attribute_map)
        given = {k: v for k, v in {**zoo.COMMON, **self.entry.kwargs}.items() if k in STRUCTURE and (k in known or k in self.entry.kwargs)}
        given = {k: self._stretched(v) for k, v in given.items()}
        for name in ("num_hidden_layers", "num_layers", "n_layers"):
            if name in known and (name in given or name == "n_layers"):
                given[name] = self.layers
        if "num_layers" in given:
            given.pop("num_hidden_layers", None)
        widths = {k: v for k, v in WIDTHS.get(self.entry.name, {}).items() if k in known or k.endswith("_config")}
        return cls(**{**given, **widths})

    def _stretched(self, v: Any) -> Any:
        """One entry a layer."""
        return (v * self.layers)[: len(v) // 2 * self.layers] if isinstance(v, list) else v

    def build(self, dtype: torch.dtype = torch.bfloat16, implementation: str = "default") -> torch.nn.Module:
        """In eval mode, its parameters and buffers fake: shapes and types of the CPU, no memory."""
        config = self.config()
        if implementation != "default":
            config._experts_implementation = implementation
        with torch.device("meta"):
            model = getattr(zoo._module(self.entry.package, "modeling"), self.entry.model)(config)
        return without_memory(model.to(dtype)).eval()


def without_memory(model: torch.nn.Module, mode: FakeTensorMode | None = None) -> torch.nn.Module:
    """Parameters and buffers become fake CPU tensors, in place."""
    made: dict[int, torch.Tensor] = {}
    with mode if mode is not None else MODE:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, t in held.items():
                    if t is not None and id(t) not in made:
                        new = torch.empty(t.shape, dtype=t.dtype)
                        made[id(t)] = torch.nn.Parameter(new, requires_grad=False) if held is module._parameters else new
                    if t is not None:
                        held[name] = made[id(t)]  # type: ignore[assignment]
    return model


MODE = FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without values."""
    with MODE:
        return {k: torch.empty(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
