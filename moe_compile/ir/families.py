"""The ops that run routed experts, by what the experts have: one family for each set of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import Experts
from .codec import encode
from .operands import ADAPTED, CHAINED, CODED, PLAIN, STORED_ADAPTED
from .records import AdaptedLayout, ChainedLayout, Layout, Storage


@dataclass(frozen=True)
class Family:
    """Ops of routed experts with the same parameters. `op`: the name of the one that a graph calls; its lists; its plain arguments."""

    op: str
    names: tuple[str, ...]
    records: tuple[type, ...]

    def plain(self, experts: Experts) -> list[Any]:
        """The plain arguments, after the tensors. Raises `scalar.UnknownActivation`."""
        return [a for record in self.records for a in encode(record, experts)]


EXPERTS = Family("experts", PLAIN, (Layout,))
EXPERTS_STORED = Family("experts_stored", CODED, (Layout, Storage))
EXPERTS_ADAPTED = Family("experts_adapted", ADAPTED, (AdaptedLayout,))
EXPERTS_STORED_ADAPTED = Family("experts_stored_adapted", STORED_ADAPTED, (AdaptedLayout, Storage))
EXPERTS_CHAINED = Family("experts_chained", CHAINED, (ChainedLayout,))
FAMILIES = (EXPERTS, EXPERTS_STORED, EXPERTS_ADAPTED, EXPERTS_STORED_ADAPTED, EXPERTS_CHAINED)


def family_of(experts: Experts) -> Family:
    """Whose op runs them."""
    if experts.chain is not None:
        return EXPERTS_CHAINED
    if experts.coded:
        return EXPERTS_STORED_ADAPTED if experts.adapted else EXPERTS_STORED
    return EXPERTS_ADAPTED if experts.adapted else EXPERTS
