"""What becomes of a selection that no experts were found for: counts for a loss, or rows that are dropped where an expert is full.

A count says how many tokens chose an expert: no token's own choice can be read off it, so nothing is applied by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from ...ir import Rejection
from .. import terms as T
from ..aten import names
from ..aten.element import Opaque, Puller, call_args, shape_of, size_of
from ..aten.names import op_name
from ..aten.node import reached
from .rows import rows

# what turns ids into indicators [T, k, E] and weighs them, element by element
_INDICATES = names.RESHAPE | names.PERMUTE | names.REPEAT | names.SAME | names.CAST | names.LIKE
_INDICATES |= frozenset("one_hot eq ne mul add sub div scatter masked_fill where bitwise_and logical_and logical_not".split())
_ADDS_UP = names.REDUCTION | names.CONTRACTION | {"amax", "any", "max"}
_COUNTS = {"histc", "bincount", "scatter_add", "index_add", "index_put", "scatter_reduce"}
_MOST = 200
KTH = "selection found, no block: of the top-k only the values are used, as a threshold; experts are read from its indices"
CAPACITY = "tokens beyond an expert's capacity are dropped, by their place in its queue"
ROOM = "tokens take places in their expert's queue, whose capacity is enough for all: none is dropped, but rows are not read through places"
NO_LIMIT = "tokens take places in their expert's queue, by which rows lie in a buffer; none is dropped, but they are not read by places"
DEPTHS = "tokens are chosen here, not experts (mixture of depths): those that are not chosen pass by, and no token has experts of its own"
EXPERT_CHOICE = "experts choose tokens here (expert choice): a token has no fixed number of experts, and may have none"


def only_counted(choice: fx.Node, walls: set[fx.Node]) -> bool:
    """Whether nothing but counts is made of the indices that were chosen, as a loss that balances the load does."""
    scores, seen = next(iter(choice.args), None), list(indices(choice))
    if not isinstance(scores, fx.Node) or not seen or not shape_of(seen[0]):
        return False
    per_token = shape_of(scores)[-1] * shape_of(seen[0])[-1]
    if not isinstance(per_token, int):  # chosen among tokens
        return False
    for n in seen:
        for u in n.users:
            if u in seen or _is_count(u, n, choice, walls, per_token):
                continue
            if op_name(u) not in _INDICATES | _ADDS_UP or len(seen) > _MOST or not _small(u, rows(scores) * per_token):
                return False
            seen.append(u)
    return True


def kth_best(graph: fx.Graph) -> Iterator[Rejection]:
    """Where values that a top-k gives, and not its indices, are compared with scores: what is at least the k-th best one is kept."""
    for n in graph.nodes:
        if op_name(n) != "topk" or any(i.users for i in indices(n)):
            continue
        shown = reached([u for u in n.users if u.args[1] == 0], lambda x: (u for u in x.users if op_name(u) in names.VIEW), _MOST)
        kept = next((u for x in shown for u in x.users if op_name(u) in ("lt", "le", "gt", "ge")), None)
        if kept is not None:
            yield Rejection(KTH, kept, "find", code="no block")


def indices(choice: fx.Node) -> Iterator[fx.Node]:
    """The tensors of indices that a selection gives: itself, or one of its results."""
    if isinstance(choice.meta.get("val"), torch.Tensor):
        yield choice
    else:
        yield from (u for u in choice.users if op_name(u) == "getitem" and u.args[1] == 1)


def _small(n: fx.Node, most: Any) -> bool:
    """Whether a tensor has no more elements than one for each token, slot and expert. Of no tokens everything is small."""
    if not isinstance(n.meta.get("val"), torch.Tensor):
        return False
    size = sp.Mul(*shape_of(n))
    ratio = sp.cancel(size / most) if most != 0 else size
    return bool(ratio.is_number and ratio <= 1)


def _is_count(u: fx.Node, n: fx.Node, choice: fx.Node, walls: set[fx.Node], most: Any) -> bool:
    """Whether u adds up over the tokens: no element of it depends on one token's choice."""
    size = sp.Mul(*shape_of(u)) if isinstance(u.meta.get("val"), torch.Tensor) else None
    if size is None or not size.is_number or size > most:
        return False
    if op_name(u) in _COUNTS:
        return len(shape_of(u)) == 1 and (u.args[0] is not n or op_name(u) in ("histc", "bincount"))
    return op_name(u) in _ADDS_UP and not _of_one_token(u, choice, walls)


def _of_one_token(u: fx.Node, choice: fx.Node, walls: set[fx.Node]) -> bool:
    """Whether an element of u depends on what one token, named by where the element is, has chosen; also where that cannot be told."""
    at = [T.named(f"at{d}", s) for d, s in enumerate(shape_of(u))]
    try:
        with T.Budget(50_000).within():
            term = Puller(lambda x: x is choice.args[0], walls, 4_000).at(u, tuple(at))
    except (T.TooLarge, Opaque):
        return True
    chosen = [x for x in T.walk(term) if x.op == "topk" and x.args[0] is choice]
    return not chosen or any(T.uses(i, v) for x in chosen for i in x.args[1][:-1] for v in at)


def named(choice: fx.Node) -> Rejection | None:
    """Why a selection is left as written, where that has a name."""
    if (queue := dropped(choice)) is not None:
        return Rejection(ROOM if _has_room(queue) else CAPACITY, queue, "experts", code="capacity")
    if (queue := _queue(choice)) is not None:
        return Rejection(NO_LIMIT, queue, "experts", code="capacity")
    if (rows_at := chosen_by_experts(choice)) is not None:
        whole = shape_of(choice.args[0]) == shape_of(rows_at)[:-1]  # type: ignore[arg-type]  # one score a token
        return Rejection(DEPTHS if whole else EXPERT_CHOICE, rows_at, "experts", code="expert choice")
    return None


def dropped(choice: fx.Node) -> fx.Node | None:
    """Where a token's place in the queue of its expert is counted and compared with how many the expert takes; None where it is not."""
    made = _made_of(indices(choice))
    for n in made:
        if op_name(n) == "cumsum" and not over_scores(n, choice) and any(_compares(u) for x in _made_of([n]) for u in x.users):
            return n
        if op_name(n) == "slice" and op_name(n.args[0]) == "getitem" and op_name(n.args[0].args[0]) in ("where", "nonzero_numpy"):  # type: ignore[arg-type, union-attr]
            return n
    return None


def _queue(choice: fx.Node) -> fx.Node | None:
    """Where places in the queues of the experts are counted, [tokens, ..., experts], and never compared with how many there are."""
    queues = (n for n in _made_of(indices(choice)) if op_name(n) == "cumsum" and len(shape_of(n)) > 1 and _is_place(n))
    return next((n for n in queues if call_args(n).dim not in (-1, len(shape_of(n)) - 1)), None)


def over_scores(n: fx.Node, choice: fx.Node) -> bool:
    """Whether a sum runs over a token's own scores (top-p), not over the tokens that wait for an expert."""
    summed, scores = n.args[0], choice.args[0] if choice.args else None
    if not isinstance(summed, fx.Node) or not isinstance(scores, fx.Node):
        return False
    a, b = summed.meta["val"], scores.meta.get("val")
    return isinstance(b, torch.Tensor) and a.is_floating_point() and a.shape == b.shape and call_args(n).dim in (-1, a.ndim - 1)


def _made_of(sources: Iterable[fx.Node]) -> list[fx.Node]:
    """The sources and what is made of them before any product."""
    seen = list(sources)
    for n in seen:
        seen.extend(u for u in n.users if u not in seen and len(seen) <= _MOST and op_name(u) not in names.CONTRACTION)
    return seen


def _compares(n: fx.Node) -> bool:
    """Whether a node compares with a number; a place compared with other places, such as where groups end, is a search."""
    return op_name(n) == "one_hot" or op_name(n) in ("lt", "le", "gt", "ge") and not isinstance(n.args[1], fx.Node)


def _has_room(queue: fx.Node) -> bool:
    """Whether there are as many places as are counted, or more, so that none is beyond them; False where places start behind others."""
    if op_name(queue) != "cumsum":
        return False
    places, limits = [queue], []
    for n in places:
        limits += [_places(u) for u in n.users if _compares(u)]
        places += [u for u in n.users if not _compares(u) and u not in places and _is_place(u)]
    if any(op_name(n) in ("add", "sub") and isinstance(n.args[1], fx.Node) for n in places):
        return False
    most = shape_of(queue)[call_args(queue).dim]  # each of these chooses an expert once
    return bool(limits) and all(isinstance(n, (int, sp.Expr)) and bool(sp.expand(n - most).is_nonnegative) for n in limits)


def _is_place(n: fx.Node) -> bool:
    v = n.meta.get("val")
    return isinstance(v, torch.Tensor) and v.dtype in (torch.int64, torch.int32)


def _places(u: fx.Node) -> Any:
    """How many places a comparison leaves: [place < n], or as many as one_hot has columns."""
    return shape_of(u)[-1] if op_name(u) == "one_hot" else size_of(u.args[1]) + (op_name(u) in ("le", "gt"))  # type: ignore[operator]


def chosen_by_experts(choice: fx.Node) -> fx.Node | None:
    """Where rows are added at the very indices that were chosen: experts choose tokens (expert choice). None where they are not."""
    seen = list(indices(choice))
    for n in seen:
        for u in n.users:
            if (
                op_name(u) in names.ACCUMULATE
                and n is not u.args[0]
                and isinstance(u.meta.get("val"), torch.Tensor)
                and len(shape_of(u)) > 1
            ):
                return u
            if op_name(u) in names.RESHAPE | names.REPEAT | names.SAME | names.PART | names.PERMUTE | {"getitem", "sort"} and u not in seen:
                seen.append(u)
    return None
