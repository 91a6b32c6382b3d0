"""Which tensors are positive whatever they are made of, as a softmax is: seen from the operations that made them."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from . import names
from .names import op_name

_POSITIVE = frozenset("softmax _softmax sigmoid exp softplus".split())
_SAME_SIGN = names.RESHAPE | names.PERMUTE | names.PART | names.REPEAT | names.SAME | names.CAST | {"getitem"}
_CLOSED = names.REDUCTION | frozenset("mul div add true_divide".split())  # of positive numbers again a positive one
_DEEP = 24


def is_positive(n: Any, left: int = _DEEP) -> bool:
    """Whether all elements are more than 0; where one underflows, its gradient is 0 too."""
    if not isinstance(n, fx.Node):
        return isinstance(n, (int, float)) and n > 0
    if n.op != "call_function" or left <= 0:
        return False
    name = op_name(n)
    if name in _POSITIVE:
        return True
    if name in _SAME_SIGN:
        return is_positive(n.args[0], left - 1)
    parts = n.args[:1] if name in names.REDUCTION else n.args[:2]
    return name in _CLOSED and all(is_positive(x, left - 1) for x in parts)
