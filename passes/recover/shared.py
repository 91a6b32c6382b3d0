"""The shared expert: an MLP of the same tokens that is added to the routed result, found by dataflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from ...ir import Experts, Form, Rows, SharedExpert
from ...ir.operands import CODED, Operands
from .. import terms as T
from ..aten import names
from ..aten.element import Puller, shape_of
from ..aten.names import op_name, through
from ..aten.node import reached
from ..terms import Term
from . import scales as channels
from . import static_rows
from .body import Core, parse_core
from .coded import check, stored
from .experts import compute_dtype, parameters
from .forms import layout
from .linear import Linear
from .match import ExpertsMatch, Param
from .rounding import Rounding, unrounded
from .rows import WORDS, No, factors, fixed_widths, is_row, parted, row_index, row_variable, rows
from .selections import users_through_views


@dataclass(frozen=True)
class SharedOperands:
    """What a fused op needs of a shared expert: it as the one expert of a list, its parameters, the node of its gate [.., 1] or None."""

    experts: Experts
    operands: Operands[Param]
    gate: fx.Node | None

    def params(self) -> list[fx.Node]:
        return [q.node for q in self.operands]


@dataclass(frozen=True)
class SharedMatch:
    """A shared expert and the node that holds its output. `operands` None: recovered, but not in a form that the ops take, and `why`."""

    ir: SharedExpert
    node: fx.Node
    operands: SharedOperands | None
    why: str = ""


def match_shared(m: ExpertsMatch, result: fx.Node, order: dict[fx.Node, int], walls: set[fx.Node]) -> SharedMatch | None:
    """The shared expert, or None when nothing of that form is added to the result.

    `result`: the node that the routed experts end in, after a scale on the output.
    """
    starts = [] if m.base is None else [m.base]
    for other in (x for n in (*starts, *_joined(result)) for x in _addends(n)):
        if shape_of(other)[-1:] == shape_of(m.out)[-1:] and _stands_beside(other, m, order):
            found = _read(m, other, order, walls)
            if found is not None:
                return found
    return None


STEPS = 200_000  # what may be spent on one addend, in steps of a few microseconds
FAR = 4  # additions that are looked through: zeros, a scale, a residual
LARGE = 256  # nodes between the tokens and a shared expert's result: an MLP has about ten


def _addends(n: fx.Node) -> list[fx.Node]:
    """What is added, and what that is a sum of."""
    out = [n]
    for n in out:
        n = through(n, names.RESHAPE | names.SAME)
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
    while n is not out and n.op == "call_function" and n.all_input_nodes and op_name(n) not in names.CONTRACTION | {"add"}:
        n = n.all_input_nodes[0]
    return n is out


def _stands_beside(other: fx.Node, m: ExpertsMatch, order: dict[fx.Node, int]) -> bool:
    """Whether `other` is computed from the tokens by few operations and without the routed result: a later layer is not."""
    made = reached([other], lambda n: (x for x in n.all_input_nodes if order[x] > order[m.tokens]))
    return all(n is not m.out and i < LARGE for i, n in enumerate(made))


def _read(m: ExpertsMatch, other: fx.Node, order: dict[fx.Node, int], walls: set[fx.Node]) -> SharedMatch | None:
    edge = order[m.tokens]
    p = Puller(lambda n: order[n] <= edge or WORDS in n.meta, walls)
    t, h = row_variable(rows(other)), T.named("h", shape_of(other)[-1])
    try:
        with T.Budget(STEPS).within():
            term = p.at(other, (*row_index(t, shape_of(other)[:-1]), h))
        parsed = _parse(m, term, t, h)
        if parsed is None:
            return None
        core, gate, rounding = parsed
        form, symbols, expr = layout(core)
        if not isinstance(core.inner, int) or form is Form.INTERLEAVED or not fixed_widths(m.tokens, other):
            return None
        ups = [core.linears[s] for s in symbols]
        ways = (stored(ups), stored([core.down]), rounding.up, rounding.down)
        check(ups, core.down, form)
    except (No, T.TooLarge):
        return None
    ir = SharedExpert(core.inner, expr, gate.op != "c", ups[0].bias is not None, *ways)
    try:
        dtype = compute_dtype(p, m.tokens, other) if ir.coded else m.experts.dtype
        one = _experts(m, ir, other, core, form, ups, dtype)
        return SharedMatch(ir, other, _operands(one, ups, core.down, rounding, _gate_node(p, other, term, t, h, edge, order)))
    except No as e:
        return SharedMatch(ir, other, None, str(e))


def _parse(m: ExpertsMatch, term: Term, t: Term, h: Term) -> tuple[Core, Term, Rounding] | None:
    """[sigmoid(Σ x w)] · down act(up x), read as one expert of a list of one, what multiplies it, and how its rows are rounded."""
    one = T.named("expert", 1)
    weights = {x: T.atom((x.args[0],), (one, *x.args[1])) for x in T.walk(term) if x.op == "a" and _is_parameter(x, m.tokens)}
    term = T.subst(term, weights)
    core, rest = parted(term, h)
    tables, gate = channels.tables(core, rest, one)
    if gate.op != "c" and not (gate.op == "fn" and gate.args[0] == "sigmoid"):
        return None
    rounding = unrounded(core, h, one)
    parsed = parse_core(rounding.body, t, h, one, tables=tables)
    if parsed.table is not None:
        if parsed.down.channel is not None:
            return None
        parsed.down.channel = channels.channel(parsed.table, h, one, 1, 0)
    if (rounding.up or rounding.down) and stored([parsed.down]) is None:
        return None  # rows in few bits beside weights that are floats
    if parsed.on_input is not None or not all(_is_own_row(x, m.tokens, t) for x in parsed.tokens):
        return None
    parsed.linears = {s: _of_list(x) for s, x in parsed.linears.items()}
    parsed.down = _of_list(parsed.down)
    return parsed, gate, rounding


def _is_parameter(x: Term, tokens: fx.Node) -> bool:
    """Whether an atom reads no row of the tokens' own; of what the graph is given, the tokens apart, a dim of 1 is none."""
    given = x.args[0] is not tokens and channels.is_held(x) and not any(v.args[0] == "t" for i in x.args[1] for v in i.atoms)
    return given or not any(is_row(x, d) for d in range(len(x.args[1])))


def _is_own_row(x: Term, tokens: fx.Node, t: Term) -> bool:
    """Whether what a projection reads is tokens[t, m], and not another row of them (x.flip(0), x[order])."""
    if x.args[0] is not tokens:
        return False
    own = T.atom(tokens, (*row_index(t, shape_of(tokens)[:-1]), x.args[1][-1]))
    return T.canonical(own) is T.canonical(x)


def _gate_node(p: Puller, other: fx.Node, term: Term, t: Term, h: Term, edge: int, order: dict[fx.Node, int]) -> fx.Node | None:
    """The node of what multiplies the MLP, nearest to the product; None when that is 1. Raises No when no node holds it."""
    gate = T.mul(*(f for f in factors(term) if not T.uses(f, h) and (f.op == "fn" or f.op == "c")))
    if T.is_c(gate, 1):
        return None
    wanted, seen = T.canonical(gate), [other]
    for n in seen:
        seen.extend(x for x in n.all_input_nodes if order[x] > edge and x not in seen)
        if shape_of(n)[-1:] == (1,) and T.same_size(rows(n), rows(other)):
            if T.canonical(p.at(n, (*row_index(t, shape_of(n)[:-1]), T.const(0)))) is wanted:
                return n
    raise No("no tensor of the graph holds the shared expert's gate")


def _experts(m: ExpertsMatch, ir: SharedExpert, other: fx.Node, core: Core, form: Form, ups: list[Linear], dtype: torch.dtype) -> Experts:
    """It as the one expert of a list, with products in `dtype`."""
    return Experts(
        num_experts=1,
        hidden=shape_of(m.tokens)[-1],
        intermediate=ir.intermediate,
        out_features=shape_of(other)[-1],
        form=form,
        activation=ir.activation,
        stacked=False,
        up_transposed=ups[0].transposed,
        down_transposed=core.down.transposed,
        up_bias=ups[0].bias is not None,
        down_bias=core.down.bias is not None,
        dtype=dtype,
        up_stored=ir.up_stored,
        down_stored=ir.down_stored,
        up_rows=ir.up_rows,
        down_rows=ir.down_rows,
    )


def _operands(e: Experts, ups: list[Linear], down: Linear, rounding: Rounding, gate: fx.Node | None) -> SharedOperands:
    """Raises No when gate and up are stored unlike each other or a parameter is read in part."""
    if len({(x.transposed, x.bias is None) for x in ups}) != 1 or any(x.scale != 1 for x in ups):
        raise No("gate and up projections are stored differently")
    if any(x.pair is not None for x in (*ups, down)):
        raise No("it has low-rank pairs (LoRA)")
    store = ups if e.form is Form.SEPARATE else ups[:1]
    operands = parameters(e, store, down)
    if e.coded:
        e, operands = replace(e, stacked=True), replace(operands, **{n: tuple(map(_as_stack, getattr(operands, n))) for n in _STACKED})
    steps = {f"{n}_smooth": _steps(getattr(e, f"{n}_rows"), getattr(rounding, f"{n}_smooth")) for n in ("up", "down")}
    return SharedOperands(e, replace(operands, **steps), gate)


_STACKED = [name for name in CODED if name.rpartition("_")[2] not in ("table", "group", "smooth")]


def _as_stack(q: Param) -> Param:
    """[1, ..] of one matrix: kernels on codes take stacks best."""
    return Param(q.node, (1, *q.stored()))


def _of_list(x: Linear) -> Linear:
    """Codes of one matrix are a list of one, as everything is that is read of it."""
    return x if isinstance(x.weight, tuple) else replace(x, weight=(x.weight,))


def _steps(rows: Rows | None, k: Term | None) -> tuple[Param, ...]:
    """The number that static rows are divided by, where it is a parameter."""
    if rows is None or k is None:
        return ()
    return tuple(static_rows.operands(k, False, 1))
