"""One function of (token, slot, expert) from the parts: E unrolled copies made one, or the one that looks its weights up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from .. import terms as T
from ..aten.element import shape_of
from ..terms import Term
from ..terms.unify import unify
from .addends import Part, has_feature
from .identity import supposed
from .rows import MIXED, NO_EXPERTS, No, data_dependent, factors, ids_atom, nodes_of, outer_atoms, plain_row
from .scales import is_coded

EXPERT = "expert"
_JOINED = "an expert's id is put together from several selections (two levels, product keys): no one top-k chooses"


class OneBody(NamedTuple):
    """A body in the variable `expert`, the ids term, parts of experts that are another function, the id of the first expert."""

    body: Term
    ids: Term
    identity: dict[int, Term]
    first: int = 0


def one_body(parts: list[Part]) -> OneBody:
    """Raises No where the parts are no function of one expert each."""
    named = [q for q in parts if q.expert is not None]
    if named and len(named) != len(parts):
        raise No("some experts are named by number and some are looked up")
    if not named:
        if len(parts) > 1:
            raise No("more than one term looks experts up", NO_EXPERTS)
        return _looked_up(parts[0])
    ids = {q.ids for q in named}
    if len(ids) > 1:
        raise No("the experts are chosen by different ids")
    by_expert: dict[int, list[Term]] = {}
    for q in named:
        assert q.expert is not None
        by_expert.setdefault(q.expert, []).append(q.body)
    copies = {e: T.canonical(T.add(*bs)) if len(bs) == 1 else _twice(e) for e, bs in by_expert.items()}
    identity = {e: c for e, c in copies.items() if _is_identity(c)}
    real = {e: c for e, c in copies.items() if e not in identity}
    if not real:
        raise No("no expert is applied", NO_EXPERTS)
    first = min(real)
    if sorted(real) != list(range(first, first + len(real))) or first and len(real) == 1:
        raise No(_left_out(real))
    expert = T.named(EXPERT, len(real))
    body = unify({e - first: c for e, c in real.items()}, expert)
    if isinstance(body, str):
        if any(map(_mixes_rows, real.values())):
            raise No(MIXED, "inside")
        raise No(_other_sizes(real) or body, "unlike")
    if first and any(_passes_over(x, expert) for x in T.walk(body)):
        raise No(_left_out(real))
    (the_ids,) = ids
    assert the_ids is not None
    return OneBody(body, the_ids, {e - first: c for e, c in identity.items()}, first)


def _passes_over(x: Term, expert: Term) -> bool:
    """Whether a stack is read from a later expert than its first: it has weights for the ids before it."""
    return x.op == "a" and any(T.uses(i, expert) and not T.is_c(T.subst(i, {v: T.const(0) for v in i.atoms}), 0) for i in x.args[1])


def _twice(e: int) -> Term:
    raise No(f"expert {e} is applied twice")


def _mixes_rows(body: Term) -> bool:
    """Whether an expert's function adds up over the tokens that chose it: Σ_r [ids(r, j) = e] x[r, m]; or takes the largest of its rows."""
    if any(x.op == "max" and x.args[0].op == "v" and free_unbacked_symbols(x.args[0].args[1]) for x in T.walk(body)):
        return True
    tokens = {v.args[1] for v in body.atoms if v.args[0] == "t"}
    sums = [x.args for x in T.walk(body) if x.op == "sum" and x.args[0].args[1] in tokens]
    return any(_chosen_by(v, inner) and any(T.uses(a, v) and not ids_atom(a) for a in outer_atoms(inner)) for v, inner in sums)


def _chosen_by(v: Term, inner: Term) -> bool:
    """Whether a condition on the ids of a token picks some of those that v counts."""
    conditions = (x for x in T.walk(inner) if x.op == "eq" and T.uses(x, v))
    return any(y.op == "topk" or y.op == "a" and ids_atom(y) for x in conditions for y in T.walk(x))


def _other_sizes(real: Mapping[int, Term]) -> str:
    """Whether the weights of some expert have other sizes than those of the first."""
    sizes = {e: sorted({tuple(map(str, shape_of(n))) for n in _matrices(body)}) for e, body in real.items()}
    first = sizes[min(sizes)]
    other = next((e for e, s in sizes.items() if s != first), None)
    if other is None or len(sizes[other]) != len(first):
        return ""
    return f"the weights of expert {other} have other sizes than those of expert {min(sizes)}: all experts must be equally wide"


def _matrices(body: Term) -> Iterator[fx.Node]:
    """The parameters that a term reads by numbers alone: two dims, an expert's own."""
    for x in T.walk(body):
        n = x.args[0] if x.op == "a" and not any(map(data_dependent, x.args[1])) else None
        if isinstance(n, fx.Node) and n.op in ("placeholder", "get_attr") and len(shape_of(n)) == 2:
            yield n


def _left_out(real: Mapping[int, Term]) -> str:
    missing = [e for e in range(max(real)) if e not in real]
    which = f"experts {', '.join(map(str, missing[:6]))}{', ...' if missing[6:] else ''} are" if missing[1:] else f"expert {missing[0]} is"
    return f"{which} never applied, though a token may choose so: the experts must be 0..{max(real)}, each once"


def _is_identity(c: Term) -> bool:
    return not any(x.op == "sum" and any(v.args[0] == "h" for v in x.atoms) for x in T.walk(c))


def _looked_up(part: Part) -> OneBody:
    """Weights are indexed by the ids themselves: name that index `expert`."""
    found: dict[Term, None] = {}
    sizes = []
    joined = False
    core = T.mul(*(f for f in factors(part.body) if has_feature(f)))
    for a in outer_atoms(core):
        if plain_row(a) or len(a.args[1]) < 2 or not any(data_dependent(i) for i in a.args[1]):
            continue
        for d, i in enumerate(a.args[1]):
            if d and data_dependent(a.args[1][0]):
                break  # behind the ids: the groups of inputs
            pieces = [piece for piece in (i.args if i.op == "add" else (i,)) if data_dependent(piece)]
            joined |= len({x.args[0] for piece in pieces for x in T.walk(piece) if x.op == "topk"}) > 1
            for piece in pieces:
                found[T.coefficient(piece)[1]] = None
                stride = T.coefficient(piece)[0]
                n = _dim(a, d)
                sizes.append(T.exact_div(n, stride))
    if len(found) != 1:
        if found:
            raise No(_JOINED if joined else "expert weights are indexed by different ids")
        raise No("no expert weight is indexed by the ids", NO_EXPERTS)
    if len(set(sizes)) != 1 or not isinstance(sizes[0], int):
        raise No("expert weights disagree on the number of experts")
    (ids,) = found
    expert = T.named(EXPERT, sizes[0])
    mapping = {}
    body = _without_range(part.body, core)
    atoms = outer_atoms(body)
    whole = any(len(a.args[1]) > 2 and not plain_row(a) and is_coded(a) for a in atoms)  # then one number an expert may be a scale
    for a in atoms:
        if not plain_row(a) and len(a.args[1]) > (not whole) and any(data_dependent(i) for i in a.args[1]):
            mapping[a] = T.atom(a.args[0], tuple(T.subst(i, {ids: expert}) for i in a.args[1]))
    return OneBody(T.canonical(supposed(T.subst(body, mapping), ids, range(sizes[0]))), ids, {})


def _without_range(body: Term, core: Term) -> Term:
    """body without [0 <= ids < E]: beyond the experts their weights are taken for 0. The axiom of `Facts.zero_beyond` is used here only.

    The condition comes from Σ_e [ids = e] f(e) = [0 <= ids < E] f(ids). In the fused op ids that are no experts contribute nothing.
    """
    if not any(f.op in ("lt", "not") for f in factors(body)):
        return body
    for a in outer_atoms(core):
        if not plain_row(a) and len(a.args[1]) > 1 and any(data_dependent(i) for i in a.args[1]):
            first, *more = nodes_of(a)
            T.facts().zero_beyond[a.args[0]] = (1 + len(more), *shape_of(first)) if isinstance(a.args[0], tuple) else shape_of(first)
    return T.rewrite(body, T.EXPERT_WEIGHTS, T.facts())


def _dim(a: Term, d: int) -> Any:
    """The size of dim d of what an atom reads; of tensors that are one behind another, the first is their number."""
    if isinstance(a.args[0], tuple):
        return shape_of(a.args[0][0])[d - 1] if d else len(a.args[0])
    return shape_of(a.args[0])[d]
