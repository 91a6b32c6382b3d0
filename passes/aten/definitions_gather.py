"""Gathering and scattering as terms: how rows are picked and put back."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from .. import terms as T
from ..terms import Term
from . import names
from .definitions_views import TUPLES
from .element import Args, Idx, Mask, Opaque, Puller, call_args, dtype_of, normal_dim, reindex, replace, rule, shape_of, truth
from .names import op_name
from .places import REPEATED, apart, one_place, wrapped

_PICKS = frozenset({"nonzero", "nonzero_numpy", "masked_select", "where"})


def true_at(p: Puller, mask: fx.Node, row: Term) -> Idx:
    """Where the row-th true element of a mask is. Reshaping keeps the order: of a reshaped mask it is told by the one that was reshaped,
    and of rows that hold a true element by those, where no row holds two of them."""
    source = mask
    while op_name(source) in names.RESHAPE and source not in p.walls and not p.stop(source):
        source = source.args[0]  # type: ignore[assignment]
    if op_name(source) == "any" and (of := _of_elements(p, source)) is not None:
        return reindex(tuple(T.mk("nz", of, row, d) for d in range(len(of.shape) - 1)), of.shape[:-1], shape_of(mask))
    m = p.mask(source)
    return reindex(tuple(T.mk("nz", m, row, d) for d in range(len(m.shape))), m.shape, shape_of(mask))


def _of_elements(p: Puller, rows: fx.Node) -> Mask | None:
    """m of any(m, -1), where each row of m holds at most one true element and these pick something too: both are as many, in one order."""
    source, dim = rows.args[0], getattr(call_args(rows), "dim", None)
    if not isinstance(source, fx.Node) or dim is None or len(shape_of(source)) < 2:
        return None
    if rows in p.walls or p.stop(rows) or p.stop(source):
        return None
    if not any(op_name(n) in names.LOOKUP | names.PUT | _PICKS for n in source.users):
        return None
    last = len(shape_of(source)) - 1
    dims = [normal_dim(d, last + 1) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    m = p.mask(source)
    return m if dims == [last] and one_place(m, set(range(last)), p.given) else None


# ---- gather ------------------------------------------------------------------------------------------------------------


class Index:
    """The index list of an advanced indexing call, as terms over the broadcast index shape."""

    def __init__(self, p: Puller, src: fx.Node, indices: Any) -> None:
        self.puller = p
        self.sizes = shape_of(src)
        self.at_dim: dict[int, Any] = {}  # source dim -> function of the broadcast index
        shapes: list[tuple[Any, ...]] = []
        d = 0
        for i in indices:
            if i is None:
                d += 1
            elif dtype_of(i) is torch.bool:
                for c in range(len(shape_of(i))):
                    self.at_dim[d] = lambda idx, i=i, c=c: true_at(p, i, idx[-1])[c]
                    d += 1
                shapes.append(("rows",))
            else:
                self.at_dim[d] = lambda idx, i=i: p.broadcast(i, idx)
                shapes.append(shape_of(i))
                d += 1
        self.shape = max(shapes, key=len, default=())
        for s in shapes:
            if len(s) == len(self.shape):
                self.shape = tuple(a if a != 1 else b for a, b in zip(self.shape, s, strict=True))
        dims = sorted(self.at_dim)
        adjacent = bool(dims) and dims == list(range(dims[0], dims[0] + len(dims)))
        self.front = dims[0] if adjacent else 0
        self.kept = [d for d in range(len(self.sizes)) if d not in self.at_dim]

    def source(self, idx: Idx) -> Idx:
        """Index into the source of the gathered element `idx`."""
        n = len(self.shape)
        inner, outer = idx[self.front : self.front + n], iter(idx[: self.front] + idx[self.front + n :])
        return tuple(wrapped(self.at_dim[d](inner), s) if d in self.at_dim else next(outer) for d, s in enumerate(self.sizes))


@rule("index", "_unsafe_index")
def _index(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    return p.at(src, Index(p, src, a.indices).source(idx))


@rule("gather", "take_along_dim")
def _gather(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    index = getattr(a, "index", getattr(a, "indices", None))
    if a.dim is None:
        raise Opaque("take_along_dim without a dim")
    d = normal_dim(a.dim, len(idx))
    return p.at(src, replace(idx, d, p.at(index, idx)))


@rule("index_select")
def _index_select(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    d = normal_dim(a.dim, len(idx))
    return p.at(n.args[0], replace(idx, d, p.at(a.index, (idx[d],))))


rule("embedding")(lambda p, n, a, idx: p.at(a.weight, (p.at(a.indices, idx[:-1]), idx[-1])))
rule("masked_select")(lambda p, n, a, idx: p.broadcast(n.args[0], true_at(p, a.mask, idx[0])))
rule("one_hot")(lambda p, n, a, idx: T.eq(p.at(n.args[0], idx[:-1]), idx[-1]))


@rule("where")
def _where(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return T.ite(truth(p.broadcast(a.condition, idx)), p.broadcast(a.self, idx), p.broadcast(a.other, idx))


@rule("nonzero", "argwhere")
def _nonzero(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if idx[1].op != "c":
        raise Opaque("nonzero read by a variable column")
    return true_at(p, n.args[0], idx[0])[idx[1].args[0]]  # type: ignore[arg-type]


TUPLES["where"] = TUPLES["nonzero_numpy"] = lambda p, src, i, n, idx: true_at(p, src.args[0], idx[0])[i]


# ---- scatter -----------------------------------------------------------------------------------------------------------


@rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    d = normal_dim(a.dim, len(idx))
    j = T.var(shape_of(a.index)[d], "j")
    here = replace(idx, d, j)
    hit = T.eq(p.at(a.index, here), idx[d])
    base = p.at(n.args[0], idx)
    reduce = getattr(a, "reduce", None)
    if op_name(n) == "scatter_add" or reduce in ("add", "sum"):
        return T.add(base, T.reduce_("sum", j, T.mul(hit, p.at(a.src, here))))
    if reduce is not None:
        raise Opaque(f"scatter with reduce={reduce}")
    value = getattr(a, "value", None)
    if value is not None:
        return T.ite(T.reduce_("any", j, hit), p.at(value, ()), base)
    src = p.at(a.src, here)
    if src.op == "c":
        return T.ite(T.reduce_("any", j, hit), src, base)
    if not apart([p.at(a.index, here)], [j], p.given):
        raise Opaque(REPEATED)
    total = T.reduce_("sum", j, T.mul(hit, src))
    return total if T.is_c(base, 0) else T.ite(T.reduce_("any", j, hit), total, base)


@rule("index_add")
def _index_add(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    parts: list[Term] = []
    node: Any = n
    while isinstance(node, fx.Node) and node.op == "call_function" and not (node is not n and p.stop(node)):
        added = _added(p, node, idx)
        if added is None:
            break
        parts.append(added)
        node = node.args[0]
    return T.add(p.at(node, idx), *parts)


def _added(p: Puller, n: fx.Node, idx: Idx) -> Term | None:
    """What an accumulating node adds to its base at `idx`, or None if it is no accumulation."""
    name = op_name(n)
    if name == "index_add":
        a = call_args(n)
        d = normal_dim(a.dim, len(idx))
        row = T.var(shape_of(a.index)[0], "n")
        hit = T.eq(p.at(a.index, (row,)), idx[d])
        return T.mul(T.const(a.alpha), T.reduce_("sum", row, T.mul(hit, p.at(a.source, replace(idx, d, row)))))
    if name in names.PUT:
        a = call_args(n)
        values = a.values if a.accumulate else accumulated_value(n)
        return None if values is None else _put_sum(p, n, a, values, idx)
    return None


def accumulated_value(n: fx.Node) -> Any:
    """y of `out[idx] = out[idx] + y` (which is what `out[idx] += y` records), or None."""
    a = call_args(n)
    v = a.values
    if not isinstance(v, fx.Node) or op_name(v) != "add" or call_args(v).alpha != 1:
        return None
    for x, y in (v.args[:2], v.args[1::-1]):
        if isinstance(x, fx.Node) and op_name(x) == "index":
            xa = call_args(x)
            if x.args[0] is n.args[0] and list(xa.indices) == list(a.indices):
                return y
    return None


def _put_sum(p: Puller, n: fx.Node, a: Args, values: Any, idx: Idx) -> Term:
    where = Index(p, n.args[0], a.indices)  # type: ignore[arg-type]
    rows = tuple(T.var(s if s != "rows" else f"rows:{n.name}", "n") for s in where.shape)
    n_in = len(rows)
    kept = iter(tuple(idx[d] for d in where.kept))
    full = []
    for d in range(len(idx) - len(where.at_dim) + n_in):
        full.append(rows[d - where.front] if where.front <= d < where.front + n_in else next(kept))
    src = where.source(tuple(full))
    if not a.accumulate and not apart([src[d] for d in where.at_dim], rows, p.given):
        raise Opaque(REPEATED)
    t = T.mul(*(T.eq(src[d], idx[d]) for d in where.at_dim), p.broadcast(values, tuple(full)))
    for r in reversed(rows):
        t = T.reduce_("sum", r, t)
    return t


@rule(*names.PUT)
def _index_put(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if a.accumulate or accumulated_value(n) is not None:
        return _index_add(p, n, a, idx)
    return _put(p, n, Index(p, n.args[0], a.indices), a.values, idx)  # type: ignore[arg-type]


@rule("index_copy")
def _index_copy(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """x[.., index, ..] = source along one dim."""
    d = normal_dim(a.dim, len(idx))
    return _put(p, n, Index(p, n.args[0], [*[None] * d, a.index]), a.source, idx)  # type: ignore[arg-type]


def _put(p: Puller, n: fx.Node, where: Index, values: Any, idx: Idx) -> Term:
    if len(where.shape) != 1:
        return _put_scatter(p, n, values, where, idx)
    row = T.named(f"row:{n.name}", where.shape[0] if where.shape[0] != "rows" else f"rows:{n.name}")
    kept = [idx[d] for d in where.kept]
    full = tuple(kept[: where.front] + [row] + kept[where.front :])
    src = where.source(full)
    coords = [src[d] for d in where.at_dim]
    value = p.broadcast(values, full)
    (first, *_) = coords
    if len(coords) == 1 and first.op == "perm" and first.args[2] is row:
        (d,) = where.at_dim
        return T.subst(value, {row: T.inv(first.args[0], first.args[1], idx[d])})
    if len(coords) == 1 and first is row:  # out[arange] = y
        (d,) = where.at_dim
        return T.subst(value, {row: idx[d]})
    place = _place_in_mask(coords, row, [idx[d] for d in where.at_dim], [shape_of(n.args[0])[d] for d in where.at_dim])  # type: ignore[arg-type]
    if place is not None:
        mask, at = place
        inside = T.subst(value, {T.mk("nz", mask, row, d): i for d, i in enumerate(at)})
        if T.uses(inside, row):
            raise Opaque("a masked write that depends on the row's number")
        return T.ite(mask.at(at), inside, p.at(n.args[0], idx))
    return _put_scatter(p, n, values, where, idx)


def _place_in_mask(coords: list[Term], row: Term, at: list[Term], sizes: list[Any]) -> tuple[Mask, Idx] | None:
    """(mask, index into it that `at` is) when `coords` are those of the row-th true element of one mask, in any order or reshaped."""
    masks = {x.args[0] for c in coords for x in T.walk(c) if x.op == "nz" and x.args[1] is row}
    if len(masks) != 1:
        return None
    (mask,) = masks
    own = [T.mk("nz", mask, row, d) for d in range(len(mask.shape))]
    if len(coords) == len(own) and set(coords) == set(own):
        return mask, tuple(at[coords.index(c)] for c in own)
    if T.same_size(sp.Mul(*sizes), sp.Mul(*mask.shape)) and tuple(coords) == reindex(tuple(own), mask.shape, sizes):
        return mask, reindex(tuple(at), sizes, mask.shape)
    return None


def _put_scatter(p: Puller, n: fx.Node, values: Any, where: Index, idx: Idx) -> Term:
    """Plain writes at index tuples, e.g. dense[arange, ids] = w."""
    base = p.at(n.args[0], idx)
    rows = tuple(T.var(s, "n") for s in where.shape)
    kept = iter(tuple(idx[d] for d in where.kept))
    count = len(where.kept) + len(rows)
    full = tuple(rows[d - where.front] if where.front <= d < where.front + len(rows) else next(kept) for d in range(count))
    src = where.source(full)
    if any(s == "rows" for s in where.shape):
        raise Opaque("a write through a partial mask")
    value = p.broadcast(values, full)
    if value.op != "c" and not apart([src[d] for d in where.at_dim], rows, p.given):
        raise Opaque(REPEATED)
    hit = T.mul(*(T.eq(src[d], idx[d]) for d in where.at_dim))
    total, any_hit = T.mul(hit, value), hit
    for r in reversed(rows):
        total, any_hit = T.reduce_("sum", r, total), _any_over(r, any_hit)
    if value.op == "c":
        return T.ite(any_hit, value, base)
    return total if T.is_c(base, 0) else T.ite(any_hit, total, base)


def _any_over(v: Term, hit: Term) -> Term:
    """any_v Π [..]: eliminate v when one factor fixes it."""
    for f in hit.args if hit.op == "mul" else (hit,):
        if f.op == "eq" and v in f.args:
            other = f.args[0] if f.args[1] is v else f.args[1]
            if not T.uses(other, v):
                return T.subst(T.mul(*(g for g in hit.args if g is not f)), {v: other}) if hit.op == "mul" else T.const(1)
    return T.reduce_("any", v, hit)
