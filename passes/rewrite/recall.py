"""Recall: what the passes found in a graph, kept on disk, so that a second process does not search and prove it again.

The key covers the whole Dynamo graph (targets, arguments, shapes, dtypes, devices, strides), the options that matter, and
the versions of torch and of this package's sources. A graph that holds anything the key cannot describe is not kept.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from ... import ir as _ir
from ...ops import sources
from ..aten import contracts
from ..aten.node import example_value
from ..aten.sharded import group_called, takes_part
from ..aten.sources import frames

log = logging.getLogger("moe_compile")


class _Unkeyable(Exception):
    pass


def key_of(graph: fx.Graph, salt: tuple[Any, ...]) -> str | None:
    """A digest of the graph, or None when some part of it has no stable description."""
    if contracts.foreign(graph):  # what is read of it is not told by the graph
        return None
    h = hashlib.sha256(repr((_sources(), torch.__version__, salt, torch.is_grad_enabled())).encode())
    try:
        for n in graph.nodes:
            h.update(repr((n.name, n.op, _target(n), _arg(n.args), _arg(n.kwargs), _value(example_value(n)))).encode())
            if takes_part(n):  # which rank this is stands in a group, not in the graph
                h.update(repr([(g.rank(), g.size()) for g in map(group_called, n.args) if g is not None]).encode())
    except _Unkeyable:
        return None
    return h.hexdigest()


def _target(n: fx.Node) -> str:
    t = n.target
    if isinstance(t, str):
        if n.op in ("get_attr", "call_module"):
            raise _Unkeyable
        return t
    if isinstance(t, torch._ops.OpOverload):
        return str(t)
    module = getattr(t, "__module__", None) or ""
    name = getattr(t, "__qualname__", getattr(t, "__name__", None))
    if isinstance(t, torch._ops.HigherOrderOperator) or name is None or "<locals>" in name:
        raise _Unkeyable
    if module.split(".")[0] not in ("torch", "_operator", "operator", "builtins", "math", ""):
        raise _Unkeyable
    return f"{module}.{name}"


def _arg(a: Any) -> Any:
    if isinstance(a, fx.Node):
        return ("node", a.name)
    if isinstance(a, (list, tuple)):
        return tuple(_arg(x) for x in a)
    if isinstance(a, dict):
        return tuple((k, _arg(v)) for k, v in sorted(a.items()))
    if isinstance(a, slice):
        return ("slice", _arg(a.start), _arg(a.stop), _arg(a.step))
    if a is None or isinstance(
        a, (int, float, bool, str, complex, torch.dtype, torch.device, torch.memory_format, torch.layout, type(...))
    ):
        return repr(a)
    raise _Unkeyable


def _value(v: Any) -> Any:
    if isinstance(v, torch.Tensor):
        return (
            type(v).__name__,
            *map(_size, v.shape),
            str(v.dtype),
            str(v.device),
            v.requires_grad,
            *map(_size, v.stride() if v.layout is torch.strided else ()),
        )
    if isinstance(v, torch.SymFloat):  # a block may rest on the number it has now
        return (_size(v), repr(v.node.hint))
    if isinstance(v, (torch.SymInt, torch.SymBool)):
        return _size(v)
    if isinstance(v, (list, tuple)):
        return tuple(_value(x) for x in v)
    return repr(v) if isinstance(v, (int, float, bool, str, type(None))) else type(v).__name__


def _size(s: Any) -> str:
    return _text(s.node.expr) if isinstance(s, (torch.SymInt, torch.SymFloat, torch.SymBool)) else repr(s)


@functools.lru_cache(maxsize=4096)
def _text(expr: Any) -> str:
    """A size in symbols; sympy takes long to write one down, and a graph names few of them often."""
    return str(expr)


def lines(graph: fx.Graph) -> str:
    """A digest of the lines of the user's code that made a graph: an equal graph may come of other code."""
    h = hashlib.sha256()
    for n in graph.nodes:  # stacks as they are: to take the lines out of each takes as long as all else that is done for an equal block
        h.update(f"{n.meta.get('stack_trace')}\0".encode())
    return h.hexdigest()


def anchor(source: str, graph: fx.Graph) -> tuple[str, int] | None:
    """Where file:line is found in a graph: the name of a node and the place in its stack. None: nowhere."""
    for n in graph.nodes:
        found = [":".join(f) for f in frames(n)]
        if source in found:
            return n.name, found.index(source)
    return None


def source_at(where: tuple[str, int] | None, graph: fx.Graph) -> str:
    """The file:line that stands there in an equal graph, "" if nothing does."""
    name, place = where or ("", 0)
    found = next((frames(n) for n in graph.nodes if n.name == name), [])
    return ":".join(found[min(place, len(found) - 1)]) if found else ""


def _sources() -> str:
    """A digest of this package's own files but for the targets': a change of the compiler forgets everything."""
    passes, package = Path(__file__).resolve().parents[1], Path(_ir.__file__).resolve().parents[1]
    return sources.digest(str(passes), str(package))


def folder() -> Path | None:
    """Inside Inductor's cache folder, and off when Inductor's caches are off."""
    from torch._inductor import config
    from torch._inductor.runtime.runtime_utils import cache_dir

    if config.force_disable_caches or not config.fx_graph_cache:
        return None
    return Path(cache_dir()) / "moe_compile"


def load(key: str | None) -> Any:
    """What was kept under a key, or None."""
    where = folder() if key is not None else None
    if where is None or key is None:
        return None
    try:
        return pickle.loads((where / key).read_bytes())
    except FileNotFoundError:
        return None
    except Exception as e:  # a file of another version, or a broken one
        log.info("a kept plan could not be read (%s)", e)
        return None


def save(key: str | None, value: Callable[[], Any]) -> None:
    """Keep a value, which is made only where it can be kept; a failure to do so is not an error."""
    where = folder() if key is not None else None
    if where is None or key is None:
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=where)
        with os.fdopen(handle, "wb") as f:
            f.write(pickle.dumps(value()))
        os.replace(name, where / key)
    except Exception as e:
        log.info("a plan could not be kept (%s)", e)
