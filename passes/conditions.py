"""Under what a graph runs: whether a gradient may be wanted, whether autocast chooses dtypes."""

from __future__ import annotations

import torch
import torch.fx as fx

from .shadow import example_value


def may_train(graph: fx.Graph) -> bool:
    """Whether a gradient may be wanted."""
    values = (example_value(n) for n in graph.nodes if n.op in ("placeholder", "get_attr"))
    return torch.is_grad_enabled() and any(v is None or isinstance(v, torch.Tensor) and v.requires_grad for v in values)


def under_autocast(graph: fx.Graph, device: str) -> bool:
    """Whether autocast chooses dtypes on a type of device, around the graph or in it."""
    return torch.is_autocast_enabled(device) or any("autocast" in str(n.target) for n in graph.nodes)
