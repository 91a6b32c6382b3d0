"""Weights that code makes wider as it uses them: whole stacks of them would be cast at every call, for a few experts that are hit.

experts(x, cast(W), ...) = experts(x, W, ...), where the op casts the matrices of those experts that tokens were sent to, and no others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from ... import ops  # noqa: F401 (defines them)
from ..aten import names
from ..aten.conditions import may_train
from ..aten.effects import written_between
from ..aten.node import example_value
from .target import Target

_experts = torch.ops.moe_compile.experts.default
_PARAMETERS = [i for i, a in enumerate(_experts._schema.arguments) if a.name in ("up", "down", "up_bias", "down_bias")]


def leave_narrow(gm: fx.GraphModule, target: Target) -> None:
    """Give experts their weights as they are stored, for a target that wants that, where no gradient may be wanted."""
    if not target.casts or may_train(gm.graph):
        return
    found = [n for n in gm.graph.nodes if n.target is _experts and any(_before(w, n) is not None for i in _PARAMETERS for w in n.args[i])]
    for n in found:
        narrow = {i: [w if (own := _before(w, n)) is None else own for w in n.args[i]] for i in _PARAMETERS}
        casts = [w for i in _PARAMETERS for w in n.args[i]]
        n.args = tuple(narrow.get(i, a) for i, a in enumerate(n.args))
        for cast in dict.fromkeys(casts):
            if not cast.users:
                gm.graph.erase_node(cast)
    if found:
        gm.graph.lint()
        gm.recompile()


def _before(w: Any, experts: fx.Node) -> fx.Node | None:
    """A weight as it was before it was made as wide as the tokens are; None where it was not."""
    if not isinstance(w, fx.Node) or names.op_name(w) not in names.CAST or not w.args or not isinstance(w.args[0], fx.Node):
        return None
    values: list[Any] = [example_value(n) for n in (w.args[0], w, experts.args[0])]  # type: ignore[arg-type]
    if not all(isinstance(v, torch.Tensor) for v in values):
        return None
    own, wide, tokens = values
    alike = own.shape == wide.shape and own.device == wide.device and own.stride() == wide.stride() and wide.dtype == tokens.dtype
    floats = own.is_floating_point() and 1 < own.dtype.itemsize < wide.dtype.itemsize
    return None if not (alike and floats) or written_between(w, experts) else w.args[0]
