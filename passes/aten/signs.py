"""Which tensors are positive whatever they are made of, as a softmax is: seen from the operations that made them."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from . import names
from .names import op_name
from .node import reached

_POSITIVE = frozenset("softmax _softmax sigmoid exp softplus".split())
_SAME_SIGN = names.RESHAPE | names.PERMUTE | names.PART | names.REPEAT | names.SAME | names.CAST | {"getitem"}
_CLOSED = frozenset("mul div add true_divide".split())  # of positive numbers again a positive one, as sums and means are
_MASKS = names.PUT | frozenset("where masked_fill masked_scatter index_fill scatter log log2".split())
_SEEN_THROUGH = _SAME_SIGN | frozenset("mul div add sub rsub true_divide neg".split())
_DEEP, _FAR = 24, 200


def is_positive(n: Any, left: int = _DEEP, known: dict[fx.Node, bool] | None = None) -> bool:
    """Whether all elements are more than 0; where one underflows, its gradient is 0 too. `known`: of nodes met already."""
    if not isinstance(n, fx.Node):
        return isinstance(n, (int, float)) and n > 0
    known = {} if known is None else known
    if n not in known:
        known[n] = left > 0 and n.op == "call_function" and _is_positive(n, left - 1, known)
    return known[n]


def _is_positive(n: fx.Node, left: int, known: dict[fx.Node, bool]) -> bool:
    name = op_name(n)
    if name in _POSITIVE:
        return not _is_masked(n.args[0])
    if name in _SAME_SIGN or name in names.REDUCTION:
        return is_positive(n.args[0], left, known)
    plain = len(n.args) == 2 and not n.kwargs  # alpha may be below zero, a quotient rounded to 0
    return name in _CLOSED and plain and all(is_positive(x, left, known) for x in n.args)


def _is_masked(n: Any) -> bool:
    """Whether a condition may have put -inf into n, so that its exponential is 0 there; True where n is made of too much."""
    made = reached([n] if isinstance(n, fx.Node) else [], lambda x: x.all_input_nodes if op_name(x) in _SEEN_THROUGH else (), _FAR + 1)
    return any(op_name(x) in _MASKS or i >= _FAR for i, x in enumerate(made))
