"""The operands of a block's products as nodes of the lowered graph: new graph inputs, each with the recipe that it is made by."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import scalar as act
from ...ir.codec import record_of
from ...ir.operands import CODED, PLAIN
from ...ir.records import Storage
from ..reference import generic
from . import calls, int8
from .formats import refuses_nz
from .record import recording
from .weights import Recipe, trace_back

ops = torch.ops.moe_compile
EXPERTS = (ops.experts.default, ops.experts_stored.default)


@dataclass(frozen=True)
class Choices:
    """What the user asked for. train: with gradients; quantize: the option; nz: packed weights in the fractal format.

    fused_combine: npu_moe_finalize_routing, not npu_moe_token_unpermute.
    """

    train: bool = False
    quantize: int8.Quantize = None
    nz: bool = False
    fused_combine: bool = True


@dataclass(frozen=True)
class ExpertsCall:
    """A call of `experts` or `experts_stored`: nodes, and the plain arguments."""

    x: fx.Node
    ids: fx.Node
    weights: fx.Node
    up: Sequence[fx.Node]
    down: Sequence[fx.Node]
    up_bias: Sequence[fx.Node]
    down_bias: Sequence[fx.Node]
    up_scale: Sequence[fx.Node]
    down_scale: Sequence[fx.Node]
    base: fx.Node | None
    layout: generic.Layout
    scaled: bool
    rows: bool

    @classmethod
    def of(cls, n: fx.Node) -> ExpertsCall:
        scaled = n.target is ops.experts_stored.default
        end = 3 + len(CODED if scaled else PLAIN)
        tensors, (base, *plain) = list(n.args[:end]), n.args[end:]
        size = len(fields(generic.Layout))
        layout = record_of(generic.Layout, plain[:size])
        rows = scaled and any(record_of(Storage, plain[size:]).rows())
        x, ids, weights, up, down, up_bias, down_bias, *scales = tensors
        up_scale, down_scale = scales[:2] or ((), ())
        every: Any = (x, ids, weights, up, down, up_bias, down_bias, up_scale, down_scale, base, layout, scaled, rows)
        return cls(*every)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.meta["example_value"].dtype  # type: ignore[no-any-return]

    @property
    def reads(self) -> list[fx.Node]:
        """What is read beside the expert weights."""
        return [a for a in (self.x, self.ids, self.weights, self.base) if isinstance(a, fx.Node)]

    def widths(self) -> tuple[int, int]:
        """Output channels of one up tensor, and of the down projection."""
        up, down = (ts[0].meta["example_value"] for ts in (self.up, self.down))
        inner = -1 if self.layout.up_transposed else -2
        return up.shape[inner], down.shape[-1 if self.layout.down_transposed else -2]

    def problem(self, chain: str, nz: bool) -> int8.Problem:
        """The block as `int8` asks about it."""
        layout = self.layout
        inner = layout.intermediate([d.meta["example_value"] for d in self.down])
        expr = act.decode(layout.act_ops, layout.act_consts)
        hidden = int(self.x.meta["example_value"].shape[-1])
        biases = bool(self.up_bias or self.down_bias)
        return int8.Problem(chain, expr, layout.form, hidden, inner, biases, layout.weight_on_input, self.dtype, nz)


Nodes = dict[str, list[fx.Node]]


@dataclass
class Operands:
    """Makes operands for the blocks of one graph.

    packed: the new inputs; copied: bytes of the copies that there will be; made: bytes of operands that the graph makes on every step.
    """

    graph: fx.Graph
    placeholders: dict[fx.Node, int]
    choices: Choices
    notes: list[str]
    packed: dict[Recipe, fx.Node] = field(default_factory=dict)
    copied: int = 0
    made: int = 0

    def plain(self, n: fx.Node, c: ExpertsCall) -> Nodes:
        """The packed operands of a block in its own precision, by the names of `calls.Packed`."""
        layout, halves, bias = c.layout, c.layout.halves(), calls.bias_dtype(c.dtype)
        stored, part = (torch.int8, "stored") if c.scaled else (c.dtype, "")
        found = {
            "up": self._group(n, c.up, halves, layout, not layout.up_transposed, stored, part),
            "down": self._group(n, c.down, 1, layout, not layout.down_transposed, stored, part),
            "up_bias": self._group(n, c.up_bias, halves, layout, False, bias) if c.up_bias else [],
            "down_bias": self._group(n, c.down_bias, 1, layout, False, bias) if c.down_bias else [],
        }
        if c.scaled:
            up, down = c.widths()
            for offset, what in ((False, "scale"), (True, "offset")):
                found[f"up_{what}"] = self._scales(n, c, c.up, c.up_scale, halves, up, c.dtype, offset)
                found[f"down_{what}"] = self._scales(n, c, c.down, c.down_scale, 1, down, c.dtype, offset)
        return found

    def quantised(self, c: ExpertsCall) -> tuple[int8.Row, Nodes] | None:
        """The chain in int8 that a block takes, and its operands by the names of `quant.Quantised`; None where it stays as it is.

        A model that rounds its rows itself is W8A8 without being asked; clipping them would be another function.
        """
        chain = "w8a8" if c.rows else int8.chain_of(self.choices.quantize)[0]
        if chain is None:
            return None
        problem = c.problem(chain, self.choices.nz)
        row, why = int8.choose(problem)[0], int8.why_not(problem)
        every = (*c.up, *c.down, *c.up_scale, *c.down_scale)
        if why is None and any(trace_back(n, self.placeholders) is None for n in every):
            why = "the weights are computed in the graph"
        if why is not None and c.rows:
            raise ValueError(f"rows are rounded to 8 bits: {why}")
        if row is None or why is not None:
            self.notes.append(f"a block is not quantised: {why}")
            return None
        return row, self._in_int8(c, row)

    def _in_int8(self, c: ExpertsCall, row: int8.Row) -> Nodes:
        layout, down_scale = c.layout, int8.scale_dtype(c.dtype)
        found: Nodes = {}
        for name, weights, own, parts, stored, dtype, width in (
            ("up", c.up, c.up_scale, layout.halves(), layout.up_transposed, row.up_scale or down_scale, c.widths()[0]),
            ("down", c.down, c.down_scale, 1, layout.down_transposed, down_scale, c.widths()[1]),
        ):
            if c.scaled:
                found[name] = self._group(c.x, weights, parts, layout, not stored, torch.int8)
                found[f"{name}_scale"] = self._scales(c.x, c, weights, own, parts, width, dtype)
            else:
                found[name] = self._group(c.x, weights, parts, layout, not stored, dtype, "int8")
                found[f"{name}_scale"] = self._group(c.x, weights, parts, layout, not stored, dtype, "scale")
        return found

    # ---- one operand -----------------------------------------------------------------------------------------------------

    def _group(
        self, at: fx.Node, nodes: Sequence[fx.Node], parts: int, layout: generic.Layout, transposed: bool, dtype: torch.dtype,
        part: str = "",
    ) -> list[fx.Node]:  # fmt: skip
        """One operand for each of `parts`: gate and up may come apart."""
        size = len(nodes) // parts
        return [self._operand(at, nodes[i * size : (i + 1) * size], layout, transposed, dtype, part) for i in range(parts)]

    def _scales(
        self, at: fx.Node, c: ExpertsCall, weights: Sequence[fx.Node], scales: Sequence[fx.Node], parts: int, width: int,
        dtype: torch.dtype, offset: bool = False,
    ) -> list[fx.Node]:  # fmt: skip
        """The model's own scales [E, width], one tensor a part (ones where it has none), or zeros in their place: there are no offsets."""
        kind, nodes = ("zeros" if offset else "channel" if scales else "ones"), scales or weights
        size = len(nodes) // parts
        return [self._operand(at, nodes[i * size : (i + 1) * size], c.layout, False, dtype, kind, width) for i in range(parts)]

    def _operand(
        self, at: fx.Node, nodes: Sequence[fx.Node], layout: generic.Layout, transposed: bool, dtype: torch.dtype, part: str = "",
        width: int = 0,
    ) -> fx.Node:  # fmt: skip
        sources = [trace_back(n, self.placeholders) for n in nodes]
        if all(s is not None for s in sources):
            known = tuple(s for s in sources if s is not None)
            return self._input(Recipe(known, layout.num_experts, layout.stacked, transposed, dtype, part, width))
        self.notes.append("expert weights are computed in the graph: their layout is made on every step")
        with recording(at, at, nodes) as r:  # nothing to make ahead
            values = [r.value(n) for n in nodes]
            t = values[0] if layout.stacked else torch.stack(values)
            t = t if t.shape[0] == layout.num_experts else t[: layout.num_experts]
            if part in ("zeros", "ones"):
                t = torch.full((layout.num_experts, width), float(part == "ones"), dtype=dtype, device=t.device)
            t = t.expand(layout.num_experts, width) if part == "channel" else t
            t = calls.cast(t.transpose(-1, -2) if transposed else t, dtype)
            t = t.contiguous() if part in ("channel", "stored") else t
        self.made += t.numel() * t.element_size()
        return r.node(t)

    def _input(self, recipe: Recipe) -> fx.Node:
        """The new graph input that holds a packed operand; equal operands share one."""
        old = list(self.placeholders)
        sources = [old[s.position] for s in recipe.sources]
        values = [s.meta["example_value"] for s in sources]
        mode = getattr(values[0], "fake_mode", None) or contextlib.nullcontext()
        with mode, torch.no_grad():
            recipe = self._formatted(recipe, values)
            if recipe in self.packed:
                return self.packed[recipe]
            made = recipe.view(values) if self.choices.train else recipe.pack(values)
            value = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=made.device)
            free = self.choices.train or recipe.part in ("channel", "zeros", "ones") or recipe.is_free(values)
        value.requires_grad_(self.choices.train and any(v.requires_grad for v in values))
        self.copied += 0 if free else value.numel() * value.element_size()
        self.packed[recipe] = self._placeholder(recipe, sources, value)
        return self.packed[recipe]

    def _placeholder(self, recipe: Recipe, sources: Sequence[fx.Node], value: Tensor) -> fx.Node:
        with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
            kind = "" if recipe.part in ("", "stored") else f"{recipe.part}_"
            again = sum(r.sources == recipe.sources and r.part == recipe.part for r in self.packed)
            n = self.graph.placeholder(f"packed_{kind}{sources[0].name}{f'_{again}' if again else ''}")
        n.meta.update(sources[0].meta, example_value=value, val=value)
        n.meta.pop("grapharg", None)
        return n

    def _formatted(self, recipe: Recipe, values: Sequence[Tensor]) -> Recipe:
        """The recipe in the fractal format, where that is asked for and the operand is a weight that may have it.

        In training weights are cast where they are used, so the recipe stays: only what cannot be is told here.
        """
        if not self.choices.nz or recipe.part not in ("", "int8", "stored"):
            return recipe
        made = recipe.view(values)
        if made.ndim != 3:
            return recipe
        why = "it is not known to be taken under rows of floats" if recipe.part == "stored" else refuses_nz(made.shape, made.dtype)
        if why is not None:
            self.notes.append(f"weight_format='nz': an expert weight stays as it is: {why}")
        return recipe if why is not None or self.choices.train else recipe.in_nz()
