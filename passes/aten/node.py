"""What a node of either graph tells about itself: the value recorded for it, its arguments by the names of its schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

_N = TypeVar("_N")


def example_value(n: fx.Node) -> Any:
    """The fake (or real) value that Dynamo or a tracer recorded for a node."""
    return n.meta["example_value"] if "example_value" in n.meta else n.meta.get("val")


def fakes(values: Iterable[Any]) -> AbstractContextManager[Any]:
    """The fake mode that some of these values are of; nothing where none is."""
    return next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None) or nullcontext()


def traced(run: Callable[..., Any], values: Sequence[Any], pre_dispatch: bool = False) -> fx.GraphModule | None:
    """The graph of a function on fake values, None where it fails."""
    try:
        with fakes(values):
            return make_fx(run, tracing_mode="real", pre_dispatch=pre_dispatch)(*values)
    except Exception as e:
        if type(e).__module__.startswith("torch._dynamo"):
            raise
        return None


def reached(start: Iterable[_N], nexts: Callable[[_N], Iterable[_N]], most: int = 1 << 60) -> Iterator[_N]:
    """Some nodes and all that `nexts` leads to from them, each once; behind `most` of them no more are looked for."""
    seen = dict.fromkeys(start)
    waiting = list(seen)
    yield from waiting
    while waiting and len(seen) < most:
        new = dict.fromkeys(x for x in nexts(waiting.pop()) if x not in seen)
        seen |= new
        waiting += new
        yield from new


def schema_of(n: fx.Node) -> Any:
    return getattr(n.target, "_schema", None)


def named_args(n: fx.Node) -> Iterator[tuple[Any, Any]]:
    """(schema argument, value) pairs of an ATen call; defaults are left out."""
    for spec, value in zip(schema_of(n).arguments, n.args, strict=False):
        yield spec, value
    for spec in schema_of(n).arguments[len(n.args) :]:
        if spec.name in n.kwargs:
            yield spec, n.kwargs[spec.name]
