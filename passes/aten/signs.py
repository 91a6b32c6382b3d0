"""Which tensors are positive whatever they are made of, as a softmax is: seen from the operations that made them."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from . import names
from .names import op_name

_POSITIVE = frozenset("softmax _softmax sigmoid exp softplus".split())
_SAME_SIGN = names.RESHAPE | names.PERMUTE | names.PART | names.REPEAT | names.SAME | names.CAST | {"getitem"}
_CLOSED = frozenset("mul div add true_divide".split())  # of positive numbers again a positive one, as sums and means are
_MASKS = names.PUT | frozenset("where masked_fill masked_scatter index_fill scatter log log2".split())
_SEEN_THROUGH = _SAME_SIGN | frozenset("mul div add sub rsub true_divide neg".split())
_DEEP = 24


def is_positive(n: Any, left: int = _DEEP) -> bool:
    """Whether all elements are more than 0; where one underflows, its gradient is 0 too."""
    if not isinstance(n, fx.Node):
        return isinstance(n, (int, float)) and n > 0
    if n.op != "call_function" or left <= 0:
        return False
    name = op_name(n)
    if name in _POSITIVE:
        return not _is_masked(n.args[0])
    if name in _SAME_SIGN:
        return is_positive(n.args[0], left - 1)
    if name in names.REDUCTION:
        return is_positive(n.args[0], left - 1)
    plain = len(n.args) == 2 and not n.kwargs  # alpha may be below zero, a quotient rounded to 0
    return name in _CLOSED and plain and all(is_positive(x, left - 1) for x in n.args)


def _is_masked(n: Any, left: int = _DEEP) -> bool:
    """Whether a condition may have put -inf into n, so that its exponential is 0 there by that condition."""
    if not isinstance(n, fx.Node) or n.op != "call_function":
        return False
    name = op_name(n)
    if left <= 0 or name in _MASKS:
        return True
    return name in _SEEN_THROUGH and any(_is_masked(x, left - 1) for x in n.all_input_nodes)
