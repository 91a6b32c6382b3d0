"""The options that only the Ascend target has."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import OptionError, one_of

MODES = ("auto", "ge", "npugraph_ex", "eager")


@dataclass(frozen=True)
class AscendOptions:
    """mode: which graph mode: "ge", "npugraph_ex", "eager" ("auto": npugraph_ex where the wheel has it, else ge; training: eager).

    quantize: "w8a8": experts in int8 with dynamic scales (inference); "w8a8c8": activations clipped besides, where the custom op for it
        is registered, ("w8a8c8", alpha) each row to ±alpha · max (0 < alpha <= 1; alone: 1, no clipping).
    weight_format: "nz": packed expert weights in the fractal format, in training cast where they are used; "nd": as they are.
    combine: the op that sums the experts' rows at inference: "finalize" (npu_moe_finalize_routing, in fp32, shared expert inside) or
        "unpermute" (npu_moe_token_unpermute, what training uses; not with mode "ge"), to tell one from the other.
    mega_moe: experts over ranks in one kernel, where cann_ops_transformer has it and the block is within its limits.
    distinct_places: your word that a table of replicas (count, places) names physical experts, each once: what is read from it counts as
        distinct experts then, as dispatch over ranks needs them.
    core_limit: (cube cores, vector cores) that the side stream of the shared expert may use.
    """

    mode: str = "auto"
    quantize: str | tuple[str, float] | None = None
    weight_format: str = "nd"
    combine: str = "finalize"
    mega_moe: bool = False
    distinct_places: bool = False
    core_limit: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        _check_quantize(self.quantize)
        one_of("weight_format", self.weight_format, ("nd", "nz"))
        one_of("combine", self.combine, ("finalize", "unpermute"))
        one_of("mega_moe", self.mega_moe, (False, True))
        one_of("distinct_places", self.distinct_places, (False, True))
        _check_core_limit(self.core_limit)
        if self.mode == "ge":
            refuse_in_ge(self.combine)


def refuse_in_ge(combine: str) -> None:
    if combine == "unpermute":
        raise OptionError("option 'combine' is 'unpermute', which GE has no converter for; allowed with mode 'ge': 'finalize'")


def _check_quantize(quantize: Any) -> None:
    if isinstance(quantize, (tuple, list)):
        alpha = quantize[1] if len(quantize) == 2 and quantize[0] == "w8a8c8" else None
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= 1:
            raise OptionError(f"option 'quantize' is {quantize!r}; allowed: ('w8a8c8', alpha) with 0 < alpha <= 1")
        return
    one_of("quantize", quantize, (None, "w8a8", "w8a8c8"))


def _check_core_limit(limit: Any) -> None:
    pair = isinstance(limit, (tuple, list)) and len(limit) == 2 and all(type(n) is int and n > 0 for n in limit)
    if limit is not None and not pair:
        raise OptionError(f"option 'core_limit' is {limit!r}; allowed: None or (cube cores, vector cores), two positive integers")


# Of the graph modes' `CompilerConfig`s (torch_npu 2.13): the parts of GE's first, whose names may go on behind a dot
_PARTS = (
    *("debug", "export", "dump_config", "fusion_config", "inference_config", "aoe_config", "experimental_config", "ge_config"),
    *("aclgraph_config", "npugraphex_config"),
)
_INNER = (
    *("mode", "post_grad_custom_pre_pass", "post_grad_custom_post_pass", "force_eager", "static_kernel_compile", "frozen_parameter"),
    *("capture_limit", "clone_input", "clone_output", "inplace_pass", "input_inplace_pass", "pattern_fusion_pass", "remove_noop_ops"),
    *("remove_cat_ops", "use_graph_pool", "reuse_graph_pool_in_same_fx", "super_kernel_optimize", "super_kernel_optimize_options"),
    *("super_kernel_debug_options", "deadlock_check", "capture_error_mode", "force_recapture", "dump_tensor_data", "data_dump_stage"),
    *("data_dump_dir", "disable_static_kernel_compile_cache", "unsafe_skip_npugraph_capture_validation", "record_statistics_debug_info"),
)


def check_inner(given: Mapping[str, Any]) -> None:
    """Raises `OptionError` for names that no graph mode's config has.

    Where torch_npu is installed the config itself tells (`modes`), for it may be newer.
    """
    if importlib.util.find_spec("torch_npu") is not None:
        return
    for name in given:
        first, dot, _ = name.partition(".") if isinstance(name, str) else ("", "", "")
        if first not in _PARTS and (dot or first not in _INNER):
            allowed = ", ".join((*_INNER, *(f"{p}.…" for p in _PARTS)))
            raise OptionError(
                f"option 'inner_options' holds {name!r}, which the graph modes of target 'ascend' do not take; allowed: {allowed}"
            )
