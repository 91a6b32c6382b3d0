"""An expert that is more than down act(up x): products and maps of whole rows in turn, as norms, residuals and a third matrix are.

Stage n takes the row v of the stage before (the first one the expert's input x) and gives  map(W_0 v, W_1 v, ..., p_0, p_1, ..., x):  an
expression of each feature that may hold means and sums over all features of the row. Where a stage has no product its map reads x alone.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor

from . import scalar

ROW = sp.Symbol("x", real=True)  # the expert's input at the same feature


class mean(sp.Function):  # type: ignore[misc]
    """Over the features of a row."""

    nargs = 1


class total(sp.Function):  # type: ignore[misc]
    """The sum over the features of a row."""

    nargs = 1


def product(i: int) -> sp.Symbol:
    """The i-th product of a stage, at a feature."""
    return sp.Symbol(f"y{i}", real=True)


def vector(i: int) -> sp.Symbol:
    """The i-th vector of a stage, at a feature."""
    return sp.Symbol(f"p{i}", real=True)


class Kind(enum.IntEnum):
    """How a parameter of all experts is stored."""

    STACKED = 0  # one tensor, experts first
    LISTED = 1  # a tensor for each expert
    SHARED = 2  # one for all of them


@dataclass(frozen=True)
class Matrix:
    """W of a product: rows offset + stride · i of a parameter [out, in] ([in, out] where `transposed`)."""

    operand: int
    stride: int = 1
    offset: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Vector:
    """A number for each feature: elements offset + stride · h of a parameter; or one number for all features (`stride` 0)."""

    operand: int
    stride: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Stage:
    """`width`: of the rows that come out. `map`: in `product(i)`, `vector(i)`, `ROW` (of the same width), `mean` and `total`."""

    width: int
    matrices: tuple[Matrix, ...]
    vectors: tuple[Vector, ...]
    map: sp.Expr


@dataclass(frozen=True)
class Chain:
    """The stages of an expert, and how each of its parameters is stored; stages name parameters by their places in `kinds`."""

    stages: tuple[Stage, ...]
    kinds: tuple[Kind, ...]

    def starts(self, experts: int) -> list[int]:
        """Where the tensors of each parameter begin in the list of all."""
        out = [0]
        for kind in self.kinds:
            out.append(out[-1] + (experts if kind is Kind.LISTED else 1))
        return out

    def of_expert(self, parts: Sequence[Tensor], experts: int, e: int) -> list[Tensor]:
        """Expert e's parameters."""
        pick: dict[Kind, Callable[[int], Tensor]] = {
            Kind.STACKED: lambda i: parts[i][e],
            Kind.LISTED: lambda i: parts[i + e],
            Kind.SHARED: lambda i: parts[i],
        }
        return [pick[kind](start) for kind, start in zip(self.kinds, self.starts(experts), strict=False)]

    def widths(self, hidden: int) -> list[int]:
        """Of the rows that go into each stage, and of those that come out of the last."""
        return [hidden, *(s.width for s in self.stages)]

    def parameters(self) -> Iterator[tuple[int, Matrix | Vector, int]]:
        """(stage, what reads a parameter, which)."""
        for n, s in enumerate(self.stages):
            readers: tuple[Matrix | Vector, ...] = (*s.matrices, *s.vectors)
            for q in readers:
                yield n, q, q.operand

    def resized(self, known: Mapping[int, int]) -> Chain:
        """With other widths: old -> new."""

        def part(q: Any, old: int) -> Any:
            blocks, rest = divmod(q.offset, old)
            return replace(q, offset=blocks * known.get(old, old)) if blocks and not rest else q

        def stage(s: Stage) -> Stage:
            matrices, vectors = (tuple([part(q, s.width) for q in group]) for group in (s.matrices, s.vectors))
            return Stage(known.get(s.width, s.width), matrices, vectors, s.map)

        return replace(self, stages=tuple(map(stage, self.stages)))

    def apply(self, x: Tensor, own: Sequence[Tensor]) -> Tensor:
        """One expert's function on rows x [N, H] -> [N, out] in x's dtype; own: its parameters (`of_expert`)."""
        v = x
        for s in self.stages:
            ys = [v @ rows_of(own[m.operand].to(x.dtype), m, s.width).t() for m in s.matrices]
            ps = [elements_of(own[p.operand].to(x.dtype), p, s.width) for p in s.vectors]
            v = run(s, ys, ps, x)
        return v


def rows_of(weight: Tensor, m: Matrix, width: int) -> Tensor:
    """[.., width, in] of a matrix as it is stored."""
    w = weight.transpose(-1, -2) if m.transposed else weight
    return w[..., m.offset : m.offset + m.stride * (width - 1) + 1 : m.stride, :]


def elements_of(t: Tensor, p: Vector, width: int) -> Tensor:
    """[.., width] of a vector as it is stored, [.., 1] where it is one number."""
    if not p.stride:
        return t[..., p.offset : p.offset + 1]
    return t[..., p.offset : p.offset + p.stride * (width - 1) + 1 : p.stride]


class _Rows(scalar.Tensors):
    """Of a root the gradient at 0 is 0, as that of a vector's norm is."""

    def power(self, a: Any, p: float) -> Any:
        if not isinstance(a, Tensor) or not 0 < p < 1:
            return a**p
        if not torch.is_grad_enabled():
            return a.sqrt() if p == 0.5 else a**p
        zero = a == 0
        return torch.where(zero, 0.0, torch.where(zero, 1.0, a) ** p)


def run(s: Stage, ys: Sequence[Tensor], ps: Sequence[Tensor], x: Tensor) -> Tensor:
    """A stage's map on rows: ys [N, width] each, ps [width] or [N, width] each, x [N, H] -> [N, width]; differentiable."""
    values: dict[int, Any] = {_PRODUCT + i: y for i, y in enumerate(ys)} | {_VECTOR + i: p for i, p in enumerate(ps)}
    shape = (x.shape[0], s.width)

    def wide(v: Any) -> Tensor:
        return torch.broadcast_to(v, shape) if isinstance(v, Tensor) else x.new_full(shape, v)

    over = {_MEAN: lambda v: wide(v).mean(-1, keepdim=True), _TOTAL: lambda v: wide(v).sum(-1, keepdim=True), _SILU: F.silu}
    return wide(scalar.interpret(*program(s), values | {_ROW: x}, _Rows(), over))


# ---- as plain numbers ------------------------------------------------------------------------------------------------------

_MEAN, _TOTAL, _ROW, _SILU, _PRODUCT, _VECTOR = 8, 9, 10, 11, 1_000, 2_000  # opcodes beside those of `scalar`


def encode(chain: Chain) -> tuple[list[int], list[float]]:
    """The chain as integers and constants. Raises `scalar.UnknownActivation` for a map that no program says."""
    ints, floats = [len(chain.kinds), *map(int, chain.kinds), len(chain.stages)], []
    for s in chain.stages:
        ints += [s.width, len(s.matrices), len(s.vectors)]
        for m in s.matrices:
            ints += [m.operand, m.stride, m.offset, int(m.transposed)]
        for p in s.vectors:
            ints += [p.operand, p.stride, p.offset]
        ops, consts = program(s)
        ints += [len(ops), *ops]
        floats += consts
    return ints, floats


@functools.lru_cache(maxsize=1024)
def program(s: Stage) -> tuple[list[int], list[float]]:
    """A stage's map as a postfix program. Raises `scalar.UnknownActivation`."""
    ops, consts = scalar.fold(s.map, scalar.Programs(), lambda e, go: _code(s, e, go))
    return ops, consts


def _code(s: Stage, e: Any, go: Callable[[Any], Any]) -> Any:
    if e.func in (mean, total):
        ops, consts = go(e.args[0])
        return [*ops, _MEAN if e.func is mean else _TOTAL], consts
    if e.is_Mul and (gate := next((a.args[0] for a in e.args if a.func is scalar.sigmoid and a.args[0] in e.args), None)) is not None:
        ops, consts = go(gate)  # x σ(x) in one pass over memory
        rest, more = go(sp.Mul(*(a for a in e.args if a not in (gate, scalar.sigmoid(gate)))))
        return ([*ops, _SILU], consts) if rest == [scalar.OP_CONST] else ([*ops, _SILU, *rest, scalar.OP_MUL], [*consts, *more])
    ys, ps = ({make(i): first + i for i in range(n)} for make, first, n in _symbols(s))
    op = (ys | ps | {ROW: _ROW}).get(e)
    return None if op is None else ([op], [])


def _symbols(s: Stage) -> tuple[tuple[Callable[[int], sp.Symbol], int, int], ...]:
    return (product, _PRODUCT, len(s.matrices)), (vector, _VECTOR, len(s.vectors))


def decode(ints: Sequence[int], floats: Sequence[float]) -> Chain:
    """The inverse of `encode`, up to sympy's own rearrangement of maps."""
    numbers, consts = iter(ints), iter(floats)

    def take(n: int) -> list[int]:
        return [next(numbers) for _ in range(n)]

    kinds = tuple(Kind(k) for k in take(next(numbers)))
    stages = []
    for _ in range(next(numbers)):
        width, matrices, vectors = take(3)
        ms = [take(4) for _ in range(matrices)]
        ps = [take(3) for _ in range(vectors)]
        own = tuple(Matrix(o, stride, offset, bool(t)) for o, stride, offset, t in ms), tuple(Vector(*p) for p in ps)
        stages.append(Stage(width, *own, _expression(take(next(numbers)), consts)))
    return Chain(tuple(stages), kinds)


def _expression(ops: Sequence[int], consts: Iterator[float]) -> sp.Expr:
    values: dict[int, sp.Expr] = {_ROW: ROW}
    for op in ops:
        if op >= _PRODUCT:
            values[op] = vector(op - _VECTOR) if op >= _VECTOR else product(op - _PRODUCT)
    return scalar.interpret(ops, consts, values, scalar.Expressions(), {_MEAN: mean, _TOTAL: total, _SILU: scalar.silu})
