"""The shared expert: an MLP of the same tokens that is added to the routed result, found by dataflow."""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx as fx

from ..ir import Form, SharedExpert
from . import terms as T
from .expert_core import layout, parse_core
from .find import users_through_views
from .match import ExpertsMatch
from .pull import CONTRACTIONS, Puller, op_name, shape_of
from .rows import No, factors, is_row, row_index, row_variable, rows
from .terms import Term


def match_shared(m: ExpertsMatch, result: fx.Node, order: dict[fx.Node, int], walls: set[fx.Node]) -> tuple[SharedExpert, fx.Node] | None:
    """(the shared expert, the node that holds its output), or None when nothing of that form is added to the result.

    `result`: the node that the routed experts end in, after a scale on the output.
    """
    starts = [] if m.base is None else [m.base]
    for other in (x for n in (*starts, *_joined(result)) for x in _addends(n)):
        if shape_of(other)[-1:] == shape_of(m.out)[-1:]:
            found = _read(m, other, order, walls)
            if found is not None:
                return found, other
    return None


FAR = 4  # additions that are looked through: zeros, a scale, a residual


def _addends(n: fx.Node) -> list[fx.Node]:
    """What is added, and what that is a sum of."""
    out = [n]
    for n in out:
        while op_name(n) in ("clone", "view", "reshape", "contiguous"):
            n = n.args[0]  # type: ignore[assignment]
        if op_name(n) == "add" and len(out) < FAR:
            out.extend(x for x in n.args[:2] if isinstance(x, fx.Node))
    return out


def _joined(out: fx.Node) -> Iterator[fx.Node]:
    """What is added to the result, nearest first; further additions count as long as nobody else reads the sum so far."""
    for _ in range(FAR):
        users = [u for u in users_through_views(out) if op_name(u) == "add"]
        for u in users:
            yield from (x for x in u.args[:2] if isinstance(x, fx.Node) and not _comes_from(x, out))
        if len(users) != 1 or len(list(users_through_views(out))) != 1:
            return
        out = users[0]


def _comes_from(n: fx.Node, out: fx.Node) -> bool:
    while n is not out and n.op == "call_function" and n.all_input_nodes and op_name(n) not in ("add", *CONTRACTIONS):
        n = n.all_input_nodes[0]
    return n is out


def _read(m: ExpertsMatch, other: fx.Node, order: dict[fx.Node, int], walls: set[fx.Node]) -> SharedExpert | None:
    edge = order[m.tokens]
    p = Puller(lambda n: order[n] <= edge, walls)
    t, h = row_variable(rows(other)), T.named("h", shape_of(other)[-1])
    try:
        return _parse(m, p.at(other, (*row_index(t, shape_of(other)[:-1]), h)), t, h)
    except No:
        return None


def _parse(m: ExpertsMatch, term: Term, t: Term, h: Term) -> SharedExpert | None:
    """[sigmoid(Σ x w)] · down act(up x), read as one expert of a list of one."""
    one = T.named("expert", 1)
    params = {
        x: T.atom(x.args[0], (one, *x.args[1]))
        for x in T.walk(term)
        if x.op == "a" and not any(is_row(x, d) for d in range(len(x.args[1])))
    }
    term = T.subst(term, params)
    core = T.mul(*(f for f in factors(term) if T.uses(f, h)))
    gate = T.mul(*(f for f in factors(term) if not T.uses(f, h)))
    if gate.op != "c" and not (gate.op == "fn" and gate.args[0] == "sigmoid"):
        return None
    parsed = parse_core(core, t, h, one)
    if parsed.on_input is not None or {x.args[0] for x in parsed.tokens} != {m.tokens}:
        return None
    form, order, expr = layout(parsed)
    if not isinstance(parsed.inner, int) or form is Form.INTERLEAVED:
        return None
    return SharedExpert(parsed.inner, expr, gated=gate.op != "c", bias=parsed.linears[order[0]].bias is not None)
