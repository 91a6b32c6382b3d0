"""A small model with random weights of any transformers model type, for the command line.

Knows no model: sizes are shrunk by what a configuration field is called, everything that makes the routing (number of experts, k, groups,
scales, score functions) keeps its default.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

import torch

VOCAB, TOKENS = 256, 16

# field name -> new value; the first pattern that matches wins. Heads x head size = hidden size, which many models assume.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size(_per_layer_input)?", VOCAB),
    (r"(pad|bos|eos|decoder_start|image|video|audio)_token_id|.*_token_id", 0),
    (r"(num_(hidden_|decoder_|text_)?layers|n_layers?|num_blocks)", 2),
    (r"(first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_mtp_layers|moe_layer_start_index)", 0),
    (r"(decoder_sparse_step|moe_layer_freq|moe_layer_interval|moe_layer_frequency|interleave_moe_layer_step|expert_layer_period)", 1),
    (r"expert_layer_offset", 0),
    (r"mlp_only_layers", []),
    (r"(mlp_layer_types|layer_types|layers_block_type|hybrid_override_pattern|no_rope_layers|moe_layers)", None),
    (r".*(ffn|ffn_hidden|intermediate|latent)_(size|dim)", 32),
    (r"(.*hidden_size|d_model|dim|emb_dim|embedding_size|hidden_size_per_layer_input)", 64),
    (r"(num_attention_heads|n_heads?|num_heads)", 4),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|swa_num_key_value_heads|num_global_key_value_heads)", 2),
    (r"(head_dim|v_head_dim|qk_nope_head_dim|global_head_dim|swa_head_dim|swa_v_head_dim|index_head_dim|attention_head_dim)", 16),
    (r"qk_rope_head_dim|rotary_dim|rope_head_dim|partial_rotary_dim", 8),
    (r".*_lora_rank|.*_latent_(size|dim|rank)", 16),
    (r"linear_((key|value)_)?head_dim", 16),
    (r"linear_num_((key|value)_)?heads", 4),
    (r"(mamba_(n_heads|num_heads))", 8),
    (r"(mamba_(d_head|head_dim|d_state)|ssm_state_size)", 16),
    (r"mamba_n_groups|n_groups", 1),
    (r"(sliding_window|attention_chunk_size|window_size)", 16),
    (r"max_position_embeddings|max_seq_len|max_sequence_length", 128),
    (r"initializer_range", 0.1),
)
# A default of one expert, or none, or an unset k makes no MoE model: these stand in for it.
_AT_LEAST = (
    (r"(num_experts|num_local_experts|n_routed_experts)", 8, (None, 1)),
    (r"(num_experts_per_tok|moe_topk|moe_top_k|top_k_experts)", 2, (None,)),
    (r"(n_shared_experts|num_shared_experts)", 1, (None,)),
)
# What models assume about each other's fields is not written down anywhere: these are tried in turn until one runs.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": 16},
    {"head_dim": 8, "num_key_value_heads": 4},
    {"index_n_heads": 4, "linear_num_heads": 4, "num_key_value_heads": 4},
    {"layer_types": ["full_attention"] * 2},
    {"layer_types": ["full_attention"] * 2, "num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"sliding_window": 16},
    {"head_dim": 64},
)


# what stands in a checkpoint's config.json beside the fields of its class
_OF_CHECKPOINTS = {"architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "quantization_config", "_name_or_path"}
_OF_CHECKPOINTS |= {"model_type", "rope_theta", "rope_scaling", "attn_implementation", "_attn_implementation", "use_bfloat16"}


class NoSuchModel(ValueError):
    """The model type is unknown, or no small version of it can be built; the message says which and what to do."""


def build(model_type: str, seed: int = 0) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A tiny model of a transformers model type, in eval mode, and keyword arguments for one forward.

    Raises ImportError when transformers is not installed, `NoSuchModel` for an unknown type or one that cannot be shrunk.
    """
    config_class = _text_part(_config_class(model_type))
    model_class = _model_class(config_class)
    ids = torch.randint(2, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    first: Exception | None = None
    for variant in _VARIANTS:
        if not variant.keys() <= {f.name for f in dataclasses.fields(config_class)}:
            continue
        try:
            torch.manual_seed(seed)
            model = model_class(config_class(**{**_small(config_class), **variant}))
            inputs = {"input_ids": ids, "use_cache": False}
            with torch.no_grad():
                model.eval()(**inputs)
            return model, inputs
        except Exception as e:
            first = first or e
    raise NoSuchModel(
        f"no small {model_type!r} can be made from its default configuration ({type(first).__name__}: {first}); "
        "build a model yourself and call moe_compile.explain(model, input_ids)"
    ) from first


def build_full(model_type: str, fields: Sequence[str] = ()) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model of a transformers model type at its default size in bf16, and keyword arguments for one forward, all on the meta device.

    fields: "name=value", fields of the configuration to be set. Raises ImportError when transformers is not installed, `NoSuchModel` for
    an unknown type, a field that it does not have, or values that make no model.
    """
    model = model_of(model_type, dict(map(field, fields)), torch.device("meta"))
    return model, {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64, device="meta"), "use_cache": False}


def model_of(model_type: str, given: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """A model of a transformers model type with these fields of its configuration, in bf16 and eval mode. Raises as `build_full`."""
    config_class = _text_part(_config_class(model_type))
    parts = [given[n] for n in ("text_config", "thinker_config") if isinstance(given.get(n), dict)]
    given = next(iter(parts), given)  # of a model of several parts the text's
    known = {f.name for f in dataclasses.fields(config_class)}
    if unknown := sorted(given.keys() - known - _OF_CHECKPOINTS):
        close = difflib.get_close_matches(unknown[0], known, 5)
        raise NoSuchModel(f"{model_type!r} has no configuration field {unknown[0]!r}; close ones: {', '.join(close) or 'none'}")
    try:
        with device:
            return _model_class(config_class)(config_class(**given)).to(torch.bfloat16).eval()  # type: ignore[no-any-return]
    except Exception as e:
        raise NoSuchModel(f"no {model_type!r} can be made of {given}: {type(e).__name__}: {e}") from e


def field(text: str) -> tuple[str, Any]:
    """ "num_experts=128" -> a number, a truth value, a list or None where it is one, else a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise NoSuchModel(f"{text!r} is no NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


# What the sizes of an MoE layer are called in configurations, the most specific name first.
_SIZES = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "hidden": ("hidden_size", "d_model"),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size"),
    "k": ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"),
}


def moe_sizes(model_type: str) -> dict[str, int]:
    """Of experts, hidden, intermediate and k what the default configuration of a transformers model type says.

    Raises as `build` does for a missing transformers or an unknown type.
    """
    config = _text_part(_config_class(model_type))()
    found = {}
    for size, names in _SIZES.items():
        values = (getattr(config, name, None) for name in names)
        value = next((v for v in values if type(v) is int), None)
        if value is not None:
            found[size] = value
    return found


def _config_class(model_type: str) -> type:
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise ImportError("--model needs transformers: pip install 'moe-compile[examples]'") from None
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), 5)
        hint = f"; close ones: {', '.join(close)}" if close else ""
        raise NoSuchModel(f"transformers knows no model type {model_type!r}{hint}")
    return CONFIG_MAPPING[model_type]


def _text_part(cls: Any) -> Any:
    """Of a model made of several parts (vision, audio, text), the text part's configuration class."""
    parts = getattr(cls, "sub_configs", None) or {}
    for name in ("text_config", "thinker_config"):
        part = parts.get(name)
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return _text_part(part)
    return cls


def _small(cls: Any) -> dict[str, Any]:
    """Small sizes for a configuration of class `cls`."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        shrink = [new for pattern, new in _RULES if re.fullmatch(pattern, f.name)]
        raise_ = [new for pattern, new, low in _AT_LEAST if re.fullmatch(pattern, f.name) and f.default in low]
        if f.init and raise_:
            values[f.name] = raise_[0]
        elif f.init and shrink and _shrinks(f.default, shrink[0]):
            values[f.name] = shrink[0]
    return values


def _shrinks(default: Any, new: Any) -> bool:
    """Whether a rule's value can stand in for a field's default: never grow, never switch on what is off."""
    if default is None or default is dataclasses.MISSING:
        return new is None or new == []
    if isinstance(new, (int, float)) and isinstance(default, (int, float)) and not isinstance(default, bool):
        return new < default
    return new is None or isinstance(new, list)


def _model_class(config_class: Any) -> Any:
    """The causal language model of a configuration class, or its bare model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if config_class in mapping:
            found = mapping[config_class]
            return found[0] if isinstance(found, (list, tuple)) else found
    found = _in_same_package(config_class)
    if found is None:
        raise NoSuchModel(f"transformers has no text model for model type {config_class.model_type!r}")
    return found


def _in_same_package(config_class: Any) -> Any:
    """A model whose `config_class` this is, from the module that stands beside the configuration's; the largest whole is last."""
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    models: list[Any] = [m for m in vars(module).values() if isinstance(m, type) and getattr(m, "config_class", None) is config_class]
    takes_ids = [m for m in models if "input_ids" in inspect.signature(m.forward).parameters]
    return next((m for m in takes_ids if m.__name__.endswith("ForCausalLM")), takes_ids[-1] if takes_ids else None)
