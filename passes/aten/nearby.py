"""Which nodes of Dynamo's graph are near a selection: those are read, the rest (attention, the head, other layers' norms) is not.

Around each selection s the graph is cut twice. Above: at the tokens that the router's product reads, and what few operations make of
the residual stream for it. Below: at the residual sum h + y, where h is what the tokens were made of, or the stream weighed or mixed
anew (a·h + b·y, C·h + b·y), and y what came of s; how h was made is not read. A cut is only made where no rows of features pass it by;
without one all that follows is read, as written. Nothing is read behind a selection among the tokens themselves (keys in attention).
What stands under a transform of torch.func is read as a whole or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.fx as fx
from torch._C._functorch import is_functorch_wrapped_tensor

from ...calls import is_write
from . import names
from .effects import change_of_level, has_effect, is_transform, storage_of, targets_of
from .names import op_name, through
from .node import example_value

_SUMS = 8  # residual sums tried below one selection
_SAME = names.VIEW | names.CAST | names.MOVE | names.CREATION | {"stack"}
_FAR = names.CONTRACTION | {"scaled_dot_product_attention"}


def nodes_near(graph: fx.Graph, selections: Iterable[fx.Node], routers: Iterable[fx.Node]) -> set[fx.Node] | None:
    """The nodes to be read; None: all of them, for who depends on whom is not to be told from the graph, or nothing would be left out.

    `routers`: products that may weigh experts without a selection; they count where products for as many experts stand beside them.
    """
    whole = _transformed(graph)
    if whole is None or any(is_write(n) and any(storage_of(t) is None for t in targets_of(n)) for n in graph.nodes):
        return None
    flow = _Flow(graph, whole)
    near = 0
    for s in (*selections, *filter(flow.has_beside, routers)):
        near |= flow.around(s)
    read = flow.closed(flow.of(near))
    return read if len(read) < len(flow.nodes) else None


class _Flow:
    """Who depends on whom, through memory that is written too. Sets of nodes are numbers with a bit for each node.

    `above[i]`, `below[i]`: all that node i depends on, all that depends on it.
    """

    def __init__(self, graph: fx.Graph, whole: dict[fx.Node, list[fx.Node]]) -> None:
        self.whole = whole
        self.nodes = list(graph.nodes)
        self.at = {n: i for i, n in enumerate(self.nodes)}
        self.storage = {n: storage_of(n) for n in self.nodes}
        self.written = {storage_of(t) for n in self.nodes if is_write(n) for t in targets_of(n)}
        self.inputs = [[self.at[x] for x in found] for found in self._inputs()]
        self.above = [0] * len(self.nodes)
        for i, found in enumerate(self.inputs):
            for x in found:
                self.above[i] |= self.above[x] | 1 << x
        self.readers: list[list[int]] = [[] for _ in self.nodes]
        self.below = [0] * len(self.nodes)
        for i in reversed(range(len(self.nodes))):
            mine = self.below[i] | 1 << i
            for x in self.inputs[i]:
                self.below[x] |= mine
                self.readers[x].append(i)
        self.sums = [i for i, n in enumerate(self.nodes) if op_name(n) == "add" and len(self._tensors(i)) == 2]
        self.cuts = 0  # residual sums found so far

    def _inputs(self) -> Iterator[list[fx.Node]]:
        """What each node depends on: its arguments, and what has been written into their memory so far."""
        wrote: dict[int | None, list[fx.Node]] = {s: [] for s in self.written}
        for n in self.nodes:
            yield [*n.all_input_nodes, *(w for x in n.all_input_nodes for w in wrote.get(self.storage[x], ()))]
            for t in targets_of(n) if is_write(n) else ():
                wrote[storage_of(t)] = [n]

    def of(self, mask: int) -> Iterator[fx.Node]:
        bits = bin(mask)[:1:-1]
        i = bits.find("1")
        while i >= 0:
            yield self.nodes[i]
            i = bits.find("1", i + 1)

    def _tensors(self, i: int) -> list[int]:
        return [self.at[x] for x in self.nodes[i].all_input_nodes if isinstance(example_value(x), torch.Tensor)]

    def around(self, selection: fx.Node) -> int:
        """What is read around one selection."""
        s = self.at[selection]
        scores, tokens = self._scores(s)
        if self._is_among_tokens(s, scores):
            return scores | sum(1 << x for x in self.readers[s])
        upper = scores | self._residual(tokens)
        beyond = 0
        for n in self.of(upper):
            beyond |= self.above[self.at[n]]
        beyond &= ~upper
        end = self._end(s, tokens)
        inside = self.below[s] | 1 << s
        if end is not None:
            self.cuts |= 1 << end
            inside &= ~self.below[end]
        for i in map(self.at.__getitem__, self.of(inside)):
            upper |= self.above[i] if i != end else 0
        return (upper | inside) & ~beyond

    def _is_among_tokens(self, s: int, scores: int) -> bool:
        """Whether tokens are selected by tokens, as keys in attention are: the sides of the product are made of something in common.

        So may be those of a router's (a projection, a scale); but as many experts as it has columns stand below.
        """
        products = [self.at[n] for n in self.of(scores) if op_name(n) in _FAR]
        return bool(products) and all(self._is_of_itself(i) and not self._chooses_of_stack(s, i) for i in products)

    def _chooses_of_stack(self, s: int, i: int) -> bool:
        """Whether a product below the selection reads a stack that is as long as the product i is wide, or high."""
        v = example_value(self.nodes[i])
        counts = [d for d in v.shape[-2:] if isinstance(d, int)] if isinstance(v, torch.Tensor) else []
        return any(self.below[s] & self.of_stacks.get(d, 0) for d in counts)

    @functools.cached_property
    def of_stacks(self) -> dict[int, int]:
        """The products that read a stack of a length."""
        found: dict[int, int] = {}
        for n in self.of(self.products):
            for d in _stacks(n):
                found[d] = found.get(d, 0) | 1 << self.at[n]
        return found

    @functools.cached_property
    def products(self) -> int:
        return sum(1 << i for i, n in enumerate(self.nodes) if op_name(n) in names.CONTRACTION)

    def _is_of_itself(self, i: int) -> bool:
        """Whether both sides of a product are made of one tensor of floats, and neither of parameters alone."""
        sides = [self.above[x] | 1 << x for x in self._tensors(i)]
        if len(sides) != 2 or any(map(self._is_of_parameters, sides)):
            return False
        return any(self._floats(self.at[n]) for n in self.of(sides[0] & sides[1]))

    def _is_of_parameters(self, side: int) -> bool:
        given = [n for n in self.of(side) if n.op in ("placeholder", "get_attr")]
        return all(isinstance(example_value(n), torch.nn.Parameter) for n in given)

    def has_beside(self, router: fx.Node) -> bool:
        """Whether what a product with a column for each expert reads goes into products for all experts as well.

        Not by way of it, unless as rows that are looked up by what came of it (experts above a threshold).
        """
        r = self.at[router]
        beside = 0
        for x in self._tensors(r):
            beside |= self.below[x]
        v = example_value(router)
        count = v.shape[-1] if isinstance(v, torch.Tensor) else 0
        looked_up = sum(1 << self.at[n] for n in self.of(self.below[r]) if self._looks_up(r, n))
        products = [n for n in self.of(beside & self.products) if not self._comes_of(r, n) or self.above[self.at[n]] & looked_up]
        return len(products) > count or any(count in _stacks(n) for n in products)

    def _comes_of(self, r: int, n: fx.Node) -> bool:
        return bool(self.below[r] >> self.at[n] & 1) or self.at[n] == r

    def _looks_up(self, r: int, n: fx.Node) -> bool:
        """Whether a node that depends on r picks rows of something that does not."""
        return op_name(n) in names.LOOKUP | {"getitem", "index"} and bool(n.all_input_nodes) and not self._comes_of(r, n.all_input_nodes[0])

    def _scores(self, s: int) -> tuple[int, list[int]]:
        """A selection's scores down from the products that make them, and what these products read, through views and casts."""
        seen, tokens = self._up([s], stops=_FAR)
        if not tokens and (first := self._weighed(s)) is not None:  # ids from a table: the scores are looked up at them
            more, tokens = self._up([first], stops=_FAR)
            seen |= more
        return seen, tokens

    def _weighed(self, s: int) -> int | None:
        """What the first operation after a selection reads that does not come from it: scores, or the tokens themselves."""
        for i in map(self.at.__getitem__, self.of(self.below[s])):
            for x in self.inputs[i]:
                if self._floats(x) and not (self.below[s] >> x & 1) and self.nodes[x].op == "call_function":
                    return x
        return None

    def _up(self, start: list[int], stops: frozenset[str]) -> tuple[int, list[int]]:
        """All that is above, as far as the nearest products, and what these read."""
        seen, read, waiting = 0, [], list(start)
        while waiting:
            i = waiting.pop()
            if seen >> i & 1:
                continue
            seen |= 1 << i
            n = self.nodes[i]
            if op_name(n) in stops or "moe_compile" in str(n.target):
                read += self._tensors(i)
            elif not (self.cuts >> i & 1):
                waiting += self.inputs[i]
        return seen, read

    def _residual(self, tokens: list[int]) -> int:
        """From the tokens up to the sum that the residual stream is, over norms and the like."""
        seen, waiting = 0, list(tokens)
        while waiting:
            i = waiting.pop()
            if not (seen >> i & 1):
                seen |= 1 << i
                far = op_name(self.nodes[i]) in _FAR or self.cuts >> i & 1 or self._is_sum(i)
                waiting += () if far else self.inputs[i]
        return seen

    def _is_sum(self, i: int) -> bool:
        found = self._tensors(i)
        return op_name(self.nodes[i]) == "add" and len(found) == 2 and all(self._width(x) == self._width(i) for x in found)

    def _end(self, s: int, tokens: list[int]) -> int | None:
        """The first residual sum behind which nothing of the selection is left to be added."""
        stream = 0
        for x in tokens:
            stream |= self.above[x] | 1 << x
        widths = {self._width(x) for x in tokens} - {None}
        for is_of in (self._is_of, self._is_made_of):
            found = (i for i in self.sums if i > s and self.below[s] >> i & 1 and self._adds(i, s, stream, is_of))
            for i, _ in zip(found, range(_SUMS), strict=False):
                if not self._passed_by(s, i, {self._width(i), *widths}):
                    return i
        return None

    def _adds(self, i: int, s: int, stream: int, is_of: Callable[[int, int, int], bool]) -> bool:
        """Whether one operand comes from the selection and the other is of the stream that the tokens were made of."""
        a, b = self._tensors(i)
        return any(self.below[s] >> y & 1 and self._width(h) == self._width(i) and is_of(h, s, stream) for h, y in ((a, b), (b, a)))

    def _is_of(self, h: int, s: int, stream: int) -> bool:
        return bool(stream >> h & 1)

    def _is_made_of(self, h: int, s: int, stream: int) -> bool:
        """Whether h is the stream, weighed or mixed anew: rows of it, through anything but a product with weights, nothing selected."""
        if self.below[s] >> h & 1 or not self.above[h] & stream:
            return False
        seen, waiting = 0, [h]
        while waiting:
            i = waiting.pop()
            if seen >> i & 1 or self.nodes[i].op in ("placeholder", "get_attr"):
                continue
            seen |= 1 << i
            if stream >> i & 1 and self._width(i) == self._width(h):
                return True
            waiting += () if self._weighs(i) else self.inputs[i]
        return False

    def _weighs(self, i: int) -> bool:
        """Whether a node is a product with given weights, or a call of who knows what."""
        name = op_name(self.nodes[i])
        return not name or name in names.CONTRACTION and any(map(_is_given, self.nodes[i].all_input_nodes))

    def _passed_by(self, s: int, end: int, widths: set[str | None]) -> bool:
        """Whether rows of features behind `end` are made of what the selection gave, but not by way of `end`."""
        behind = self.below[end]
        beside = self.of(self.below[s] & ~behind & ~self.above[end] & ~(1 << end))
        used = (u for n in beside for u in self.readers[self.at[n]])
        return any(behind >> u & 1 and self._width(u) in widths for u in used)

    def _width(self, i: int) -> str | None:
        v = example_value(self.nodes[i])
        return str(v.shape[-1]) if isinstance(v, torch.Tensor) and v.ndim > 1 else None

    def _floats(self, i: int) -> bool:
        v = example_value(self.nodes[i])
        return isinstance(v, torch.Tensor) and v.dtype.is_floating_point

    # ---- what has to be read with it ---------------------------------------------------------------------------------

    def closed(self, read: Iterable[fx.Node]) -> set[fx.Node]:
        """With inputs, effects, all names of memory that is written, and what views, sizes and indices that are read are made of."""
        named = self._names_of_written()
        given = [n for n in self.nodes if n.op in ("placeholder", "get_attr")]
        alone = (n for n in self.nodes if has_effect(n) and not _reads_tensor(n) and n not in self.whole)
        out, waiting = set(given), [*read, *alone]
        while waiting:
            n = waiting.pop()
            if n in out or n.op == "output":
                continue
            out.add(n)
            waiting += (*filter(_is_read_through, n.all_input_nodes), *self.whole.get(n, ()))
            for x in (n, *n.all_input_nodes):
                waiting += named.pop(self.storage[x], ())
        return out

    def _names_of_written(self) -> dict[int | None, list[fx.Node]]:
        named: dict[int | None, list[fx.Node]] = {s: [] for s in self.written}
        for n in self.nodes:
            for s in {self.storage[n], *(storage_of(t) for t in targets_of(n) if is_write(n))}:
                if s in named:
                    named[s].append(n)
        return named


def _transformed(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]] | None:
    """All that stands under one transform of torch.func, at each node of it; None where that cannot be told from the graph."""
    whole: dict[fx.Node, list[fx.Node]] = {}
    level, part = 0, list[fx.Node]()
    for n in graph.nodes:
        level += change_of_level(n)
        if level < 0 or not part and is_transform(n) and level == 0:
            return None
        if level or part:
            part.append(n)
            whole[n] = part
        if level == 0:
            part = []
    wrapped = (n for n in whole if isinstance(v := example_value(n), torch.Tensor) and is_functorch_wrapped_tensor(v))
    return None if level or any(u not in whole for n in wrapped for u in n.users) else whole


def _stacks(n: fx.Node) -> set[int]:
    """How many matrices the given stacks hold that a product reads, in one view or another."""
    seen, found = list(n.all_input_nodes), set[int]()
    for x in seen:
        v = example_value(x)
        if x.op in ("placeholder", "get_attr") and isinstance(v, torch.Tensor) and v.ndim == 3 and isinstance(v.shape[0], int):
            found.add(v.shape[0])
        if op_name(x) in names.VIEW | names.CAST | names.LOOKUP | {"getitem"}:
            seen += (y for y in x.all_input_nodes if y not in seen)
    return found


def _is_given(n: fx.Node) -> bool:
    """Whether a node is an input of the graph, in one view or another."""
    return through(n, names.VIEW | names.CAST).op in ("placeholder", "get_attr")


def _is_read_through(n: fx.Node) -> bool:
    v = example_value(n)
    return not isinstance(v, torch.Tensor) or not v.dtype.is_floating_point or op_name(n) in _SAME or op_name(n) == "getitem"


def _reads_tensor(n: fx.Node) -> bool:
    return any(isinstance(example_value(x), torch.Tensor) for x in n.all_input_nodes)
