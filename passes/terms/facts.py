"""What is known of a term's values: whether it is never negative, and below what it stays.

Facts of single tensors come from whoever reads the graph; those of terms follow from them. Two kinds:

- `extents`: what a selection (top-k, argmax), a sort or a tensor of whole numbers holds is at least 0, and below the extent where that is
  not None. The slots of one top-k choose different positions.
- `zero_beyond`: the axiom that an expert weight read beyond its experts is 0. No program reads there (it would fail), but a reading may:
  where Σ_e [ids = e] f(e) became f(ids), an id that is no expert contributes nothing, as in the sum. It holds for expert weights only.
- `positive`: tensors whose elements are more than 0, but for underflow, where their gradients are 0 as well (softmax, sigmoid, exp).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy as sp

from .arithmetic import TRUTHS, add, coefficient
from .budget import step
from .numbers import exact_div, is_plain, same_size
from .term import Term, addends, const, is_c, mk, walk

Range = tuple[bool, Any]  # is it never negative; n if it is also at most n - 1, else None
_ANY: Range = (False, None)
_TRUTH: Range = (True, 2)


class Facts:
    """`normal`: what the rewriter at work makes of a term, for rules that have to know."""

    def __init__(self) -> None:
        self.extents: dict[Any, Any] = {}
        self.zero_beyond: dict[Any, tuple[Any, ...]] = {}  # expert weight -> its shape
        self.positive: set[Any] = set()
        self.normal: Callable[[Term], Term] = lambda t: t
        self._ranges: dict[Term, Range] = {}

    def seen_by(self, normal: Callable[[Term], Term]) -> Facts:
        """The same facts with another rewriter."""
        other = Facts()
        other.__dict__.update(self.__dict__, normal=normal)
        return other

    def know(self, node: Any, extent: Any) -> None:
        """What a selection, a sort or a tensor holds is at least 0, and below `extent` unless that is None."""
        if node not in self.extents or extent is not None and self.extents[node] != extent:
            self.extents[node] = extent
            self._ranges.clear()

    def range(self, t: Term) -> Range:
        found = self._ranges.get(t)
        if found is None:
            f = _RANGES.get(t.op)
            found = self._ranges[t] = _ANY if f is None else f(self, *t.args)
        return found

    def extent(self, t: Term) -> Any:
        """Exclusive upper bound of an index term, or None."""
        return self.range(t)[1]

    def upper(self, t: Term) -> int | None:
        """Largest value of a non-negative integer index term, when it is a plain number."""
        n = self.range(t)[1]
        return int(n) - 1 if isinstance(n, (int, sp.Integer)) else None

    def below(self, t: Term, n: Any) -> bool:
        """Whether 0 <= t < n is certain."""
        extent = self.range(t)[1]
        return extent is not None and at_most(extent, n)

    def chosen_only(self, t: Term) -> bool:
        """Whether t is a sum of products of positive numbers and of at most one [ids = e] each: 0 only where no slot chose e.

        Another condition, such as one on the token (padding), makes an expert's weight 0 although a slot chose it.
        """
        return self._choices(t) in (0, 1)

    def _choices(self, t: Term) -> int | None:
        """How many conditions [ids = e] a product in t holds at most; None where t has other conditions or numbers that may be 0."""
        step()
        if t.op in ("mul", "add", "sum"):
            found = [self._choices(x) for x in t.parts]
            known = [n for n in found if n is not None]
            return None if len(known) < len(found) else sum(known) if t.op == "mul" else max(known)
        if t.op == "pow":
            return self._choices(t.args[0])
        if t.op == "eq":
            return 1 if any(x.op == "topk" or x.op == "a" and x.args[0] in self.extents for x in t.args) else None
        if t.op == "c":
            return 0 if is_plain(t.args[0]) and t.args[0] > 0 else None
        positive = t.op == "a" and t.args[0] in self.positive or t.op == "fn" and t.args[0] in ("exp", "sigmoid", "softplus")
        return 0 if positive and not any(x.op in (*TRUTHS, "ite") or is_c(x, -math.inf) for x in walk(t)) else None

    def inside(self, t: Term, n: Any) -> tuple[Term, ...]:
        """Factors of [0 <= t < n], those left out that are certain."""
        if self.below(t, n):
            return ()
        limit = mk("lt", t, const(n))
        return (limit,) if self.range(t)[0] else (mk("not", mk("lt", t, const(0))), limit)

    def vanishes(self, t: Term, index: Term, n: Any) -> bool:
        """Whether t is 0 wherever `index` is n or more (negative, where n is None): an expert weight of at most n experts is a factor."""
        step()
        if t.op == "a" and t.args[0] in self.zero_beyond:
            sizes = self.zero_beyond[t.args[0]]
            return any(self._ends_at(i, size, index, n) for i, size in zip(t.args[1], sizes))
        if t.op == "mul":
            return any(self.vanishes(f, index, n) for f in t.args)
        if t.op == "add":
            return all(self.vanishes(a, index, n) for a in t.args)
        return t.op == "sum" and self.vanishes(t.args[1], index, n)

    def _ends_at(self, i: Term, size: Any, index: Term, n: Any) -> bool:
        """Whether i = k · index + r with 0 <= r < k, and size <= k · n."""
        own = [coefficient(x)[0] for x in addends(i) if coefficient(x)[1] is index]
        rest = add(*(x for x in addends(i) if coefficient(x)[1] is not index))
        return bool(own) and (n is None or at_most(size, own[0] * n)) and self.below(rest, own[0])


def at_most(a: Any, b: Any) -> bool:
    """a <= b for certain; sizes are positive."""
    if isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a <= b
    return same_size(a, b) or bool(sp.expand(b - a).is_nonnegative)


# ---- ranges of terms from those of their subterms ----------------------------------------------------------------------


def _of_number(facts: Facts, c: Any) -> Range:
    if isinstance(c, sp.Expr):
        return (True, c + 1) if c.is_nonnegative else _ANY
    return (True, c + 1) if isinstance(c, int) and c >= 0 else (isinstance(c, float) and c >= 0, None)


def _of_add(facts: Facts, *ts: Term) -> Range:
    """0 <= a < m and 0 <= b < n: 0 <= a + b < m + n - 1."""
    return _combined(facts, ts, lambda a, b: a + b - 1)


def _combined(facts: Facts, ts: tuple[Term, ...], f: Callable[[Any, Any], Any]) -> Range:
    total: Any = None
    bounded = True
    for t in ts:
        positive, n = facts.range(t)
        if not positive:
            return _ANY
        bounded = bounded and n is not None and not isinstance(n, str)
        if bounded:
            total = n if total is None else f(total, n)
    return (True, (sp.expand(total) if isinstance(total, sp.Expr) else total) if bounded else None)


def _of_fdiv(facts: Facts, t: Term, n: Term) -> Range:
    positive, extent = facts.range(t)
    if not positive or extent is None or isinstance(extent, str):
        return positive, None
    if isinstance(extent, int) and isinstance(n.args[0], int):
        return True, (extent - 1) // n.args[0] + 1
    return True, exact_div(extent, n.args[0])


def _of_ite(facts: Facts, condition: Term, a: Term, b: Term) -> Range:
    """The larger one; b is below its largest value where it is said not to equal it."""
    (first, m), (second, n) = facts.range(a), facts.range(b)
    if m is None or n is None:
        return first and second, None
    if condition.op == "eq" and isinstance(n, int) and any(x is b and is_c(c, n - 1) for x, c in (condition.args, condition.args[::-1])):
        n = n - 1
    return True, n if at_most(m, n) else m if at_most(n, m) else None


def _of_sum(facts: Facts, v: Term, body: Term) -> Range:
    positive, extent = facts.range(body)
    if extent is None or isinstance(extent, str) or isinstance(v.args[1], str):
        return positive, None
    return True, (extent - 1) * v.args[1] + 1


def _of_function(facts: Facts, name: str, args: tuple[Term, ...], consts: tuple[Any, ...]) -> Range:
    if name in ("clamp", "hardtanh", "maximum"):
        lo, hi = consts
        positive = lo >= 0 or facts.range(args[0])[0] and hi >= 0
        return positive, int(hi) + 1 if positive and float(hi).is_integer() else None
    if name in ("relu", "round"):
        return facts.range(args[0]) if facts.range(args[0])[0] else (name == "relu", None)
    return name in ("exp", "sigmoid", "softplus", "abs"), None


_RANGES: dict[str, Callable[..., Range]] = {
    "c": _of_number,
    "v": lambda facts, name, size: (True, size),
    "a": lambda facts, node, idx: (True, facts.extents[node]) if node in facts.extents else _ANY,
    "topk": lambda facts, node, idx: (True, facts.extents.get(node)),
    "perm": lambda facts, sort, key, p: (True, facts.extents.get(sort)),
    "inv": lambda facts, sort, key, p: (True, facts.extents.get(sort)),
    "sv": lambda facts, key, p: facts.range(key),
    "rank": lambda facts, key, p, e: (True, None),
    "nz": lambda facts, mask, row, d: (True, mask.shape[d]),
    "add": _of_add,
    "mul": lambda facts, *ts: _combined(facts, ts, lambda a, b: (a - 1) * (b - 1) + 1),
    "fdiv": _of_fdiv,
    "mod": lambda facts, t, n: (True, n.args[0]),
    "ite": _of_ite,
    "sum": _of_sum,
    "max": lambda facts, v, body: facts.range(body),
    "min": lambda facts, v, body: facts.range(body),
    "fn": _of_function,
    **dict.fromkeys(("eq", "lt", "not", "any"), lambda facts, *args: _TRUTH),
}
