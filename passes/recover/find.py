"""Find: walk the shadow once and try to read experts at every node that could be their combined result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from ...ir import Rejection
from .. import terms as T
from ..aten import names
from ..aten.definitions_gather import accumulated_value
from ..aten.definitions_views import TUPLES
from ..aten.effects import Memory
from ..aten.element import NO_RULE, RULES, Puller, call_args, shape_of
from ..aten.names import op_name
from ..aten.node import reached
from ..aten.shadow import CUT
from ..terms.budget import BUDGET
from .counted import kth_best, named, only_counted
from .dense import DenseReader
from .doubled import scales_of_codes
from .experts import BESIDE, match_experts
from .fused import is_fused, read_fused, with_identity
from .given_ids import given_ids, is_last, rows_in_order
from .match import ExpertsMatch, outermost
from .merged import merged_pairs
from .mixture import mixtures, one_by_one, soft_mixtures
from .odd import COMBINED, between, combined_otherwise
from .rounded_nodes import rounded_nodes
from .rows import NO_EXPERTS, WORDS
from .scales import made_floats, says_groups
from .selections import choices, is_id_input, is_joined, is_selection, is_table, is_zero, unviewed, users_through_views
from .static_rows import is_own_number
from .successive import successive
from .writes import feeds_by_writes, first_write, harmless

FIND = "find"
LEAVES = "left graph"  # code of a selection whose experts, if there are any, are not in the graph
# What may be spent on the experts of one selection, in steps of a few microseconds; loops over experts take up to 450 a node
_BESIDE = 4  # how far back a sum is tried that goes on behind its experts
STEPS, STEPS_A_NODE = 150_000, 400


@dataclass
class Findings:
    matches: list[tuple[ExpertsMatch, Puller]] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


class Finder:
    """Labels say which selection (top-k) a node's value depends on, the latest one counting.

    Nodes with the label at hand are looked into, others are the region's inputs. A matched result is labelled 0 again, so
    later layers do not see this one's: every node is visited once.
    """

    def __init__(self, graph: fx.Graph, walls: set[fx.Node], memory: Memory, id_inputs: bool = False) -> None:
        self.graph, self.walls, self.memory = graph, walls, memory
        self.order = memory.order
        self.opaque, readers = (set(), set()) if id_inputs else given_ids(graph, walls)
        codes = made_floats(graph)
        chosen = (n for n in graph.nodes if (is_id_input(n) if id_inputs else n in self.opaque or is_selection(n)))
        self.sources = [n for n in chosen if not says_groups(n, codes)]
        self.silent = self.opaque - readers  # numbers that are compared: of the experts, or for reasons of their own
        self.given = frozenset(self.sources if id_inputs else ())
        for n in self.sources:
            if is_joined(n) and n not in self.memory.stale and (most := choices(n)) is not None:
                T.facts().know(n, most)
        self.static = self._labels()
        self.live: dict[fx.Node, int] = {}
        self.within = Counter(self.static.values())  # how many nodes carry a label
        self.left: dict[int, int] = {}  # elements that may still be asked for around a selection, all attempts together
        self.steps: dict[int, T.Budget] = {}  # and the work on terms
        self.packed = any(WORDS in n.meta for n in codes)
        if codes:
            codes |= rounded_nodes(graph)
        self.opened = codes | merged_pairs(graph)  # weights that are looked into for what they are made of
        fewer = self.opened - scales_of_codes(graph, codes)
        self.fallbacks = [set(s) for s in dict.fromkeys(map(frozenset, (fewer, codes, ()))) if s != self.opened]
        self.in_order: frozenset[fx.Node] = frozenset()  # rows that are taken as they come, whatever put them in the order of their experts
        self.fused: dict[fx.Node, ExpertsMatch] = {}  # calls of the fused op that were read

    def _labels(self) -> dict[fx.Node, int]:
        number = {n: i + 1 for i, n in enumerate(self.sources)}
        out: dict[fx.Node, int] = {}
        for n in self.graph.nodes:
            label = max((out[x] for x in n.all_input_nodes), default=0)
            out[n] = number.get(n) or (0 if self._embeds(n, label) else label)
        return out

    def _embeds(self, n: fx.Node, label: int) -> bool:
        """Whether n is what a table holds for numbers that experts are compared with: a part of the tokens, as of words that are hashed."""
        return label > 0 and op_name(n) == "embedding" and self.sources[label - 1] in self.silent

    def run(self) -> Findings:
        number = {n: i + 1 for i, n in enumerate(self.sources)}
        found = Findings()
        tried: dict[int, list[Rejection]] = {}
        closed: set[int] = set()  # selections that feed another one
        matched: set[int] = set()  # selections whose experts were found; there may be more of them
        for n in self.graph.nodes:
            label = max((self.live[x] for x in n.all_input_nodes), default=0)
            unknown = n.op == "call_function" and not is_fused(n) and op_name(n) not in RULES and op_name(n) not in TUPLES
            if n in number:
                closed.add(label)  # a selection that feeds another one is a part of it
                label = number[n]
            elif label and (unknown or self._embeds(n, label)):
                label = 0
            self.live[n] = label
            ready = is_fused(n) and n not in self.walls  # in a checkpointed body: taken there
            if label and self._is_spent(label):
                continue
            if ready or label and label not in closed and self._is_candidate(n, label):
                for x, out in self._attempts(n, label):
                    if isinstance(out, Rejection):
                        tried.setdefault(label, []).append(out)
                        continue
                    found.matches.append(out)
                    self.live[x] = 0
                    matched.add(label)
        found.matches = outermost(sorted(found.matches, key=lambda m: self.order[m[0].out]))
        for s, i in number.items():
            if i not in matched:
                found.rejected.extend(self._refused(s, i, tried.get(i, []), i in closed))
        found.rejected.extend((*mixtures(self.graph, self.walls, self.sources), *soft_mixtures(self.graph)))
        if not found.matches and not found.rejected:
            found.rejected.extend((*kth_best(self.graph), *one_by_one(self.graph)))
        return found

    def _attempts(self, n: fx.Node, label: int) -> Iterator[tuple[fx.Node, tuple[ExpertsMatch, Puller] | Rejection]]:
        """What comes of n, and, where it is no block, of what n may have added to one."""
        out = self.attempt(n, label)
        x, first = n, out
        for _ in range(_BESIDE):  # a sum that goes on behind its experts, with what other numbers of the router stand for
            before = x.args[0]
            if not isinstance(out, Rejection) or out.code != BESIDE or op_name(before) not in names.ACCUMULATE:  # type: ignore[arg-type]
                break
            x = before  # type: ignore[assignment]
            out = self.attempt(x, label)
        yield (n, first) if isinstance(out, Rejection) else (x, out)
        if isinstance(out, Rejection):
            yield from ((y, self.attempt(y, label)) for y in self._summands(n, label))

    def _refused(self, source: fx.Node, label: int, tried: list[Rejection], closed: bool) -> list[Rejection]:
        """What is told of a selection without experts; of numbers that may be no choice at all only where experts were seen."""
        if source in self.silent:
            return []
        if source in self.opaque:
            return [r for r in tried if r.code != NO_EXPERTS][-1:]
        if is_table(source):
            return [r for r in tried if r.stage == FIND][:1]
        closed = closed or feeds_by_writes(self.memory, source, self.sources)
        return [] if closed or only_counted(source, self.walls) else [self._worst(tried, source, label)]

    def _summands(self, n: fx.Node, label: int) -> list[fx.Node]:
        """What could be a result of its own: each of two blocks of one selection, added, or what a weight multiplies."""
        if op_name(n) == "mul":
            return self._weighed(n, label)
        if op_name(n) != "add":
            return []
        kinds = names.COMBINE | {"mul"} if _is_mixed(n) else names.COMBINE
        out = [x for x in n.args[:2] if isinstance(x, fx.Node) and self.live.get(x) == label and op_name(x) in kinds]
        return [x for x in out if op_name(x) != "add" and x.meta["val"].ndim >= 2]

    def _worst(self, tried: Iterable[Rejection], source: fx.Node, label: int) -> Rejection:
        """The most telling of the reasons: tokens are dropped, or one from a place where experts were seen."""
        if (by_name := named(source)) is not None:
            return by_name
        if (chain := successive(source)) is not None:
            return chain
        tried = list(tried)
        looked_for = None if tried else COMBINED  # a selection of keys in attention, with a norm or softmax behind it, is tried nowhere
        if (odd := between(source, self.walls, looked_for)) is not None:
            return odd
        for r in reversed(tried):
            if r.code != NO_EXPERTS:
                return Rejection(r.reason, r.node, r.stage, code=r.code)
        output = next(n for n in self.graph.nodes if n.op == "output")
        if any(self.live.get(n) == label and CUT not in n.meta for n in output.all_input_nodes):
            if not _read_back(source) and (otherwise := combined_otherwise(source, self.walls)) is not None:
                return otherwise
            return Rejection("the selected indices leave this graph before any expert is applied", source, "capture", code=LEAVES)
        seen = "are read back as numbers one by one: loop over the experts, and pick the rows of each with torch.where(ids == e)"
        why = seen if _read_back(source) else "choose no experts in this graph"
        return Rejection(f"selection found, no block: the selected indices {why}", source, FIND, code="no block")

    def _is_candidate(self, n: fx.Node, label: int) -> bool:
        in_order = self.sources[label - 1] in self.opaque and is_last(n)
        if op_name(n) not in names.COMBINE and not in_order and not self._weighed(n, label) or n in self.walls:
            return False
        v = n.meta.get("val")
        if not isinstance(v, torch.Tensor) or v.ndim < 2 or not v.dtype.is_floating_point:
            return False
        if any(n in self._weighed(u, label) for u in users_through_views(n)):
            return False
        return not any(self._continues(n, u, label) for u in n.users)

    def _weighed(self, n: fx.Node, label: int) -> list[fx.Node]:
        """What one weight a row, from the same selection, multiplies when all experts are done: out * p[:, None]."""
        if op_name(n) != "mul" or any(op_name(u) in names.COMBINE and op_name(u) != "add" for u in n.users):
            return []
        pairs = [(x, y) for x, y in (n.args[:2], n.args[1::-1]) if _is_tensor(x) and _is_tensor(y)]
        rows = [x for x, y in pairs if self.static[y] == label and shape_of(y)[1:][-1:] == (1,)]
        return [x for x in map(unviewed, rows) if op_name(x) in names.ACCUMULATE and self.live.get(x) == label]

    def _continues(self, n: fx.Node, u: fx.Node, label: int) -> bool:
        """Whether u goes on accumulating onto n."""
        name = op_name(u)
        if name in names.ACCUMULATE:
            return u.args[0] is n or name in names.PUT and call_args(u).values is n and accumulated_value(u) is not None
        if name == "add":
            others = [x for x in u.args[:2] if x is not n and isinstance(x, fx.Node)]
            return bool(others) and all(self.static[x] == label or is_zero(x) for x in others)
        return name == "index" and any(
            self._continues(n, w, label) for v in u.users for w in v.users if w is not u and w.args and w.args[0] is n
        )

    def _elements(self, label: int) -> int:
        """Elements that one attempt may ask for: what is read around a selection is linear in the nodes behind it."""
        return 4_000 + 16 * self.within[label]

    def spend(self, label: int) -> int:
        return self.left.setdefault(label, 2 * self._elements(label))

    def budget(self, label: int) -> T.Budget:
        """The work on terms that a selection may cause. A table may be no routing at all: less is spent on it."""
        steps = (STEPS + STEPS_A_NODE * self.within[label]) // (4 if self._is_table(label) else 1)
        return self.steps.setdefault(label, T.Budget(steps))

    def _is_spent(self, label: int) -> bool:
        return self.spend(label) <= 0 or self.budget(label).left <= 0

    def _is_table(self, label: int) -> bool:
        return label > 0 and is_table(self.sources[label - 1])

    def attempt(self, n: fx.Node, label: int) -> tuple[ExpertsMatch, Puller] | Rejection:
        """What weights are made of (codes, low-rank pairs) is looked for first; where that is of an unknown kind, they are weights."""
        self.in_order = rows_in_order(n) if label and self.sources[label - 1] in self.opaque else frozenset()
        out = again = self._attempt(n, label)
        kept = self.opened
        for fewer in self.fallbacks:
            if not isinstance(again, Rejection) or out.code == NO_EXPERTS and not self.packed:  # type: ignore[union-attr]
                break
            self.opened = fewer
            again = self._attempt(n, label)
        self.opened = kept
        return out if isinstance(again, Rejection) else again

    def _attempt(self, n: fx.Node, label: int) -> tuple[ExpertsMatch, Puller] | Rejection:
        allowed = min(self._elements(label), self.spend(label))
        p = Puller(lambda x: self.stops(x, label), self.walls, allowed)
        p.given, p.coded = self.given, bool(self.opened)
        try:
            with self.budget(label).within():
                out = self._match(n, p, label)
        except T.TooLarge as e:
            if self._is_table(label):
                allowed = self.left[label]
                return Rejection("the ids come from a table, and what is around them depends on each other in too many ways", n, FIND)
            return Rejection(str(e), n, "experts", code=BUDGET)
        finally:
            self.left[label] -= allowed - max(p.left, 0)
        if isinstance(out, Rejection):
            return Rejection(out.reason[:240], out.node, out.stage, code=out.code)
        return out, p

    def _match(self, n: fx.Node, p: Puller, label: int) -> ExpertsMatch | Rejection:
        dense = DenseReader(self.walls, self._elements(label), self.given, self.sources[label - 1] if label else None)
        out = read_fused(n, p) if is_fused(n) else with_identity(n, p, self.fused, dense) or match_experts(p, n, dense)
        if isinstance(out, Rejection):
            node, why = next(iter(p.unknown.items()), (None, ""))
            if node is not None and self.live.get(node) == label:
                told = not why.startswith(NO_RULE) and out.code == NO_EXPERTS  # else nothing was seen at all
                return Rejection(why if told else f"{out.reason} ({why})", node, "experts", code="" if told else out.code)
            return out
        if not harmless(self.memory, (x for x, _ in p.memo), out):
            writer = first_write(self.memory, (x for x, _ in p.memo))
            return Rejection("a tensor of the block is written through another view", writer or n, "experts", code="aliased")
        if is_fused(n) and not isinstance(out, Rejection):
            self.fused[n] = out
        return out

    def stops(self, n: fx.Node, label: int) -> bool:
        """Whether the experts' pass takes a node as a given tensor."""
        if n in self.opened and WORDS in n.meta:
            return True
        if n in self.in_order or is_joined(n) or is_table(n):
            return True
        if n in self.memory.stale and op_name(n) == "clone":  # no copy any more of what it was made of
            return True
        if self.live.get(n, self.static[n]) == label or n in self.opened:
            return False
        name = op_name(n)
        if name in names.CREATION or name == "getitem" and op_name(n.args[0]) in names.PART:  # type: ignore[arg-type]
            return False
        v = n.meta.get("val")
        if isinstance(v, torch.Tensor) and not v.dtype.is_floating_point:
            return False
        if name in names.VIEW | names.MOVE or name == "stack" or name in names.LOOKUP | {"index_select"} and _by_position(n):
            return False
        if is_own_number(n):
            return False
        if name in names.CAST:
            src = n.args[0]
            u = src.meta["val"] if isinstance(src, fx.Node) else None
            return not (isinstance(u, torch.Tensor) and isinstance(v, torch.Tensor) and (u.dtype, u.device) == (v.dtype, v.device))
        return True


def _is_tensor(n: Any) -> bool:
    return isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)


def _by_position(n: fx.Node) -> bool:
    """Whether rows are gathered by computed positions (such as arange // k), not by data."""
    seen = [x for x in n.all_input_nodes if x is not n.args[0]]
    for x in seen:
        if x.op != "call_function" or len(seen) > 20:
            return False
        if op_name(x) not in names.CREATION:
            seen.extend(y for y in x.all_input_nodes if isinstance(y.meta.get("val"), torch.Tensor))
    return True


def _read_back(source: fx.Node) -> bool:
    """Whether elements of a selection's indices become numbers of the host, by way of integers alone."""

    def is_whole(n: fx.Node) -> bool:
        v = n.meta.get("val")
        return isinstance(v, torch.Tensor) and not v.dtype.is_floating_point

    made = reached([source], lambda n: n.users if n is source or is_whole(n) else ())
    return any(op_name(n) in names.READ for n in made if n is not source)


def _is_mixed(n: fx.Node) -> bool:
    """Whether n is p · y + (1 - p) · x, where experts may be one of the products."""
    products = [x for x in n.args[:2] if isinstance(x, fx.Node) and op_name(x) == "mul"]
    shares = (op_name(f) for x in products for y in x.all_input_nodes if (f := names.through(y, names.VIEW | names.CAST)) is not None)
    return len(products) == 2 and any(name in ("sub", "rsub") for name in shares)
