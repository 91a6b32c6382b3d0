"""Rows that a model rounds before a product, each group of a row by its own scale: q = round(y / s), s = max|y| / largest, and s times q.

With y in the place of q · s the rest is read as if nothing were rounded; that it is, stands in the IR (`Experts.up_rows`, `down_rows`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...ir import Rows
from .. import terms as T
from ..aten.definitions_views import SMALL
from ..terms import Term
from . import smooth as smoothing
from . import static_rows
from .rows import No, factors

ROUNDED = "rows are rounded to fewer bits in a way that is not recovered: by max / largest of each row or of equal groups of it"
IN_PART = "rounded in part"  # code of a function whose products have different rows
_TYPES = {"round": torch.int8} | {name: dtype for dtype, name in SMALL.items()}


@dataclass(frozen=True)
class _Scale:
    """What a rounding divides by: `base`, which is factor · s; `bare`, which is bare_factor · s but for the floor, where there is one."""

    base: Term
    factor: float
    bare: Term | None
    bare_factor: float
    rows: Rows
    along: Term  # what runs along a row


@dataclass(frozen=True)
class Rounding:
    """An expert's body without rounding; how rows were rounded before the up projections, and before the down projection; smooth scales."""

    body: Term
    up: Rows | None = None
    down: Rows | None = None
    up_smooth: Term | None = None
    down_smooth: Term | None = None


def unrounded(body: Term, h: Term, expert: Term, smooth: bool = False) -> Rounding:
    """An expert's body without rounding. `smooth`: numbers of a row's places in what is rounded are smooth scales, and left out.

    A routing weight beside it, that may be rounded too, stays as it is. Raises No for any other rounding.
    """
    weights = [f for f in factors(body) if not T.uses(f, h) and not _products(f, expert) and any(map(_is_round, T.walk(f)))]
    core, found = _core_unrounded(T.mul(*(f for f in factors(body) if f not in weights)), expert, smooth)
    (up, up_smooth), (down, down_smooth) = (x or (None, None) for x in found)
    return Rounding(T.mul(*weights, core), up, down, up_smooth, down_smooth)


_Found = tuple[Rows, Term | None] | None  # how rows are rounded, and their smooth scales


def _core_unrounded(body: Term, expert: Term, smooth: bool) -> tuple[Term, list[_Found]]:
    found: list[_Found] = [None, None]
    for _ in range(3):
        rounds = _innermost(body)
        if not rounds:
            return body, found
        if torch.is_grad_enabled():
            raise No("rows are rounded to fewer bits where a gradient may be wanted")
        level = {_level(r, expert) for r in rounds}
        if len(level) != 1 or (which := level.pop()) > 1 or found[which] is not None:
            raise No(_told(rounds[0]))
        _check_every(body, which, expert)
        body, found[which] = _without(body, rounds, expert, smooth, which)
    raise No(_told(_innermost(body)[0]))


def _told(r: Term) -> str:
    return f"{ROUNDED} ({_TYPES[r.args[0]]})".replace("torch.", "")


def _level(r: Term, expert: Term) -> int:
    """How many products with weights stand inside what is rounded."""
    return max((_products(x, expert) for x in r.args[1]), default=0)


def _products(t: Term, expert: Term) -> int:
    """Products with an expert's weights, one inside the other."""
    found: dict[Term, int] = {}

    def depth(x: Term) -> int:
        if x not in found:
            inner = max((depth(c) for c in T.children(x)), default=0)
            found[x] = inner + (x.op == "sum" and T.uses(x, expert))
        return found[x]

    return depth(t)


def _check_every(body: Term, level: int, expert: Term) -> None:
    """All products of a level have rounded rows, or it is another function."""
    for x in T.walk(body):
        if x.op == "sum" and T.uses(x, expert) and _products(x.args[1], expert) == level and T.uses(x.args[1], x.args[0]):
            if not any(_is_round(y) and _level(y, expert) == level for y in T.walk(x.args[1])):
                raise No("rows are rounded to fewer bits before some of the up projections only", IN_PART)


def _without(body: Term, rounds: list[Term], expert: Term, smooth: bool, level: int) -> tuple[Term, _Found]:
    """The body with y in the place of s · round(y / s); with y / k where k are smooth scales."""
    scales = {s.base: s for r in rounds if (s := _scale(r, body, expert)) is not None}
    hows = {s.rows for s in scales.values()}
    if len(hows) != 1:
        raise No(_told(rounds[0]))
    (how,) = hows
    number = 1 / how.step if how.step else how.largest
    if how.step and level:
        body, number = _by_step(body, rounds, how.step), 1.0
    steps = {base: T.var(1, "s") for base in scales}  # base = factor · s: numbers go out where they came in
    plain = {base: T.mul(T.const(s.factor), steps[base]) for base, s in scales.items()}
    bare = {s.bare: T.mul(T.const(s.bare_factor), steps[base]) for base, s in scales.items() if s.bare is not None}
    along = {s.along for s in scales.values()}
    for floored, mapping in ((True, plain), (False, plain | bare)):
        ks: set[Term | None] = set()
        read = functools.partial(smoothing.without, along=along, expert=expert, found=ks if smooth else None)
        out = _cancelled(body, rounds, mapping, along, expert, read, number)
        if not any(s in out.atoms for s in steps.values()):
            if len(ks) > 1:
                raise No(_told(rounds[0]))
            k = ks.pop() if ks else None
            if how.static:
                return out, (how, _step(scales, k, rounds[0]))
            return out, (replace(how, floored=floored and how.floored, smooth=smoothing.kind(k)), k)
    raise No(_told(rounds[0]))  # what was divided by is not what the product is multiplied by


def _by_step(body: Term, rounds: list[Term], step: float) -> Term:
    """c Σ d q = (c / s) Σ (s d) q for q = round(y / s), s a constant: numbers in the sum are the activation's, which gives y, not y / s."""
    sums = {}
    for x in T.walk(body):
        if x.op == "sum" and any(f in rounds or f.op == "fn" and f.args[1][0] in rounds for f in factors(x.args[1])):
            c, rest = T.coefficient(x.args[1])
            inner = T.reduce_("sum", x.args[0], T.mul(T.const(step), rest))
            sums[x] = T.mul(T.const(_near(float(c) / step)), inner)
    if any(_is_round(x) for x in T.walk(T.subst(body, dict.fromkeys(sums, T.const(1))))):
        raise No(_told(rounds[0]))
    return T.subst(body, sums)


def _step(scales: dict[Term, _Scale], k: Term | None, r: Term) -> Term | None:
    """The number that static rows are divided by; None for a constant."""
    (base, *others) = scales
    if k is not None or others and scales[base].rows.step == 0:
        raise No(_told(r))
    return None if scales[base].rows.step else base


def _cancelled(
    body: Term, rounds: list[Term], mapping: dict[Term, Term], along: set[Term], expert: Term, read: Callable[[Term], Term], number: float
) -> Term:
    """The body where scales are symbols and nothing is rounded: (y / s) s = y, as `read` has it. Raises No where y cancels with others."""
    body = T.subst(body, mapping)
    inner = set(_innermost(body))
    if smoothing.behind(body, inner | {x for x in T.walk(body) if x.op == "fn" and x.args[1][0] in inner}, along, expert):
        raise No(_told(rounds[0]))
    mapping = {r: read(_clamped(r.args[1][0])) for r in _innermost(body)}
    if smoothing.cancels(mapping.values(), along, T.subst(body, dict.fromkeys(mapping, T.const(1)))):
        raise No(_told(rounds[0]))
    for x in T.walk(body):
        if x.op == "fn" and x.args[0] == "clamp" and x.args[1][0] in mapping:
            mapping[x] = mapping[x.args[1][0]] if _beyond(x, _largest_of(x.args[1][0])) else x
    return T.canonical(_snapped(_cancelled_numbers(T.subst(body, mapping), number)))


def _cancelled_numbers(t: Term, largest: float) -> Term:
    """c Σ d f = (c n) Σ (d / n) f: the largest number of a type goes out of a sum where it meets what it cancels with."""
    for _ in range(16):
        change = next((found for x in T.walk(t) if x.op == "mul" and (found := _moved(x, largest)) is not None), None)
        if change is None:
            break
        t = T.subst(t, {change[0]: change[1]})
    return t


def _moved(product: Term, largest: float) -> tuple[Term, Term] | None:
    """A product with a number and one sum, and the same with the largest number of a type moved between them; None where it is not."""
    outside, _ = T.coefficient(product)
    sums = [(f, *T.coefficient(f.args[1])) for f in factors(product) if f.op == "sum" and T.coefficient(f.args[1])[0] != 1]
    for f, inside, rest in sums:
        moves = [(_size(float(outside) * n) + _size(float(inside) / n), n) for n in (1.0, largest, 1 / largest)]
        n = min(moves)[1]
        if n != 1:
            others = [g for g in factors(product) if g is not f and g.op != "c"]
            inner = T.reduce_("sum", f.args[0], T.mul(T.const(_near(float(inside) / n)), rest))
            return product, T.mul(T.const(_near(float(outside) * n)), inner, *others)
    return None


def _size(c: float) -> float:
    """How far a number is from 1."""
    return abs(math.log(abs(c))) if c else math.inf


def _near(c: float) -> float | int:
    """1 for what is 1 but for its last digits."""
    return 1 if abs(c - 1) < 1e-12 else c


def _clamped(arg: Term) -> Term:
    """y / s behind a clamp to the numbers that a type has, which it is within."""
    return arg.args[1][0] if arg.op == "fn" and arg.args[0] == "clamp" else arg


def _largest_of(r: Term) -> float:
    return Rows(8, _TYPES[r.args[0]]).largest


def _beyond(clamp: Term, largest: float) -> bool:
    """Whether a clamp leaves numbers up to the largest alone."""
    lo, hi = clamp.args[2]
    return bool(lo <= -largest and hi >= largest)


def _innermost(body: Term) -> list[Term]:
    rounds = [x for x in T.walk(body) if _is_round(x)]
    return [r for r in rounds if not any(_is_round(x) for x in T.walk(r.args[1][0]))]


def _is_round(x: Term) -> bool:
    return x.op == "fn" and x.args[0] in _TYPES


def _snapped(t: Term) -> Term:
    """Numbers that are 1 but for the rounding of 1/127 are 1."""
    near = {x: T.const(1) for x in T.walk(t) if x.op == "c" and isinstance(x.args[0], float) and 0 < abs(x.args[0] - 1) < 1e-12}
    return T.subst(t, near) if near else t


# ---- the scale of a rounding -------------------------------------------------------------------------------------------


def _scale(r: Term, body: Term, expert: Term) -> _Scale:
    """What a rounding of y · k / base divides by."""
    (arg,) = r.args[1]
    largest = _largest_of(r)
    limits = next(
        (x.args[2] for x in (arg, *T.walk(body)) if x.op == "fn" and x.args[0] == "clamp" and (x is arg or x.args[1][0] is r)), (0, 0)
    )
    if arg.op == "fn" and arg.args[0] == "clamp":
        if not _beyond(arg, largest):
            raise No(_told(r))
        (arg,) = arg.args[1]
    k, _ = T.coefficient(arg)
    for f in factors(arg):
        if f.op == "pow" and f.args[1] == -1:
            y = T.mul(*(g for g in factors(arg) if g is not f and g.op != "c"))
            found = _of(f.args[0], y, float(k), r, largest)
            if found is not None:
                return found
    static = static_rows.divided(arg, expert, _TYPES[r.args[0]], limits)
    if static is None:
        raise No(_told(r))
    kept = -128 <= limits[0] < limits[1] <= 127
    if not _TYPES[r.args[0]].is_floating_point and not kept:  # a cast to an integer type, which no term shows, would wrap
        raise No("rows are divided by a calibrated number and rounded to whole numbers that nothing keeps within int8")
    base, rows, along = static
    return _Scale(base, 1.0, None, 1.0, rows, along)


def _of(base: Term, y: Term, k: float, r: Term, largest: float) -> _Scale | None:
    """base = own · s, where s is max|y| / largest, with a floor or as a power of two or both; k / own is a number of y's."""
    own = largest if _size(k / largest) < _size(k) else 1.0
    inner, power = _power(base)
    floored, bound = False, -math.inf
    c, core = T.coefficient(inner)
    if core.op == "fn" and core.args[0] == "clamp" and core.args[2][1] == math.inf:
        bound = core.args[2][0] * float(c)
        inside, core = T.coefficient(core.args[1][0])
        c, floored = float(c) * float(inside), True
    if core.op == "ite" and _is_not_zero(core.args[0], core.args[1]) and core.args[2].op == "c":  # a group of zeros stays one
        core, bound = core.args[1], torch.finfo(torch.float32).tiny * own
        inside, core = T.coefficient(core)
        c = float(c) * float(inside)
    found = _largest(core, y)
    if found is None or power and k != 1:
        return None
    times, group, along = found
    if not math.isclose(k / (float(c) * times), largest, rel_tol=1e-6):
        return None
    rows = Rows(8, _TYPES[r.args[0]], group, max(0.0, float(bound) / own), power)
    return _Scale(base, own, core if floored and not power else None, own / float(c), rows, along)


def _is_not_zero(condition: Term, most: Term) -> bool:
    """0 < most or most != 0, of what is never negative."""
    _, most = T.coefficient(most)
    if condition.op == "lt":
        return T.is_c(condition.args[0], 0) and T.coefficient(condition.args[1])[1] is most
    return condition.op == "not" and condition.args[0].op == "eq" and {most, T.const(0)} == set(condition.args[0].args)


def _power(base: Term) -> tuple[Term, bool]:
    """x of 2^ceil(log2(x))."""
    x = base
    for name in ("exp2", "ceil", "log2"):
        if x.op != "fn" or x.args[0] != name:
            return base, False
        (x,) = x.args[1]
    return x, True


def _largest(most: Term, y: Term) -> tuple[float, int, Term] | None:
    """(c, group, u) of max_v |c y[v]|, over the variable u that runs along y's row, or along a group of it; None for something else."""
    if most.op != "max" or most.args[1].op != "fn" or most.args[1].args[0] != "abs":
        return None
    v, body = most.args
    c, own = T.coefficient(body.args[1][0])
    own, n = T.canonical(own), v.args[1]
    for u in y.atoms:
        if T.same_size(u.args[1], n) and own is T.canonical(T.subst(y, {u: v})):
            return abs(float(c)), 0, u
        if isinstance(n, int) and isinstance(u.args[1], int) and u.args[1] > n and u.args[1] % n == 0:
            if own is T.canonical(T.subst(y, {u: T.add(T.mul(T.const(n), T.fdiv(u, n)), v)})):
                return abs(float(c)), n, u
    return None
