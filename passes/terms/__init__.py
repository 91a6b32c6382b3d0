"""Terms: what one element of a tensor is, as an index-level expression.

A tensor is a function from indices to scalars. Expert loops, sort-based dispatch, grouped and batched matmuls and dense
combines all say `out[t,h] = Σ_j w[t,j] · f(x[t], W[ids[t,j]])`; as terms they become that one expression.

Terms are interned: equal terms are one object, so equality is identity and shared subterms cost once.

    ("c", value)            constant: number or sympy size
    ("v", name, size)       index variable, 0 <= v < size
    ("a", node, idx)        element of a tensor that is not looked into
    ("add"|"mul", *terms)   sorted; numbers folded
    ("pow", base, exponent) exponent a number
    ("fn", name, args, consts)  pointwise function
    ("eq"|"lt", a, b), ("not", a), ("ite", c, a, b)   truth is 0 or 1
    ("sum"|"max"|"min"|"any"|"prod", var, body)       reductions
    ("fdiv"|"mod", a, n)    integer division, for flattened indices
    ("perm"|"inv", sort, key, p), ("sv", key, p)      sorted order: its permutation, the inverse, the sorted value
    ("rank", key, q, e)     how many of the positions up to q have the key e
    ("nz", mask, row, dim)  coordinate `dim` of the row-th true element of a mask
    ("topk", node, idx)     index chosen by a top-k (an expert id)
"""

from __future__ import annotations

from .arithmetic import coefficient
from .axioms import EXPERT_WEIGHTS
from .budget import Budget, TooLarge, limited, look, step
from .facts import Facts
from .logic import is_truth
from .numbers import exact_div, same_size
from .orders import Q
from .reductions import is_slot
from .rewrite import Rewriter, rewrite
from .rules import Rule, Rules
from .session import (
    NORMAL,
    add,
    at_key,
    canonical,
    eq,
    extent,
    facts,
    fdiv,
    fn,
    inv,
    ite,
    lt,
    mod,
    mul,
    never_negative,
    normal,
    not_,
    perm,
    power,
    rebuild,
    reduce_,
    reset,
    subst,
    sv,
    tracing,
    upper,
)
from .term import Term, atom, children, const, is_c, let, mk, named, show, uses, var, walk

__all__ = [
    "EXPERT_WEIGHTS", "NORMAL", "Budget", "Facts", "Q", "Rewriter", "Rule", "Rules", "Term", "TooLarge", "add",
    "at_key", "atom", "canonical", "children", "coefficient", "const", "eq", "exact_div", "extent", "facts", "fdiv",
    "fn", "inv", "is_c", "is_slot", "is_truth", "ite", "let", "limited", "look", "lt", "mk", "mod", "mul", "named", "never_negative",
    "normal", "not_", "perm", "power", "rebuild", "reduce_", "reset", "rewrite", "same_size", "show", "step",
    "subst", "sv", "tracing", "upper", "uses", "var", "walk",
]  # fmt: skip
