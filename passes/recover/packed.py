"""Codes that are packed into words, and what they stand for: read by running the operations on words and looking at every code.

A node is made of one tensor of words (`Leaf`) where nothing else than constants goes into it. The pass stops at such nodes: what an element
of theirs is needs no term, it is found out.
"""

from __future__ import annotations


from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from ..aten import names
from ..aten.names import op_name

_WORDS = (torch.uint8, torch.int32, torch.int8)
_BITS = frozenset(
    "bitwise_and __and__ bitwise_or __or__ bitwise_xor bitwise_right_shift __rshift__ bitwise_left_shift __lshift__".split()
)
_POINTWISE = frozenset("add sub rsub mul div neg ldexp exp2 pow eq ne lt le gt ge where floor_divide remainder".split())
_MADE_OF_WORDS = names.VIEW | names.CAST | names.JOIN | names.LOOKUP | frozenset({"index_select", "getitem"}) | _BITS | _POINTWISE
_TABLES = (16, 256)
_MOST = 1 << 25  # elements of a node that is looked at


def cuts(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Nodes made of packed words alone that something else is made of, with the tensor of the words."""
    leaf: dict[fx.Node, fx.Node] = {}
    fixed: set[fx.Node] = set()
    packed: set[fx.Node] = set()
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr"):
            v = n.meta.get("val")
            if isinstance(v, Tensor) and v.dtype in _WORDS and v.ndim > 1:
                leaf[n] = n
            elif n.op == "get_attr" or isinstance(v, Tensor) and v.ndim == 1 and v.is_floating_point() and v.shape[0] in _TABLES:
                fixed.add(n)
        elif n.op == "call_function" and all(x in leaf or x in fixed for x in n.all_input_nodes):
            of = {leaf[x] for x in n.all_input_nodes if x in leaf}
            if not of and (n.all_input_nodes or op_name(n) in names.CREATION):
                fixed.add(n)
            elif len(of) == 1 and op_name(n) in _MADE_OF_WORDS:
                (leaf[n],) = of
                if _unpacks(n, leaf) or any(x in packed for x in n.all_input_nodes):
                    packed.add(n)
    return {n: leaf[n] for n in packed if isinstance(n.meta.get("val"), Tensor) and any(u not in leaf for u in n.users)}


def _unpacks(n: fx.Node, leaf: dict[fx.Node, fx.Node]) -> bool:
    """Whether an operation reads something else than whole numbers off words: bits, a table, another type's bits; arithmetic on bytes."""
    name, words = op_name(n), leaf[n].meta["val"].dtype
    if name in _BITS or name in ("index", "embedding", "index_select", "gather") and any(x in leaf for x in n.all_input_nodes[1:]):
        return True
    if name == "view" and isinstance(n.args[1], torch.dtype):
        return True
    return name in _POINTWISE and words is torch.uint8


@dataclass(frozen=True)
class Reading:
    """What a node made of words is: value(code) at every place of a matrix [rows, columns] of codes.

    `leaf`: its words, those of matrix `expert` where they are a stack. axis: along which a word's codes lie, 1 for rows, 2 for columns, 0
    where a word is one code. order: the place, in its word, of each of its codes. values: of each code. table: the node they come from.
    """

    leaf: fx.Node
    shape: tuple[int, int]
    axis: int
    order: tuple[int, ...]
    values: tuple[float, ...]
    table: fx.Node | None = None

    @property
    def bits(self) -> int:
        return len(self.values).bit_length() - 1


def read(n: fx.Node, leaf: fx.Node, expert: int | None, experts: int) -> Reading | None:
    """The reading of a node, which holds one matrix (that of `expert` where the leaf is a stack) or with `expert` None a stack of them.

    None where it is no such thing, or too large to look at.
    """
    v, words = n.meta["val"], leaf.meta["val"]
    stacked = words.shape[0] == experts and words.ndim > 2
    if v.numel() > _MOST or v.numel() % (experts if expert is None else 1) or not all(isinstance(s, int) for s in (*v.shape, *words.shape)):
        return None
    given = _words(tuple(words.shape), words.dtype)
    tables = [x for x in _made_of(n) if x.op == "placeholder" and x is not leaf]
    values = {leaf: given, **{t: torch.randperm(t.meta["val"].shape[0], generator=_generator()).double() + 0.5 for t in tables}}
    out = _run(n, values)
    at = expert if stacked and expert is not None else 0
    matrix = (given[at] if stacked else given).flatten(1)
    found = _looked_at(matrix, out[at] if stacked and expert is None else out)
    if found is None:
        return None
    axis, order, codes = found
    (rows, columns), per = matrix.shape, max(len(order), 1)
    shape = (rows * per if axis == 1 else rows, columns * per if axis == 2 else columns)
    table = next((t for t in tables if tuple(values[t].tolist()) == codes), None)
    return None if tables and table is None else Reading(leaf, shape, axis, order, codes, table)


def _looked_at(words: Tensor, out: Tensor) -> tuple[int, tuple[int, ...], tuple[float, ...]] | None:
    """(axis, order, value of every code) where each element of `out` is a function of one code of a word in its own place."""
    rows, columns = words.shape
    per, rest = divmod(out.numel(), words.numel())
    width = 8 * words.dtype.itemsize
    if rest or per not in (1, 2, 4, 8) or width // per > 8:
        return None
    bits = width // per
    fields = [(words.long() >> (bits * p)) & ((1 << bits) - 1) for p in range(per)]
    for axis, seen in ((2, out.reshape(rows, columns, per).unbind(-1)), (1, out.reshape(rows, per, columns).unbind(1))):
        found = [_function(fields, part) for part in seen]
        if None not in found and len({f[1] for f in found if f is not None}) == 1:
            order = tuple(f[0] for f in found if f is not None)
            if sorted(order) == list(range(per)):
                return (0, (), found[0][1]) if per == 1 else (axis, order, found[0][1])  # type: ignore[index]
    return None


def _function(fields: list[Tensor], out: Tensor) -> tuple[int, tuple[float, ...]] | None:
    """(place, value of every code): which of the codes an element is a function of. Every code occurs."""
    for place, codes in enumerate(fields):
        size = 256 if len(fields) == 1 else 1 << (8 * 4 // len(fields) if len(fields) == 8 else 8 // len(fields))
        table = torch.zeros(size, dtype=torch.float64)
        table[codes.flatten()] = out.double().flatten()
        if torch.equal(table[codes].nan_to_num(nan=1e300), out.double().nan_to_num(nan=1e300)) and len(codes.unique()) == size:
            return place, tuple(table.tolist())
    return None


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _words(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random words, all their bits; the matrices of a stack start a few words apart in one buffer."""
    lead = shape[0] if len(shape) > 2 else 0
    rest = shape[1:] if lead else shape
    numel = 1
    for s in rest:
        numel *= s
    info = torch.iinfo(dtype)
    flat = torch.randint(info.min, info.max + 1, (numel + 7 * lead,), generator=_generator()).to(dtype)
    strides = torch.empty(rest, device="meta").stride()
    return flat.as_strided(shape, (7, *strides)) if lead else flat.reshape(shape)


def _made_of(n: fx.Node) -> list[fx.Node]:
    """What a node is computed from, itself included, in no order."""
    found = [n]
    for x in found:
        found.extend(y for y in x.all_input_nodes if y not in found)
    return found


def _run(n: fx.Node, values: dict[fx.Node, Any]) -> Tensor:
    """A node's value, computed with the types that the graph has."""
    env: dict[fx.Node, Any] = dict(values)

    def load(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return env[a]
        if isinstance(a, (list, tuple)):
            return type(a)(load(x) for x in a)
        return torch.device("cpu") if isinstance(a, torch.device) else a

    needed = set(_made_of(n))
    for x in n.graph.nodes:
        if x in needed and x not in env:
            if x.op == "get_attr":
                env[x] = getattr(x.graph.owning_module, str(x.target))
            else:
                env[x] = x.target(*load(x.args), **{k: load(a) for k, a in x.kwargs.items()})  # type: ignore[operator]
        if x is n:
            break
    out: Tensor = env[n]
    return out
