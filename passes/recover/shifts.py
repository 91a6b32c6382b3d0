"""Codes that are shifted by numbers which a tensor holds (AutoGPTQ's `wf`): which tensors these are, and why codes are not read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx as fx
from torch import Tensor

from .. import terms as T
from ..aten import names
from ..aten.element import fixed_number
from ..aten.names import op_name
from ..aten.node import reached
from ..terms import Term
from .rows import nodes_of, reads

_SHIFTS = frozenset({"bitwise_right_shift", "__rshift__"})
_COUNTS = (4, 8, 16)  # codes in a word of 32 bits
_WHOLE = (torch.int32, torch.int64, torch.uint8, torch.int8)


def is_list(n: fx.Node) -> bool:
    """Whether a tensor that the graph is given says by how much each code of a word is shifted, and nothing else."""
    v = n.meta.get("val")
    return n.op == "placeholder" and isinstance(v, Tensor) and v.dtype in _WHOLE and v.numel() in _COUNTS and _only_shifts(n)


def _only_shifts(n: fx.Node) -> bool:
    def shifts(u: fx.Node) -> bool:
        if op_name(u) in _SHIFTS:
            return u.args[0] is not n and u.args[1] is n
        return op_name(u) in names.VIEW | names.CAST and _only_shifts(u)

    return bool(n.users) and all(map(shifts, n.users))


def shifted(weight: Iterable[Term], expert: Term) -> str | None:
    """Why a weight, a product of terms, is not read where codes in it are shifted by such numbers; None where none are."""
    atoms = (x for f in weight for x in T.walk(f) if x.op == "a" and T.uses(x, expert))
    nodes = (n for a in atoms for n in nodes_of(a)[:1] if isinstance(n, fx.Node))
    for x in (x for n in nodes for x in _made_of(n)):
        if op_name(x) in _SHIFTS and len(x.args) > 1 and isinstance(x.args[1], fx.Node):
            held = [y for y in _made_of(x.args[1]) if y.op == "placeholder" and isinstance(y.meta.get("val"), Tensor)]
            if held:
                by = reads(T.atom(held[0], ()))
                why = "shifted by numbers that are computed of a tensor's"
                return f"codes of a weight are {why}{by}: let the tensor hold them, one for each code"
    return None


def _made_of(n: fx.Node) -> Iterable[fx.Node]:
    return reached([n], lambda x: () if fixed_number(x) else x.all_input_nodes)
