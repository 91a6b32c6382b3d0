"""Vocabulary of the experts' pass: rows of tokens, factors and atoms of a term, the failure that ends a reading."""

from __future__ import annotations

import enum
from typing import Any

import sympy as sp
import torch
import torch.fx as fx

from .. import terms as T
from ..aten.element import shape_of
from ..aten.sources import code_of
from ..terms import Term
from ..terms.text import said

WORDS = "moe_words"  # in a node's meta: the tensor of packed words that it is made of alone (`packed`)
NO_EXPERTS = "no experts"  # code of a failure at a place where nothing looks like experts
MIXED = (
    "the rows of an expert are mixed with each other (a mean, norm or maximum over rows): a token's result must not hang on other tokens"
)


class Cause(enum.Enum):
    """What a failure is about, where that decides which of several is told (`ways`)."""

    OTHER = "a predicate of one way to read experts"
    PAIR = "low-rank pairs"
    ROWS = "numbers of a whole row of an expert, as norms have"
    WEIGHTS = "weights that are made of others"
    TELLING = "what stands in the way, in any way to read it"


NO_CHAIN = "an expert's products are no chain, each of what the one before it made: a residual or a branch stands around one of them"


class No(Exception):
    """The first predicate that failed. `code`: as a rejection's."""

    def __init__(self, reason: str, code: str = "", cause: Cause = Cause.OTHER) -> None:
        super().__init__(reason)
        self.code, self.cause = code, cause


UNFIXED_WIDTH = "the width of the tokens is not a fixed number"


def fixed_widths(*nodes: fx.Node) -> bool:
    """Whether the last dims are numbers: a symbolic one can still meet a matrix where there is no token."""
    return all(isinstance(shape_of(n)[-1], int) for n in nodes)


def row_variable(tokens: Any) -> Term:
    """The token index; with a single token it is 0, as it is wherever a dim of size 1 is read."""
    if isinstance(tokens, sp.Expr):
        tokens = sp.expand(tokens)
    return T.const(0) if tokens == 1 else T.named("t", tokens)


def rows(n: fx.Node) -> Any:
    """Number of rows when all leading dims are flattened."""
    total: Any = 1
    for s in shape_of(n)[:-1]:
        total = total * s
    return total


def is_row(a: Term, d: int) -> bool:
    """Whether dim d of an atom is read at the token itself."""
    i, n = a.args[1][d], a.args[0]
    if data_dependent(i) or isinstance(n, fx.Node) and WORDS in n.meta:
        return False
    if any(v.args[0] == "t" for v in i.atoms):
        return True
    if not T.is_c(i, 0) or not isinstance(n, fx.Node) or shape_of(n)[d] != 1:
        return False
    # of what the graph is given a dim behind the experts' is their own; of what it computes it may be the one token's
    return n.op not in ("placeholder", "get_attr") or not any(data_dependent(before) for before in a.args[1][:d])


def row_index(t: Term, lead: tuple[Any, ...]) -> tuple[Term, ...]:
    """t as an index into the leading dims (row-major)."""
    rev: list[Term] = []
    flat = t
    for n, s in enumerate(reversed(lead)):
        last = n == len(lead) - 1
        rev.append(flat if last else T.mod(flat, s))
        flat = flat if last else T.fdiv(flat, s)
    return tuple(rev[::-1])


def ids_atom(x: Term) -> bool:
    """Whether an atom may be an expert id: whole numbers, but not bytes or what is unpacked of words, which are weights."""
    n = x.args[0]
    if not isinstance(n, fx.Node) or WORDS in n.meta or not hasattr(n.meta.get("val"), "dtype"):
        return False
    return not n.meta["val"].dtype.is_floating_point and n.meta["val"].dtype not in (torch.int8, torch.uint8)


def factors(t: Term) -> tuple[Term, ...]:
    return t.args if t.op == "mul" else (t,)


def parted(t: Term, v: Term) -> tuple[Term, Term]:
    """(what depends on v, what does not) of a product."""
    return T.mul(*(f for f in factors(t) if T.uses(f, v))), T.mul(*(f for f in factors(t) if not T.uses(f, v)))


def nodes_of(a: Term) -> tuple[Any, ...]:
    """What an atom reads: one tensor, or one for each expert."""
    return a.args[0] if isinstance(a.args[0], tuple) else (a.args[0],)


def outer_atoms(t: Term) -> list[Term]:
    """Atoms that are values (not those inside another atom's index), each once."""
    out: dict[Term, None] = {}
    seen: set[Term] = set()
    stack = [t]
    while stack:
        x = stack.pop()
        if x in seen:
            continue
        seen.add(x)
        if x.op == "a":
            out[x] = None
        elif x.op not in ("eq", "lt", "topk"):
            stack.extend(T.children(x))
    return list(out)


def data_dependent(i: Term) -> bool:
    """Whether an index term is read from data (an expert id), not computed from loop variables."""
    return any(x.op in ("topk", "sv") or (x.op == "a") for x in T.walk(i))


def mapped(ids: Term) -> bool:
    """Whether ids are neither a selection's own nor simply given."""
    return ids.op != "topk" and not (ids.op == "a" and not any(data_dependent(i) for i in ids.args[1]))


def plain_row(a: Term) -> bool:
    """Whether an atom has the token row itself as an index (scores and tokens do, weights do not)."""
    return any(is_row(a, d) for d in range(len(a.args[1])))


def reads(t: Term) -> str:
    """The tensors that a term reads, as the user calls them, for a rejection."""
    nodes = [n for x in T.walk(t) if x.op == "a" for n in nodes_of(x)[:1]]
    found = dict.fromkeys(called(n) for n in nodes)
    names = [n for n in found if n]
    return f" (it reads {', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""


def called(n: object) -> str:
    """A node as the user calls it: a parameter by its path, anything else by its code; "" where neither is known."""
    if not isinstance(n, fx.Node):
        return ""
    return said(n) if n.op in ("placeholder", "get_attr") else code_of(n)
