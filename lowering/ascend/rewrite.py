"""From fused ops to npu calls, on the Dynamo graph: `moe_compile.route` and `.experts` go, what `calls` makes of them comes in."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir.placement import physical
from ..reference import generic
from ..reference.routing import Routing
from . import calls, exchange, int8, law, over_ranks, places, quant, training
from .calls import Packed
from .experts_call import EXPERTS, ExpertsCall, ops
from .known import RESHAPES, addend, all_within
from .operands import Choices, Nodes, Operands
from .record import Recorder, recording
from .weights import Recipe, trace_back


@dataclass
class Lowered:
    """The rewritten graph, what its inputs are made of (a position among the old inputs, or a recipe), and remarks for the report.

    made: bytes of expert weights that are computed or laid out in the graph itself, that is on every step.
    """

    module: fx.GraphModule
    inputs: list[int | Recipe]
    training: bool
    notes: list[str] = field(default_factory=list)
    made: int = 0


def lower(gm: fx.GraphModule, choices: Choices) -> Lowered:
    """A copy of `gm` without fused ops. Raises `rules.ArgumentError` where a call would break an op's rules."""
    run = _Lowering(_copy(gm), choices)
    _fill_values(run.graph)
    for n in list(run.graph.nodes):
        if n.target is ops.route.default:
            run.route(n)
    for n in list(run.graph.nodes):
        if n.target is physical:
            run.places(n)
    for n in list(run.graph.nodes):
        if n.target is ops.experts_stored.default and choices.train:
            run.notes.append("int8 experts: the npu ops have no gradient to their rows, the fused op runs as it is")
        elif n.target in EXPERTS:
            run.experts(n)
        elif over_ranks.travels(n):
            run.experts_over_ranks(n)
    return run.done()


def needs_gradients(gm: fx.GraphModule) -> bool:
    """Whether anything that goes into a fused op asks for a gradient."""
    if not torch.is_grad_enabled():
        return False
    work = [n for n in gm.graph.nodes if n.target in (ops.route.default, *EXPERTS) or over_ranks.travels(n)]
    seen = set(work)
    while work:  # nodes that the passes put in hold no values: what they are made of does
        for a in work.pop().all_input_nodes:
            value = a.meta.get("example_value")
            if isinstance(value, Tensor) and value.requires_grad:
                return True
            if a not in seen and value is None:
                seen.add(a)
                work.append(a)
    return False


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph(gm)
    graph._codegen = gm.graph._codegen
    mapping: dict[fx.Node, fx.Node] = {}
    out = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    assert out is not None
    value, old_output = out  # type: ignore[misc]
    graph.output(value, old_output.type).meta = dict(old_output.meta)
    for old, new in mapping.items():
        new.name = old.name
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    new_gm = fx.GraphModule(gm, graph)
    new_gm.meta = dict(gm.meta)
    return new_gm


def _fill_values(graph: fx.Graph) -> None:
    """Example values of the nodes that the passes put in: those before the experts are pure."""
    mode = next((v.fake_mode for n in graph.nodes if hasattr(v := n.meta.get("example_value"), "fake_mode")), contextlib.nullcontext())

    def value(n: fx.Node) -> Any:
        return n.meta["example_value"]

    with mode, torch.no_grad():
        for n in graph.nodes:
            if "example_value" in n.meta or n.op not in ("call_method", "call_function"):
                continue
            if all("example_value" in a.meta for a in n.all_input_nodes):
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), value)
                run = getattr(args[0], n.target) if n.op == "call_method" else None  # type: ignore[arg-type]
                n.meta["example_value"] = run(*args[1:], **kwargs) if run is not None else n.target(*args, **kwargs)  # type: ignore[operator]


def _forget_values(ids: fx.Node) -> None:
    """Example values of what the passes made of ids that are of another dtype now."""
    for u in ids.users:
        if u.target in (torch.remainder, operator.sub, "reshape"):
            u.meta.pop("example_value", None)
            _forget_values(u)


class _Lowering:
    def __init__(self, gm: fx.GraphModule, choices: Choices) -> None:
        self.gm, self.graph, self.choices, self.train = gm, gm.graph, choices, choices.train
        self.placeholders = {n: i for i, n in enumerate(self.graph.find_nodes(op="placeholder"))}
        self.notes: list[str] = []
        self.operands = Operands(self.graph, self.placeholders, choices, self.notes)

    # ---- routing -------------------------------------------------------------------------------------------------------

    def route(self, n: fx.Node) -> None:
        """weights, ids = route(...): readers of ids other than the experts get them as int64."""
        logits, bias, table, *plain = n.args
        tensors = [a for a in (logits, bias, table) if isinstance(a, fx.Node)]
        value = logits.meta["example_value"]  # type: ignore[union-attr]
        why = None if self.train else law.why_aten(calls.case(value, Routing(*plain)))  # type: ignore[arg-type]
        if why is not None:
            self.notes.append(f"routing as ATen ops: {why}")
        with recording(n, n, tensors) as r:
            w, ids = calls.route(r.value(logits), r.value(bias), r.value(table), Routing(*plain), self.train)  # type: ignore[arg-type]
            others = [u for g in n.users if g.args[1] == 1 for u in g.users if u.target not in (*EXPERTS, physical)]
            wide = ids.to(torch.int64) if others and ids.dtype != torch.int64 else ids
        for g in list(n.users):
            if g.args[1] == 0:
                g.replace_all_uses_with(r.node(w))
            else:
                for u in list(g.users):
                    u.replace_input_with(g, r.node(ids if u.target in (*EXPERTS, physical) else wide))
            self.graph.erase_node(g)
        self.graph.erase_node(n)
        for t in (ids, wide):
            r.node(t).meta["experts_of"] = value.shape[-1]
        r.drop_unused()

    def places(self, n: fx.Node) -> None:
        """ids = physical(logical ids, table): the op that makes them, or a gather."""
        ids, table, world, rank = n.args
        with recording(n, n, [ids, table]) as r:  # type: ignore[list-item]
            given = (r.value(ids), r.value(table), world, rank)  # type: ignore[arg-type]
            out = places.emitted(*given)  # type: ignore[arg-type]
        why = places.refuses(places.case(*given))  # type: ignore[arg-type]
        if why is not None:
            self.notes.append(f"physical experts stay a gather: {why}")
        elif self.choices.distinct_places and all_within(ids, int(table.meta["example_value"].shape[0]), n, True):  # type: ignore[union-attr,arg-type]
            r.node(out).meta["places"] = True
        n.replace_all_uses_with(r.node(out))
        self.graph.erase_node(n)
        r.drop_unused()
        _forget_values(r.node(out))
        _fill_values(self.graph)

    # ---- experts -------------------------------------------------------------------------------------------------------

    def experts(self, n: fx.Node) -> None:
        """Rows where the op stood; the combine where an addend that goes into it is known."""
        c = ExpertsCall.of(n)
        quantised = self.operands.quantised(c)
        nodes = self.operands.plain(n, c) if quantised is None else quantised[1]
        step: Any = quant if quantised is not None else training if self.train else calls
        with recording(n, n, c.reads) as r:
            v = [r.value(a) for a in (c.x, c.ids, c.weights)]
            known = all_within(c.ids, c.layout.num_experts, n)
            p = self._values(nodes, r, None if quantised is None else quantised[0], c.layout)
            *rows, own = step.start(*v, p, c.layout, known)
            if c.base is not None:
                own.append(r.value(c.base))
        place, other, between = addend(n, len(own)) if not self.train else (n, None, [])
        with recording(place, n, c.reads) as late:
            late.nodes, late.kept = r.nodes, r.kept
            addends = [] if other is None else [late.value(other).reshape(-1, rows[0].shape[-1])]
            fused = self.choices.fused_combine and not self.train
            out = calls.finish(rows[0], rows[1], rows[2], own, addends, fused)
        combined = self._reshaped(late.node(out), place, between)
        place.replace_all_uses_with(combined)
        if other is not None and other in place.args[:1]:  # `shared.add_(routed)`: from here on `shared` is the sum
            for u in [u for u in other.users if u is not place and place < u]:
                u.replace_input_with(other, combined)
        for gone in dict.fromkeys((place, *reversed(between), n)):
            self.graph.erase_node(gone)
        r.drop_unused()
        late.drop_unused()

    def experts_over_ranks(self, n: fx.Node) -> None:
        """Dispatch, products, combine where a law takes the block; else rows travel as written, and the fused op runs as it is.

        A dispatch sends a row to the ranks of its experts: what rows by all-to-all (`divided_experts(rows=True)`) ask for, too."""
        c, group, shared = over_ranks.read(n)
        at = exchange.Place.of(group)
        row, why = over_ranks.choose(n, c, at, training=self.train, shared=shared, one_kernel=self.choices.one_kernel)
        if row is exchange.COLLECTIVES:
            way = "all-to-all" if n.kwargs.get("rows") else "collectives"
            self.notes.append(f"experts over {at.world} ranks: rows travel by {way} and the fused op runs as it is, op by op: {why}")
            return
        if self.choices.quantize is not None:
            self.notes.append("a block is not quantised: its experts are over ranks")
        nodes = self.operands.plain(n, c)
        with recording(n, n, c.reads) as r:
            values = [r.value(a) for a in (c.x, c.ids, c.weights)]
            p = Packed.of({name: [r.value(a) for a in of] for name, of in nodes.items()}, c.layout, False)
            out = over_ranks.emitted(values, p, r.value(c.base), c.layout, row, at)
        n.replace_all_uses_with(r.node(out))
        self.graph.erase_node(n)
        r.drop_unused()
        self.notes.append(f"experts over {at.world} ranks: {row.calls}")

    def _reshaped(self, n: fx.Node, place: fx.Node, between: Sequence[fx.Node]) -> fx.Node:
        """The views that stood between the result and the add, on the sum."""
        for view in between:
            if view.target in RESHAPES:
                with self.graph.inserting_before(place):
                    n = self.graph.call_method(str(view.target), (n, *view.args[1:]))
                n.meta.update(view.meta)
        return n

    def _values(self, nodes: Nodes, r: Recorder, row: int8.Row | None, layout: generic.Layout) -> Packed | quant.Quantised:
        v = {name: [r.value(n) for n in of] for name, of in nodes.items()}
        if row is None:
            return Packed.of(v, layout, self.train and self.choices.nz)
        one = {name: v[name][0] for name in v if name.startswith("down") and v[name]}
        up = {name: values for name, values in v.items() if name.startswith("up")}
        return quant.Quantised(**up, **one, row=row, alpha=int8.chain_of(self.choices.quantize)[1])

    def done(self) -> Lowered:
        """Weights that only the packed operands read are no inputs any more."""
        used = {s.position for recipe in self.operands.packed for s in recipe.sources}
        for n in reversed(list(self.graph.nodes)):
            if n not in self.placeholders and not n.users and n.args and trace_back(n, self.placeholders) is not None:
                self.graph.erase_node(n)
        inputs: list[int | Recipe] = []
        recipes = {n: recipe for recipe, n in self.operands.packed.items()}
        for n in self.graph.find_nodes(op="placeholder"):
            if n in recipes:
                inputs.append(recipes[n])
            elif n.users or self.placeholders[n] not in used:
                inputs.append(self.placeholders[n])
            else:
                n.meta.clear()  # a graph remembers nodes that are gone, and these the model's tensors (`modes`)
                self.graph.erase_node(n)
        if self.operands.copied:
            size = f"{self.operands.copied / 2**20:.1f} MiB more memory"
            self.notes.append(
                f"expert weights are copied on first use into the layout of grouped matmul: {size} "
                "(moe_compile.prepare(model, target='ascend') rearranges them in place instead)"
            )
        self.graph.lint()
        self.gm.recompile()
        return Lowered(self.gm, inputs, self.train, list(dict.fromkeys(self.notes)), self.operands.made)
