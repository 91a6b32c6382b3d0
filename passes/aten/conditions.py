"""Under what a graph runs: whether a gradient may be wanted, whether autocast chooses dtypes, what the user's hooks see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.fx as fx

from .node import example_value


def may_train(graph: fx.Graph) -> bool:
    """Whether a gradient may be wanted."""
    values = (example_value(n) for n in graph.nodes if n.op in ("placeholder", "get_attr"))
    return torch.is_grad_enabled() and any(v is None or isinstance(v, torch.Tensor) and v.requires_grad for v in values)


def under_autocast(graph: fx.Graph, device: str) -> bool:
    """Whether autocast chooses dtypes on a type of device, around the graph or in it."""
    known = torch.amp.is_autocast_available(device)  # of no "meta", where a model is only told about
    return (known and torch.is_autocast_enabled(device)) or any("autocast" in str(n.target) for n in graph.nodes)


@contextmanager
def no_saving_hooks() -> Iterator[None]:
    """The user's hooks on saved tensors see none of ours: a checkpoint around the first call counts what is saved, and compares.

    Where there are none, none are set: a graph with `torch.func.grad` in it forbids any.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield
