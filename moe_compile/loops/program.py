"""Whether a function runs the same operations on narrow matrices and on wide ones, for every expert.

What was proved on narrow ones then holds for wide ones: operations mean the same at any width, and nothing but their list, which the
code may choose by a width, can differ. On the wide ones no float is computed: a result is memory that nobody writes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir import Rejection
from .fewer import Fewer

Line = tuple[str, list[Any]]


class _Listed(TorchDispatchMode):
    """Writes down each operation with its plain arguments. `idle`: floats are not computed.

    `made`: what an operation that is not computed makes of tensors that lie like these, since each expert runs the same.
    """

    def __init__(self, idle: bool) -> None:
        super().__init__()
        self.idle, self.lines, self.made = idle, list[Line](), dict[Any, Any]()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: Dynamo sees none of this anyway, and keeping it away costs as much as an operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, how = [*args, *kwargs.values()], (len(args), *kwargs)
        if any(isinstance(a, (list, tuple, dict)) for a in flat):
            flat, how = pytree.tree_flatten((args, kwargs))
        self.lines.append((_kind(func).name, [None if isinstance(a, Tensor) else a for a in flat]))
        if not self.idle or not _computes(func, flat):
            return func(*args, **kwargs)
        return flat[0] if _kind(func).writes else self._unmade(func, args, kwargs, flat, how)

    def _unmade(self, func: Any, args: Any, kwargs: Any, flat: list[Any], how: Any) -> Any:
        key = func, how, tuple((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else (type(a), a) for a in flat)
        if key not in self.made:
            args, kwargs = pytree.tree_map_only(Tensor, _meta, (args, kwargs))
            self.made[key] = func(*args, **kwargs)
        made = self.made[key]
        return _real(made) if isinstance(made, Tensor) else pytree.tree_map_only(Tensor, _real, made)


def _computes(func: Any, flat: list[Any]) -> bool:
    """Whether an operation makes floats of tensors, or writes them, and is no view."""
    of = _kind(func)
    if not of.computes or not any(isinstance(a, Tensor) and a.is_floating_point() for a in flat):
        return False
    if of.writes:
        first = flat[0]
        return of.returns == 1 and isinstance(first, Tensor) and first.is_floating_point()
    return not (of.indexes and any(isinstance(a, Tensor) and a.dtype is torch.bool for a in flat))  # how many rows: in the mask's values


class _Kind(NamedTuple):
    """What an operation's schema and name say: `computes` is False for views, for what makes no tensor or chooses one by values."""

    name: str
    computes: bool
    writes: bool
    indexes: bool
    returns: int


@functools.cache
def _kind(func: Any) -> _Kind:
    returns, name, writes = func._schema.returns, str(func), func._schema.is_mutable
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    chooses = name.partition(".")[2].partition(".")[0] in _CHOOSE and not writes
    sized = torch.Tag.dynamic_output_shape in func.tags
    return _Kind(name, bool(returns) and not (view or chooses or sized), writes, "index" in name, len(returns))


_CHOOSE = {"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "eq", "ne", "lt", "le", "gt", "ge", "item", "_local_scalar_dense"}


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
    return len(small) == len(large) and all(_is_line(a, b, fewer) for a, b in zip(small, large, strict=True))


def _is_line(a: Line, b: Line, fewer: Fewer) -> bool:
    (name, xs), (other, ys) = a, b
    return name == other and len(xs) == len(ys) and (_picks(name) and xs == ys or _alike(xs, ys, fewer))


def _picks(name: str) -> bool:
    """Whether plain numbers are places or values, such as an expert's number, and no sizes."""
    return name.startswith(("aten.select.", "aten.eq."))


def _alike(xs: list[Any], ys: list[Any], fewer: Fewer) -> bool:
    groups = {narrow: wide for wide, narrow in fewer.widths}

    def same(x: Any, y: Any) -> bool:
        if type(x) is not int or type(y) is not int:
            return type(x) is type(y) and bool(x == y)
        return y == fewer.size(x) or fewer.size(x) == x and y == groups.get(x)

    return all(same(x, y) for x, y in zip(xs, ys, strict=True))
