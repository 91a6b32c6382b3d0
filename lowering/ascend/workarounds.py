"""Bugs of the torch_npu wheel that lowered graphs would meet, each worked around in one place, where this wheel shows it.

Whether it does is tried, never read off a version: the same text stands in every wheel from 2.9 to 2.14, and nobody knows about the next.
Elsewhere, because they are matters of how a call is made, right in any wheel: npugraph_ex.record/wait emit no event (streams.NpugraphEx
uses tagged events); init_routing_v2 keeps the first default of active_expert_range (rules.py demands it); active_num is a plain int
(rules.py demands -1).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
import torch.fx as fx


@dataclass(frozen=True)
class Workaround:
    """`fails()` tries what is said to be broken; `mend()` replaces it."""

    what: str
    fails: Callable[[], bool]
    mend: Callable[[], None]


@functools.cache
def install() -> list[str]:
    """Apply what this wheel needs; returns what was applied. Needs torchair."""
    return apply(KNOWN)


def apply(known: tuple[Workaround, ...]) -> list[str]:
    applied = []
    for w in known:
        if w.fails():
            w.mend()
            applied.append(w.what)
    return applied


# ---- the GE converter of npu_moe_gating_top_k_softmax_v2 -------------------------------------------------------------------


def _softmax_v2_fails() -> bool:
    """Whether a graph of this one op does not become the node that it means."""
    import torchair

    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4, 8, device="meta")
    top = graph.call_function(torch.ops.npu.npu_moe_gating_top_k_softmax_v2.default, (x,), {"k": 2, "renorm": 1})
    graph.output((graph.call_function(getitem, (top, 0)),))
    try:
        compiled = torchair.get_compiler(torchair.CompilerConfig())(fx.GraphModule({}, graph), [x.meta["val"]])
        return all(op.type != "MoeGatingTopKSoftmaxV2" for op in compiled.runner.graph.op)
    except Exception:  # the wheel hands `renorm` to an op that has no such attribute: TypeError
        return True


def _mend_softmax_v2() -> None:
    """A converter to the op that is meant."""
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


KNOWN = (Workaround("GE converter of npu_moe_gating_top_k_softmax_v2", _softmax_v2_fails, _mend_softmax_v2),)
