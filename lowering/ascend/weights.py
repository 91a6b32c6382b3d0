"""How a packed operand of npu_grouped_matmul, [E, in, out] in one block of memory, is made of graph inputs.

A weight whose memory already lies that way is used through a view; any other is copied (`store`), never on a step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from . import antiquant, int8

# what may stand between a graph input and its use as a weight: views of it, casts of it
_VIEWS = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze transpose permute swapaxes swapdims movedim moveaxis adjoint t "
    "select narrow unbind chunk split tensor_split detach contiguous".split()
)
_CASTS = frozenset("to type float bfloat16 half".split())
_ATTRIBUTES = frozenset(("T", "mT", "H", "mH", "data"))


@dataclass(frozen=True)
class Step:
    """One view or cast: a method, an attribute ("mT") or an index."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, t: Any) -> Any:
        if self.name == "getitem":
            return t[self.args[0]]
        found = getattr(t, self.name)
        return found if self.name in _ATTRIBUTES else found(*self.args, **dict(self.kwargs))


@dataclass(frozen=True)
class Source:
    """A graph input and the views and casts that the graph puts on it before the experts see it."""

    position: int
    chain: tuple[Step, ...] = ()

    def value(self, t: Tensor) -> Tensor:
        for step in self.chain:
            t = step(t)
        return t


@dataclass(frozen=True)
class Recipe:
    """How one packed operand is made: the first `experts` of a stacked tensor, or one of many; transposed or not, cast or not.

    part: "int8" for the quantised weight, "scale" for its scales in `dtype`, "" for the weight itself, "pair" for a matrix of a low-rank
    pair, "smooth" for smooth scales k [E, in] (of [in] too) and "inverse" for 1 / k. Of weights in few bits that the model has, `coding`:
    "codes", "factors" of these sources or "ones", "offsets" of these sources or "shifts". nz: in the fractal format.
    """

    sources: tuple[Source, ...]
    experts: int
    stacked: bool
    transposed: bool
    dtype: torch.dtype
    part: str = ""
    coding: antiquant.Coding | None = None
    nz: bool = False

    def in_nz(self) -> Recipe:
        return replace(self, nz=True)

    def plain(self) -> tuple[Any, ...]:
        """Everything but where the sources stand among a graph's inputs: equal for equal operands of different graphs."""
        chains = tuple(s.chain for s in self.sources)
        return (self.experts, self.stacked, self.transposed, self.dtype, self.part, self.coding, self.nz, chains)

    def view(self, tensors: Sequence[Tensor], differentiable: bool = False) -> Tensor:
        """The operand's value in the wanted orientation and dtype; free where no stacking and no cast is needed."""
        return self.made([s.value(t) for s, t in zip(self.sources, tensors)], differentiable)

    def made(self, parts: Sequence[Tensor], differentiable: bool = False) -> Tensor:
        """The same, of what the sources' views and casts give."""
        t = parts[0] if self.stacked else torch.stack(list(parts)) if differentiable else _together(parts)
        if self.part in ("smooth", "inverse"):
            t = t.expand(self.experts, -1) if t.ndim == 1 else t[: self.experts]
            return (1 / t.float() if self.part == "inverse" else t).to(self.dtype)
        t = t if t.shape[0] == self.experts else t[: self.experts]
        if self.coding is not None:
            return self._decoded(t, self.coding)
        if self.transposed:
            t = t.transpose(-1, -2)
        if self.part in ("int8", "scale"):
            scale = int8.channel_scale(t).to(self.dtype)
            return scale if self.part == "scale" else int8.to_int8(t, scale)
        return t if t.dtype == self.dtype else t.to(self.dtype)

    def _decoded(self, t: Tensor, coding: antiquant.Coding) -> Tensor:
        if self.part == "codes":
            return coding.codes(t)
        given = t if self.part in ("factors", "offsets") else None
        make = coding.factors if self.part in ("factors", "ones") else coding.offsets
        return make(given, t, self.dtype)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        t = self.view(tensors)
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if self._out_in else t.contiguous()

    @property
    def _out_in(self) -> bool:
        """Whether the op wants the memory [E, out, in] under a view [E, in, out]."""
        return self.part == "codes" and self.coding is not None and self.coding.out_in

    def is_free(self, tensors: Sequence[Tensor]) -> bool:
        """Whether packing copies nothing: the operand is a view of the first tensor, in order, in its format."""
        if self.part not in ("", "codes") or self.nz:
            return False
        t = self.view(tensors)
        return (t.transpose(-1, -2) if self._out_in else t).is_contiguous() and _shares(t, tensors[0])


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _together(parts: Sequence[Tensor]) -> Tensor:
    """A list as one stacked tensor: a view when the parts lie one behind the other, else a copy."""
    first = parts[0]
    step = first.numel()
    follows = all(
        _shares(p, first) and p.stride() == first.stride() and p.storage_offset() == first.storage_offset() + i * step
        for i, p in enumerate(parts)
    )
    return first.as_strided((len(parts), *first.shape), (step, *first.stride())) if follows else torch.stack(list(parts))


# ---- off a graph ---------------------------------------------------------------------------------------------------------


def trace_back(n: fx.Node, placeholders: dict[fx.Node, int]) -> Source | None:
    """The graph input that a node is a view or cast of, or None."""
    chain: list[Step] = []
    while n not in placeholders:
        step = _step(n)
        if step is None:
            return None
        chain.append(step)
        n = n.args[0]  # type: ignore[assignment]
    return Source(placeholders[n], tuple(reversed(chain)))


def _step(n: fx.Node) -> Step | None:
    """What a node does to its first argument, where that is a view or a cast with plain arguments."""
    if not n.args or n.all_input_nodes != [n.args[0]]:
        return None
    args, kwargs = tuple(map(_plain, n.args[1:])), tuple((k, _plain(v)) for k, v in sorted(n.kwargs.items()))
    if n.target is operator.getitem:
        return Step("getitem", args) if _is_index(args[0]) else None
    if n.target is getattr:
        return Step(str(args[0])) if args[0] in _ATTRIBUTES else None
    name = str(n.target) if n.op == "call_method" else _function(n.target)
    return Step(name, args, kwargs) if name in _VIEWS | _CASTS else None


def _function(target: Any) -> str:
    """torch.transpose and its kin are methods of their first argument; any other function is not."""
    name = getattr(target, "__name__", "")
    return name if isinstance(target, Callable) and getattr(torch, name, None) is target else ""  # type: ignore[arg-type]


def _plain(v: Any) -> Any:
    return tuple(map(_plain, v)) if isinstance(v, (list, tuple)) else v


def _is_index(i: Any) -> bool:
    """Numbers, slices of numbers, ... and None; an index of a tuple (of chunks) is a number too."""
    if isinstance(i, tuple):
        return all(map(_is_index, i))
    if isinstance(i, slice):
        return all(x is None or type(x) is int for x in (i.start, i.stop, i.step))
    return i is None or i is Ellipsis or type(i) is int
