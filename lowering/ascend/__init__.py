"""The Ascend target: fused ops become calls of npu ops, for torchair's graph modes or the eager npu backend.

Checked without an NPU: laws (`law`), argument rules (`rules`), emulated numerics (`emulate`), the real
torch_npu wheel (tests/ascend/test_wheel.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx
from torch import nn

from ..target import Rest, Target
from . import capability, device
from .options import AscendOptions, check_inner


def _finish(rest: Rest, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    from . import modes  # when there is a graph to lower: most processes have no NPU

    return modes.finish(rest, gm, example_inputs)


def _rearrange(model: nn.Module, training: bool, weight_format: str) -> dict[str, int]:
    from . import rearrange

    return rearrange.prepare(model, training, weight_format)


TARGET = Target(
    name="ascend",
    devices=("npu",),
    refuses=capability.refuses,
    says=capability.says,
    options=AscendOptions,
    finish=_finish,
    check_inner=check_inner,
    rearrange=_rearrange,
    missing=capability.missing,
    machine=lambda: device.family(),
    places=True,
    coded=True,  # int8 weights with scales: npu_grouped_matmul takes both
)
