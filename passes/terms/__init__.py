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

from .arithmetic import add, coefficient, eq, exact_sum, fn, is_truth, ite, lt, mul, not_, power, same_size, scaled
from .index import below, exact_div, extent, fdiv, mod, split_by, upper
from .rebuild import Q, at_key, canonical, inv, perm, rebuild, reduce_, same_choice, subst, sv
from .term import BINDERS, Term, TooLarge, allow, atom, children, const, is_c, mk, named, reset, show, uses, var, walk

__all__ = [
    "BINDERS", "Q", "Term", "TooLarge", "add", "allow", "at_key", "atom", "below", "canonical", "children", "coefficient", "const", "eq",
    "exact_div", "exact_sum", "extent", "fdiv", "fn", "inv", "is_c", "is_truth", "ite", "lt", "mk", "mod", "mul", "named", "not_", "perm",
    "power", "rebuild", "reduce_", "reset", "same_choice", "same_size", "scaled", "show", "split_by", "subst", "sv", "upper", "uses", "var",
    "walk",
]  # fmt: skip
