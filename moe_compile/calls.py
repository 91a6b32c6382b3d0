"""What a call in a captured graph does to its arguments: asked by the passes and by targets that rewrite graphs."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import torch.fx as fx

_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul,
}  # fmt: skip
_DUNDERS = {f"__{f.__name__}__" for f in _IN_PLACE}  # called by name: x.__itruediv__(2)


def is_write(n: fx.Node) -> bool:
    """Whether a Dynamo node changes its first argument (or its `out=`)."""
    if n.op == "call_method":
        name = str(n.target)
        return (name.endswith("_") and not name.endswith("__")) or name in _DUNDERS
    if n.op != "call_function":
        return False
    if n.target in _IN_PLACE or n.kwargs.get("out") is not None or _asked_in_place(n):
        return True
    schema = getattr(n.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = getattr(n.target, "__name__", "")
    is_operator = getattr(n.target, "__module__", "") == "_operator"  # `a & b` is and_: no word of Python's own ends in one otherwise
    return name.endswith("_") and not name.endswith("__") and not is_operator


def _asked_in_place(n: fx.Node) -> bool:
    """relu(x, inplace=True), by name or by position."""
    if "inplace" in n.kwargs:
        return bool(n.kwargs["inplace"])
    at = _place_of_inplace(n.target) if any(a is True for a in n.args) else None
    return at is not None and at < len(n.args) and n.args[at] is True


@functools.lru_cache(maxsize=1024)
def _place_of_inplace(f: Any) -> int | None:
    try:
        parameters = list(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        return None
    return parameters.index("inplace") if "inplace" in parameters else None
