"""What an element of each view, cast and freshly made tensor is. Each rule is its op's definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy as sp
import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .. import terms as T
from ..terms import Term
from ..terms.unify import unify
from . import names
from .element import Args, Idx, Opaque, Puller, call_args, dtype_of, normal_dim, reindex, replace, rule, shape_of, size_of, truth
from .names import op_name

# ---- views and casts ---------------------------------------------------------------------------------------------------


@rule(*names.RESHAPE)
def _view(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    if dtype_of(src) != dtype_of(n):
        raise Opaque("bits read as another type")
    return p.at(src, reindex(idx, shape_of(n), shape_of(src)))


@rule(*names.SAME, *names.CAST)
def _same(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    if src.meta["val"].device != n.meta["val"].device:
        raise Opaque("a copy to another device")
    t = p.at(src, idx)
    before, after = dtype_of(src), dtype_of(n)
    if after is torch.bool and before is not torch.bool:
        return truth(t)
    if before.is_floating_point and not after.is_floating_point and not _integral(t):
        raise Opaque("a cast that rounds")
    if before.is_floating_point and after in SMALL:
        return T.fn(SMALL[after], t)
    if before != after and not _holds(t, before, after):
        raise Opaque(f"a cast to {str(after).removeprefix('torch.')} that may change values")
    return t


# A cast to a float of one byte is a function; to powers of two (e8m0) none that is known
SMALL = {d: str(d).removeprefix("torch.") for d in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)}


def _holds(t: Term, before: torch.dtype, after: torch.dtype) -> bool:
    """Whether a cast keeps an element. Floats of 16 bits and more are one real number to the passes, and indices fit into 32 bits."""
    top = T.upper(t) if t.op not in ("fn", "a") else None
    if after.is_floating_point:
        exact = 2 / torch.finfo(after).eps if after.itemsize > 1 else 0
        return after.itemsize > 1 and (top is None or top <= exact)
    if after.itemsize >= 4 or any(x.op == "fn" and x.args[0] == "round" for x in T.walk(t)):
        return True
    most = torch.iinfo(after).max
    if not before.is_floating_point and before is not torch.bool and _fits(before, after) or T.is_truth(t):
        return True
    return top is not None and top <= most


def _fits(before: torch.dtype, after: torch.dtype) -> bool:
    a, b = torch.iinfo(before), torch.iinfo(after)
    return b.min <= a.min and a.max <= b.max


def _integral(t: Term) -> bool:
    """Whether a float-typed term can only hold whole numbers (counts, ids)."""
    if T.is_truth(t) or t.op in ("topk", "perm", "inv", "sv", "nz", "eq", "fdiv", "mod", "v"):
        return True
    if t.op == "c":
        return isinstance(t.args[0], int)
    if t.op == "a":
        v = t.args[0].meta.get("val")
        return isinstance(v, Tensor) and not v.dtype.is_floating_point
    if t.op == "fn" and t.args[0] in ("round", "clamp"):
        return t.args[0] == "round" or _integral(t.args[1][0]) and all(float(c).is_integer() or abs(c) == math.inf for c in t.args[2])
    return t.op in ("add", "mul", "sum", "max") and all(_integral(c) for c in T.children(t))


@rule("dropout", "feature_dropout", "native_dropout")
def _dropout(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    if getattr(a, "train", True) and a.p != 0:
        raise Opaque("dropout is active")
    return p.at(a.input, idx)


# ---- moved elements ----------------------------------------------------------------------------------------------------

# op -> where in its operand the element at an index stands: (arguments, index, the operand's shape) -> index. A new such op is one row.
Move = Callable[[Args, Idx, tuple[Any, ...]], Idx]


def _swapped(idx: Idx, d0: int, d1: int) -> Idx:
    out = list(idx)
    out[d0], out[d1] = out[d1], out[d0]
    return tuple(out)


def _moved_dims(a: Args, idx: Idx, shape: tuple[Any, ...]) -> Idx:
    rank = len(idx)
    src, dst = ([normal_dim(d, rank) for d in ([x] if isinstance(x, int) else x)] for x in (a.source, a.destination))
    rest = iter(d for d in range(rank) if d not in src)
    order = [src[dst.index(d)] if d in dst else next(rest) for d in range(rank)]
    return tuple(idx[order.index(d)] for d in range(rank))


def _flipped(dims: Sequence[int], idx: Idx, shape: tuple[Any, ...]) -> Idx:
    """n - 1 - i along each of the dims."""
    gone = {normal_dim(d, len(idx)) for d in dims}
    return tuple(T.add(T.const(s - 1), T.mul(T.const(-1), i)) if d in gone else i for d, (i, s) in enumerate(zip(idx, shape, strict=True)))


def _rolled(a: Args, idx: Idx, shape: tuple[Any, ...]) -> Idx:
    """(i - shift) mod n along each of the dims; all elements in row-major order where none is named."""
    shifts, dims = ([x] if isinstance(x, int) else list(x) for x in (a.shifts, a.dims))
    if not dims:
        n = sp.Mul(*shape)
        (at,) = reindex(idx, shape, (n,))
        return reindex((T.mod(T.add(at, T.const(-size_of(shifts[0]) % n)), n),), (n,), shape)
    for k, d in zip(map(size_of, shifts), dims, strict=True):
        d = normal_dim(d, len(idx))
        idx = replace(idx, d, T.mod(T.add(idx[d], T.const(-k % shape[d])), shape[d]))
    return idx


MOVES: dict[str, Move] = {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), lambda a, i, s: _swapped(i, *list(vars(a).values())[1:])),
    **dict.fromkeys(
        ("t", "numpy_T", "T", "mT", "mH", "H", "matrix_H", "adjoint"), lambda a, i, s: i if len(i) < 2 else _swapped(i, -1, -2)
    ),
    **dict.fromkeys(("movedim", "moveaxis"), _moved_dims),
    "permute": lambda a, i, s: tuple(i[[normal_dim(d, len(i)) for d in a.dims].index(d)] for d in range(len(i))),
    "unsqueeze": lambda a, i, s: (*i[: normal_dim(a.dim, len(i))], *i[normal_dim(a.dim, len(i)) + 1 :]),
    "flip": lambda a, i, s: _flipped(a.dims, i, s),
    "fliplr": lambda a, i, s: _flipped((1,), i, s),
    "flipud": lambda a, i, s: _flipped((0,), i, s),
    "roll": _rolled,
}


@rule(*MOVES)
def _move(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    return p.at(src, MOVES[op_name(n)](a, idx, shape_of(src)))


@rule("tril", "triu")
def _triangle(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """x[i, j] where j - i <= diagonal (tril), where j - i >= diagonal (triu), else 0."""
    edge = T.add(idx[-2], T.const(size_of(a.diagonal)))
    kept = T.lt(idx[-1], T.add(edge, T.const(1))) if op_name(n) == "tril" else T.not_(T.lt(idx[-1], edge))
    return T.ite(kept, p.at(n.args[0], idx), T.const(0))


rule("expand", "expand_as", "broadcast_to")(lambda p, n, a, idx: p.broadcast(n.args[0], idx))


@rule("slice", "narrow")
def _slice(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    d = normal_dim(a.dim, len(idx))
    start, step = size_of(a.start) or 0, getattr(a, "step", 1) or 1
    whole = T.same_size(shape_of(src)[d], shape_of(n)[d]) or op_name(src) == "bincount"  # each of whose elements is a count by itself
    if free_unbacked_symbols(src.meta["val"].shape[d]) and not whole:
        raise Opaque("some of the rows that depend on data are left out")
    if isinstance(start, int) and start < 0:
        start = start + shape_of(src)[d]
    return p.at(src, replace(idx, d, T.add(T.mul(T.const(step), idx[d]), T.const(start))))


@rule("select")
def _select(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    rank = len(shape_of(src))
    d, i = normal_dim(a.dim, rank), size_of(a.index)
    if isinstance(i, int) and i < 0:
        i = i + shape_of(src)[d]
    return p.at(src, (*idx[:d], T.const(i), *idx[d:]))


@rule("getitem")
def _getitem(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src, i = n.args
    assert isinstance(src, fx.Node) and isinstance(i, int)
    f = TUPLES.get(op_name(src))
    if f is None or src in p.walls:
        raise Opaque(f"no rule for an output of {src.target}")
    return f(p, src, i, n, idx)


def _part(p: Puller, src: fx.Node, i: int, n: fx.Node, idx: Idx) -> Term:
    a = Args(**{k: [*map(size_of, v)] if isinstance(v, (list, tuple)) else size_of(v) for k, v in vars(call_args(src)).items()})
    x: Any = src.args[0]
    if hasattr(a, "tensor_indices_or_sections"):
        raise Opaque("parts whose bounds are in a tensor")
    d = normal_dim(a.dim, len(idx))
    start = names.SPLIT[op_name(src)](a, i, shape_of(x)[d])
    return p.at(x, replace(idx, d, T.add(idx[d], T.const(start))))


def _unbind(p: Puller, src: fx.Node, i: int, n: fx.Node, idx: Idx) -> Term:
    d = normal_dim(call_args(src).dim, len(idx) + 1)
    return p.at(src.args[0], (*idx[:d], T.const(i), *idx[d:]))


TUPLES: dict[str, Any] = {**dict.fromkeys(names.SPLIT, _part), "unbind": _unbind}


@rule("stack")
def _stack(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    d = normal_dim(a.dim, len(idx))
    rest = idx[:d] + idx[d + 1 :]
    if T.is_c(idx[d]):
        return p.at(a.tensors[idx[d].args[0]], rest)
    firsts = [p.at(x, rest) for x in a.tensors]
    if all(f.op == "a" and f.args[1] == firsts[0].args[1] for f in firsts):
        return T.atom(tuple(f.args[0] for f in firsts), (idx[d], *firsts[0].args[1]))
    if (one := _of_each(firsts, idx[d])) is not None:
        return one
    out = firsts[-1]
    for e in range(len(firsts) - 2, -1, -1):
        out = T.ite(T.eq(idx[d], T.const(e)), firsts[e], out)
    return out


def _of_each(parts: Sequence[Term], at: Term) -> Term | None:
    """stack(F(W_0), F(W_1), ...)[e] = F(stack(W)[e]), as of weights made of each expert's codes and scales; None of others."""
    if not all(_is_made_of_given(t) for t in parts):
        return None
    e = T.var(len(parts), "e")
    body = unify(dict(enumerate(parts)), e)
    return None if isinstance(body, str) else T.subst(body, {e: at})


def _is_made_of_given(t: Term) -> bool:
    """Whether elements are arithmetic on more than one number, and none of a contraction's, a selection's or another data's."""
    return t.op in ("mul", "add", "fn", "pow") and all(x.op in _ARITHMETIC for x in T.walk(t)) and any(x.op == "a" for x in T.walk(t))


_ARITHMETIC = frozenset("a c v mul add fn pow fdiv mod".split())


@rule("repeat", "tile")
def _repeat(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    shape = shape_of(src)
    own = idx[len(idx) - len(shape) :]
    return p.at(src, tuple(i if T.same_size(s, o) else T.mod(i, s) for i, s, o in zip(own, shape, shape_of(n)[-len(shape) :], strict=True)))


@rule("repeat_interleave")
def _repeat_interleave(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    src: Any = n.args[0]
    if not isinstance(a.repeats, int):
        raise Opaque("repeat_interleave by a tensor")
    if a.dim is None:  # of all elements in a row
        shape = shape_of(src)
        return p.at(src, reindex((T.fdiv(idx[0], a.repeats),), (sp.Mul(*shape),), shape))
    d = normal_dim(a.dim, len(idx))
    return p.at(src, replace(idx, d, T.fdiv(idx[d], a.repeats)))


@rule("kron")
def _kron(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    """Of tensors of one rank: a[i // |b|] · b[i mod |b|] in every dim."""
    inner = shape_of(a.other)
    if not len(inner) == len(shape_of(n.args[0])) == len(idx):  # type: ignore[arg-type]
        raise Opaque("a Kronecker product of tensors of other ranks")
    outer = tuple(T.fdiv(i, s) for i, s in zip(idx, inner, strict=True))
    return T.mul(p.at(n.args[0], outer), p.at(a.other, tuple(T.mod(i, s) for i, s in zip(idx, inner, strict=True))))


# ---- creation ----------------------------------------------------------------------------------------------------------


rule(*names.ZEROS)(lambda p, n, a, idx: T.const(0))
rule(*names.ONES)(lambda p, n, a, idx: T.const(1))
rule(*names.EMPTY)(lambda p, n, a, idx: T.atom(n, idx))
rule("copy")(lambda p, n, a, idx: p.broadcast(a.src, idx))
rule("eye")(lambda p, n, a, idx: T.eq(idx[0], idx[1]))


@rule(*names.FULL)
def _full(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    v = getattr(a, "fill_value", None) if hasattr(a, "fill_value") else getattr(a, "value", getattr(a, "s", None))
    return p.at(v, ()) if isinstance(v, fx.Node) else T.const(v)


@rule("arange")
def _arange(p: Puller, n: fx.Node, a: Args, idx: Idx) -> Term:
    return T.add(T.const(size_of(getattr(a, "start", 0)) or 0), T.mul(T.const(getattr(a, "step", 1) or 1), idx[0]))
