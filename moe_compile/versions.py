"""What came of one piece of code in the versions that Dynamo compiled it in: for other sizes, in another mode, or for another layer.

Dynamo keeps all versions and runs the one whose guards hold. Layers of one class share their code, so the version of a layer that is
left as written must not hide the version of one that is fused.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from .findings import BlockReport
from .ir import Rejection
from .reported import Report

_X = TypeVar("_X", BlockReport, Rejection)
_generation = 0


def forget() -> None:
    """Dynamo drops all compiled code: none of what is noted by now will run again."""
    global _generation
    _generation += 1


class Versions:
    """The reports of one piece of code, oldest first. One that tells nothing beside a later one goes: the same block for other sizes."""

    def __init__(self) -> None:
        self._parts: list[Report] = []
        self._generation = _generation

    def add(self, part: Report) -> None:
        """Note the newest version."""
        if self._generation != _generation:
            self._parts, self._generation = [], _generation
        self._parts = [p for p in self._parts if not _tells(p) <= _tells(part)] + [part]

    def told(self) -> Iterator[Report]:
        """The newest version, and of each older one what the newer ones do not tell."""
        known: Counter[Hashable] = Counter()
        for part in reversed(self._parts):
            told = _tells(part)
            if told <= known and known:
                continue
            yield dataclasses.replace(part, blocks=_beyond(part.blocks, known), rejected=_beyond(part.rejected, known))
            known |= told


def tells(parts: Mapping[Any, Versions]) -> Counter[Hashable]:
    """What the pieces of code of one module fuse and leave, all versions together."""
    return sum((_tells(part) for versions in parts.values() for part in versions.told()), Counter())


def modules_traced() -> frozenset[int]:
    """The ids of the modules among the locals of the frame that Dynamo traces at present: whose code it is."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        given = InstructionTranslator.current_tx().output.root_tx.f_locals
    except (ImportError, AttributeError):
        return frozenset()
    return frozenset(id(v) for v in given.values() if isinstance(v, nn.Module))


def _tells(part: Report) -> Counter[Hashable]:
    """What a version fuses and leaves, whatever the sizes are."""
    return Counter([*map(_key, part.blocks), *map(_key, part.rejected)])


def _beyond(told: Iterable[_X], known: Counter[Any]) -> list[_X]:
    """Those of a version that newer versions do not tell as often."""
    left, kept = Counter(known), []
    for x in told:
        if left[_key(x)] > 0:
            left[_key(x)] -= 1
        else:
            kept.append(x)
    return kept


def _key(x: BlockReport | Rejection) -> Hashable:
    if isinstance(x, BlockReport):
        return "fused", x.source, x.formula, x.experts, x.shared, x.exchange
    return "left", x.source, x.code, x.part
