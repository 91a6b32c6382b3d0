"""Tensors that are made empty and then filled part by part, as what they hold in the end: for reading alone.

    t = empty(..); t[:, i::n] = v_i   (i = 0 .. n - 1)     t = stack(v_0, .., v_{n-1}; behind dim 1), flattened
    t = empty(..); t[:a] = v_0; t[a:] = v_1                t = cat(v_0, v_1)

compressed-tensors, HQQ and gpt-oss's own loader put codes together so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from . import names
from .effects import mutated_args, storage_of
from .names import op_name
from .node import fakes

_aten = torch.ops.aten


def fill(graph: fx.Graph) -> None:
    """Readers of such tensors read what they hold; the writes stay. A tensor that is written in another way, or read between, is left."""
    made = [n for n in graph.nodes if op_name(n) in names.CREATION and len(n.users) > 2 and _fixed(n)]
    order = {x: i for i, x in enumerate(graph.nodes)} if made else {}
    written: dict[int | None, list[tuple[fx.Node, fx.Node]]] = {}
    for w in order:
        for target in mutated_args(w) if w.op == "call_function" else ():
            written.setdefault(storage_of(target), []).append((w, target))
    for n in made:
        found = _parts(n, order)
        if found is None:
            continue
        dim, step, writes = found
        readers = [u for u in n.users if u not in {w.args[0] for w in writes}]
        first = min(readers, key=order.__getitem__)
        # what else writes must be the first reader, or others would have read the same memory by other names
        if any(w not in writes and (w is not first or target is not n) for w, target in written.get(storage_of(n), ())):
            continue
        with fakes([n.meta["val"]]):
            held = _held(dim, step, writes, max(writes, key=order.__getitem__), n.meta["val"].dtype)
        for u in readers:
            u.replace_input_with(n, held)


def _fixed(n: fx.Node) -> bool:
    v = n.meta.get("val")
    return isinstance(v, Tensor) and all(isinstance(s, int) for s in v.shape)


def _parts(n: fx.Node, order: dict[fx.Node, int]) -> tuple[int, int, list[fx.Node]] | None:
    """(dim, step, writes by where they begin) of a tensor that is written whole by copies into slices, before anything reads it."""
    slices: list[tuple[int, int, int, int, fx.Node]] = []
    readers = []
    for u in n.users:
        write = next(iter(u.users)) if len(u.users) == 1 else None
        if op_name(u) == "slice" and write is not None and write.target is _aten.copy_.default and write.args[0] is u and not write.users:
            dim, start, end, step = _bounds(u, n.meta["val"])
            slices.append((dim, step, start, end, write))
        else:
            readers.append(u)
    if len(slices) < 2 or not readers or min(order[r] for r in readers) < max(order[s[-1]] for s in slices):
        return None
    slices.sort(key=lambda s: s[2])
    dims, steps = {s[0] for s in slices}, {s[1] for s in slices}
    if len(dims) > 1 or len(steps) > 1:
        return None
    (dim,), (step,) = dims, steps
    size, starts, ends = n.meta["val"].shape[dim], [s[2] for s in slices], [s[3] for s in slices]
    strided = step == len(slices) > 1 and starts == list(range(step)) and size % step == 0 and set(ends) == {size}
    in_turn = step == 1 and starts == [0, *ends[:-1]] and ends[-1] == size
    same = all(w.args[1].meta["val"].shape == w.args[0].meta["val"].shape for *_, w in slices if isinstance(w.args[1], fx.Node))
    whole = all(isinstance(w.args[1], fx.Node) for *_, w in slices)
    return (dim, step, [s[-1] for s in slices]) if (strided or in_turn) and same and whole else None


def _bounds(u: fx.Node, whole: Tensor) -> tuple[int, int, int, int]:
    """(dim, start, end, step) of a slice, within the tensor."""
    given: tuple[Any, ...] = (*u.args[1:], *(0, None, None, 1)[len(u.args) - 1 :])
    dim, start, end, step = given
    size = whole.shape[dim]
    first = 0 if start is None else start + size if start < 0 else start
    last = size if end is None else end + size if end < 0 else min(end, size)
    return dim % whole.ndim, first, last, step


def _held(dim: int, step: int, writes: Sequence[fx.Node], last: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What is in the tensor behind the last write."""
    at, values = last, []
    for w in writes:
        v: Any = w.args[1]
        values.append(v if v.meta["val"].dtype is dtype else (at := _behind(at, w, _aten.to.dtype, v, dtype)))
    if step == 1:
        return _behind(at, last, _aten.cat.default, values, dim)
    one = _behind(at, last, _aten.stack.default, values, dim + 1)
    return _behind(one, last, _aten.flatten.using_ints, one, dim, dim + 1)


def _behind(at: fx.Node, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    with at.graph.inserting_after(at):
        new = at.graph.call_function(target, args)
    new.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta")}
    new.meta["val"] = target(*fx.map_arg(args, lambda x: x.meta["val"]))
    return new
