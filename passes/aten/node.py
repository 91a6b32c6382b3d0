"""What a node of either graph tells about itself: the value recorded for it, its arguments by the names of its schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.fx as fx


def example_value(n: fx.Node) -> Any:
    """The fake (or real) value that Dynamo or a tracer recorded for a node."""
    return n.meta["example_value"] if "example_value" in n.meta else n.meta.get("val")


def schema_of(n: fx.Node) -> Any:
    return getattr(n.target, "_schema", None)


def named_args(n: fx.Node) -> Iterator[tuple[Any, Any]]:
    """(schema argument, value) pairs of an ATen call; defaults are left out."""
    for spec, value in zip(schema_of(n).arguments, n.args, strict=False):
        yield spec, value
    for spec in schema_of(n).arguments[len(n.args) :]:
        if spec.name in n.kwargs:
            yield spec, n.kwargs[spec.name]
