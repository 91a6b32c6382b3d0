#!/usr/bin/env python3
"""Random terms against their normal forms: `make fuzz N=1000000`, or `python tests/laws/fuzz.py N [SEED]`.

Prints the smallest part of the first term whose normal form has another value, with the rules that fired on it.
"""

from __future__ import annotations

import random
import sys

from random_terms import Source, difference

import moe_compile.passes.terms as T
from moe_compile.passes.terms.term import Term

EACH = 24  # evaluations of one term


def wrong(evaluations: int, seed: int = 0) -> str:
    """What is wrong with the normal form of some random term, or nothing; `evaluations` counts those that had a value."""
    counted = 0
    while counted < evaluations:
        source, t = term(seed)
        values, problem = difference(t, T.normal(t), source, EACH, seed)
        if problem:
            return f"seed {seed}: {_smallest(t, source, seed) or problem}"
        counted += values
        seed += 1
    return ""


def term(seed: int) -> tuple[Source, Term]:
    """A random term in two variables; terms of earlier seeds are forgotten."""
    T.reset()
    source = Source(seed, symbolic=seed % 3 == 0)
    return source, source.value([source.var(), source.var()], random.Random(seed).choice((2, 3, 3, 4)))


def _smallest(t: Term, source: Source, seed: int) -> str:
    """The problem of the first subterm (subterms come before what they are in) that is wrong by itself."""
    for x in T.walk(t):
        with T.tracing() as trace:
            made = T.rewrite(x, T.NORMAL, T.facts(), trace=trace)
        _, problem = difference(x, made, source, 10 * EACH, seed)
        if problem:
            return f"{problem}\nrules that fired:\n{trace}"
    return ""


def main() -> int:
    evaluations, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    print(f"{evaluations} evaluations from seed {seed}", flush=True)
    problem = wrong(evaluations, seed)
    print(problem or "every normal form has its term's values")
    return bool(problem)


if __name__ == "__main__":
    sys.exit(main())
