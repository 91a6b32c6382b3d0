"""The operands of a block's products as nodes of the lowered graph: new graph inputs, each with the recipe that it is made by."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Rows
from ...ir.stored import Scale
from . import antiquant, calls, int8
from .experts_call import ExpertsCall
from .formats import refuses_nz
from .options import AscendOptions
from .record import recording
from .weights import Recipe, trace_back

SMALL = ("factors", "ones", "offsets", "shifts", "pair", "smooth", "inverse")  # parts of recipes whose copies are not worth telling


@dataclass(frozen=True)
class Choices:
    """What the user asked for. train: with gradients; quantize: the option; nz: packed weights in the fractal format.

    fused_combine: npu_moe_finalize_routing, not npu_moe_token_unpermute. one_kernel: for experts over ranks (`exchange.MEGA`).
    distinct_places: the user's word that no table of replicas has a place twice, or one that is none.
    """

    train: bool = False
    quantize: int8.Quantize = None
    nz: bool = False
    fused_combine: bool = True
    one_kernel: bool = False
    distinct_places: bool = False

    @classmethod
    def of(cls, chosen: AscendOptions, train: bool) -> Choices:
        return cls(
            train, chosen.quantize, chosen.weight_format == "nz", chosen.combine == "finalize", chosen.mega_moe, chosen.distinct_places
        )


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
        found: Nodes = {}
        for name in ("up", "down"):
            found |= self._weights(n, c, name) if c.stored(name) is None else self._coded(n, c, name)
        for name in ("up_bias", "down_bias"):
            found[name] = self._group(n, c, name, False, calls.bias_dtype(c.dtype))
        for name in ("up_a", "up_b", "down_a", "down_b"):
            found[name] = self._pairs(n, c, name)
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
        stored = [s for name in ("up", "down") if (s := c.stored(name)) is not None]
        why = why or next((w for s in stored if (w := antiquant.int8_by_channel(s)) is not None), None)
        every = (*c.p.up, *c.p.down, *c.p.up_scale, *c.p.down_scale, *c.p.up_smooth, *c.p.down_smooth)
        if why is None and any(trace_back(n, self.placeholders) is None for n in every):
            why = "the weights are computed in the graph"
        if why is not None and c.rows:
            raise ValueError(f"rows are rounded to 8 bits: {why}")
        if row is None or why is not None:
            self.notes.append(f"a block is not quantised: {why}")
            return None
        return row, self._in_int8(c, row)

    def _in_int8(self, c: ExpertsCall, row: int8.Row) -> Nodes:
        found: Nodes = {}
        for name, stored in (("up", c.layout.up_transposed), ("down", c.layout.down_transposed)):
            dtype = (row.up_scale if name == "up" else None) or int8.scale_dtype(c.dtype)
            how = c.stored(name)
            if how is not None:
                found[name] = self._group(c.x, c, name, not stored, torch.int8)
                found[f"{name}_scale"] = self._factors(c.x, c, name, antiquant.Coding.of(how), dtype)
            else:
                found[name] = self._group(c.x, c, name, not stored, dtype, "int8")
                found[f"{name}_scale"] = self._group(c.x, c, name, not stored, dtype, "scale")
            rows = None if c.storage is None else c.storage.rows()[name == "down"]
            if rows is not None and rows.smooth:
                kept = c.dtype if row is int8.STEPS and name == "down" else torch.float32
                found[f"{name}_smooth"] = [self._smooth(c, getattr(c.p, f"{name}_smooth"), rows, kept)]
        return found

    def _smooth(self, c: ExpertsCall, nodes: Sequence[fx.Node], rows: Rows, dtype: torch.dtype) -> fx.Node:
        """Smooth scales [E, in]: what rows are multiplied by."""
        part = "inverse" if rows.smooth == Scale.DIVIDES else "smooth"
        return self._operand(c.x, nodes, Recipe((), c.layout.num_experts, len(nodes) == 1, False, dtype, part))

    # ---- one operand -----------------------------------------------------------------------------------------------------

    def _weights(self, at: fx.Node, c: ExpertsCall, name: str) -> Nodes:
        stored = c.layout.up_transposed if name == "up" else c.layout.down_transposed
        return {name: self._group(at, c, name, not stored, c.dtype)}

    def _coded(self, at: fx.Node, c: ExpertsCall, name: str) -> Nodes:
        """The model's own codes, scales (ones where it has none) and offsets. Raises ValueError where no row takes them."""
        how = c.stored(name)
        assert how is not None
        if (why := antiquant.why_not(how)) is not None:
            raise ValueError(why)
        coding = antiquant.Coding.of(how)
        found = {name: self._group(at, c, name, False, c.dtype, "codes", coding)}
        found[f"{name}_scale"] = self._factors(at, c, name, coding, c.dtype)
        if coding.bits:
            zero = f"{name}_zero"
            given = (zero, "offsets") if getattr(c.p, zero) else (name, "shifts")
            found[f"{name}_offset"] = self._group(at, c, given[0], False, c.dtype, given[1], coding)
        return found

    def _factors(self, at: fx.Node, c: ExpertsCall, name: str, coding: antiquant.Coding, dtype: torch.dtype) -> list[fx.Node]:
        scale = f"{name}_scale"
        source, part = (scale, "factors") if getattr(c.p, scale) else (name, "ones")
        return self._group(at, c, source, False, dtype, part, coding)

    def _pairs(self, at: fx.Node, c: ExpertsCall, name: str) -> list[fx.Node]:
        """a [E, in, r] or b [E, r, out] of each part that has a pair, in the wider type of the pair's and the rows'."""
        dtypes = [n.meta["example_value"].dtype for n in getattr(c.p, name)[:1]]
        return self._group(at, c, name, True, functools.reduce(torch.promote_types, dtypes, c.dtype), "pair")

    def _group(
        self, at: fx.Node, c: ExpertsCall, name: str, swapped: bool, dtype: torch.dtype, part: str = "",
        coding: antiquant.Coding | None = None,
    ) -> list[fx.Node]:  # fmt: skip
        """One operand for each stack of a parameter, or for each list of as many matrices as there are experts."""
        nodes, layout = getattr(c.p, name), c.layout
        size = 1 if layout.stacked else layout.num_experts
        like = Recipe((), layout.num_experts, layout.stacked, swapped, dtype, part, coding)
        return [self._operand(at, nodes[i : i + size], like) for i in range(0, len(nodes), size)]

    def _operand(self, at: fx.Node, nodes: Sequence[fx.Node], like: Recipe) -> fx.Node:
        sources = [trace_back(n, self.placeholders) for n in nodes]
        if all(s is not None for s in sources):
            return self._input(replace(like, sources=tuple(s for s in sources if s is not None)))
        self.notes.append("expert weights are computed in the graph: their layout is made on every step")
        with recording(at, at, nodes) as r:  # nothing to make ahead
            t = like.made([r.value(n) for n in nodes], differentiable=True)
            t = t.contiguous() if like.coding is not None else t
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
            free = self.choices.train or recipe.part in SMALL or recipe.is_free(values)
        value.requires_grad_(self.choices.train and any(v.requires_grad for v in values))
        self.copied += 0 if free else value.numel() * value.element_size()
        self.packed[recipe] = self._placeholder(recipe, sources, value)
        return self.packed[recipe]

    def _placeholder(self, recipe: Recipe, sources: Sequence[fx.Node], value: Tensor) -> fx.Node:
        with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
            kind = "" if recipe.part in ("", "codes") else f"{recipe.part}_"
            again = sum(r.sources == recipe.sources and r.part == recipe.part for r in self.packed)
            n = self.graph.placeholder(f"packed_{kind}{sources[0].name}{f'_{again}' if again else ''}")
        n.meta.update(sources[0].meta, example_value=value, val=value)
        n.meta.pop("grapharg", None)
        return n

    def _formatted(self, recipe: Recipe, values: Sequence[Tensor]) -> Recipe:
        """The recipe in the fractal format, where that is asked for and the operand is a weight that may have it.

        In training weights are cast where they are used, so the recipe stays: only what cannot be is told here.
        """
        if not self.choices.nz or recipe.part not in ("", "int8", "codes"):
            return recipe
        made = recipe.view(values)
        if made.ndim != 3:
            return recipe
        why = "it is not known to be taken under rows of floats" if recipe.part == "codes" else refuses_nz(made.shape, made.dtype)
        if why is not None:
            self.notes.append(f"weight_format='nz': an expert weight stays as it is: {why}")
        return recipe if why is not None or self.choices.train else recipe.in_nz()
