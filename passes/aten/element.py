"""Pull: ask what one element of a node is, and get a term.

`Puller.at(node, idx)` reads the node's ATen op and asks its operands in turn; the rules stand in
`definitions_*`. A node where the puller stops (a boundary, an unknown op, a wall) is an atom.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import sympy as sp
import torch
import torch.fx as fx
from torch import Tensor

from .. import terms as T
from ..terms import Term
from ..terms.budget import TOO_MANY
from .names import op_name
from .node import schema_of
from .signs import is_positive

Idx = tuple[Term, ...]
Args = SimpleNamespace
Rule = Callable[["Puller", fx.Node, Args, Idx], Term]
RULES: dict[str, Rule] = {}

NO_RULE = "no rule for"
STEPS = 20  # of the budget for work on terms, for each element that is looked up


class Opaque(Exception):
    """A rule cannot say what this element is: the node becomes an atom."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        for n in names:
            RULES[n] = f
        return f

    return register


def call_args(n: fx.Node) -> SimpleNamespace:
    """The call's arguments by schema name, defaults filled in."""
    cached = n.meta.get("moe_args")
    if cached is not None:
        return cached
    if schema_of(n) is None:
        raise Opaque(f"{n.target} has no schema")
    out: dict[str, Any] = {}
    for i, spec in enumerate(schema_of(n).arguments):
        if i < len(n.args):
            out[spec.name] = n.args[i]
        elif spec.name in n.kwargs:
            out[spec.name] = n.kwargs[spec.name]
        else:
            out[spec.name] = spec.default_value if spec.has_default_value() else None
    args = n.meta["moe_args"] = SimpleNamespace(**out)
    return args


def size_of(s: Any) -> Any:
    """int, or the sympy expression of a SymInt (or of a node that holds one); a SymFloat is the number it has now (see `fixed_number`)."""
    if isinstance(s, fx.Node):
        s = s.meta.get("val")
    if isinstance(s, torch.SymFloat):
        return s.node.hint
    if isinstance(s, torch.SymInt):
        e = s.node.expr
        return int(e) if e.is_Integer else e
    return s


def shape_of(n: fx.Node) -> tuple[Any, ...]:
    cached = n.meta.get("moe_shape")
    if cached is None:
        v = n.meta.get("val")
        if not isinstance(v, Tensor):
            raise Opaque(f"{n} holds no tensor")
        cached = n.meta["moe_shape"] = tuple(size_of(s) for s in v.shape)
    return cached


def dtype_of(n: fx.Node) -> torch.dtype:
    v = n.meta.get("val")
    if not isinstance(v, Tensor):
        raise Opaque(f"{n} holds no tensor")
    return v.dtype


def fixed_number(n: fx.Node) -> bool:
    """A float of the user's that Dynamo keeps variable: it is read as the number it has now, and guarded where a block rests on it."""
    v = n.meta.get("val")
    return isinstance(v, torch.SymFloat) and v.node.hint is not None


def as_written(value: Tensor) -> Any:
    """A constant tensor's number; a float32 as the shortest decimal that rounds to it (1e-12, not 9.99999996e-13)."""
    number = value.item()
    if value.dtype is not torch.float32 or number != number or number in (float("inf"), -float("inf")):
        return number
    return next(x for p in range(1, 18) if float(torch.tensor(x := float(f"{number:.{p}g}"), dtype=torch.float32)) == number)


class Mask:
    """A boolean tensor whose true elements are rows; nodes that say the same are one mask."""

    def __init__(self, puller: Puller, node: fx.Node) -> None:
        self.node, self.shape = node, shape_of(node)
        self.at: Callable[[tuple[Term, ...]], Term] = lambda idx: truth(puller.at(node, idx))

    def __repr__(self) -> str:
        return f"mask:{self.node}"


_UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def opaque(node: fx.Node, idx: tuple[Term, ...]) -> Term:
    """An element that is not looked into."""
    if getattr(node.meta.get("val"), "dtype", None) in _UNSIGNED:
        T.facts().know(node, None)
    if is_positive(node):
        T.facts().positive.add(node)
    return T.atom(node, idx)


def truth(t: Term) -> Term:
    """A term used as a condition."""
    return t if T.is_truth(t) else T.not_(T.eq(t, T.const(0)))


class Puller:
    """`stop(node)` says where to make an atom; `dtypes` notes the dtype in which a pointwise function was computed."""

    def __init__(self, stop: Callable[[fx.Node], bool], walls: set[fx.Node] = frozenset(), limit: int = 400_000) -> None:  # type: ignore[assignment]
        self.stop, self.walls, self.left = stop, walls, limit
        self.memo: dict[tuple[fx.Node, tuple[Term, ...]], Term] = {}
        self.masks: dict[fx.Node, Mask] = {}
        self.mask_of: dict[Any, Mask] = {}
        self.dtypes: dict[Term, torch.dtype] = {}
        self.given: frozenset[fx.Node] = frozenset()  # inputs that are ids, whose rows are taken to repeat none
        self.unknown: dict[fx.Node, str] = {}
        self.coded = False  # whether there may be weights in few bits, whose products models compute block by block
        self.wholes: dict[fx.Node, tuple[tuple[Term, ...], Term]] = {}  # elements at variables, of nodes that are read in many places

    def at(self, node: Any, idx: Sequence[Term]) -> Term:
        """The element of `node` (a node or a number) at an index tuple of its rank."""
        if not isinstance(node, fx.Node):
            return T.const(node)
        if fixed_number(node):
            return T.const(size_of(node))
        key = (node, tuple(idx))
        out = self.memo.get(key)
        if out is None:
            self.left -= 1
            T.step(STEPS)
            if self.left < 0:
                raise T.TooLarge(TOO_MANY)
            out = self.memo[key] = self._look(node, key[1])
        return out

    def _look(self, node: fx.Node, idx: tuple[Term, ...]) -> Term:
        if node.op != "call_function" or node in self.walls or self.stop(node):
            return self.literal(node) if node.op == "get_attr" and not idx else opaque(node, idx)
        f = RULES.get(op_name(node))
        if f is None:
            self.unknown.setdefault(node, f"{NO_RULE} {node.target}")
            return opaque(node, idx)
        try:
            args = SimpleNamespace() if node.target is operator.getitem else call_args(node)
            out = f(self, node, args, idx)
        except Opaque as e:
            self.unknown.setdefault(node, str(e))
            return opaque(node, idx)
        if out.op in ("fn", "mul") and out not in self.dtypes:
            v = node.meta.get("val")
            if isinstance(v, Tensor):
                self.dtypes[out] = v.dtype
        return out

    def literal(self, node: fx.Node) -> Term:
        owner = node.graph.owning_module
        value = getattr(owner, str(node.target), None) if owner is not None else None
        if isinstance(value, Tensor) and value.ndim == 0 and not isinstance(value, torch.nn.Parameter):
            try:
                return T.const(as_written(value))
            except (RuntimeError, TypeError):
                pass
        return T.atom(node, ())

    def mask(self, node: fx.Node) -> Mask:
        m = self.masks.get(node)
        if m is None:
            m = Mask(self, node)
            value = T.canonical(m.at(tuple(T.named(f"mask{d}", s) for d, s in enumerate(m.shape))))
            m = self.masks[node] = self.mask_of.setdefault((m.shape, value), m)
        return m

    def broadcast(self, node: Any, idx: tuple[Term, ...]) -> Term:
        """The element of an operand that is broadcast to the shape that `idx` indexes."""
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            return T.const(size_of(node) if isinstance(node, fx.Node) else node)
        shape = shape_of(node)
        own = idx[len(idx) - len(shape) :] if shape else ()
        return self.at(node, tuple(T.const(0) if s == 1 else i for s, i in zip(shape, own, strict=True)))


def normal_dim(d: int, rank: int) -> int:
    return d + rank if d < 0 else d


def replace(idx: tuple[Term, ...], d: int, t: Term) -> tuple[Term, ...]:
    return (*idx[:d], t, *idx[d + 1 :])


def reindex(idx: tuple[Term, ...], out_shape: Sequence[Any], in_shape: Sequence[Any]) -> tuple[Term, ...]:
    """Index into `in_shape` of the element that row-major `out_shape` has at `idx` (view, reshape, flatten)."""
    result: list[Term] = []
    o, i = 0, 0
    while o < len(out_shape) or i < len(in_shape):
        o2, i2 = _matching(out_shape, in_shape, o, i)
        result.extend(_regroup(idx[o:o2], out_shape[o:o2], in_shape[i:i2]))
        o, i = o2, i2
    return tuple(result)


def _matching(a: Sequence[Any], b: Sequence[Any], i: int, j: int) -> tuple[int, int]:
    """The smallest runs a[i:i2], b[j:j2] of equal product."""
    if i < len(a) and j < len(b) and T.same_size(a[i], b[j]):
        return i + 1, j + 1
    if i < len(a) and a[i] == 1:
        return i + 1, j
    if j < len(b) and b[j] == 1:
        return i, j + 1
    i2, j2 = min(i + 1, len(a)), min(j + 1, len(b))
    for _ in range(len(a) + len(b)):
        pa, pb = sp.Mul(*a[i:i2]), sp.Mul(*b[j:j2])
        if T.same_size(pa, pb):
            return i2, j2
        if j2 < len(b) and (i2 >= len(a) or T.exact_div(pa, pb) is not None):
            j2 += 1
        elif i2 < len(a):
            i2 += 1
        else:
            break
    return len(a), len(b)


def _regroup(idx: tuple[Term, ...], out: Sequence[Any], inn: Sequence[Any]) -> list[Term]:
    if len(out) == 1 and len(inn) == 1:
        return [idx[0]]
    flat = T.const(0)
    for t, s in zip(idx, out, strict=True):
        flat = T.add(T.mul(T.const(s), flat), t)
    rev: list[Term] = []
    for d, s in enumerate(reversed(inn)):
        if d == len(inn) - 1:
            rev.append(flat)
            break
        rev.append(T.mod(flat, s))
        flat = T.fdiv(flat, s)
    return rev[::-1]
