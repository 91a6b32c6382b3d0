"""Axes that cannot mislead: a line only between neighbours that were measured, ticks in round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STEPS = (1, 2, 5)


def line(axis: Any, places: Sequence[int], values: Mapping[int, float | None], *style: Any, **more: Any) -> None:
    """Draw values over places; at a place without a value the line is broken."""
    axis.plot(places, [values.get(p) or math.nan for p in places], *style, **more)


def round_numbers(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... from the last one at or below `low` to the first one at or above `high`, both above zero."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    found = [s * 10.0**p for p in powers for s in _STEPS]
    first = max(i for i, v in enumerate(found) if v <= low * (1 + 1e-9))
    last = min((i for i, v in enumerate(found) if v >= high * (1 - 1e-9)), default=len(found) - 1)
    return found[first : last + 1]


def scales(axis: Any, places: Sequence[int], values: Iterable[float | None]) -> None:
    """Logarithmic both ways: the places that were measured, and round numbers."""
    seen = [v for v in values if v]
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(places, labels=[f"{p:,}" for p in places])
    axis.set_xticks([], minor=True)
    if seen:
        ticks = round_numbers(min(seen), max(seen))
        axis.set_yticks(ticks, labels=[f"{t:,g}" for t in ticks])
        axis.set_ylim(ticks[0], ticks[-1])
    axis.set_yticks([], minor=True)
    axis.grid(True, alpha=0.25)
