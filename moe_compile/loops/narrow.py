"""Narrow sizes for wide ones: a module's matrices as they would be in a smaller model of its kind.

All widths are divided by one number, so that a width that is twice another stays it, and that divides the numbers of groups that share a
scale and of words that hold several codes too. What is no width stays: experts (leading dims of stacks, lengths of lists), tables, ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

WIDE = 512  # sizes from which it pays
_LEAST = 48  # what a width is divided down to
_GROUPS = 2  # groups that are left of many
_SHARES = tuple(1 << n for n in range(1, 9))  # numbers of a row that may share a scale or a word


def narrow(shapes: Iterable[Sequence[int]], rows: Iterable[int], fixed: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Pairs of (size, narrow size); none where nothing is gained. shapes: of weights; rows: widths of rows; fixed: numbers that stay."""
    shapes, found, small = list(shapes), set(rows), set[int]()
    experts = {s[0] for s in shapes if len(s) > 2}
    stays = {*fixed, *experts}
    # of [.., groups, words] the words of one group are as many in a smaller model
    runs = {s[-1] for s in shapes if len(s) > 3 and s[-1] < WIDE}
    for shape in shapes:
        by_expert = len(shape) > 2 or len(shape) == 2 and shape[0] in experts  # a router's rows are experts
        for d in shape[1:] if by_expert else shape:
            (found if d >= WIDE else small if len(shape) > 1 else stays).add(d)
    wide = {d for d in found if d >= WIDE} - stays
    groups = {d for d in small - runs if any(d * share in wide for share in _SHARES)}
    stays |= small - groups
    by = _divisor(wide, groups, stays)
    return tuple((d, d // by) for d in sorted(wide | groups)) if by > 1 else ()


def _divisor(wide: set[int], groups: set[int], stays: set[int]) -> int:
    """The largest number that divides all of them, leaves enough of each, and makes none that is another's."""
    most = min([*(d // _LEAST for d in wide), *(d // _GROUPS for d in groups)]) if wide else 1
    common = math.gcd(*wide, *groups)
    for by in range(most, 1, -1):
        if common % by == 0 and not {d // by for d in wide} & stays:
            return by
    return 1
