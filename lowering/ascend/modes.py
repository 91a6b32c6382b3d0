"""The way to the device: which graph mode compiles the lowered graph, and what each needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ... import report as reports
from ...errors import OptionError
from ...options import ASCEND_MODES, Options
from . import schemas
from .rewrite import Lowered, lower, needs_gradients, ops
from .weights import STORE, Recipe

log = logging.getLogger("moe_compile")


def compile_with(options: Options, mode: str | None, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Lower the fused ops of `gm`, hand it to a graph mode, and give back a function of the original inputs.

    A graph that cannot be lowered keeps its fused ops, which run on any device; the report says why. With `strict=True` it raises.
    """
    if not any(n.target in (ops.route.default, ops.experts.default) for n in gm.graph.nodes):
        return _inner(options, mode, gm, example_inputs, False)
    schemas.ensure()
    train = needs_gradients(gm)
    if train and options.quantize is not None:
        raise OptionError("option 'quantize' is for inference: quantised experts have no gradients")
    try:
        lowered = lower(gm, train)
    except Exception as e:
        if options.strict:
            raise
        log.warning("the fused ops were not lowered to npu ops: %s: %s", type(e).__name__, e)
        _tell([f"not lowered to npu ops, the fused ops run as they are: {type(e).__name__}: {e}"])
        return _inner(options, mode, gm, example_inputs, train)
    _tell(lowered.notes)
    for sink in SINKS:
        sink(lowered)
    inner = _inner(options, mode, lowered.module, _inputs(lowered, example_inputs), train)
    return _with_packed(inner, lowered)


SINKS: list[Callable[[Lowered], None]] = []  # who wants to see lowered graphs (`dry_run`)


def _tell(notes: Sequence[str]) -> None:
    report = reports.current()
    if report is not None:
        report.add_notes(notes)


def _inputs(lowered: Lowered, old: Sequence[Any]) -> list[Any]:
    placeholders = lowered.module.graph.find_nodes(op="placeholder")
    return [old[i] if isinstance(i, int) else n.meta["example_value"] for i, n in zip(lowered.inputs, placeholders)]


def _with_packed(inner: Callable[..., Any], lowered: Lowered) -> Callable[..., Any]:
    """The compiled function on the inputs that Dynamo gives: weights go in as packed operands."""
    inputs, training = lowered.inputs, lowered.training

    def operand(i: int | Recipe, args: Sequence[Any]) -> Any:
        if isinstance(i, int):
            return args[i]
        tensors = [args[s.position] for s in i.sources]
        return i.view(tensors, differentiable=True) if training else STORE.get(i, tensors, _as_is)

    def run(*args: Any) -> Any:
        return inner(*[operand(i, args) for i in inputs])

    return run


def _as_is(t: Tensor) -> Tensor:
    return t


def _inner(options: Options, mode: str | None, gm: fx.GraphModule, example_inputs: Sequence[Any], training: bool) -> Callable[..., Any]:
    if options.inner != "auto":
        from ...inner import compile_with as generic

        return generic(options, None if mode in ASCEND_MODES else mode, "any", gm, example_inputs)
    return gm
