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

from ...passes.aten.effects import is_write
from .. import generic
from ..routing import Routing
from . import calls, law, quant, training
from .calls import Packed
from .record import Recorder, recording
from .streams import is_product
from .weights import Recipe, trace_back

ops = torch.ops.moe_compile
EXPERTS = (ops.experts.default, ops.experts_scaled.default)
_RESHAPES = ("view", "reshape", "view_as", "reshape_as")


@dataclass
class Lowered:
    """The rewritten graph, what its inputs are made of (a position among the old inputs, or a recipe), and remarks for the report."""

    module: fx.GraphModule
    inputs: list[int | Recipe]
    training: bool
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """A call of `experts` or `experts_scaled`: nodes, and the plain arguments."""

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
    row_bits: int

    @classmethod
    def of(cls, n: fx.Node) -> _Call:
        scaled = n.target is ops.experts_scaled.default
        tensors, (base, *plain) = list(n.args[: 9 if scaled else 7]), n.args[9 if scaled else 7 :]
        plain, rows = (plain[:-2], plain[-2:]) if scaled else (plain, [0, 0.0])
        layout = generic.Layout(tuple(plain[0]), tuple(plain[1]), *plain[2:])  # type: ignore[arg-type]
        x, ids, weights, up, down, up_bias, down_bias, *scales = tensors
        up_scale, down_scale = scales or ((), ())
        every: Any = (x, ids, weights, up, down, up_bias, down_bias, up_scale, down_scale, base, layout, scaled, rows[0])
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


def lower(gm: fx.GraphModule, train: bool, quantize: quant.Quantize = None) -> Lowered:
    """A copy of `gm` without fused ops. Raises `rules.ArgumentError` where a call would break an op's rules."""
    run = _Lowering(_copy(gm), train, quantize)
    _fill_values(run.graph)
    for n in list(run.graph.nodes):
        if n.target is ops.route.default:
            run.route(n)
    for n in list(run.graph.nodes):
        if n.target is ops.experts_scaled.default and train:
            run.notes.append("int8 experts: the npu ops have no gradient to their rows, the fused op runs as it is")
        elif n.target in EXPERTS:
            run.experts(n)
    return run.done()


def needs_gradients(gm: fx.GraphModule) -> bool:
    """Whether anything that goes into a fused op asks for a gradient."""
    if not torch.is_grad_enabled():
        return False
    work = [n for n in gm.graph.nodes if n.target in (ops.route.default, *EXPERTS)]
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


class _Lowering:
    def __init__(self, gm: fx.GraphModule, train: bool, quantize: quant.Quantize) -> None:
        self.gm, self.graph, self.train = gm, gm.graph, train
        self.chain, self.alpha = quant.chain_of(quantize)
        self.placeholders = {n: i for i, n in enumerate(self.graph.find_nodes(op="placeholder"))}
        self.packed: dict[Recipe, fx.Node] = {}
        self.notes: list[str] = []
        self.copied = 0  # bytes of packed copies

    # ---- routing -------------------------------------------------------------------------------------------------------

    def route(self, n: fx.Node) -> None:
        """weights, ids = route(...): readers of ids other than the experts get them as int64."""
        logits, bias, table, *plain = n.args
        tensors = [a for a in (logits, bias, table) if isinstance(a, fx.Node)]
        why = None if self.train else law.why_aten(Routing(*plain), logits.meta["example_value"].shape[-1])  # type: ignore[arg-type, union-attr]
        if why is not None:
            self.notes.append(f"routing as ATen ops: {why}")
        with recording(n, n, tensors) as r:
            w, ids = calls.route(r.value(logits), r.value(bias), r.value(table), Routing(*plain), self.train)  # type: ignore[arg-type]
            others = [u for g in n.users if g.args[1] == 1 for u in g.users if u.target not in EXPERTS]
            wide = ids.to(torch.int64) if others and ids.dtype != torch.int64 else ids
        for g in list(n.users):
            if g.args[1] == 0:
                g.replace_all_uses_with(r.node(w))
            else:
                for u in list(g.users):
                    u.replace_input_with(g, r.node(ids if u.target in EXPERTS else wide))
            self.graph.erase_node(g)
        self.graph.erase_node(n)
        for t in (ids, wide):
            r.node(t).meta["experts_of"] = logits.meta["example_value"].shape[-1]  # type: ignore[union-attr]
        r.drop_unused()

    # ---- experts -------------------------------------------------------------------------------------------------------

    def experts(self, n: fx.Node) -> None:
        """Rows where the op stood; the combine where an addend that goes into it is known."""
        c = _Call.of(n)
        quantised = self._quantised(c)
        operands = {} if quantised is not None else self._operands(n, c)
        step: Any = quant if quantised is not None else training if self.train else calls
        with recording(n, n, c.reads) as r:
            v = [r.value(a) for a in (c.x, c.ids, c.weights)]
            known = _all_within(c.ids, c.layout.num_experts)
            p = self._values(operands, r) if quantised is None else self._chain(c, list(map(r.value, quantised)))
            *rows, own = step.start(*v, p, c.layout, known)
            if c.base is not None:
                own.append(r.value(c.base))
        place, other, between = _addend(n, len(own)) if not self.train else (n, None, [])
        with recording(place, n, c.reads) as late:
            late.nodes, late.kept = r.nodes, r.kept
            addends = [] if other is None else [late.value(other).reshape(-1, rows[0].shape[-1])]
            out = step.finish(*rows, own, addends)
        combined = self._reshaped(late.node(out), place, between)
        place.replace_all_uses_with(combined)
        if other is not None and other in place.args[:1]:  # `shared.add_(routed)`: from here on `shared` is the sum
            for u in [u for u in other.users if u is not place and _follows(place, u)]:
                u.replace_input_with(other, combined)
        for gone in dict.fromkeys((place, *reversed(between), n)):
            self.graph.erase_node(gone)
        r.drop_unused()
        late.drop_unused()

    def _reshaped(self, n: fx.Node, place: fx.Node, between: Sequence[fx.Node]) -> fx.Node:
        """The views that stood between the result and the add, on the sum."""
        for view in between:
            if view.target in _RESHAPES:
                with self.graph.inserting_before(place):
                    n = self.graph.call_method(str(view.target), (n, *view.args[1:]))
                n.meta.update(view.meta)
        return n

    def _values(self, p: dict[str, list[fx.Node]], r: Recorder) -> Packed:
        v = {name: [r.value(n) for n in nodes] for name, nodes in p.items()}
        one = {name: v[name][0] for name in v if name.startswith("down") and v[name]}
        return Packed(**{name: values for name, values in v.items() if name.startswith("up")}, **one)

    def _chain(self, c: _Call, values: list[Tensor]) -> quant.Quantised:
        up, up_scale, down, down_scale = values
        if self._chain_of(c) == "w8a8c8":
            return quant.Clipped(up, up_scale, down, down_scale, self.alpha)
        return quant.Quantised(up, up_scale, down, down_scale)

    def _operands(self, n: fx.Node, c: _Call) -> dict[str, list[fx.Node]]:
        """Nodes of the packed operands: new graph inputs where the weights are inputs themselves."""
        layout, halves, bias = c.layout, c.layout.halves(), calls.bias_dtype(c.dtype)
        stored, part = (torch.int8, "stored") if c.scaled else (c.dtype, "")

        def group(nodes: Sequence[fx.Node], parts: int, transposed: bool, wanted: torch.dtype, part: str = "") -> list[fx.Node]:
            size = len(nodes) // parts
            return [self._operand(n, nodes[i * size : (i + 1) * size], layout, transposed, wanted, part) for i in range(parts)]

        found = {
            "up": group(c.up, halves, not layout.up_transposed, stored, part),
            "down": group(c.down, 1, not layout.down_transposed, stored, part),
            "up_bias": group(c.up_bias, halves, False, bias) if c.up_bias else [],
            "down_bias": group(c.down_bias, 1, False, bias) if c.down_bias else [],
        }
        if c.scaled:
            up, down = c.widths()
            for offset, what in ((False, "scale"), (True, "offset")):
                found[f"up_{what}"] = self._scales(n, c, c.up, c.up_scale, halves, up, c.dtype, offset)
                found[f"down_{what}"] = self._scales(n, c, c.down, c.down_scale, 1, down, c.dtype, offset)
        return found

    def _scales(
        self, at: fx.Node, c: _Call, weights: Sequence[fx.Node], scales: Sequence[fx.Node], parts: int, width: int, dtype: torch.dtype,
        offset: bool = False,
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
        with recording(at, at, nodes) as r:  # computed in the graph: nothing to make ahead
            values = [r.value(n) for n in nodes]
            t = values[0] if layout.stacked else torch.stack(values)
            t = t if t.shape[0] == layout.num_experts else t[: layout.num_experts]
            if part in ("zeros", "ones"):
                t = torch.full((layout.num_experts, width), float(part == "ones"), dtype=dtype, device=t.device)
            t = t.expand(layout.num_experts, width) if part == "channel" else t
            t = calls.cast(t.transpose(-1, -2) if transposed else t, dtype)
            t = t.contiguous() if part in ("channel", "stored") else t
        self.notes.append("expert weights are computed in the graph: their layout is made on every step")
        return r.node(t)

    def _chain_of(self, c: _Call) -> str | None:
        """A model that rounds its rows itself is W8A8 without being asked; clipping them would be another function."""
        return "w8a8" if c.row_bits else self.chain

    def _quantised(self, c: _Call) -> list[fx.Node] | None:
        """Int8 weights and scales of both products as graph inputs, or None where they stay as they are."""
        chain = self._chain_of(c)
        if chain is None:
            return None
        layout, every = c.layout, (*c.up, *c.down, *c.up_scale, *c.down_scale)
        inner = layout.intermediate([d.meta["example_value"] for d in c.down])
        why = quant.refuses(layout, inner, bool(c.up_bias or c.down_bias), c.dtype) or quant.refuses_chain(chain, inner, c.dtype)
        if why is None and any(trace_back(n, self.placeholders) is None for n in every):
            why = "the weights are computed in the graph"
        if why is not None and c.row_bits:
            raise ValueError(f"rows are rounded to {c.row_bits} bits: {why}")
        if why is not None:
            self.notes.append(f"a block is not quantised: {why}")
            return None
        out: list[fx.Node] = []
        scales = (torch.float32 if chain == "w8a8" else quant.scale_dtype(c.dtype), quant.scale_dtype(c.dtype))
        transposed = (layout.up_transposed, layout.down_transposed)
        for weights, own, stored, scale, width in zip((c.up, c.down), (c.up_scale, c.down_scale), transposed, scales, c.widths()):
            if c.scaled:
                out.append(self._operand(c.x, weights, layout, not stored, torch.int8))
                out += self._scales(c.x, c, weights, own, 1, width, scale)
            else:
                out += [self._operand(c.x, weights, layout, not stored, scale, part) for part in ("int8", "scale")]
        return out

    def _input(self, recipe: Recipe) -> fx.Node:
        """The new graph input that holds a packed operand; equal operands share one."""
        if recipe in self.packed:
            return self.packed[recipe]
        old = list(self.placeholders)
        sources = [old[s.position] for s in recipe.sources]
        values = [s.meta["example_value"] for s in sources]
        mode = getattr(values[0], "fake_mode", None) or contextlib.nullcontext()
        with mode, torch.no_grad():
            made = recipe.view(values) if self.train else recipe.pack(values)
            value = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=made.device)
        value.requires_grad_(self.train and any(v.requires_grad for v in values))
        if not self.train and recipe.part not in ("channel", "zeros", "ones") and not recipe.is_free(values):
            self.copied += value.numel() * value.element_size()
        with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
            kind = "" if recipe.part in ("", "stored") else f"{recipe.part}_"
            again = sum(r.sources == recipe.sources and r.part == recipe.part for r in self.packed)
            n = self.graph.placeholder(f"packed_{kind}{sources[0].name}{f'_{again}' if again else ''}")
        n.meta.update(sources[0].meta, example_value=value, val=value)
        n.meta.pop("grapharg", None)
        self.packed[recipe] = n
        return n

    def done(self) -> Lowered:
        """Weights that only the packed operands read are no inputs any more."""
        used = {s.position for recipe in self.packed for s in recipe.sources}
        for n in reversed(list(self.graph.nodes)):
            if n.op == "call_method" and not n.users and trace_back(n, self.placeholders) is not None:
                self.graph.erase_node(n)
        inputs: list[int | Recipe] = []
        recipes = {n: recipe for recipe, n in self.packed.items()}
        for n in self.graph.find_nodes(op="placeholder"):
            if n in recipes:
                inputs.append(recipes[n])
            elif n.users or self.placeholders[n] not in used:
                inputs.append(self.placeholders[n])
            else:
                self.graph.erase_node(n)
        if self.copied:
            self.notes.append(
                f"expert weights are copied on first use into the layout of grouped matmul: {self.copied / 2**20:.1f} MiB more memory "
                "(moe_compile.prepare(model, target='ascend') rearranges them in place instead)"
            )
        if self.train and _sharded():
            self.notes += sorted({_alignment_note(recipe, n) for recipe, n in self.packed.items()} - {""})
        self.graph.lint()
        self.gm.recompile()
        return Lowered(self.gm, inputs, self.train, list(dict.fromkeys(self.notes)))


def _sharded() -> bool:
    """Whether weights are likely to be spread over several devices."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _alignment_note(recipe: Recipe, n: fx.Node) -> str:
    """Shards of expert weights are cast to the fractal format as they are gathered: blocks of 512 are what that wants."""
    sizes = n.meta["example_value"].shape[1:]
    odd = [int(s) for s in sizes if len(sizes) == 2 and s % 512]
    return f"expert weights are sharded: sizes that are multiples of 512 are recommended, one has {odd}" if odd else ""


# ---- what is known of the graph around -----------------------------------------------------------------------------------


def _all_within(ids: fx.Node, num_experts: int) -> bool:
    """Whether ids are a top-k's over exactly these experts, seen through views and casts."""
    while isinstance(ids, fx.Node):
        if "experts_of" in ids.meta:
            return bool(ids.meta["experts_of"] == num_experts)
        if ids.op == "call_method" and ids.target in ("to", "view", "reshape", "flatten", "int", "long", "contiguous", "detach"):
            ids = ids.args[0]  # type: ignore[assignment]
            continue
        top = ids.args[0] if ids.target in (operator.getitem, getattr) and ids.args[1] in (1, "indices") else None
        if isinstance(top, fx.Node) and (top.target is torch.topk or (top.op == "call_method" and top.target == "topk")):
            of = top.args[0].meta.get("example_value")  # type: ignore[union-attr]
            return bool(isinstance(of, Tensor) and of.shape[-1] == num_experts)
        return False
    return False


def _addend(n: fx.Node, taken: int) -> tuple[fx.Node, fx.Node | None, list[fx.Node]]:
    """(the add that the result alone goes into, the other operand, the views between), or (n, None, []).

    The op adds in fp32 and rounds once. The combine moves to the add, so nothing in between may write anywhere.
    """
    end, between = n, []
    while len(end.users) == 1 and taken < 2:
        (u,) = end.users
        if u.op == "call_method" and u.args[0] is end and (u.target in _RESHAPES or (u.target == "to" and _keeps_value(n, u))):
            end = u
            between.append(u)
            continue
        other = _other_operand(u, end)
        if other is None or not _same_kind(end, other) or _dtype(end) != _dtype(n) or _written_between(n, u):
            break
        return u, other, between
    return n, None, []


def _other_operand(u: fx.Node, mine: fx.Node) -> fx.Node | None:
    in_place = u.target is operator.iadd or (u.op == "call_method" and u.target == "add_")
    if in_place and not u.kwargs and len(u.args) == 2 and u.args[1] is mine and _only_written(u.args[0], u):
        return u.args[0]  # type: ignore[return-value]
    plain = u.target in (operator.add, torch.add) or (u.op == "call_method" and u.target == "add")
    if u.kwargs or len(u.args) != 2 or not (plain or (in_place and u.args[0] is mine)):
        return None
    other = u.args[1] if u.args[0] is mine else u.args[0]
    return other if isinstance(other, fx.Node) and other is not mine else None


def _only_written(other: Any, u: fx.Node) -> bool:
    """Whether nobody but `u` and what follows it sees this value's memory: a fresh product, not read before."""
    return isinstance(other, fx.Node) and is_product(other) and all(x is u or _follows(u, x) for x in other.users)


def _follows(first: fx.Node, n: fx.Node) -> bool:
    return bool(first < n)


def _dtype(n: fx.Node) -> torch.dtype | None:
    return getattr(n.meta.get("example_value"), "dtype", None)


def _keeps_value(n: fx.Node, cast: fx.Node) -> bool:
    """Whether a cast on the way from `n` loses nothing: to a wider dtype, or back to `n`'s own."""
    own, to = _dtype(n), _dtype(cast)
    return own is not None and to is not None and (to == own or torch.promote_types(own, to) == to)


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("example_value"), b.meta.get("example_value")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return x.dtype == y.dtype and x.shape == y.shape and x.ndim >= 1


def _written_between(first: fx.Node, last: fx.Node) -> bool:
    n = first.next
    while n is not last:
        if is_write(n):
            return True
        n = n.next
    return False
