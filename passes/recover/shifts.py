"""Codes that are shifted by numbers which a tensor holds (AutoGPTQ's `wf`): why they are not read."""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx
from torch import Tensor

from .. import terms as T
from ..aten.names import op_name
from ..terms import Term
from .packed import made_of
from .rows import nodes_of, reads

_SHIFTS = frozenset({"bitwise_right_shift", "__rshift__"})


def shifted(weight: Iterable[Term], expert: Term) -> str | None:
    """Why a weight, a product of terms, is not read where codes in it are shifted by such numbers; None where none are."""
    atoms = (x for f in weight for x in T.walk(f) if x.op == "a" and T.uses(x, expert))
    nodes = (n for a in atoms for n in nodes_of(a)[:1] if isinstance(n, fx.Node))
    for x in (x for n in nodes for x in made_of(n)):
        if op_name(x) in _SHIFTS and len(x.args) > 1 and isinstance(x.args[1], fx.Node):
            held = [y for y in made_of(x.args[1]) if y.op == "placeholder" and isinstance(y.meta.get("val"), Tensor)]
            if held:
                by = reads(T.atom(held[0], ()))
                return f"codes of a weight are shifted by numbers that a tensor holds{by}, which no graph tells: give them as constants"
    return None
