"""Bugs of the torch_npu wheel that lowered graphs would meet, each worked around in one place, with the versions it is known in.

Elsewhere, because they are matters of how a call is made: npugraph_ex.record/wait emit no event (streams.NpugraphEx uses tagged events);
init_routing_v2 keeps the first default of active_expert_range (rules.py demands it); active_num is a plain int (rules.py demands -1).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

# what is worked around -> versions of torch_npu in which it was seen
KNOWN = {"GE converter of npu_moe_gating_top_k_softmax_v2": ("2.13",)}


@functools.cache
def install() -> list[str]:
    """Apply what this wheel needs; returns what was applied. Needs torchair."""
    import torch_npu

    version = ".".join(torch_npu.__version__.split("+")[0].split(".")[:2])
    applied = []
    for what, apply in _FIXES.items():
        if version in KNOWN[what]:
            apply()
            applied.append(what)
    return applied


def _softmax_v2() -> None:
    """The wheel's converter hands `renorm` to an op that has no such attribute: TypeError. The op it means is MoeGatingTopKSoftmaxV2."""
    import torchair

    # loaded now, or the wheel's converter is registered behind this one when the first graph is converted
    importlib.import_module("torchair._ge_concrete_graph.ge_converter.custom.npu_moe_gating_top_k_softmax_v2")
    from torchair._ge_concrete_graph.compat_ir import ge_op
    from torchair.ge import attr

    @torchair.register_fx_node_ge_converter(torch.ops.npu.npu_moe_gating_top_k_softmax_v2.default)
    def convert(
        x: Any, *, k: int = 1, finished: Any = None, renorm: int = 0, output_softmax: bool = False, meta_outputs: Any = None
    ) -> Any:
        return ge_op(
            op_type="MoeGatingTopKSoftmaxV2",
            inputs={"x": x, "finished": finished},
            attrs={"k": attr.Int(k), "renorm": attr.Int(renorm or 0), "output_softmax": attr.Bool(bool(output_softmax))},
            outputs=["y", "expert_idx", "softmax_result"],
        )


_FIXES: dict[str, Callable[[], None]] = {"GE converter of npu_moe_gating_top_k_softmax_v2": _softmax_v2}
