"""Experts over ranks in a graph, where the passes have put them: rows travel by dispatch and combine where a law takes the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.fx as fx
from torch import Tensor

from ...ir.codec import record_of
from ...ir.operands import Operands
from ...ir.records import Layout
from . import calls, device, exchange
from .experts_call import ExpertsCall
from .known import all_within


def travels(n: fx.Node) -> bool:
    """Whether a node is experts whose rows travel (`moe_compile.divided`): a call with this rank's weights and all ranks' ids."""
    return n.op == "call_function" and getattr(n.target, "__name__", "") == "divided_experts"


def read(n: fx.Node) -> tuple[ExpertsCall, str, bool]:
    """The block as it is on this rank, the name of the group, whether all ranks hold the same tokens."""
    x, ids, weights, lists, add, plain, group, shared = n.args
    layout: Layout = record_of(Layout, plain)  # type: ignore[arg-type]
    return ExpertsCall(x, ids, weights, Operands.read(lists), add, layout, None), str(group), bool(shared)  # type: ignore[arg-type]


def choose(n: fx.Node, c: ExpertsCall, at: exchange.Place, **said: bool) -> tuple[exchange.Row, str]:
    """The row of `exchange` that takes the block, and what the others of this kind of device objected to; said: fields of `Spread`."""
    x, ids = c.x.meta["example_value"], c.ids.meta["example_value"]
    whole, down = over_all(c.layout, at), [d.meta["example_value"] for d in c.p.down]
    spread = exchange.Spread.of(
        device.family(), at.world, x, ids, whole, int(c.layout.intermediate(down)), bool(c.p.up_bias or c.p.down_bias),
        known=all_within(c.ids, whole.num_experts, n, distinct=True), widens=int(c.layout.out_features(down)) != int(x.shape[-1]), **said,
    )  # fmt: skip
    row, refused = exchange.choose(spread)
    told = dict.fromkeys(why for r, why in refused if r is not exchange.MEGA or spread.one_kernel)
    return row, "; ".join(told)


def over_all(layout: Layout, at: exchange.Place) -> Layout:
    """The layout with the experts of all ranks."""
    return replace(layout, num_experts=layout.num_experts * at.world)


def emitted(values: Sequence[Tensor], p: calls.Packed, base: Any, layout: Layout, row: exchange.Row, at: exchange.Place) -> Tensor:
    """x, ids, weights of this rank, its experts, an addend or None -> [T, H]."""
    x, ids, weights = values
    out = exchange.experts(x, ids, weights, p, over_all(layout, at), row, at)
    return out if base is None else out + calls.cast(base, out.dtype)
