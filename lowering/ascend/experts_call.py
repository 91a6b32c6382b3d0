"""A call of routed experts in the graph, as this target reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.fx as fx

from ...ir import families
from ...ir import scalar as act
from ...ir.codec import record_of
from ...ir.operands import Operands
from ...ir.records import Layout, Storage
from ...ir.stored import Scale
from ...ops import bundled
from . import antiquant, device, int8

ops = torch.ops.moe_compile
FAMILIES = {getattr(ops, f.op).default: f for f in (families.EXPERTS, families.EXPERTS_STORED, families.EXPERTS_ADAPTED)}
EXPERTS = tuple(FAMILIES)


@dataclass(frozen=True)
class ExpertsCall:
    """A call of an op of routed experts: nodes, and the plain arguments. storage: of weights that are no plain floats."""

    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    p: Operands[fx.Node]
    base: fx.Node | None
    layout: Layout
    storage: Storage | None

    @classmethod
    def of(cls, n: fx.Node) -> ExpertsCall:
        family = FAMILIES[n.target]  # type: ignore[index]
        x, ids, weights, p, (base, *plain) = bundled(n.args, family.names)
        size = len(fields(family.records[0]))
        layout: Layout = record_of(family.records[0], plain[:size])
        return cls(x, ids, weights, p, base, layout, record_of(Storage, plain[size:]) if Storage in family.records else None)

    @property
    def rows(self) -> bool:
        return self.storage is not None and any(self.storage.rows())

    @property
    def dtype(self) -> torch.dtype:
        return self.x.meta["example_value"].dtype  # type: ignore[no-any-return]

    @property
    def reads(self) -> list[fx.Node]:
        """What is read beside the expert weights."""
        return [a for a in (self.x, self.ids, self.weights, self.base) if isinstance(a, fx.Node)]

    def stored(self, name: str) -> antiquant.Problem | None:
        """How the weights of "up" or "down" lie in memory; None where they are floats."""
        how = None if self.storage is None else self.storage.stored()[name == "down"]
        if how is None:
            return None
        transposed = self.layout.up_transposed if name == "up" else self.layout.down_transposed
        r, c = how.shape(getattr(self.p, name)[0].meta["example_value"].shape[-2:])
        inner, out = (r, c) if transposed else (c, r)
        return antiquant.Problem(how, transposed, int(inner), int(out), self.dtype, device.family())

    def problem(self, chain: str, nz: bool) -> int8.Problem:
        """The block as `int8` asks about it."""
        layout, down = self.layout, self.stored("down")
        inner = layout.intermediate([d.meta["example_value"] for d in self.p.down]) if down is None else down.inner
        expr = act.decode(layout.act_ops, layout.act_consts)
        hidden = int(self.x.meta["example_value"].shape[-1])
        biases = bool(self.p.up_bias or self.p.down_bias)
        pairs = bool(self.p.up_a or self.p.down_a)
        rows = None if self.storage is None else self.storage.rows()[1]
        smooth = next((k.meta["example_value"].dtype for k in self.p.down_smooth), None)
        return int8.Problem(
            chain, expr, layout.form, hidden, inner, biases, layout.weight_on_input, self.dtype, nz, pairs,
            Scale.NONE if rows is None else rows.smooth, smooth,
        )  # fmt: skip
