"""Which buffers of a tape share memory, and when large ones come and go.

Small buffers lie side by side in one allocation. A large one, or a large result, is allocated by itself before the first step that
touches it and given back behind the last, as code that runs step by step would: what a call needs at once stays what it was. Its
allocation costs microseconds where its bytes cost more. All that happens between a fork and the join happens at once: what is touched
there lives from the one to the other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .later import Later
from .tape import Fork, GroupedProduct, Join, Product, Step, Tape

LARGE = 1 << 24  # bytes
_ALIGNED = 256


@dataclass(frozen=True)
class Span:
    """The steps [first, last] that touch a buffer; first > last where none does."""

    first: int
    last: int


@dataclass(frozen=True)
class Memory:
    """offsets: byte offset of each small buffer in the workspace of `size` bytes, by root. alone: the buffers with memory of their own,
    by root, with the steps to allocate them before and to give them back behind; (-1, ...) is before everything, a result stays."""

    size: int
    offsets: dict[int, int]
    alone: dict[int, Span]


def plan(tape: Tape, results: Collection[int]) -> Memory:
    """`results`: roots of the buffers that the call gives back."""
    spans = _spans(tape.steps)
    by_torch = {t.root for s in tape.steps if isinstance(s, (Product, GroupedProduct)) for t in s.touches()}
    end, size = len(tape.steps), 0
    offsets: dict[int, int] = {}
    alone: dict[int, Span] = {}
    for b in tape.buffers:
        if b.root not in spans and b.root not in results:
            continue  # nothing touches it
        span, large = spans.get(b.root, Span(-1, end)), bytes_of(b) >= LARGE
        if b.root in results:
            alone[b.root] = Span(span.first if large else -1, end)
        elif large or b.root in by_torch:
            alone[b.root] = span
        else:
            offsets[b.root] = size
            size += -(-bytes_of(b) // _ALIGNED) * _ALIGNED
    return Memory(size, offsets, alone)


def bytes_of(b: Later) -> int:
    return b.numel() * b.dtype.itemsize


def _spans(steps: Sequence[Step]) -> dict[int, Span]:
    """By root."""
    found: dict[int, Span] = {}
    begin: int | None = None
    beside: set[int] = set()
    for i, step in enumerate(steps):
        if isinstance(step, Join):
            found.update({root: Span(min(found[root].first, begin or 0), i) for root in beside})
            begin, beside = None, set()
        elif type(step) is Fork:
            begin = i
        for t in step.touches():
            found[t.root] = Span(found[t.root].first if t.root in found else i, i)
            if begin is not None:
                beside.add(t.root)
    return found
