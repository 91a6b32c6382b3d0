"""The edge of a block's regions: what each tensor there is, and the small sizes that it gets on probes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy as sp
import torch.fx as fx

from ...ir import Experts, Gating, Stored
from ...ir.chain import Chain, Matrix
from ...ir.operands import Operands
from ...ir.stored import ALL, Scale
from .. import terms as T
from ..aten.element import shape_of
from ..aten.places import never_negative
from ..recover.match import Param
from ..recover.region import Block
from ..recover.shared import SharedOperands
from .sizes import SMALL, Dim, Sizes, regroup

FEW = 7  # tokens, a prime that rarely equals another size
PROBES = 3  # of the usual kinds: together they are to hit every expert
_FEW_ENOUGH = 16  # tokens that stay as many as they are
_MOST = 64  # tokens
_WIDTHS = (24, 20, 28, 36, 44)
_FEW_EXPERTS = 64  # with blocks of scales, of which more than these get fewer
ENDS = "group ends"
_PER_EXPERT = ("selection bias", "expert scale", ENDS)
_NEAR = (1, 2, 3, 4)  # multiples of each other that two sizes stay on a probe


@dataclass(frozen=True)
class Extent:
    """A dim of a parameter: a multiple of `width`, or a number for every `block` of a `whole` that is one."""

    width: int
    whole: int = 0
    block: int = 1


@dataclass(frozen=True)
class Small:
    """One choice of sizes: the shape of every tensor of the edge, the views of parameters, the experts as they are on the probe."""

    sizes: Sizes
    shapes: Mapping[fx.Node, tuple[int, ...]]
    views: Mapping[Param, tuple[int, ...] | None]
    experts: Experts


@dataclass(frozen=True)
class Edge:
    """Roles of the tensors that regions of a block start at.

    `rows`: node -> its width, for tensors with a row for each token (tokens, ids, weights, logits, base, a gate). `groups`: the
    experts' parameters with what their last dims are. `roles`: node -> what it is. `mapped`: ids may be any numbers
    `within` (least, largest; None: not known). `wraps`: those below zero count from the last expert. `counts`: of the blocks that an
    index of blocks is into.
    """

    tokens: fx.Node
    experts: Experts
    k: int
    roles: Mapping[fx.Node, str]
    rows: Mapping[fx.Node, int]
    groups: tuple[tuple[Param, tuple[Extent, ...]], ...]
    twins: Mapping[fx.Node, fx.Node]
    gating: Gating | None = None
    mapped: bool = False
    within: tuple[int | None, int | None] = (None, None)
    wraps: bool = False
    counts: Mapping[fx.Node, int] = field(default_factory=dict)

    @property
    def lead(self) -> tuple[Dim, ...]:
        return shape_of(self.tokens)[:-1]

    @property
    def total(self) -> int:
        """How many ids mean something."""
        return self.experts.num_experts + self.experts.num_identity

    def first_sizes(self) -> Sizes:
        """Few tokens, enough of them for every expert on one probe or another; narrow widths."""
        e = self.experts
        atoms: dict[int, int] = {}
        free = iter(_WIDTHS)
        widths: dict[int, int] = {}
        inner = () if e.chain is None else tuple((s.width, 1) for s in e.chain.stages)
        for old, block in (*zip((e.hidden, e.intermediate, e.out_features), _blocks(e), strict=True), *inner):
            widths[old] = math.lcm(widths.get(old, 1), block)
        for i, old in enumerate(sorted(widths, reverse=True)):
            if widths[old] == 1 and old > 2 * SMALL:
                atoms[old] = _beside(old, atoms) or next(free)
            elif widths[old] > 1:
                atoms.update(_in_blocks(old, widths[old], i + 1 + (self.total <= _FEW_EXPERTS)))
        few = min(max(FEW, -(-self.total // (PROBES * self.k)) | 1), _MOST)
        symbols = sorted({x for s in self.lead if isinstance(s, sp.Expr) for x in s.free_symbols}, key=str)
        values = {x: few if i == len(symbols) - 1 else 2 for i, x in enumerate(symbols)}
        values = {x: max(v, *(_value(s, x, v) for s in self.lead)) for x, v in values.items()}
        rows = self._few_rows(atoms, few, bool(symbols))
        kept = {e.num_experts, self.total, self.k, *widths.values()}
        return Sizes(values, tuple(p for p in dict.fromkeys((*rows.items(), *atoms.items())) if p[0] > 1), frozenset(kept))

    def _few_rows(self, atoms: dict[int, int], few: int, symbolic: bool) -> dict[int, int]:
        """What the dims of the tokens become, and products of them. They go with a width that is as large, or a simple multiple, unless
        that stays large (it is made of blocks that share a scale)."""
        known = [s for s in self.lead if isinstance(s, int)]
        if math.prod(known) <= _FEW_ENOUGH:
            return {}
        rows: dict[int, int] = {}
        for s in sorted(set(known), reverse=True):
            least = few if s == max(known) and not symbolic else 2
            beside = atoms.get(s) or _beside(s, {**atoms, **rows}) or least
            rows[s] = min(s, beside if beside <= _MOST else least) if s > 3 else s
        for i in range(len(known)):
            for j in range(i + 2, len(known) + 1):
                rows.setdefault(math.prod(known[i:j]), math.prod(rows[s] for s in known[i:j]))
        return rows

    def small(self, sizes: Sizes) -> Small:
        """Raises Unfree where a tensor's shape cannot follow."""
        known, rows = dict(sizes.atoms), dict(reversed(sizes.atoms))  # of two sizes for one number the first is that of the tokens

        def new(s: Dim) -> int:
            return known.get(s, s) if isinstance(s, int) else int(sizes.of(s))

        lead = [rows.get(s, s) if isinstance(s, int) else int(sizes.of(s)) for s in self.lead]
        shapes: dict[fx.Node, tuple[int, ...]] = {}
        for n, width in self.rows.items():
            shapes[n] = _one(sizes, (*self.lead, width), (*lead, new(width) if self.roles[n] in ("tokens", "base") else width), shape_of(n))
        views: dict[Param, tuple[int, ...] | None] = {}
        for q, extents in self.groups:
            stored = q.stored()
            at = len(stored) - len(extents)
            after = (*stored[:at], *(_scaled(s, x, known, sizes) for s, x in zip(stored[at:], extents, strict=True)))
            views[q] = None if q.view is None else after
            shapes.setdefault(q.node, after if q.view is None else _one(sizes, stored, after, shape_of(q.node)))
        for n, role in self.roles.items():
            if role in _PER_EXPERT:  # as many tokens as experts do not change how many experts there are
                shapes.setdefault(n, tuple(s if s in (self.experts.num_experts, self.total) else new(s) for s in shape_of(n)))
            shapes.setdefault(n, sizes.shape(shape_of(n)) if role == "other" else tuple(new(s) for s in shape_of(n)))
        return Small(sizes, shapes, views, self.experts.resized(dict(sizes.atoms)))


def _in_blocks(old: int, block: int, few: int) -> dict[int, int]:
    """A width as so few blocks, where it is whole blocks and more; and how many there are."""
    return {old: few * block, old // block: few} if old % block == 0 and old > few * block else {}


def _beside(old: int, known: Mapping[int, int]) -> int | None:
    """The size that keeps a simple ratio to a size that is known."""
    for a, b in known.items():
        for q in _NEAR:
            if old == a * q:
                return b * q
            if a == old * q and b % q == 0 and b // q > 2:
                return b // q
    return None


def _value(size: Dim, x: sp.Symbol, least: int) -> int:
    """A value of x for which a size c x + d, such as that of what is left behind a chunk of the tokens, is no smaller than `least`."""
    factor = sp.sympify(size).coeff(x)
    rest = size - factor * x
    whole = factor.is_Integer and rest.is_Integer and factor > 0
    return -(-(least - int(rest)) // int(factor)) if whole else least


def _one(sizes: Sizes, old: Iterable[Dim], new: Iterable[int], shape: tuple[Dim, ...]) -> tuple[int, ...]:
    """The same elements in another shape."""
    runs = regroup(sizes, tuple(old), tuple(new), shape)
    out: list[int] = []
    for options in runs:  # of several ways the one that leaves the inner dims as they are: how many codes a word or a group has
        here = shape[len(out) : len(out) + len(options[0])]
        out += sorted(options, key=lambda way: [a == b for a, b in zip(tuple(way)[::-1], here[::-1], strict=True)])[-1]
    return tuple(out)


def _scaled(stored: Any, x: Extent, known: Mapping[int, int], sizes: Sizes) -> int:
    """A stored dim: a multiple of a width (gate and up), or one number for several channels."""
    whole, width = x.whole or stored, x.width
    if whole >= width and whole % width == 0:
        return -(-int(whole // width * known.get(width, width)) // x.block)
    return int(sizes.candidates(stored)[0])


def edge_of(b: Block, mapped: bool) -> Edge:
    """The edge of a block: its experts' and its routing's inputs."""
    m, g = b.match, b.gating
    roles: dict[fx.Node, str] = {}
    rows: dict[fx.Node, int] = {}

    def row(n: fx.Node | None, role: str, width: int) -> None:
        if n is not None and n not in roles:
            roles[n], rows[n] = role, width

    row(m.tokens, "tokens", m.experts.hidden)
    row(m.base, "base", m.experts.out_features)
    row(b.ids if b.ends is None else None, "ids", m.k)
    row(b.weights, "weights", m.k)
    for n in b.twins:
        row(n, "twin", m.k)
    if b.ends is not None:
        roles[b.ends] = ENDS
    if g is not None:
        row(g.logits, "logits", g.gating.num_experts)
        roles.update({n: role for n, role in ((g.bias, "selection bias"), (g.expert_scale, "expert scale")) if n is not None})
    groups = _groups(m.experts, m.operands)
    roles.update({q.node: role for q, _, role in groups if q.node not in roles})
    pairs = tuple((q, extents) for q, extents, _ in groups)
    within = (0 if never_negative(m.ids) and not b.wraps else None, T.upper(m.ids))
    gating = None if g is None else g.gating
    return Edge(m.tokens, m.experts, m.k, roles, rows, pairs, b.twins, gating, mapped, within, b.wraps, _counts(m.experts, m.operands))


def edge_of_shared(tokens: fx.Node, o: SharedOperands) -> Edge:
    """The edge of a shared expert: the tokens, its parameters, its gate."""
    roles, rows = {tokens: "tokens"}, {tokens: o.experts.hidden}
    if o.gate is not None:
        roles[o.gate], rows[o.gate] = "weights", 1
    groups = _groups(o.experts, o.operands)
    roles.update({q.node: role for q, _, role in groups})
    pairs = tuple((q, extents) for q, extents, _ in groups)
    return Edge(tokens, o.experts, 1, roles, rows, pairs, {}, counts=_counts(o.experts, o.operands))


def _groups(e: Experts, operands: Operands[Param]) -> list[tuple[Param, tuple[Extent, ...], str]]:
    """(parameter, what its last dims are as they are stored, role); an extent of 1 is that of a dim that stays as it is."""
    both = {"up": (e.intermediate, e.hidden), "down": (e.out_features, e.intermediate)}
    extents: dict[str, tuple[Extent, ...]] = {}
    for name, how, transposed in (("up", e.up_stored, e.up_transposed), ("down", e.down_stored, e.down_transposed)):
        (out, inner), codes = both[name], getattr(operands, name)
        widths = (inner, out) if transposed else (out, inner)
        extents |= {name: _of_words(how, codes, widths), f"{name}_bias": (Extent(out),), f"{name}_table": ()}
        rows = getattr(e, f"{name}_rows")
        extents[f"{name}_smooth"] = (Extent(1 if rows is not None and rows.static else inner),)
        extents |= {f"{name}_a": (Extent(1), Extent(inner)), f"{name}_b": (Extent(out), Extent(1))}
        extents[f"{name}_scale"] = _of_scales(how, codes, widths)
        extents[f"{name}_second"] = _of_seconds(how, codes, widths)
        extents[f"{name}_zero"] = _of_zeros(how, extents[f"{name}_scale"])
        extents[f"{name}_group"] = () if how is None or not how.indexed else (Extent(widths[how.indexed - 1]),)
    found = [(q, _as_stored(q, extents[name]), _role(name)) for name, qs in operands.by_name().items() if name != "parts" for q in qs]
    return found if e.chain is None else [*found, *_of_chain(e, e.chain, operands.parts)]


def _counts(e: Experts, operands: Operands[Param]) -> dict[fx.Node, int]:
    """How many blocks each index of blocks is into; the least where one is used twice."""
    found: dict[fx.Node, int] = {}
    for how, params in ((e.up_stored, operands.up_group), (e.down_stored, operands.down_group)):
        for q in params:
            found[q.node] = min(found.get(q.node, how.groups), how.groups) if how is not None else 0
    return found


def _of_chain(e: Experts, chain: Chain, parts: tuple[Param, ...]) -> list[tuple[Param, tuple[Extent, ...], str]]:
    """As `_groups`, of a chain's parameters."""
    widths, starts = chain.widths(e.hidden), chain.starts(e.num_experts)
    out: dict[int, tuple[tuple[Extent, ...], str]] = {}
    for n, q, operand in chain.parameters():
        if isinstance(q, Matrix):
            both = (Extent(widths[n + 1]), Extent(widths[n]))
            out[operand] = (both[::-1] if q.transposed else both), "weight"
        else:
            out[operand] = ((Extent(widths[n + 1]),) if q.stride else (Extent(1),)), "bias"
    return [(q, *out[i]) for i in out for q in parts[starts[i] : starts[i + 1]]]


def _role(name: str) -> str:
    """ "weight" of a projection and of its low-rank pair; else what stands behind its name; second scales are scales."""
    what = name.rpartition("_")[2].replace("second", "scale")
    return what if what in ("bias", "scale", "zero", "table", "group") else "weight"


def _as_stored(q: Param, extents: tuple[Extent, ...]) -> tuple[Extent, ...]:
    if q.order is None:
        return extents
    ordered = (*(Extent(1) for _ in q.order[: -len(extents)]), *extents)
    return tuple(ordered[q.order.index(d)] for d in range(len(q.order)))


def _codes(stored: Stored, words: tuple[Param, ...]) -> tuple[int, int]:
    """Rows and columns of the codes in a projection's tensors."""
    r, c = words[0].stored()[-2:]
    return stored.shape((r, c))


def _of_words(stored: Stored | None, words: tuple[Param, ...], widths: tuple[int, int]) -> tuple[Extent, ...]:
    if stored is None or not stored.axis:
        return tuple(map(Extent, widths))
    whole = _codes(stored, words)
    return tuple(Extent(w, n, len(stored.order) if stored.axis == d + 1 else 1) for d, (w, n) in enumerate(zip(widths, whole, strict=True)))


def _of_scales(stored: Stored | None, codes: tuple[Param, ...], widths: tuple[int, int]) -> tuple[Extent, ...]:
    if stored is None or not stored.scaled:
        return ()
    shape = _codes(stored, codes)
    blocks = zip(widths, shape, (stored.rows, stored.columns), (1, 2), strict=True)
    both = [Extent(1) if d == stored.indexed else Extent(w, n, b) for w, n, b, d in blocks]
    running = [x for x in both if x.block != ALL]
    return tuple(both) if stored.grid else tuple(running) or (Extent(widths[0]),)


def _of_seconds(stored: Stored | None, codes: tuple[Param, ...], widths: tuple[int, int]) -> tuple[Extent, ...]:
    if stored is None or not stored.second:
        return ()
    return _of_scales(replace(stored, indexed=0, scaled=Scale.TIMES, rows=stored.second_rows, columns=stored.second_columns), codes, widths)


def _of_zeros(stored: Stored | None, scales: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """Zero points lie as scales, several in a word where they are packed."""
    if stored is None or not stored.zero_order:
        return scales
    return tuple(x if stored.indexed == d + 1 else replace(x, block=x.block * _per(stored, d)) for d, x in enumerate(scales))


def _per(stored: Stored, d: int) -> int:
    """Zero points in a word, along a dim of theirs."""
    return len(stored.zero_order) if stored.zeroed == d + 2 else 1


def _blocks(e: Experts) -> tuple[int, int, int]:
    """What hidden, intermediate and out features are to be multiples of: the blocks that share a scale."""

    def block(s: Stored | None, transposed: bool) -> tuple[int, int]:
        if s is None:
            return 1, 1
        blocks = enumerate((s.rows, s.columns))
        seconds = (s.second_rows or 1, s.second_columns or 1)
        both = [math.lcm((b or 1) * _per(s, d), len(s.order) if s.axis == d + 1 else 1, seconds[d]) for d, b in blocks]
        return (both[1], both[0]) if transposed else (both[0], both[1])

    up, down = block(e.up_stored, e.up_transposed), block(e.down_stored, e.down_transposed)
    return up[1], math.lcm(up[0], down[1]), down[0]
