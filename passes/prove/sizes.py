"""Sizes of a probe: what a region's dimensions become, told by which dimension it is.

Tokens and widths get small sizes at the region's edge, where their roles are known; from there on a dimension's new size is the one
that its tensor has on the probe. Only the numbers that the graph holds as literals (`view(1024, 8, 2048)`, `arange(8192)`) have to be
told apart: a size among the dimensions it is made of (`regroup`), any other number by the edge's dimensions that it is a multiple of.
Where two of those agree in number and not in kind, the choice is a `script`, and others are tried when the first does not work out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy as sp

from ..aten.element import _matching as matching
from ..aten.element import size_of

SMALL = 32  # sizes up to which nothing is gained; up to which a number is taken for itself first
_COMBINATIONS = 256

Dim = Any  # int, or a sympy expression


class Unfree(Exception):
    """A dimension of the graph's `size` cannot have another one; `parts`: what it is split into, where that is the trouble."""

    def __init__(self, size: int, parts: tuple[int, ...] = ()) -> None:
        super().__init__(f"a dimension of size {size} cannot be reduced")
        self.size, self.parts = size, parts


@dataclass(frozen=True)
class Sizes:
    """`symbols`: values of symbolic sizes. `atoms`: (size in the graph, size on the probe) of tokens, then of widths, which may be other
    sizes of the same number. `kept`: numbers that are themselves first, such as the number of experts."""

    symbols: Mapping[Any, int] = field(default_factory=dict)
    atoms: tuple[tuple[int, int], ...] = ()
    kept: frozenset[int] = frozenset()

    def candidates(self, old: int) -> tuple[int, ...]:
        """What a number of the graph may be on the probe, most likely first."""
        exact = [b for a, b in self.atoms if a == old]
        if old <= SMALL or old in self.kept:
            return tuple(dict.fromkeys([old, *exact]))
        multiples = [b * q for a, b in self.atoms if a > 1 and old % a == 0 and old > a for q in self.candidates(old // a)]
        return tuple(dict.fromkeys([*exact, *multiples, old]))

    def of(self, s: Any) -> Any:
        """The most likely value of a size (an int, a SymInt, a node that holds one, an expression)."""
        s = size_of(s)
        if isinstance(s, bool) or not isinstance(s, (int, sp.Expr)):
            return s
        if isinstance(s, int):
            return self.candidates(s)[0] if s > 0 else s
        if s.is_Add:
            return sum(self.of(int(a) if a.is_Integer else a) for a in s.args)
        factor, rest = s.as_coeff_Mul()
        value = rest.subs({x: self.symbols.get(x, 3) for x in rest.free_symbols})
        return int((self.of(int(factor)) if factor.is_Integer else factor) * value)

    def shape(self, shape: Iterable[Dim]) -> tuple[int, ...]:
        return tuple(self.of(s) for s in shape)

    def without(self, e: Unfree) -> Sizes | None:
        """Other sizes, with which what failed may work: the dimension a multiple of what it is split into, else as large as it is.

        None when nothing is left that could be enlarged.
        """
        reduced = [(a, b) for a, b in self.atoms if a != b]
        concerned = sorted((p for p in reduced if e.size % p[0] == 0), key=lambda p: p[0] != e.size) or reduced
        if not concerned:
            return None
        old, new = concerned[0]
        outer = next((p for p in e.parts if p > 2), 0)
        split = outer > 0 and math.prod(e.parts) == old and new < old // outer * 2 < old
        size, part = (old // outer * 2, ((outer, 2),)) if split else (old, ())
        return Sizes(self.symbols, (*((a, size if a == old else b) for a, b in self.atoms), *part), self.kept)

    def as_traced(self) -> Sizes | None:
        """The graph's own sizes; None where these are."""
        same = tuple((a, a) for a, _ in self.atoms)
        return None if same == self.atoms else Sizes(self.symbols, same, self.kept)


@dataclass
class Script:
    """Which of several readings of a number is taken; `open` notes how many there were."""

    chosen: dict[Any, int] = field(default_factory=dict)
    open: dict[Any, int] = field(default_factory=dict)

    def choose(self, key: Any, options: Iterable[Any]) -> Any:
        found = list(dict.fromkeys(options))
        if len(found) > 1:
            self.open[key] = len(found)
        return found[self.chosen.get(key, 0) if len(found) > 1 else 0]

    def others(self, most: int) -> Iterator[Script]:
        """The other ways to choose, each a script of its own: one choice changed, the latest first."""
        changed = ({k: i} for k in reversed(self.open) for i in range(1, self.open[k]))
        for one in itertools.islice(changed, most):
            yield Script(one)


def regroup(
    sizes: Sizes, old_in: Sequence[Dim], new_in: Sequence[int], old_out: Sequence[Dim], computed: Mapping[int, int] | None = None
) -> list[list[tuple[int, ...]]]:
    """For each run of dims of a view the sizes that it may have on the probe. Raises Unfree where there are none.

    `computed`: dims of the result whose size the graph computes.
    """
    runs: list[list[tuple[int, ...]]] = []
    o = i = 0
    while o < len(old_out) or i < len(old_in):
        o2, i2 = matching(old_out, old_in, o, i)
        inside = {d - o: s for d, s in (computed or {}).items() if o <= d < o2}
        runs.append(_run(sizes, old_in[i:i2], new_in[i:i2], old_out[o:o2], inside))
        o, i = o2, i2
    return runs


def _run(
    sizes: Sizes, old_in: Sequence[Dim], new_in: Sequence[int], old_out: Sequence[Dim], computed: Mapping[int, int]
) -> list[tuple[int, ...]]:
    total = math.prod(new_in)
    if len(old_out) <= 1:
        return [(total,)] if old_out else [()]
    if list(old_out) == list(old_in):
        return [tuple(new_in)]
    options: list[dict[int, None]] = []
    for d, p in enumerate(old_out):
        beside = [b for a, b in zip(old_in, new_in, strict=True) if a == p]
        likely = [computed[d]] if d in computed else [*beside, *(sizes.candidates(p) if isinstance(p, int) else [sizes.of(p)])]
        options.append(dict.fromkeys(likely))
    found = [c for c in itertools.islice(itertools.product(*options), _COMBINATIONS) if math.prod(c) == total]
    if len(found) > 1 and len(set(old_out)) < len(old_out):  # 32 groups of 32 become 2 groups of 32: it is inner dims that stay
        found.sort(key=lambda c: [a == b for a, b in zip(c[::-1], old_out[::-1], strict=True)], reverse=True)
    if not found:
        known = [next(iter(o)) for o in options]
        blocks = {d for d, p in enumerate(old_out) if isinstance(p, int) and p > SMALL and p in sizes.kept}
        for d in sorted(range(len(old_out)), key=blocks.__contains__):  # however few, it is blocks that become fewer, not what is in one
            rest = math.prod(known[:d] + known[d + 1 :])
            free = d not in computed and (not isinstance(old_out[d], int) or old_out[d] > SMALL or bool(blocks))
            if free and rest and total % rest == 0:
                found.append((*known[:d], total // rest, *known[d + 1 :]))
    if not found:
        numbers = tuple(p for p in old_out if isinstance(p, int))
        raise Unfree(math.prod(numbers), numbers if len(numbers) == len(old_out) else ())
    return found
