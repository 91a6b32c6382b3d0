"""A region of the shadow and its run on a probe, in float64: every float type stands for float64, a type narrower than 16 bits rounds."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ...ir import Rejection
from ..aten import names
from ..aten.effects import aliased_arg, mutated_args
from ..aten.element import fixed_number, shape_of, size_of
from ..aten.names import op_name
from ..recover.region import inside
from .literals import Literals
from .sizes import SMALL, Unfree

TROUBLE = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, AssertionError, KeyError, AttributeError)
_FREE = names.PART | names.PERMUTE | {"expand", "expand_as", "broadcast_to"}
_MANY = 1 << 24  # elements, of which fewer need no look ahead
_unlike = count()  # a constant too large to compare is like no other


class TooMuchWork(Exception):
    """A proof that would take longer than any block is worth."""


@dataclass
class Work:
    """Multiplications, and elements written, that may still be spent on one proof."""

    left: int

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TooMuchWork

    def afford(self, amount: int) -> None:
        """Raises TooMuchWork where so much could not be spent any more."""
        if amount > self.left:
            raise TooMuchWork


@dataclass(frozen=True)
class Region:
    """What is computed (`outs`) from what (`edge`), and the nodes between, in graph order."""

    outs: tuple[fx.Node, ...]
    edge: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...] = field(default=())

    @staticmethod
    def between(edge: list[fx.Node], outs: list[fx.Node]) -> Region | Rejection:
        nodes = inside(outs, edge)
        return nodes if isinstance(nodes, Rejection) else Region(tuple(outs), tuple(edge), tuple(nodes))

    @cached_property
    def written(self) -> set[fx.Node]:
        """Nodes of the edge whose memory is written inside."""
        root: dict[fx.Node, fx.Node] = {}  # of nodes inside, the one of the edge whose memory they are
        found: set[fx.Node] = set()
        edge = set(self.edge)
        for n in self.nodes:
            if n.op == "call_function":
                base = aliased_arg(n)
                if base is not None and (base in edge or base in root):
                    root[n] = root.get(base, base)
                found.update(root.get(m, m) for m in mutated_args(n) if m in edge or m in root)
        return found

    @cached_property
    def number(self) -> dict[fx.Node, int]:
        return {n: i for i, n in enumerate([*self.edge, *self.nodes])}

    @cached_property
    def signature(self) -> int:
        """Equal for regions that compute the same thing from inputs of the same shapes (as equal layers do)."""
        number = self.number

        def arg(a: Any) -> Any:
            if isinstance(a, fx.Node):
                return ("n", number.get(a, a.name))
            if isinstance(a, (list, tuple)):
                return tuple(arg(x) for x in a)
            return (type(a).__name__, str(a))

        def key(n: fx.Node) -> Any:
            if n.op == "get_attr":
                return _constant_key(n)
            return size_of(n) if fixed_number(n) else (str(n.target), arg(n.args), arg(tuple(sorted(n.kwargs.items()))))

        head = tuple((str(shape_of(n)), str(n.meta["val"].dtype), _layout(n)) for n in self.edge)
        return hash((head, tuple(key(n) for n in self.nodes), tuple(number.get(o, -1) for o in self.outs)))

    def run(self, given: Mapping[fx.Node, Any], literals: Literals, work: Work, no_grad: Collection[fx.Node] = ()) -> dict[fx.Node, Any]:
        """All values of the region; what it writes in place changes nothing of `given`. `no_grad`: nodes that run without gradient."""
        env = {**given, **_copies({n: given[n] for n in given if n in self.written}, given)}
        enabled = torch.is_grad_enabled()
        with torch.random.fork_rng(devices=[]):
            for n in self.nodes:
                if enabled and n in no_grad:
                    with torch.no_grad():
                        env[n] = value_of(n, env, literals, work)
                else:
                    env[n] = value_of(n, env, literals, work)
        return {**env, **{n: v for n, v in given.items() if n not in self.outs}}


def _copies(written: dict[fx.Node, Tensor], given: Mapping[fx.Node, Any]) -> dict[fx.Node, Tensor]:
    """Copies of what is written, and of what shares its memory, which go on sharing it."""
    memory = {v.untyped_storage().data_ptr() for v in written.values()}
    concerned = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.untyped_storage().data_ptr() in memory} if memory else {}
    shared = Counter(v.untyped_storage().data_ptr() for v in concerned.values())
    # a gradient goes through the copy of what shares its memory with nothing
    alone = {n: v.clone() for n, v in concerned.items() if v.requires_grad and shared[v.untyped_storage().data_ptr()] == 1}
    rest = [n for n in concerned if n not in alone]
    return alone | dict(zip(rest, copy.deepcopy([concerned[n] for n in rest]), strict=True))


def _constant_key(n: fx.Node) -> Any:
    v = constant(n)
    small = isinstance(v, Tensor) and v.numel() < 4096
    return ("const", tuple(v.shape), tuple(v.flatten().tolist())) if small else ("const", next(_unlike))


def _layout(n: fx.Node) -> str:
    """The order of the dims in memory, which a view may rest on."""
    v = n.meta["val"]
    return "" if v.layout is not torch.strided or v.is_contiguous() else str(v.stride())


def constant(n: fx.Node) -> Any:
    value: Any = n.graph.owning_module
    for part in str(n.target).split("."):
        value = getattr(value, part)
    return value


# ---- one node -----------------------------------------------------------------------------------------------------------


def value_of(n: fx.Node, env: Mapping[fx.Node, Any], literals: Literals, work: Work) -> Any:
    """What a node is on a probe."""
    if n.op == "placeholder" or fixed_number(n):
        return literals.sizes.of(n.meta["val"])
    if n.op == "get_attr":
        return _constant_value(n, literals)
    if isinstance(n.meta.get("val"), torch.SymInt) and any(x not in env for x in n.all_input_nodes):  # `recover.region.inside`
        return literals.sizes.of(n.meta["val"])
    if n.args[0] not in env if n.args and isinstance(n.args[0], fx.Node) else False:
        if op_name(n) in names.SIZE:
            return literals.sizes.of(n.meta["val"])
        if op_name(n) in names.LIKE:
            return _filled(n, literals)

    ours = "moe_compile" in str(n.target)  # what rows are rounded to is a part of the meaning

    def load(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return env[a]
        if isinstance(a, torch.dtype):
            return torch.float64 if a.is_floating_point and (a.itemsize > 1 or not ours) else a
        return torch.device("cpu") if isinstance(a, torch.device) else a

    args, kwargs = literals.of(n, env)
    if op_name(n) == "view" and isinstance(args[1], torch.dtype):  # bits as another type: the type is the graph's
        bits = env[args[0]].view(args[1])
        return bits.to(torch.float64) if bits.is_floating_point() else bits
    if op_name(n) == "type_as":
        return _cast(n, env[n.args[0]])  # type: ignore[index]
    work.afford(_room(n, literals))
    args, kwargs = fx.node.map_aggregate((args, kwargs), load)
    return _call(n, args, kwargs, work)


def _room(n: fx.Node, literals: Literals) -> int:
    """How many elements a result will have about, where there are many in the graph: of what is small in, much may come out."""
    v = n.meta.get("val")
    if op_name(n) in _FREE or not isinstance(v, Tensor) or not all(isinstance(s, int) for s in v.shape) or v.numel() < _MANY:
        return 0
    return math.prod(literals.sizes.shape(shape_of(n)))


def _constant_value(n: fx.Node, literals: Literals) -> Any:
    v = constant(n)
    if not isinstance(v, Tensor):
        return v
    for s in v.shape:
        if s > SMALL and literals.sizes.candidates(s)[0] != s:
            raise Unfree(s)
    return v.to(torch.float64) if v.is_floating_point() else v


def _filled(n: fx.Node, literals: Literals) -> Tensor:
    """zeros_like and its kin where only the shape is known."""
    value = {"zeros_like": 0, "ones_like": 1, "empty_like": 7, "full_like": n.args[1] if len(n.args) > 1 else n.kwargs.get("fill_value")}
    dtype = n.meta["val"].dtype
    shape = [literals.number(n, d, s) if isinstance(s, int) else literals.sizes.of(s) for d, s in enumerate(shape_of(n))]
    return torch.full(shape, value[op_name(n)], dtype=torch.float64 if dtype.is_floating_point else dtype)


def _call(n: fx.Node, args: Any, kwargs: Any, work: Work) -> Any:
    name = op_name(n)
    spent = effort(name, args)
    work.spend(spent)
    if name in names.GROUPED:
        return _grouped_mm(*args, **kwargs)
    if name == "histc" and not args[0].is_floating_point():  # counts of integers: accelerators only
        return n.target(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)  # type: ignore[operator]
    if name in names.EMPTY:
        out = n.target(*args, **kwargs)  # type: ignore[operator]
        return out.fill_(7) if isinstance(out, Tensor) else out
    if name in ("to", "_to_copy", "float", "double", "half") and isinstance(args[0], Tensor):
        return _cast(n, args[0])
    out = n.target(*args, **kwargs)  # type: ignore[operator]
    if isinstance(out, Tensor) and name not in _FREE:  # rows that are looked up, numbers that are repeated
        work.spend(max(0, out.numel() - spent))
    if isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64:
        out = out.to(torch.float64)
    return out


def effort(name: str, args: Any) -> int:
    """About how many multiplications a call takes, or elements it reads: a view reads none."""
    if name in _FREE:
        return 0
    lists = [a if isinstance(a, (list, tuple)) else [a] for a in args]
    tensors = [t for ts in lists for t in ts if isinstance(t, Tensor)]
    if name == "einsum":
        letters = str(args[0]).split("->")[0].split(",")
        sizes = {c: s for t, dims in zip(tensors, letters, strict=True) for c, s in zip(dims.strip(), t.shape, strict=False)}
        return math.prod(sizes.values())
    if name not in names.CONTRACTION or name == "embedding" or len(tensors) < 2:
        return sum(t.numel() for t in tensors)
    rows, matrix = tensors[-2:] if name in ("addmm", "baddbmm") else tensors[:2]
    return rows.numel() * math.prod(matrix.shape[-2:]) // max(1, rows.shape[-1])


def _cast(n: fx.Node, x: Tensor) -> Tensor:
    """A cast between floats of 16 bits and more changes nothing here, any other one what it changes."""
    dtype = n.meta["val"].dtype
    if not dtype.is_floating_point:
        return x.to(dtype)
    rounds = dtype.itemsize < 2 and x.is_floating_point()
    return x.to(dtype).to(torch.float64) if rounds else x.to(torch.float64)


def _grouped_mm(x: Tensor, w: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    assert offs is not None and bias is None
    out = x.new_zeros(x.shape[0], w.shape[-1])
    start = 0
    for e, end in enumerate(offs.tolist()):
        out[start:end] = x[start:end] @ w[e]
        start = end
    return out


@contextmanager
def one_thread() -> Iterator[None]:
    """Probes are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
