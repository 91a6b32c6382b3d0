"""Whether a function runs the same operations on narrow matrices and on wide ones, for every expert.

What was proved on narrow ones then holds for wide ones: operations mean the same at any width, and nothing but their list, which the
code may choose by a width, can differ. On the wide ones no float is computed: a result is memory that nobody writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir import Rejection
from .fewer import Fewer

Line = tuple[str, list[Any]]


class _Listed(TorchDispatchMode):
    """Writes down each operation with its plain arguments. `idle`: floats are not computed."""

    def __init__(self, idle: bool) -> None:
        super().__init__()
        self.idle, self.lines = idle, list[Line]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, how = pytree.tree_flatten((args, kwargs or {}))
        self.lines.append((str(func), [None if isinstance(a, Tensor) else a for a in flat]))
        return self._unmade(func, flat, how) if self.idle and _computes(func, flat) else func(*args, **(kwargs or {}))

    def _unmade(self, func: Any, flat: list[Any], how: Any) -> Any:
        if func._schema.is_mutable:
            return flat[0]
        args, kwargs = pytree.tree_unflatten([_meta(a) if isinstance(a, Tensor) else a for a in flat], how)
        return pytree.tree_map_only(Tensor, _real, func(*args, **kwargs))


def _computes(func: Any, flat: list[Any]) -> bool:
    """Whether an operation makes floats of tensors, or writes them, and is no view."""
    tensors = [a for a in flat if isinstance(a, Tensor)]
    returns = func._schema.returns
    if not tensors or any(r.alias_info is not None and not r.alias_info.is_write for r in returns) or not returns:
        return False
    if torch.Tag.dynamic_output_shape in func.tags or not any(_is_float(t) for t in tensors):
        return False
    if func._schema.is_mutable:
        return len(returns) == 1 and flat[0] is tensors[0] and _is_float(tensors[0])
    mask = any(t.dtype is torch.bool for t in tensors) and "index" in str(func)  # how many rows it has is in its values
    return not mask and str(func).partition(".")[2].partition(".")[0] not in _CHOOSE


_CHOOSE = {"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "eq", "ne", "lt", "le", "gt", "ge", "item", "_local_scalar_dense"}


def _is_float(t: Tensor) -> bool:
    return t.is_floating_point()


def _meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _real(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)


def is_same(narrow: Any, wide: Any, given: tuple[Mapping[str, Any], Mapping[str, Any]], fewer: Fewer) -> bool:
    """Whether the function on two benches, with arguments that differ in width alone, runs the same operations."""
    lists = []
    for bench, arguments, idle in zip((narrow, wide), given, (False, True), strict=True):
        listed = _Listed(idle)
        try:
            bench.run(arguments, listener=listed)
        except (Rejection, RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            return False
        lists.append(listed.lines)
    small, large = lists
    pairs = zip(small, large, strict=False)
    return len(small) == len(large) and all(a == b and len(xs) == len(ys) and _alike(xs, ys, fewer) for (a, xs), (b, ys) in pairs)


def _alike(xs: list[Any], ys: list[Any], fewer: Fewer) -> bool:
    groups = {narrow: wide for wide, narrow in fewer.widths}

    def same(x: Any, y: Any) -> bool:
        if type(x) is not int or type(y) is not int:
            return type(x) is type(y) and bool(x == y)
        return y == fewer.size(x) or fewer.size(x) == x and y == groups.get(x)

    return all(same(x, y) for x, y in zip(xs, ys, strict=True))
