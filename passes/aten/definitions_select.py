"""Sorting, selection, counts and grouped matmuls as terms: the order a dispatch is made by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.fx as fx

from .. import terms as T
from ..terms import Term
from . import names
from .definitions_views import TUPLES
from .element import Args, Idx, Mask, Opaque, Puller, call_args, dtype_of, normal_dim, replace, rule, shape_of, size_of
from .names import op_name, through
from .places import least
from .sorted_rows import marked

# ---- sorting and selection ---------------------------------------------------------------------------------------------


def _selected(p: Puller, node: fx.Node, src: fx.Node, dim: int, i: int, idx: Idx) -> Term:
    """Values (i = 0) or indices (i = 1) of a selection of the best along the last dim."""
    T.facts().know(node, shape_of(src)[dim])
    chosen = T.mk("topk", node, idx)
    return chosen if i == 1 else p.at(src, replace(idx, dim, chosen))


def _topk(p: Puller, src: fx.Node, i: int, n: fx.Node, idx: Idx) -> Term:
    a = call_args(src)
    x: Any = src.args[0]
    return _selected(p, src, x, normal_dim(a.dim, len(idx)), i, idx)


def _max_dim(p: Puller, src: fx.Node, i: int, n: fx.Node, idx: Idx) -> Term:
    a = call_args(src)
    x: Any = src.args[0]
    d = normal_dim(a.dim, len(shape_of(x)))
    if i == 0:
        v = T.var(shape_of(x)[d], "e")
        at = replace(idx, d, v) if a.keepdim else (*idx[:d], v, *idx[d:])
        return T.reduce_("max" if op_name(src) == "max" else "min", v, p.at(x, at))
    T.facts().know(src, shape_of(x)[d])
    return T.mk("topk", src, replace(idx, d, T.const(0)) if a.keepdim else (*idx[:d], T.const(0), *idx[d:]))


TUPLES["topk"] = _topk
TUPLES["max"] = TUPLES["min"] = _max_dim


@rule("argmax", "argmin")
def _argmax(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if a.dim is None:
        raise Opaque("argmax over a flattened tensor")
    x: Any = n.args[0]
    d = normal_dim(a.dim, len(shape_of(x)))
    T.facts().know(n, shape_of(x)[d])
    return T.mk("topk", n, replace(idx, d, T.const(0)) if a.keepdim else (*idx[:d], T.const(0), *idx[d:]))


def _from_the_end(idx: Idx, d: int, size: Any) -> Idx:
    """ascending[i] = descending[E - 1 - i], but for ties: slots are counted from the largest, however it is sorted."""
    if not isinstance(size, int):
        raise Opaque("an ascending sort over a dynamic dim")
    return replace(idx, d, T.add(T.const(size - 1), T.mul(T.const(-1), idx[d])))


def _sorted(p: Puller, node: fx.Node, i: int, idx: Idx) -> Term:
    a = call_args(node)
    x: Any = node.args[0]
    shape = shape_of(x)
    d = normal_dim(a.dim, len(shape))
    if dtype_of(x).is_floating_point:
        return _selected(p, node, x, d, i, idx if a.descending else _from_the_end(idx, d, shape[d]))
    if len(shape) != 1 or a.descending:
        raise Opaque("an integer sort that is not ascending over one dim")
    T.facts().know(node, shape[0])
    q = T.named(T.Q, shape[0])
    key = p.at(x, (q,))
    if key.op in ("perm", "inv") and key.args[2] is q:  # the argsort of a permutation is its inverse
        if i == 0:
            return idx[0]
        return (T.inv if key.op == "perm" else T.perm)(key.args[0], key.args[1], idx[0])
    key = T.canonical(key)
    return T.perm(node, key, idx[0]) if i == 1 else T.sv(key, idx[0])


TUPLES["sort"] = lambda p, src, i, n, idx: _sorted(p, src, i, idx)


rule("argsort")(lambda p, n, a, idx: _sorted(p, n, 1, idx))


# ---- counts and grouped matmuls ----------------------------------------------------------------------------------------


@rule("histc")
def _histc(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if a.min == 0 and a.max == a.bins:  # the last bin also counts the id E: there must be none
        src: Any = n.args[0]
        top = T.upper(p.at(src, tuple(T.var(s, "q") for s in shape_of(src))))
        if top is not None and top < a.bins:
            return _count(p, n, idx)
    if a.min != 0 or a.max != a.bins - 1:
        raise Opaque("a histogram whose bins are not the integers")
    return _count(p, n, idx)


@rule("bincount")
def _bincount(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if a.weights is not None:
        raise Opaque("a weighted bincount")
    return _count(p, n, idx)


def _count(p: Puller, n: fx.Node, idx: Idx) -> Term:
    src: Any = n.args[0]
    at = tuple(T.var(s, "q") for s in shape_of(src))
    t = T.eq(p.at(src, at), idx[0])
    for v in reversed(at):
        t = T.reduce_("sum", v, t)
    return t


@rule("cumsum")
def _cumsum(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """Running counts of each key: cumsum over positions of a one-hot table."""
    shape = shape_of(n)
    if len(shape) != 2 or normal_dim(a.dim, 2) != 0:
        raise Opaque("a running sum that is no count")
    q, e = T.named(T.Q, shape[0]), T.var(shape[1], "e")
    hit = p.at(n.args[0], (q, e))
    if hit.op != "eq" or e not in hit.args:
        raise Opaque("a running sum that is no count")
    key = hit.args[0] if hit.args[1] is e else hit.args[1]
    if T.uses(key, e):
        raise Opaque("a running sum that is no count")
    return T.mk("rank", T.canonical(key), *idx)


def counted_key(p: Puller, counts: fx.Node) -> Term:
    """The ids that `counts[e] = Σ_q [ids(q) = e]` counts, as a sort key in Q; Opaque if it is no such count."""
    e = T.var(shape_of(counts)[0], "e")
    t = p.at(counts, (e,))
    binders = []
    while t.op in ("sum", "any"):
        binders.append(t.args[0])
        t = t.args[1]
    if t.op != "eq" or e not in t.args or not binders:
        raise Opaque("group sizes that are not the counts of the ids")
    ids = t.args[0] if t.args[1] is e else t.args[1]
    lowest = least(ids, given=0)
    if lowest is None or lowest < 0:
        raise Opaque("ids below zero are sorted before the rows of the first group")
    total: Any = 1
    for v in binders:
        total = total * v.args[1]
    flat = T.named(T.Q, int(total) if not isinstance(total, int) and total.is_Integer else total)
    at: dict[Term, Term] = {}
    for v in reversed(binders[1:]):
        at[v], flat = T.mod(flat, v.args[1]), T.fdiv(flat, v.args[1])
    at[binders[0]] = flat
    return T.canonical(T.subst(ids, at))


def group_of(p: Puller, offs: fx.Node, row: Term, values: Iterable[Term] = ()) -> Term:
    """Which group of a grouped matmul a row is in. values: terms of the row itself, which tell of a mask whose true elements rows are."""
    node = through(offs, names.CAST | names.SAME)
    if op_name(node) != "cumsum":
        raise Opaque("group offsets that are no running sum")
    return _group_at(p, node.args[0], row, values)


def _group_at(p: Puller, counts: fx.Node, row: Term, values: Iterable[Term]) -> Term:
    """The group of a row where group e has counts[e] rows: nz(m, row, 0) where counts[e] = Σ_i m[e, i], else the sorted id.

    The true elements of m in row-major order are those of m[0], then those of m[1], ... values: terms that read such elements.
    """
    for m in {u.args[0]: None for t in values for u in T.walk(t) if u.op == "nz" and u.args[1] is row}:
        if len(m.shape) > 1 and T.same_size(m.shape[0], shape_of(counts)[0]) and _counts_true(p, counts, m):
            return T.mk("nz", m, row, 0)
    return T.sv(counted_key(p, counts), row)


def _counts_true(p: Puller, counts: fx.Node, m: Mask) -> bool:
    """Whether counts[e] = Σ_i m[e, i]."""
    e, *others = (T.var(s, "e") for s in m.shape)
    total = m.at((e, *others))
    for v in reversed(others):
        total = T.reduce_("sum", v, total)
    return T.canonical(p.at(counts, (e,))) == T.canonical(total)


def _group(p: Puller, product: fx.Node, offs: fx.Node, row: Term) -> Term:
    """`group_of`, or the expert of the row where rows came in order and nothing says by which ids."""
    try:
        return group_of(p, offs, row, [p.at(product.args[0], (row, T.var(shape_of(product)[1], "m")))])  # type: ignore[arg-type]
    except Opaque:
        told = marked(offs, product)
        if told is None:
            raise
        return p.at(told, (row,))


@rule(*names.GROUPED)
def _grouped_mm(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    x, w, offs = n.args[0], n.args[1], getattr(a, "offs", None)
    if offs is None or getattr(a, "bias", None) is not None or len(shape_of(w)) != 3 or len(shape_of(x)) != 2:  # type: ignore[arg-type]
        raise Opaque("a grouped matmul of another form")
    m = T.var(shape_of(x)[1], "m")  # type: ignore[arg-type]
    g = _group(p, n, offs, idx[0])
    return T.reduce_("sum", m, T.mul(p.at(x, (idx[0], m)), p.at(w, (g, m, idx[1]))))


@rule("cat", "concat", "concatenate")
def _cat(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return _joined(p, [x for x in a.tensors if shape_of(x) != (0,)], normal_dim(a.dim, len(idx)), idx)


def _joined(p: Puller, parts: list[fx.Node], d: int, idx: Idx) -> Term:
    """The element at `idx` of `parts` one behind the other along dim `d`."""
    whole = _grouped_cat(p, parts, d, idx)
    if whole is not None:
        return whole
    start: Any = 0
    out: Term | None = None
    for x in parts:
        n_x = shape_of(x)[d]
        if T.is_c(idx[d]) and isinstance(n_x, int) and isinstance(start, int):
            if start <= idx[d].args[0] < start + n_x:
                return p.at(x, replace(idx, d, T.const(idx[d].args[0] - start)))
        else:
            here = p.at(x, replace(idx, d, T.add(idx[d], T.const(-start))))
            out = here if out is None else T.ite(T.lt(idx[d], T.const(start)), out, here)
        start = start + n_x
    if out is None:
        raise Opaque("an empty cat")
    return out


@rule("vstack", "row_stack", "hstack", "column_stack", "dstack")
def _stacked(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """Joined along a dim that the name says, where the tensors have it; lists become rows or columns first."""
    name, parts = op_name(n), a.tensors
    dim = {"vstack": 0, "row_stack": 0, "dstack": 2}.get(name, 1)
    if any(len(shape_of(x)) != len(idx) or len(idx) <= dim for x in parts):
        raise Opaque(f"{name} of tensors that have not that dim")
    return _joined(p, [x for x in parts if 0 not in shape_of(x)] or parts, dim, idx)


def _grouped_cat(p: Puller, parts: list[fx.Node], d: int, idx: Idx) -> Term | None:
    """cat over experts of the rows of a sorted tensor whose sorted id is e: the sorted tensor again, expert by expert."""
    if d != 0 or len(parts) < 2:
        return None
    cases = _masked_cases(p, parts, idx) or _counted_cases(p, parts, idx)
    if cases is None:
        return None
    sorted_id, pieces = cases
    out = T.const(0)
    for e in sorted(pieces, reverse=True):
        out = T.ite(T.eq(sorted_id, T.const(e)), pieces[e], out)
    return out


def _masked_cases(p: Puller, parts: list[fx.Node], idx: Idx) -> tuple[Term, dict[int, Term]] | None:
    """Parts that are rows where [sorted id = e], in the order of e: (the sorted id at this row, each expert's value)."""
    row = T.named("row:cat", "rows")
    pieces: dict[int, Term] = {}
    seen: set[Term] = set()
    for x in parts:
        t = p.at(x, (row, *idx[1:]))
        masks = {u.args[0] for u in T.walk(t) if u.op == "nz" and u.args[1] is row}
        if len(masks) != 1:
            return None
        (mask,) = masks
        m = mask.at(idx[:1]) if len(mask.shape) == 1 else T.const(0)
        if m.op != "eq":
            return None
        s, e = m.args if m.args[1].op == "c" else m.args[::-1]
        if e.op != "c" or not _is_sorted(s, idx[0]) or (pieces and e.args[0] <= max(pieces)):
            return None
        seen.add(s)
        pieces[e.args[0]] = T.subst(t, {T.mk("nz", mask, row, 0): idx[0]})
    return (seen.pop(), pieces) if len(seen) == 1 else None


def _is_sorted(s: Term, row: Term) -> bool:
    """Whether s is the value at `row` of an ascending order: sorted(key)[row], or key[perm[row]]."""
    if s.op == "sv":
        return s.args[1] is row
    return (
        any(T.at_key(u.args[1], u) is s for u in T.walk(s) if u.op == "perm" and u.args[2] is row)
        or row.op == "inv"
        and T.at_key(row.args[1], row.args[2]) is s
    )


def _counted_cases(p: Puller, parts: list[fx.Node], idx: Idx) -> tuple[Term, dict[int, Term]] | None:
    """Parts whose sizes are the counts of ids 0, 1, ..., E-1 read off one tensor: part e holds the rows of expert e."""
    sources = scalar_sources(parts[0].graph)
    counts: set[fx.Node] = set()
    pieces: dict[int, Term] = {}
    start: Any = 0
    for e, x in enumerate(parts):
        size = shape_of(x)[0]
        source = sources.get(str(size))
        if source is None or source[1] != e:
            return None
        counts.add(source[0])
        pieces[e] = p.at(x, (T.add(idx[0], T.const(-start)), *idx[1:]))
        start = start + size
    if len(counts) != 1 or shape_of(next(iter(counts)))[0] != len(parts):
        return None
    return _group_at(p, counts.pop(), idx[0], pieces.values()), pieces


def scalar_sources(graph: fx.Graph) -> dict[str, tuple[fx.Node, int]]:
    """Size symbol -> (tensor, position) for sizes that were read with .item() or .tolist()."""
    owner: Any = graph
    cached: dict[str, tuple[fx.Node, int]] | None = getattr(owner, "_moe_scalars", None)
    if cached is None:
        cached = owner._moe_scalars = {}
        for n in graph.nodes:
            if op_name(n) in names.READ and isinstance(n.args[0], fx.Node):
                x = through(n.args[0], names.CAST | names.SAME)
                if op_name(x) == "select" and isinstance(call_args(x).index, int):
                    cached[str(size_of(n))] = (x.args[0], call_args(x).index)
    return cached
