"""Mixtures without a selection, so that there is nothing to dispatch: told.

Dense ones have every expert on every token: y[t,h] = Σ_e p(t,e) · down_e act(up_e x[t]). p is any function of a projection of the
tokens with a column for each expert: softmax, sigmoid, ReLU, or cut at a threshold.

In soft ones slots of the experts hold weighed means of all tokens, and tokens take weighed means of all slots: with d a softmax over
tokens and c one over slots of the same logits, y[t] = Σ_s c[t,s] · expert(s)(Σ_t' d[t',s] x[t']).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx

from ...ir import Rejection
from .. import terms as T
from ..aten import names
from ..aten.element import Puller, shape_of, size_of
from ..aten.names import op_name, through
from ..aten.node import example_value
from ..terms import Term
from ..terms.unify import unify
from .body import parse_core
from .copies import EXPERT
from .rows import No, factors, parted, row_index, row_variable, rows

DENSE = "every expert is applied to every token, weighed by the router (no top-k): nothing to dispatch, the products stay as written"
SOFT = "experts work on slots, each a weighed mean of all tokens (soft MoE), and no token selects any: there is nothing to dispatch"
THRESHOLD = "experts are chosen by a threshold on the router's scores (no top-k), so that one token has more of them than another"
ONE_BY_ONE = (
    "each token goes through every expert by itself, weighed by single numbers of the router's scores (no top-k): nothing is dispatched"
)
_NEAR = 24  # steps from the router's product to the weights, and operations an expert has
_ELEMENTS, _STEPS = 4_000, 100_000  # looked at for one possible result: a dense mixture is small
_STEPS_A_NODE = 100  # and for all of a graph: as many for each of its nodes, besides
_SOFTMAX = frozenset(("softmax", "_softmax"))
_PARTS = names.PART | {"getitem", "index"}


def routers(graph: fx.Graph) -> Iterator[fx.Node]:
    """Products [.., E] of either graph that may weigh E experts: there are as many stacked weights, or they are read column by column."""
    stacked = set()
    for n in graph.nodes:
        v = example_value(n)
        if not isinstance(v, torch.Tensor):
            continue
        if _is_stack(n):
            stacked.add(v.shape[0])
        elif op_name(n) in names.CONTRACTION and v.ndim >= 2 and isinstance(v.shape[-1], int) and v.shape[-1] > 1:
            if v.shape[-1] in stacked or _columns(n, v.shape[-1]):
                yield n


def _is_stack(n: fx.Node) -> bool:
    """Whether a node is given and may hold a matrix for each expert."""
    v = example_value(n)
    given = n.op in ("placeholder", "get_attr") and isinstance(v, torch.Tensor) and v.ndim == 3
    return given and v.dtype.is_floating_point and isinstance(v.shape[0], int)  # type: ignore[union-attr]


def _columns(n: fx.Node, count: int) -> bool:
    """Whether what is made of n, element by element, is read in `count` parts or is split into its columns."""
    seen, shape = [n], _sizes(n)
    for x in seen:
        parts = [u for u in x.users if op_name(u) in _PARTS]
        if len(parts) >= count or any(op_name(u) == "unbind" for u in parts):
            return True
        if any(_weighs_stack(v, count) for u in (*parts, *x.users) for v in (u, *u.users)):
            return True
        if len(seen) < _NEAR:
            seen.extend([u for u in x.users if u not in seen and _sizes(u) == shape][: _NEAR - len(seen)])
    return False


def _weighs_stack(n: fx.Node, count: int) -> bool:
    """Whether n multiplies what `count` tensors were stacked to: the outputs of as many experts."""
    if op_name(n) not in names.CONTRACTION | {"mul"}:
        return False
    stacks = (x for x in n.all_input_nodes if op_name(x) == "stack")
    return any(isinstance(x.args[0], (list, tuple)) and len(x.args[0]) == count for x in stacks)


def _sizes(n: fx.Node) -> tuple[Any, ...] | None:
    v = example_value(n)
    return tuple(size_of(s) for s in v.shape) if isinstance(v, torch.Tensor) else None


def mixtures(graph: fx.Graph, walls: set[fx.Node], selections: Collection[fx.Node]) -> Iterator[Rejection]:
    """The dense mixtures of a graph, each told where its results are added up. What a selection reads is no mixture's router."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    done: set[fx.Node] = set()
    opaque = {*walls, *selections}
    budget = T.Budget(_STEPS + _STEPS_A_NODE * len(order))
    for router in routers(graph):
        if budget.left <= 0:
            return
        if not opaque.isdisjoint(_near(router, _NEAR)):
            continue
        out = next((n for n in _results(router) if n not in done and _is_mixture(n, router, order, opaque, budget)), None)
        if out is not None:
            done.add(out)
            yield Rejection(THRESHOLD if op_name(out) in names.ACCUMULATE else DENSE, out, "lower", code="dense")


def _results(router: fx.Node) -> list[fx.Node]:
    """What may be the sum over the experts, the latest first."""
    count = shape_of(router)[-1]
    seen = _near(router, _NEAR * (count + 2))
    sums = names.CONTRACTION | names.REDUCTION | names.ACCUMULATE | {"add"}
    shaped = (n for n in seen if op_name(n) in sums and isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].ndim >= 2)
    return [n for n in shaped if n is not router and T.same_size(rows(n), rows(router))][: 4 * count][::-1]


def _near(router: fx.Node, most: int) -> list[fx.Node]:
    """The router and what is made of it, the nearest first."""
    return list(_closure(router, lambda n: n.users, most))


def _closure(start: fx.Node, nexts: Callable[[fx.Node], Iterable[fx.Node]], most: int) -> dict[fx.Node, None]:
    """A node and what is reached from it, the nearest first, `most` nodes at the most."""
    seen, waiting = {start: None}, deque([start])
    while waiting:
        for u in nexts(waiting.popleft()):
            if u not in seen and len(seen) < most:
                seen[u] = None
                waiting.append(u)
    return seen


def _is_mixture(out: fx.Node, router: fx.Node, order: dict[fx.Node, int], walls: set[fx.Node], budget: T.Budget) -> bool:
    edge = order[_tokens(router)]
    if budget.left <= 0 or not _of_one_block(out, router, order, edge, walls):
        return False
    t, h = row_variable(rows(out)), T.named("h", shape_of(out)[-1])
    p = Puller(lambda n: order[n] <= edge or n is router, walls, _ELEMENTS)
    try:
        with budget.within(), T.Budget(_STEPS).within():
            term = p.at(out, (*row_index(t, shape_of(out)[:-1]), h))
            body = _one_expert(term, shape_of(router)[-1])
            return body is not None and _weighs(body, router, t, h)
    except (T.TooLarge, No):
        return False


def _of_one_block(out: fx.Node, router: fx.Node, order: dict[fx.Node, int], edge: int, walls: set[fx.Node]) -> bool:
    """Whether what lies between the tokens and `out` can be a router and its experts: a walk over nodes, before elements are read."""
    count = shape_of(router)[-1]
    most = _NEAR * (count + 2)
    seen = _closure(out, lambda n: (x for x in n.all_input_nodes if order[x] > edge and x is not router), most + 1)
    if len(seen) > most or not walls.isdisjoint(seen):
        return False
    products, read = sum(op_name(n) in names.CONTRACTION for n in seen), {x for n in seen for x in n.all_input_nodes}
    return router in read and (products >= 2 * count or products > 1 and any(_is_stack(x) and shape_of(x)[0] == count for x in read))


def _tokens(router: fx.Node) -> fx.Node:
    """What the router's product reads, before any views."""
    n = router.args[1] if op_name(router) in ("addmm", "einsum") else router.args[0]
    n = through(n[0] if isinstance(n, (list, tuple)) else n, names.VIEW | names.CAST)
    return n if isinstance(n, fx.Node) else router


def _one_expert(term: Term, count: int) -> Term | None:
    """What is added for one expert: of Σ_e f(e), or of f(0) + ... + f(E - 1)."""
    expert = T.named(EXPERT, count)
    for f in factors(term):
        if f.op == "sum" and f.args[0].args[1] == count:
            rest = T.mul(*(g for g in factors(term) if g is not f))
            return T.mul(rest, T.subst(f.args[1], {f.args[0]: expert}))
    if term.op != "add" or len(term.args) != count:
        return None
    body = unify({e: T.canonical(a) for e, a in enumerate(sorted(term.args, key=_column))}, expert)
    return None if isinstance(body, str) else body


def _column(a: Term) -> int:
    """The column of the router that an addend is weighed by."""
    found = [x.args[1][-1].args[0] for x in T.walk(a) if x.op == "a" and x.args[1] and x.args[1][-1].op == "c"]
    return min((c for c in found if isinstance(c, int)), default=-1)


def _weighs(body: Term, router: fx.Node, t: Term, h: Term) -> bool:
    """body = p(t, e) · down_e act(up_e x[t])"""
    (expert,) = {v for v in body.atoms if v.args[0] == EXPERT} or (None,)
    core, weight = parted(body, h)
    if expert is None or any(x.op == "topk" for x in T.walk(body)):
        return False
    if not any(x.op == "a" and x.args[0] is router and T.uses(x, expert) for x in T.walk(weight)):
        return False
    return bool(parse_core(core, t, h, expert).linears)


# ---- token by token -------------------------------------------------------------------------------------------------------


def one_by_one(graph: fx.Graph) -> Iterator[Rejection]:
    """Where all scores of a token are read as single numbers, p[k][j], and weigh products: told of the first, and not proved."""
    for router in graph.nodes:
        sizes = _sizes(router) if op_name(router) in names.CONTRACTION else None
        if sizes is None or len(sizes) < 2 or not isinstance(sizes[-1], int) or sizes[-1] < 2:
            continue
        for numbers in _numbers(x for x in _near(router, _NEAR) if _sizes(x) == sizes):
            weighed = [_weighed_product(u, router) for u in numbers.values()] if len(numbers) == sizes[-1] else [None]
            if all(weighed):
                yield Rejection(ONE_BY_ONE, weighed[0], "find", code="dense")
                return


def _numbers(scores: Iterable[fx.Node]) -> Iterator[dict[Any, fx.Node]]:
    """The single numbers that are read of each row of some tensors, by their place in it."""
    rows_of: dict[Any, dict[Any, fx.Node]] = {}
    waiting: list[tuple[fx.Node, Any]] = [(x, x) for x in scores]
    for x, path in waiting:
        for u in (u for u in x.users if op_name(u) == "select"):
            if _sizes(u) == ():
                rows_of.setdefault(path, {}).setdefault(u.args[2], u)
            else:
                waiting.append((u, (path, *u.args[1:])))
    yield from rows_of.values()


def _weighed_product(number: fx.Node, router: fx.Node) -> fx.Node | None:
    """Where a single number multiplies what a product of other tensors made."""
    for n in _closure(number, lambda n: (u for u in n.users if op_name(u) not in names.CONTRACTION | {"add"}), 8):
        others = [x for x in n.all_input_nodes if op_name(n) == "mul" and _sizes(x) not in ((), None)]
        made_of = _closure(others[0], lambda n: n.all_input_nodes if n is not router else (), 8) if others else ()
        if any(op_name(x) in names.CONTRACTION and x is not router for x in made_of):
            return n
    return None


# ---- soft mixtures --------------------------------------------------------------------------------------------------------


def soft_mixtures(graph: fx.Graph) -> Iterator[Rejection]:
    return (Rejection(SOFT, found[-1], "lower", code="soft") for found in soft(graph))


def soft(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The softmaxes of each tensor of logits in either graph that is normalised over two of its dims, both of which go into products."""
    over: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
    for n in graph.nodes:
        if op_name(n) in _SOFTMAX and isinstance(n.args[0], fx.Node) and (dim := _dim(n)) is not None:
            over.setdefault(through(n.args[0], names.RESHAPE | names.CAST), []).append((n, dim))
    for found in over.values():
        if len({d for _, d in found}) > 1 and all(_multiplied(n) for n, _ in found):
            yield [n for n, _ in found]


def _dim(n: fx.Node) -> int | None:
    dim, v = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else None), example_value(n)
    return dim % max(v.ndim, 1) - v.ndim if isinstance(dim, int) and v is not None else None


def _multiplied(n: fx.Node) -> bool:
    """Whether a product reads what was normalised, through views."""
    seen = [n]
    for x in seen:
        if x is not n and op_name(x) in names.CONTRACTION or any(op_name(u) in names.CONTRACTION for u in x.users):
            return True
        seen += [u for u in x.users if op_name(u) in names.VIEW | names.CAST and u not in seen and len(seen) < 16]
    return False
