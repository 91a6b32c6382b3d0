"""How a function is recorded and tried: with its ids and routing weights as arguments, or with the router inside."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir import Rejection
from .bench import Bench, BlockBench, DispatchBench, NoExperts, Unrolls, lies_flat, number_of_experts, primes
from .call import Call, Roles
from .fewer import MANY, Fewer, pattern
from .flags import blocks, chooses, reached, scored
from .looks import branches_on_rows, effect, has_loop, line_of_effect, loops
from .places import Place
from .probe import candidates
from .program import is_same
from .record import record_symbolically
from .rewrites import cast_stacks, fold_masks, split_stacks
from .rows import Calls

_MANY, _WORK = 2048, 1 << 30
_HEAVY = 1 << 26  # elements
_FEW = 3  # tokens on which large experts are tried in float32; all of those experts are in their own types
UNROLLED = 16  # experts beyond which a loop that Dynamo can unroll is read all the same
_LONG = 1000  # calls of torch, which a loop over few experts does not make
DRAWS = 4  # tries to choose every expert
SCORED = "no top-k chooses experts here: scores are compared with a number, and what came of it is read back into Python"
_WHOLE = {"random", "effects", "values"}  # refusals that what stands in front of a loop, in the same function, may be the cause of
APART = "; where that is in front of the loop, give the loop a function of its own, of tokens, ids and weights"


class _Reader:
    """`all`: the number of experts, `experts`: how many of them are recorded (0: as many as there are), on the bench `table`.

    lead: the token counts of the recording, as primes that divide no other size; known: every other size and number around.
    sharp: the bench in float32, own: that in the call's types; small: float32, all experts, and narrow where the recording is.
    spare: Dynamo can do without the reading. partial: no example was found that reaches every expert.
    """

    all: int
    experts: int
    fewer: Fewer | None = None
    spare = partial = False
    reads: set[Place]
    widths: tuple[tuple[int, int], ...]
    lead: list[int]
    known: set[int]
    sharp: Any
    own: Any
    small: Any
    table: Any
    _least: int

    def lay(self, fewer: Fewer | None) -> None:
        """The bench for the recording and how many tokens it takes."""
        raise NotImplementedError

    def cuts(self) -> Iterator[Fewer | None]:
        """The ways to record it, the cheapest first: few experts in place of many, narrow ones in place of wide ones, or as it is."""
        few = primes(self._least, self.known - {1})[0] if self.all > MANY else self.all
        weighted = self._weighted()
        for widths in dict.fromkeys((self.widths, ())):
            if weighted is not None:
                own = primes(5, self.known - {1})[0]
                every = primes(max(self._least, own + 2), self.known - {1})[0]
                yield Fewer(every, self.all, widths, (weighted, own))
            for count in dict.fromkeys((few, self.all)):
                yield Fewer(count, self.all, widths) if widths or count != self.all else None

    def _weighted(self) -> int | None:
        """How many experts have weights, where stacks or lists of many experts are shorter than all are."""
        found = {w.shape[0] for w in self.sharp.weights() if w.ndim > 2} | {len(m) for m in self.sharp.lists()}
        return max((n for n in found if MANY < n < self.all and n not in dict(self.widths)), default=None)

    def heavy(self) -> bool:
        """Whether all experts, as wide as they are, take more than a moment."""
        return sum(w.numel() for w in self.sharp.weights()) > _HEAVY

    def _benches(self, fewer: Fewer | None, **kw: Any) -> None:
        self.fewer = fewer
        self.table = self.own if fewer is None else self.sharp.again(fewer=fewer, **kw)
        self.table.share(self.reads)
        self.small = self.sharp.again(dtype=torch.float32, fewer=self.whole(), **kw) if self.whole() else self.sharp
        self.small.share(self.reads)

    def whole(self) -> Fewer | None:
        """All experts, narrow where the recording is."""
        return Fewer(self.all, self.all, self.fewer.widths) if self.fewer is not None and self.fewer.widths else None

    def counts_rows(self, size: int) -> bool:
        """Whether a dim of this size, in the recording, counts rows: those of all tokens, or of some."""
        return size not in self.known or any(size % p == 0 for p in self.lead if size)


class Dispatch(_Reader):
    """Recording and trials of a function of tokens, ids and routing weights."""

    def __init__(self, call: Call, roles: Roles, reads: set[Place]) -> None:
        self.call, self.reads, self.ids, self._least = call, reads, roles.ids, max(11, roles.k + 3)
        self.sharp = DispatchBench(call, roles, torch.float32)
        self.sharp.share(reads)
        self.widths = self.sharp.narrow()
        self.all = self._count()
        self.own = self.sharp.again()
        self.own.share(reads)
        self.lay(None)

    def _count(self) -> int:
        # how many there are may be how many groups a width has: of those stacks are told by where it stands
        known = {w.shape[0] for w in self.sharp.weights() if w.ndim > 2} & {wide for wide, _ in self.widths}
        if self.widths and len(known) < 2:
            count = max(known, default=0)
            narrow = self.sharp.again(dtype=torch.float32, fewer=Fewer(count, count, self.widths))
            narrow.share(self.reads)
            with contextlib.suppress(Rejection):
                return number_of_experts(narrow)
        return number_of_experts(self.sharp)

    def lay(self, fewer: Fewer | None) -> None:
        r = self.sharp.roles
        self.experts = self.all if fewer is None else fewer.few
        self._benches(fewer)
        self.known = self.own.sizes() | self.table.sizes() | {self.experts, self.experts + 1, self.all, self.all + 1, r.k, 1}
        # more tokens than experts: then no expert's number is a token count
        least = max(17, self.experts + 1, -(-2 * self.experts // r.k))
        self.lead = primes(least, self.known - {1}, len(self.call.tensors[r.tokens].shape) - 1)
        self.primes = {p: f"{r.tokens}.shape[{d}]" for d, p in enumerate(self.lead)}
        # ids and weights may come flattened; the recording has them as [T, k], from where the function's own shape is a view
        flat = [n for n in (r.ids, r.weights) if self.call.tensors[n].shape[1:] != (r.k,)]
        self.reshaped = {n: f"reshape(-1, {r.k})" for n in flat}

    def record(self) -> fx.GraphModule:
        b, tokens, k = self.table, math.prod(self.lead), self.sharp.roles.k
        routings = [b.arguments(b.routing(tokens, range(self.experts)), self.lead) for _ in range(2)]
        given = [{n: v.reshape(-1, k) if n in self.reshaped else v for n, v in a.items()} for a in routings]
        shapes = {n: routings[0][n].shape for n in self.reshaped}

        def fn(*module: Any, **tensors: Tensor) -> Any:
            return b.call_user({n: v.reshape(shapes[n]) if n in shapes else v for n, v in tensors.items()})

        gm = record_symbolically(fn, given, b.probe, self.call.grad, self.counts_rows)
        fold_masks(gm, self.experts)
        cast_stacks(gm)
        split_stacks(gm)
        gm.meta["roles"] = b.roles._asdict()
        return gm

    def follow(self) -> None:
        """Raise `Rejection` if what the function does may hang on how many rows there are."""
        b = self.sharp.again(dtype=self.table.dtype, listening=True, fewer=self.fewer)
        few = primes(4 * max(17, 2 * self.experts), self.known - {1}, len(self.lead))
        leads = [few, primes(2 * few[-1], self.known - {1} | set(few), len(few))]
        some, others = (b.arguments(b.uneven(math.prod(lead), self.experts), lead) for lead in leads)
        b.follow(some, others, [(math.prod(leads[0]), math.prod(leads[1])), *zip(*leads, strict=True)])

    def trials(self, b: DispatchBench) -> Iterator[tuple[str, dict[str, Any]]]:
        """Routings that the recording never saw, with as few tokens as they need."""
        n, k = self.all, b.roles.k
        yield "other tokens", self.usual(b)
        yield "few experts", b.arguments(b.routing(11, range(min(n, max(k, 3)))), masked=True)
        yield "only the first experts", b.arguments(b.routing(5, range(k)))
        yield "only the last experts", b.arguments(b.routing(6, range(n - k, n)))
        yield "one token", b.arguments(b.routing(1, range(n)))
        many = _affordable(b, k)
        if many > self.lead[-1]:  # an expert may have room for so many tokens and no more
            yield "many tokens", b.arguments(b.routing(many, range(k)))

    def optional(self, b: DispatchBench) -> Iterator[tuple[str, dict[str, Any]]]:
        """Routings that the function may refuse."""
        ids = b.routing(7, range(self.all))
        ids[::2, 0] = self.all
        yield "an id beyond the last expert", b.arguments(ids)

    def spot(self, b: DispatchBench) -> dict[str, Any]:
        """Few tokens, for the first experts and the last."""
        n, ends = self.all, -(-b.roles.k // 2) + 1
        return b.arguments(b.routing(2, sorted({*range(min(ends, n)), *range(max(n - ends, 0), n)})))

    def same_program(self) -> bool:
        """Whether every expert, narrow, runs the operations that it runs at its real width."""
        whole, b = self.whole(), self.sharp
        ids = b.routing(-(-self.all // b.roles.k) + 2, range(self.all))
        return whole is not None and is_same(self.small, b, (self.small.arguments(ids), b.arguments(ids)), whole)

    def twice(self, b: DispatchBench) -> dict[str, Any] | None:
        """Some tokens have an expert twice: both their weights may count, or one of them."""
        ids = b.routing(7, range(self.all))
        ids[::2, -1] = ids[::2, 0]
        return b.arguments(ids) if b.roles.k > 1 else None

    def usual(self, b: DispatchBench) -> dict[str, Any]:
        """Every expert is hit."""
        return b.arguments(b.routing(-(-self.all // b.roles.k) + 2, range(self.all)))


class Block(_Reader):
    """Recording and trials of a function of tokens alone, which holds the router too."""

    reshaped: Mapping[str, str] = {}
    ids = ""

    def __init__(self, call: Call, reads: set[Place], draw: int = 0) -> None:
        self.call, self.reads, self.draw, self._least = call, reads, draw, 17
        self.sharp = BlockBench(call, torch.float32, seed=draw)
        self.sharp.share(reads)
        self.own = self.sharp.again(seed=draw)
        self.own.share(reads)
        self.widths = self.sharp.narrow()
        found = candidates(call.module, lambda: (w for w in self.sharp.weights() if w.ndim > 2 or lies_flat(w)))
        stacks = {w.shape[0] for w in self.sharp.weights() if w.ndim > 2}  # which are no widths, whatever else is as long
        most = max((n for n in found if n in stacks or n not in dict(self.widths)), default=0)
        if most < 2:
            raise NoExperts("nothing tells how many experts there are", stage="read")
        self.all = most
        self.lay(None)

    def lay(self, fewer: Fewer | None) -> None:
        ((name, spec),) = self.call.tensors.items()
        rank, self.experts = len(spec.shape) - 1, fewer.few if fewer is not None and fewer.cuts else 0
        self._benches(fewer, seed=self.draw)
        # each of few experts is to get two tokens and more, also where a token has one expert only
        most = min(self.experts or self.all, 512)
        self.known = self.own.sizes() | self.table.sizes() | {most, most + 1, self.all + 1, 1}
        usual = max(4 * most, min(16 * most, 256 if self._cheap(256) else 128))
        self.lead = primes(max(most + 1, -(-usual // 5 ** (rank - 1))), self.known - {1}, rank)
        if loops(self.call.fn.__code__) > 1 and self._one_by_one():
            self.lead = primes(most + 1, self.known - {1}, rank)
        self.primes = {p: f"{name}.shape[{d}]" for d, p in enumerate(self.lead)}

    def _one_by_one(self) -> bool:
        """Whether twice the tokens take nearly twice the calls: it goes over them one by one, which few of them tell too."""
        calls = Calls(), Calls()
        for lead, counted in zip((self.lead, [*self.lead[:-1], self.lead[-1] // 2]), calls, strict=True):
            with contextlib.suppress(Exception):
                self.small.run(self.small.arguments(lead), listener=counted)
        return calls[0].count > max(_LONG, 1.6 * calls[1].count)

    def record(self) -> fx.GraphModule:
        try:
            given = [self.table.arguments(self.lead) for _ in range(2)]
            gm = record_symbolically(self._run, given, self.table.probe, self.call.grad, self.counts_rows)
        except Rejection as r:  # any function with a loop may come here: what cannot be read need not be about experts
            fn = self.call.fn
            if not chooses(fn.__code__, fn.__globals__, [self.call.module], inside=False):
                if r.stage == "values" and scored(fn.__code__):
                    raise Rejection(f"{r.reason}; {SCORED}", None, "find", r.source, code="values") from r
                raise NoExperts(r.reason, stage="read") from r
            advice = APART if r.stage in _WHOLE else ""
            own = effect(fn.__code__) if r.stage == "effects" else ""
            at = f"{fn.__code__.co_filename}:{line_of_effect(fn.__code__)}" if own else r.source
            raise Rejection(own or r.reason + advice, None, r.stage, at, code=r.code, part=r.part) from r.__cause__
        picked = (t for pick in _picks(gm) for t in pytree.tree_leaves(pick.meta["val"]))
        if _leaves_out(gm, self.table.probe.tensors) or any(0 in t.shape for t in picked):
            if self.draw < DRAWS - 1:
                raise Rejection("its probes choose some experts only", stage="draw")
            self.partial = True
        self.spare = self.call.fn.__code__ not in blocks() and not gm.meta["host_reads"] and not self._counts_rows(gm)
        if self.spare and not self._is_long(gm):
            raise Unrolls("nothing in its control flow depends on data", stage="read")
        cast_stacks(gm)
        split_stacks(gm)
        return gm

    def _run(self, *module: Any, **tensors: Tensor) -> Any:
        return self.table.call_user(tensors)

    def _is_long(self, gm: fx.GraphModule) -> bool:
        """Whether rows are picked for each of many experts, whatever they are: Dynamo unrolls such a loop, at a high price for each."""
        return self.all > UNROLLED and len(_picks(gm)) >= (self.experts or self.all)

    def _counts_rows(self, gm: fx.GraphModule) -> bool:
        """Whether the code asks how many rows an expert got (`if token.numel() > 0`), which no operation tells; its experts may ask too."""
        code = self.call.fn.__code__
        inside = reached(code, self.call.fn.__globals__, [self.call.module])
        return bool(_picks(gm)) and (not has_loop(code) or any(map(branches_on_rows, inside)))

    def follow(self) -> None:
        b = self.sharp.again(dtype=self.table.dtype, listening=True, seed=self.draw, fewer=self.fewer)
        leads = [self.lead, primes(2 * self.lead[-1], self.known - {1} | set(self.lead), len(self.lead))]
        for draw in range(DRAWS):
            try:
                some, others = (b.arguments(lead) for lead in leads)
                return b.follow(some, others, [(math.prod(leads[0]), math.prod(leads[1])), *zip(*leads, strict=True)])
            except Rejection as r:
                if r.stage != "draw" or draw == DRAWS - 1:
                    raise

    def trials(self, b: BlockBench) -> Iterator[tuple[str, dict[str, Any]]]:
        *first, last = self.lead
        last = last if self._cheap(math.prod(self.lead)) else _FEW
        yield "other tokens", b.arguments([*(p + 1 for p in first), last + 1])
        yield "few experts", b.arguments([*first, last], alike=True)
        yield "one token", b.arguments([1] * len(self.lead))
        many = _affordable(b, 8)
        if many > self.lead[-1]:
            yield "many tokens", b.arguments([*(1 for _ in first), many], alike=True)

    def optional(self, b: BlockBench) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from ()

    def spot(self, b: BlockBench) -> dict[str, Any]:
        return b.arguments([*(1 for _ in self.lead[1:]), 2])

    def same_program(self) -> bool:
        return False  # which experts it runs is in its floats

    def twice(self, b: BlockBench) -> dict[str, Any] | None:
        return None

    def usual(self, b: BlockBench) -> dict[str, Any]:
        return b.arguments(self.lead)

    def _cheap(self, tokens: int) -> bool:
        """Whether so many tokens are worked on in a moment."""
        return _affordable(self.small, 8) >= tokens


def _picks(gm: fx.GraphModule) -> list[fx.Node]:
    """Operations whose results have as many rows as the data wants."""
    return [n for n in gm.graph.nodes if torch.Tag.dynamic_output_shape in getattr(n.target, "tags", ())]


def _leaves_out(gm: fx.GraphModule, tensors: Mapping[str, Tensor]) -> bool:
    """Whether some experts were chosen and others not: of parameters alike but for a number in their path, or of those in a stack."""
    read = {n.meta["param_path"]: n for n in gm.graph.nodes if "param_path" in n.meta}
    alike: dict[str, set[bool]] = {}
    for path in tensors:
        alike.setdefault(pattern(path), set()).add(path in read)
    chosen = [{u.args[2] for u in n.users if u.target is torch.ops.aten.select.int and u.args[1] == 0} for n in read.values()]
    return any(len(a) > 1 for a in alike.values()) or any(
        0 < len(c) < tensors[p].shape[0] for p, c in zip(read, chosen, strict=True) if tensors[p].ndim > 2
    )


def _affordable(bench: Bench, k: int) -> int:
    """Tokens that k experts each can work on in a moment, at most 2048: multiplications count."""
    work = sum(w.numel() // (w.shape[0] if w.ndim > 2 else 1) for w in bench.weights() if w.ndim > 1)
    return min(_MANY, _WORK // max(1, k * work))
