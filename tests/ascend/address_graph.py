"""A graph that is captured by address, as npugraph_ex captures one: for tests of what such a graph may and may not rely on.

Inputs that are told to be static are read where they were when the graph was captured; all others are copied into buffers of the graph
on every replay. A capture is looked up by the addresses of the static inputs, unless these are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx
from torch import Tensor, nn


def is_static(t: Any) -> bool:
    return isinstance(t, nn.Parameter) or hasattr(t, "_dynamo_static_input_type") or hasattr(t, "_torchair_is_parameter")


class AddressGraph:
    """`backend` compiles; `captures`: how often a graph was captured; `copied`: bytes of the inputs copied by the last call."""

    def __init__(self, frozen: bool = False) -> None:
        self.frozen, self.captures, self.copied = frozen, 0, 0

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        static = [i for i, t in enumerate(example_inputs) if isinstance(t, Tensor) and is_static(t)]
        captured: dict[tuple[int, ...], dict[int, Tensor]] = {}

        def run(*args: Any) -> Any:
            key = () if self.frozen else tuple(args[i].data_ptr() for i in static)
            if key not in captured:
                self.captures += 1
                captured[key] = {i: args[i].detach() for i in static}
            self.copied = sum(t.numel() * t.element_size() for i, t in enumerate(args) if isinstance(t, Tensor) and i not in static)
            return gm(*[captured[key].get(i, a) for i, a in enumerate(args)])

        return run
